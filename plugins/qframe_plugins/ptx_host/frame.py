"""What an instruction of a kernel can name: registers, numbers, special registers, addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.errors import PtxError, PtxUnsupportedError
from qframe_plugins.ptx_host.flow import Program
from qframe_plugins.ptx_host.forms import Instruction
from qframe_plugins.ptx_host.syntax import (
    BITS,
    Address,
    Immediate,
    Operand,
    Register,
    Special,
    Symbol,
)
from qframe_plugins.ptx_host.values import I1, const, resize

AXES = {"x": 0, "y": 1, "z": 2}


@dataclass(frozen=True)
class Options:
    """What is compiled in: the checker, by its address, or 0; and the counters."""

    check: int = 0
    count: bool = False


@dataclass
class Waiting:
    """A place where threads wait: its instruction, and the function that resolves it."""

    site: int
    kind: int
    function: str


@dataclass
class Frame:
    """One thread of one program, while it is translated; `Machine` adds what instructions do."""

    program: Program
    module: Any
    addresses: Mapping[str, int]
    options: Options
    name: str = "kernel"
    waits: list[Waiting] = field(default_factory=list)
    slots: int = layout.REGISTERS
    registers: dict[str, Any] = field(default_factory=dict)

    b: Any = None  # LLVM's builder, where the next instruction goes
    thread: Any = None
    block: Any = None
    params: Any = None
    current: Instruction = field(init=False)

    def register(self, register: Register) -> Any:
        """Return what a register holds."""
        value = self.b.load(self.registers[register.name])
        return self.b.not_(value) if register.negated else value

    def assign(self, operand: Operand | None, value: Any, kind: str) -> None:
        """Write a value to a register; one that is wider gets it extended as `kind` says."""
        if isinstance(operand, Register):
            place = self.registers[operand.name]
            bits = BITS[self.program.registers[operand.name]]
            self.b.store(resize(self.b, value, bits, signed=kind[0] == "s"), place)

    def value(self, operand: Operand | None, kind: str) -> Any:
        """Return an operand's value in the bits of `kind`."""
        bits = BITS[kind]
        match operand:
            case Register():
                return resize(self.b, self.register(operand), bits)
            case Immediate(value, width, is_float):
                if is_float and width != bits:
                    raise PtxError(f"a float of {width} bits, expected {bits}")
                return const(bits, int(value != 0) if kind == "pred" else value)
            case Special(name):
                return resize(self.b, self.special(name), bits)
            case Symbol(name, offset):
                return resize(self.b, const(64, self.offset(name) + offset), bits)
        raise PtxError(f"the operand {operand} has no value")

    def offset(self, name: str) -> int:
        """Return the address of a variable: in its space, or of the host where it is global."""
        if name in self.program.offsets:
            return self.program.offsets[name]
        if name in self.addresses:
            return self.addresses[name]
        raise PtxError(f"{name!r} is neither a register nor a variable")

    def address(self, operand: Address, space: str) -> Any:
        """Return [base + offset] as an address of the host."""
        space = self.current.modifiers.get(space, space)
        space = "shared" if space == "shared::cta" else space
        base, offset = operand.base, operand.offset
        if space == "param":
            self.inside_its_parameter(operand)
        kind = "u64"
        if isinstance(base, Register) and BITS[self.program.registers[base.name]] == 32:
            kind = "u32"  # the sum wraps, as addresses of shared memory below 0 rely on
        inside = self.b.add(self.value(base, kind), const(BITS[kind], offset))
        return self.b.add(resize(self.b, inside, 64), self.base(space))

    def inside_its_parameter(self, operand: Address) -> None:
        """Raise PtxError unless an access to parameters lies in the one that it names."""
        m = self.current.modifiers
        size = BITS[m["T"]] // 8 * int(m["vec"][1:] or 1)
        if not isinstance(operand.base, Symbol):
            raise self.unsupported("a parameter is read by its name, not by an address")
        name = operand.base.name
        sizes = {variable.name: variable.size for variable in self.program.params}
        if name not in sizes:
            raise PtxError(f"there is no parameter {name!r}")
        if not 0 <= operand.offset <= sizes[name] - size:
            raise PtxError(
                f"{size} bytes at byte {operand.offset} of {name}, which has {sizes[name]}"
            )

    def base(self, space: str) -> Any:
        """Return where the addresses of a space begin."""
        if space == "shared":
            return self.of_block(layout.SHARED)
        if space == "local":
            return self.of_thread(layout.LOCAL)
        if space == "param":
            return self.params
        return const(64, 0)

    def special(self, name: str) -> Any:
        """Return a special register, 64 bits."""
        b = self.b
        word, _, axis = name[1:].partition(".")
        if axis:
            slot = {
                "tid": layout.TID, "ntid": layout.NTID,
                "ctaid": layout.CTAID, "nctaid": layout.NCTAID,
            }[word] + AXES[axis]  # fmt: skip
            return self.of_thread(slot) if word == "tid" else self.of_block(slot)
        if word == "nwarpid":
            threads = b.mul(b.mul(*(self.of_block(layout.NTID + axis) for axis in (0, 1))),
                            self.of_block(layout.NTID + 2))  # fmt: skip
            return b.lshr(b.add(threads, const(64, 31)), const(64, 5))
        if word in ("dynamic_smem_size", "total_smem_size"):
            return self.of_block(layout.DYNAMIC if word[0] == "d" else layout.TOTAL)
        lane = self.of_thread(layout.LANE)
        if word.startswith("lanemask"):
            one = b.shl(const(64, 1), lane)
            below = b.sub(one, const(64, 1))
            every = const(64, 0xFFFFFFFF)
            return {
                "eq": one, "lt": below, "le": b.or_(below, one),
                "gt": b.xor(b.or_(below, one), every), "ge": b.xor(below, every),
            }[word[-2:]]  # fmt: skip
        return self.of_thread(layout.WARP) if word == "warpid" else lane

    def of_thread(self, slot: int) -> Any:
        """Return a slot of the thread's context."""
        return self.b.load(self.b.gep(self.thread, [const(64, slot)]))

    def of_block(self, slot: int) -> Any:
        """Return a slot of the block."""
        return self.b.load(self.b.gep(self.block, [const(64, slot)]))

    def set_thread(self, slot: int, value: Any) -> None:
        """Write a slot of the thread's context."""
        self.b.store(resize(self.b, value, 64), self.b.gep(self.thread, [const(64, slot)]))

    def carry(self) -> Any:
        """Return the carry of the last instruction that keeps one."""
        return self.b.trunc(self.of_thread(layout.CARRY), I1)

    def set_carry(self, value: Any) -> None:
        """Keep a carry."""
        self.set_thread(layout.CARRY, value)

    def unsupported(self, problem: str) -> PtxUnsupportedError:
        """Return an error about this instruction."""
        statement = self.current.statement
        return PtxUnsupportedError(f"{statement.place}: {statement.text!r}: {problem}")
