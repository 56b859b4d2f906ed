"""A kernel of the text -> its flat program: calls inlined, memory laid out, liveness known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from qframe_plugins.ptx_host.errors import PtxError, PtxUnsupportedError
from qframe_plugins.ptx_host.forms import Instruction, match
from qframe_plugins.ptx_host.syntax import (
    Address,
    Function,
    Label,
    Operand,
    Pair,
    Register,
    Source,
    Statement,
    Symbol,
    Variable,
    Vector,
)

CALL = re.compile(r"call(\.uni)?$")


@dataclass
class Program:
    """What is translated: instructions and labels, registers, and where variables lie."""

    name: str
    params: list[Variable]
    code: list[Instruction | Label]
    registers: dict[str, str]
    offsets: dict[str, int] = field(default_factory=dict)
    params_size: int = 0
    shared_size: int = 0
    dynamic_at: int = 0
    local_size: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    live: dict[int, frozenset[str]] = field(default_factory=dict)

    def uses(self, name: str) -> bool:
        """Return whether an instruction of that name is in it."""
        return any(isinstance(i, Instruction) and i.form.name == name for i in self.code)


def program(source: Source, function: Function) -> Program:
    """Return the program of a kernel. Raises PtxError and PtxUnsupportedError."""
    if not function.is_defined:
        raise PtxError(f"{function.place}: {function.name} is declared, but has no body")
    whole = _Inliner(source)
    pieces = list(whole.expand(function, "", ()))
    code = [
        piece if isinstance(piece, Label) else match(piece, whole.registers) for piece in pieces
    ]
    made = Program(function.name, function.params, code, whole.registers)
    made.labels = {piece.name: at for at, piece in enumerate(code) if isinstance(piece, Label)}
    _lay_out(made, source, [*function.params], list(whole.variables.values()))
    _liveness(made)
    return made


class _Inliner:
    """Puts functions where they are called, with names of their own."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.registers: dict[str, str] = {}
        self.variables: dict[str, Variable] = {}
        self.calls = 0

    def expand(
        self, function: Function, prefix: str, stack: tuple[str, ...]
    ) -> Iterator[Statement | Label]:
        own = {*function.registers, *function.variables}
        own |= {piece.name for piece in function.body if isinstance(piece, Label)}
        if prefix:
            own |= {variable.name for variable in (*function.params, *function.results)}
        names = {name: prefix + name for name in own}
        self.registers |= {names[name]: kind for name, kind in function.registers.items()}
        for variable in function.variables.values():
            self.add(replace(variable, name=names[variable.name]))
        end = f"{prefix}return"
        for piece in function.body:
            if isinstance(piece, Label):
                yield Label(names[piece.name])
                continue
            renamed = replace(
                piece,
                operands=tuple(_rename(operand, names) for operand in piece.operands),
                guard=replace(piece.guard, name=names.get(piece.guard.name, piece.guard.name))
                if piece.guard
                else None,
            )
            if piece.opcode.startswith("call"):
                yield from self.call(renamed, (*stack, function.name))
            elif prefix and piece.opcode in ("ret", "ret.uni"):
                yield replace(renamed, opcode="bra", operands=(Symbol(end),))
            else:
                yield self.in_memory(renamed)
        if prefix:
            yield Label(end)

    def in_memory(self, statement: Statement) -> Statement:
        """Return the statement; what it passes to a function or gets from one is local memory."""
        if not statement.opcode.startswith(("ld.param", "st.param")):
            return statement
        for operand in statement.operands:
            base = operand.base if isinstance(operand, Address) else None
            if isinstance(base, Symbol) and base.name in self.variables:
                return replace(statement, opcode=statement.opcode.replace(".param", ".local", 1))
        return statement

    def add(self, variable: Variable) -> None:
        space = "local" if variable.space == "param" else variable.space
        self.variables[variable.name] = replace(variable, space=space)

    def call(self, statement: Statement, stack: tuple[str, ...]) -> Iterator[Statement | Label]:
        where = f"{statement.place}: {statement.text!r}"
        if not CALL.match(statement.opcode) or statement.guard:
            raise PtxUnsupportedError(f"{where}: a call under a condition, or of another sort")
        operands = list(statement.operands)
        results = operands.pop(0) if isinstance(operands[0], Vector) else Vector(())
        called = operands.pop(0)
        given = operands.pop(0) if operands else Vector(())
        name = called.name if isinstance(called, Symbol) else "?"
        function = self.source.functions.get(name)
        if function is None or not function.is_defined or operands:
            raise PtxUnsupportedError(f"{where}: {name} has no body in this text")
        if name in stack:
            raise PtxUnsupportedError(f"{where}: {name} calls itself")
        if not isinstance(results, Vector) or not isinstance(given, Vector):
            raise PtxError(f"{where}: arguments stand in brackets")
        if (len(given.parts), len(results.parts)) != (len(function.params), len(function.results)):
            raise PtxError(
                f"{where}: {len(given.parts)} arguments and {len(results.parts)} results, "
                f"expected {len(function.params)} and {len(function.results)}"
            )
        self.calls += 1
        prefix = f"{name}#{self.calls}:"
        for variable in (*function.params, *function.results):
            if variable.space == "reg":
                self.registers[prefix + variable.name] = variable.type
            else:
                self.add(replace(variable, name=prefix + variable.name))
        for variable, argument in zip(function.params, given.parts, strict=True):
            yield from self.move(statement, variable, prefix + variable.name, argument, True)
        yield from self.expand(function, prefix, stack)
        for variable, result in zip(function.results, results.parts, strict=True):
            yield from self.move(statement, variable, prefix + variable.name, result, False)

    def move(
        self, call: Statement, variable: Variable, inner: str, outer: Operand | None, into: bool
    ) -> Iterator[Statement]:
        """Yield what brings an argument in, or a result out."""
        if variable.space == "reg":
            kind = variable.type if variable.type == "pred" else f"b{variable.type.lstrip('bsuf')}"
            pair = (Register(inner), outer) if into else (outer, Register(inner))
            yield replace(call, opcode=f"mov.{kind}", operands=pair)
            return
        if not isinstance(outer, Symbol):
            raise PtxUnsupportedError(f"{call.place}: {call.text!r}: expected .param variables")
        source, target = (outer.name, inner) if into else (inner, outer.name)
        for offset in range(variable.size):
            byte = f"{inner}.byte"
            self.registers[byte] = "b16"
            for opcode, name in (("ld.local.b8", source), ("st.local.b8", target)):
                address = Address(Symbol(name), offset)
                ordered = (Register(byte), address) if name == source and opcode[0] == "l" else (
                    address, Register(byte))  # fmt: skip
                yield replace(call, opcode=opcode, operands=ordered)


