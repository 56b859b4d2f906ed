"""The parts of a PTX text: what the parser makes, and all that the other files know of the text.

Names are unique in their function: the parser has resolved the braces that names are local to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BITS = {"pred": 1}
for _width in (8, 16, 32, 64):
    BITS |= {f"{kind}{_width}": _width for kind in "bsu"}
BITS |= {"b128": 128, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
BITS |= {"f16x2": 32, "bf16x2": 32}
"""Type -> bits of its registers."""


@dataclass(frozen=True)
class Place:
    """Where an instruction stands: its line in the PTX, and in the source, by the last `.loc`."""

    line: int
    source: str = ""

    def __str__(self) -> str:
        return f"line {self.line}" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Register:
    """A register; `negated` is the `!` of a predicate."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A special register, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number: its bits, in as many as its literal says, or 64 of two's complement."""

    value: int
    width: int = 64
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label, or a function."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}; of destinations, None is the `_` that throws a value away."""

    parts: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Pair:
    """d|p."""

    first: Operand | None
    second: Operand | None


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Statement:
    """One instruction, as it is written."""

    opcode: str
    operands: tuple[Operand | None, ...]
    guard: Register | None
    place: Place
    text: str


@dataclass(frozen=True)
class Label:
    """A place to jump to."""

    name: str


@dataclass(frozen=True)
class Variable:
    """Memory with a name, in one of the spaces; `count` None is `extern .shared x[]`."""

    name: str
    space: str
    type: str
    align: int
    count: int | None
    initial: bytes | None = None

    @property
    def size(self) -> int:
        """The bytes that it takes."""
        return (self.count or 0) * (BITS[self.type] // 8)


@dataclass
class Function:
    """A kernel (`.entry`) or a function (`.func`)."""

    name: str
    is_kernel: bool
    params: list[Variable]
    results: list[Variable]
    place: Place
    body: list[Statement | Label] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    is_defined: bool = False


@dataclass
class Source:
    """A whole text."""

    target: str
    variables: dict[str, Variable]
    functions: dict[str, Function]
