"""Mutants of PTX: the same text with one instruction changed, which a good test has to notice.

What is changed is what people get wrong: an operation for its opposite, a comparison that takes the
bound in or leaves it out, a number that is one off, operands in the wrong order, a condition
negated, signs and roundings, a store or a barrier that is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from qframe_plugins.ptx_host.errors import PtxError, PtxUnsupportedError
from qframe_plugins.ptx_host.forms import match
from qframe_plugins.ptx_host.launch import Module
from qframe_plugins.ptx_host.syntax import (
    BITS,
    Address,
    Function,
    Immediate,
    Operand,
    Register,
    Source,
    Statement,
)

OPPOSITES: Final = {
    "add": ("sub",),
    "sub": ("add",),
    "min": ("max",),
    "max": ("min",),
    "and": ("or",),
    "or": ("and",),
    "xor": ("or",),
    "shl": ("shr",),
    "shr": ("shl",),
    "div": ("rem",),
    "rem": ("div",),
}
COMPARISONS: Final = {
    "lt": "le",
    "le": "lt",
    "gt": "ge",
    "ge": "gt",
    "eq": "ne",
    "ne": "eq",
    "lo": "ls",
    "ls": "lo",
    "hi": "hs",
    "hs": "hi",
    "neu": "equ",
    "ltu": "leu",
    "gtu": "geu",
    "leu": "ltu",
    "geu": "gtu",
}
ORDERED: Final = ("sub", "div", "rem", "shl", "shr", "selp", "setp", "fma", "mad", "prmt")
"""Operations of which two operands must not change places; the last of `fma` counts as one."""

DROPPED: Final = ("bar", "barrier", "st", "red", "membar", "fence", "cp")
ROUNDED: Final = {"rn": "rz", "rni": "rzi", "rz": "rn", "rzi": "rni"}
SIGNED: Final = {f"{a}{bits}": f"{b}{bits}" for a, b in ("su", "us") for bits in (8, 16, 32, 64)}
SIGNS_MATTER: Final = ("ld", "cvt", "shr", "dp4a", "min", "max", "div", "rem")
"""Not those with which places are computed and compared: none is beyond 2^31."""


@dataclass(frozen=True)
class Mutant:
    """One changed instruction.

    line     of the PTX
    text     the instruction as it was
    change   what has been done, in words
    source   the whole text with the change
    """

    line: int
    text: str
    change: str
    source: Source

    def module(self) -> Module:
        """Return the text, to be launched."""
        return Module(self.source)

    def __str__(self) -> str:
        return f"line {self.line}: {self.text!r}: {self.change}"


def mutants(source: Source, kernel: str) -> Iterator[Mutant]:
    """Yield every mutant of a kernel whose instructions are ones that the device knows.

    source   `Module.source`
    """
    function = source.functions[kernel]
    for at, piece in enumerate(function.body):
        if not isinstance(piece, Statement):
            continue
        seen = {_key(piece)}
        for change, made in _changed(piece):
            if made is not None and (
                _key(made) in seen
                or not _known(made, function)
                or _same_bits(piece, made, function)
            ):
                continue
            seen.add(_key(made) if made is not None else ())
            middle = [] if made is None else [made]
            body = [*function.body[:at], *middle, *function.body[at + 1 :]]
            functions = {**source.functions, kernel: replace(function, body=body)}
            yield Mutant(piece.place.line, piece.text, change, replace(source, functions=functions))


def _key(statement: Statement) -> tuple[object, ...]:
    return statement.opcode, statement.operands, statement.guard


def _known(statement: Statement, function: Function) -> bool:
    try:
        match(statement, function.registers)
    except (PtxError, PtxUnsupportedError):
        return False
    return True


def _same_bits(piece: Statement, made: Statement, function: Function) -> bool:
    """Return whether a sign was changed where it changes no bit, which would be no mutant.

    A number that is cut or copied has none.
    """
    name, *old = piece.opcode.split(".")
    _, *new = made.opcode.split(".")
    changed = [number for number, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if [SIGNED.get(old[number]) for number in changed] != [new[number] for number in changed]:
        return False
    if not changed:
        return False
    if name == "ld":
        target = piece.operands[0]
        kind = function.registers.get(target.name, "") if isinstance(target, Register) else ""
        return BITS.get(kind, 0) <= BITS[old[changed[0]]]
    if name == "cvt":
        to, origin = old[-2:]
        if "f" in to + origin:
            return False
        return "sat" not in old and (BITS[to] <= BITS[origin] or changed == [len(old) - 2])
    return False


def _changed(piece: Statement) -> Iterator[tuple[str, Statement | None]]:
    """Yield (what is done, the statement afterwards); None for one that is left out."""
    name, *parts = piece.opcode.split(".")
    if name in ("ret", "exit", "call") or piece.opcode.startswith("ld.param"):
        return
    if name in DROPPED:
        yield "left out", None
    if piece.guard is not None:
        negated = replace(piece.guard, negated=not piece.guard.negated)
        yield "condition negated", replace(piece, guard=negated)
    for other in OPPOSITES.get(name, ()):
        kinds = [f"u{part[1:]}" if part[:1] == "b" and other == "shr" else part for part in parts]
        kinds = [f"b{part[1:]}" if part[:1] in "us" and other == "shl" else part for part in kinds]
        yield f"{name} -> {other}", replace(piece, opcode=".".join([other, *kinds]))
    for place, part in enumerate(parts):
        others = [COMPARISONS.get(part) if name in ("setp", "set") else None, ROUNDED.get(part)]
        others.append(SIGNED.get(part) if name in SIGNS_MATTER else None)
        for other in filter(None, others):
            changed = [*parts[:place], other, *parts[place + 1 :]]
            yield f"{part} -> {other}", replace(piece, opcode=".".join([name, *changed]))
    yield from _operands(piece, name, parts)


def _operands(
    piece: Statement, name: str, parts: list[str]
) -> Iterator[tuple[str, Statement | None]]:
    if name in ORDERED and len(piece.operands) >= 3:
        first, second = (1, 3) if name in ("fma", "mad") else (1, 2)
        if second < len(piece.operands):
            swapped = list(piece.operands)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            yield f"operands {first} and {second} swapped", replace(piece, operands=tuple(swapped))
    if name in ("bar", "barrier"):
        return  # another number is another barrier, and as good
    for place, operand in enumerate(piece.operands):
        for change, other in _off(operand, parts):
            changed = (*piece.operands[:place], other, *piece.operands[place + 1 :])
            yield change, replace(piece, operands=changed)


def _off(operand: Operand | None, parts: list[str]) -> Iterator[tuple[str, Operand]]:
    """Yield operands that are one off: a number, or the next cell of memory."""
    match operand:
        case Immediate(value, width, is_float=False):
            for step in (1, -1):
                yield f"{value} -> {value + step}", Immediate((value + step) % (1 << width), width)
        case Immediate(value, width, is_float=True):
            yield "the next float", Immediate(value + 1, width, True)
        case Address(Register() as base, offset):
            size = next((BITS[part] // 8 for part in reversed(parts) if part in BITS), 4)
            yield f"[+{size}]", Address(base, offset + max(size, 1))