def _rename(operand: Operand | None, names: dict[str, str]) -> Operand | None:
    match operand:
        case Register(name, negated):
            return Register(names.get(name, name), negated)
        case Symbol(name, offset):
            return Symbol(names.get(name, name), offset)
        case Address(Register() | Symbol() as base, offset):
            renamed = _rename(base, names)
            return Address(renamed, offset)  # type: ignore[arg-type]
        case Vector(parts):
            return Vector(tuple(_rename(part, names) for part in parts))
        case Pair(first, second):
            return Pair(_rename(first, names), _rename(second, names))
    return operand


def _lay_out(made: Program, source: Source, params: list[Variable], local: list[Variable]) -> None:
    """Give each variable its offset in its space."""
    named = {
        name
        for piece in made.code
        if isinstance(piece, Instruction)
        for operand in piece.statement.operands
        for name in _symbols(operand)
    }
    shared = [v for v in source.variables.values() if v.space == "shared" and v.name in named]
    dynamic = [v for v in [*shared, *local] if v.space == "shared" and v.count is None]
    static = [v for v in [*shared, *local] if v.space == "shared" and v.count is not None]
    made.params_size = _place(made, params)
    made.shared_size = _place(made, static)
    made.local_size = _place(made, [v for v in local if v.space == "local"])
    made.dynamic_at = _up(made.shared_size, 16)
    for variable in dynamic:
        made.dynamic_at = _up(made.shared_size, max(16, variable.align))
        made.offsets[variable.name] = made.dynamic_at
    for variable in local:
        if variable.space not in ("shared", "local"):
            raise PtxUnsupportedError(f"{made.name}: a .{variable.space} variable in a function")


def _place(made: Program, variables: list[Variable]) -> int:
    size = 0
    for variable in variables:
        size = _up(size, variable.align)
        made.offsets[variable.name] = size
        size += variable.size
    return size


def _up(size: int, align: int) -> int:
    return -(-size // align) * align


def _symbols(operand: Operand | None) -> Iterator[str]:
    match operand:
        case Symbol(name):
            yield name
        case Address(Symbol(name)):
            yield name
        case Vector(parts):
            for part in parts:
                yield from _symbols(part)


def _liveness(made: Program) -> None:
    """Find the registers that are read after each instruction: backward, to the fixed point."""
    code = made.code
    count = len(code)
    reads: list[set[str]] = [set() for _ in code]
    writes: list[set[str]] = [set() for _ in code]
    following: list[list[int]] = [[at + 1] for at in range(count)]
    for at, piece in enumerate(code):
        if isinstance(piece, Label):
            continue
        reads[at] = set(piece.reads())
        if piece.statement.guard:
            reads[at] |= set(piece.writes())  # what it held may remain
        else:
            writes[at] = set(piece.writes())
        name = piece.form.name
        targets = [o.name for _, kind, o in _labels(piece) if isinstance(o, Symbol)]
        for target in targets:
            if target not in made.labels:
                raise PtxError(f"{piece.statement.place}: there is no label {target!r}")
        if name == "bra":
            following[at] = [made.labels[target] for target in targets]
        if name in ("ret", "exit"):
            following[at] = []
        if piece.statement.guard and name in ("bra", "ret", "exit"):
            following[at].append(at + 1)
    before: list[set[str]] = [set() for _ in range(count + 1)]
    after: list[set[str]] = [set() for _ in code]
    changed = True
    while changed:
        changed = False
        for at in range(count - 1, -1, -1):
            after[at] = set().union(*(before[to] for to in following[at]))
            needed = reads[at] | (after[at] - writes[at])
            if needed != before[at]:
                before[at], changed = needed, True
    made.live = {at: frozenset(names) for at, names in enumerate(after)}


def _labels(piece: Instruction) -> list[tuple[object, str, Operand | None]]:
    return [(slot, kind, o) for slot, kind, o in piece.bound if slot.kind == "label"]
