"""A kernel's instructions -> one LLVM function per kernel, a thread that can be resumed.

    i32 kernel(i64* thread, i64* block, i64 params, i32 resume)

runs one thread until it ends (0) or has to wait for others: then it puts what it brings, and the
registers that are still needed, into its context and returns the number of that place, at which
the scheduler lets it go on. So there are neither system threads nor stacks, and the order of
threads is the scheduler's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.errors import PtxError
from qframe_plugins.ptx_host.forms import Instruction, Slot
from qframe_plugins.ptx_host.frame import Frame, Waiting
from qframe_plugins.ptx_host.syntax import (
    BITS,
    Address,
    Immediate,
    Label,
    Operand,
    Pair,
    Symbol,
    Vector,
)
from qframe_plugins.ptx_host.values import I32, I64, WORDS, const, resize
from qframe_plugins.ptx_host.warp import Warp


class Machine(Frame):
    """Translates one program; the forms' functions are given it as `t`."""

    def build(self) -> None:
        """Add the function to the module."""
        kind = ir.FunctionType(I32, [WORDS, WORDS, I64, I32])
        self.function = ir.Function(self.module, kind, self.name)
        self.thread, self.block, self.params, resume = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.registers = {
            name: self.b.alloca(ir.IntType(BITS[kind]), name=f"r{index}")
            for index, (name, kind) in enumerate(self.program.registers.items())
        }
        self.spilled = {
            name: layout.REGISTERS + index for index, name in enumerate(self.program.registers)
        }
        self.slots = layout.REGISTERS + len(self.registers)
        self.copies = self.slots
        if self.program.uses("cp"):
            self.slots += layout.COPIES_SLOTS
        self.blocks = {
            piece.name: self.function.append_basic_block()
            for piece in self.program.code
            if isinstance(piece, Label)
        }
        start = self.function.append_basic_block("start")
        self.switch = self.b.switch(resume, start)
        self.b.position_at_end(start)
        for site, piece in enumerate(self.program.code):
            self.site = site
            if isinstance(piece, Label):
                self.b.branch(self.blocks[piece.name])
                self.b.position_at_end(self.blocks[piece.name])
            else:
                self.instruction(piece)
        self.finish(0)

    # One instruction --------------------------------------------------------------------------

    def instruction(self, piece: Instruction) -> None:
        """Emit one instruction, under its guard where it has one."""
        after = None
        if guard := piece.statement.guard:
            then, after = (self.function.append_basic_block() for _ in range(2))
            self.b.cbranch(self.register(guard), then, after)
            self.b.position_at_end(then)
        if self.options.count:
            counts = self.b.inttoptr(self.of_block(layout.COUNTS), WORDS)
            place = self.b.gep(counts, [const(64, self.site)])
            self.b.store(self.b.add(self.b.load(place), const(64, 1)), place)
        try:
            self.emit(piece)
        except PtxError as error:
            raise type(error)(
                f"{piece.statement.place}: {piece.statement.text!r}: {error}"
            ) from None
        if after is not None:
            if not self.b.block.is_terminated:
                self.b.branch(after)
            self.b.position_at_end(after)
        elif self.b.block.is_terminated:
            self.b.position_at_end(self.function.append_basic_block())

    def emit(self, piece: Instruction) -> None:
        """Call the form's function with the values, and write what it returns."""
        self.current = piece
        given: list[Any] = []
        targets: list[tuple[Slot, str, Operand | None]] = []
        for slot, kind, operand in piece.bound:
            if slot.is_written:
                targets.append((slot, kind, operand))
            elif slot.kind == "number":
                given.append(operand.value if isinstance(operand, Immediate) else None)
            elif slot.kind == "label":
                given.append(operand.name if isinstance(operand, Symbol) else None)
            elif operand is None:
                given.append(None)
            elif isinstance(operand, Address):
                given.append(self.address(operand, kind))
            elif isinstance(operand, Vector):
                given.append([self.value(part, kind) for part in operand.parts])
            elif slot.count:
                given.append([self.value(operand, kind)])
            else:
                given.append(self.value(operand, kind))
        made = piece.form.emit(self, piece.modifiers, *given)
        results = list(made) if isinstance(made, (list, tuple)) else [made]
        for slot, kind, operand in targets:
            if isinstance(operand, Vector):
                for part in operand.parts:
                    self.assign(part, results.pop(0), kind)
            elif slot.second:
                first, second = results.pop(0), results.pop(0)
                if isinstance(operand, Pair):
                    self.assign(operand.second, second, slot.second)
                    operand = operand.first
                self.assign(operand, first, kind)
            else:
                self.assign(operand, results.pop(0), kind)

    # Control ----------------------------------------------------------------------------------

    def finish(self, code: int) -> None:
        """End the thread."""
        self.b.ret(const(32, code))

    def jump(self, label: str) -> None:
        """Jump; one that leads back costs fuel, so that no loop is endless."""
        if label not in self.blocks:
            raise PtxError(f"there is no label {label!r}")
        if self.program.labels[label] <= self.site:
            place = self.b.gep(self.block, [const(64, layout.FUEL)])
            left = self.b.sub(self.b.load(place), const(64, 1))
            self.b.store(left, place)
            with self.b.if_then(self.b.icmp_signed("<", left, const(64, 0)), likely=False):
                self.finish(layout.NO_FUEL)
        self.b.branch(self.blocks[label])

    def wait(self, inputs: Iterable[Any], outputs: int = 0) -> list[Any]:
        """Wait with what the thread brings; return what it gets, in 64 bits each."""
        for index, value in enumerate(inputs):
            self.set_thread(layout.INPUT + index, value)
        written = set(self.current.writes())
        kept = sorted(self.program.live[self.site] - written)
        for name in kept:
            self.set_thread(self.spilled[name], self.b.load(self.registers[name]))
        form = self.current.form
        resolver = ""
        if form.resolve is not None:
            resolver = f"resolve.{self.current.statement.opcode}"
            if resolver not in self.module.globals:
                Warp(self.module, resolver).build(form.resolve, self.current.modifiers)
        self.waits.append(Waiting(self.site, layout.SYNCS[form.sync], resolver))
        self.b.ret(const(32, len(self.waits)))
        here = self.function.append_basic_block()
        self.switch.add_case(const(32, len(self.waits)), here)
        self.b.position_at_end(here)
        for name in kept:
            place = self.registers[name]
            value = self.of_thread(self.spilled[name])
            self.b.store(resize(self.b, value, BITS[self.program.registers[name]]), place)
        return [self.of_thread(layout.OUTPUT + index) for index in range(outputs)]

    def keep(self, value: Any) -> None:
        """Keep a value over a wait."""
        self.set_thread(layout.INPUT + 15, value)

    def kept(self) -> Any:
        """Return what `keep` was given."""
        return self.of_thread(layout.INPUT + 15)

    def cell(self, value: Any) -> Any:
        """Return memory that begins with `value`, and becomes a register."""
        with self.b.goto_entry_block():
            place = self.b.alloca(value.type)
        self.b.store(value, place)
        return place

    # Memory -----------------------------------------------------------------------------------

    def allowed(self, address: Any, space: str, size: int, access: int) -> Any:
        """Return the address, or one of the scratch slots where the checker refuses it."""
        space = "shared" if space == "shared::cta" else space
        if space == "param":
            return address
        codes = [const(32, v) for v in (size, access, layout.SPACES[space], self.site)]
        if self.options.count and access != layout.ISSUE:
            self.trace(address, space, size)
        if not self.options.check:
            return address
        kind = ir.FunctionType(I32, [WORDS, WORDS, I64, *[I32] * 4])
        check = self.b.inttoptr(const(64, self.options.check), kind.as_pointer())
        fine = self.b.call(check, [self.thread, self.block, address, *codes])
        scratch = self.b.ptrtoint(self.b.gep(self.thread, [const(64, layout.SCRATCH)]), I64)
        return self.b.select(self.b.icmp_signed("!=", fine, const(32, 0)), address, scratch)

    def trace(self, address: Any, space: str, size: int) -> None:
        """Write the access down, for `counters`."""
        count = self.b.gep(self.block, [const(64, layout.TRACE_COUNT)])
        used = self.b.load(count)
        self.b.store(self.b.add(used, const(64, 1)), count)
        with self.b.if_then(self.b.icmp_signed("<", used, self.of_block(layout.TRACE_MOST))):
            table = self.b.inttoptr(self.of_block(layout.TRACE), WORDS)
            first = self.b.mul(used, const(64, layout.TRACE_SLOTS))
            code = const(64, size | layout.SPACES[space] << 8)
            entry = (self.of_thread(layout.THREAD), const(64, self.site), address, code)
            for index, value in enumerate(entry):
                self.b.store(value, self.b.gep(table, [self.b.add(first, const(64, index))]))

    def pointer(self, address: Any, kind: Any, offset: int = 0) -> Any:
        """Return a pointer to an address."""
        return self.b.inttoptr(self.b.add(address, const(64, offset)), kind.as_pointer())

    def load(self, address: Any, space: str, kind: str, count: int = 1) -> list[Any]:
        """Return `count` values of a type that lie beside one another."""
        size, bits = BITS[kind] // 8, ir.IntType(BITS[kind])
        address = self.allowed(address, space, size * count, layout.LOAD)
        places = [self.pointer(address, bits, size * index) for index in range(count)]
        return [self.b.load(place, align=1) for place in places]

    def store(self, address: Any, space: str, kind: str, values: list[Any]) -> None:
        """Store values of a type beside one another."""
        size, bits = BITS[kind] // 8, ir.IntType(BITS[kind])
        if self.options.check:
            stored = self.b.ptrtoint(self.b.gep(self.thread, [const(64, layout.STORED)]), I64)
            for index, value in enumerate(values):
                self.b.store(value, self.pointer(stored, bits, size * index), align=1)
        address = self.allowed(address, space, size * len(values), layout.STORE)
        for index, value in enumerate(values):
            self.b.store(value, self.pointer(address, bits, size * index), align=1)

    def helper(self, name: str, kinds: list[Any], build: Callable[[Any, Any], None]) -> Any:
        """Return an internal function of the module, built when it is first asked for."""
        if name not in self.module.globals:
            kind = ir.FunctionType(kinds[0], kinds[1:])
            function = ir.Function(self.module, kind, name)
            function.linkage = "internal"
            build(ir.IRBuilder(function.append_basic_block()), function)
        return self.module.globals[name]
