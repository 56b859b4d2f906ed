"""The table of instructions: how each is written, what it is given, and who translates it.

A form is a pattern of an opcode with the operands that belong to it:

    "add[rnd:rn|rz|rm|rp][ftz][sat].{T:f32}"    ">d:T a:T b:T"

`{name:a|b}` is a modifier that must be there, `[name:a|b]` one that may, `[ftz]` short for
`[ftz:ftz]`. They stand in this order, as PTX asks. Of the operands, `>` is written to; after the
colon is its type, or the modifier that names it:

    a:T         a register or a number         2T       a type twice as wide
    [a:space]   an address in that space       n#       a number that is known beforehand
    >d:T|pred   d, or d|p                      {a:T*4}  four registers, or as many as T*vec says
    a:T?        may be left out                label@   a place to jump to

`match` finds the form of a statement. A statement that has none is an error, as are operands of
another width than the form says: nothing is guessed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qframe_plugins.ptx_host.errors import PtxError, PtxUnsupportedError
from qframe_plugins.ptx_host.syntax import (
    BITS,
    Address,
    Immediate,
    Operand,
    Pair,
    Register,
    Special,
    Statement,
    Symbol,
    Vector,
)

Modifiers = Mapping[str, str]
Emitter = Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """One modifier of a pattern; `name` is "" where it has to be exactly `choices[0]`."""

    name: str
    choices: tuple[str, ...]
    optional: bool


@dataclass(frozen=True)
class Slot:
    """One operand of a form."""

    name: str
    kind: str  # "value", "address", "number", "label"
    type: str
    second: str = ""  # the type of p in d|p
    count: str = ""  # of a vector: a number or a modifier
    is_written: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Form:
    """One line of the table."""

    pattern: str
    operands: str
    meaning: str
    emit: Emitter
    sync: str = ""  # what a thread waits for: "barrier", "warp" or "active"
    resolve: Emitter | None = None
    group: str = ""
    only: Callable[[Modifiers], bool] | None = None

    @property
    def name(self) -> str:
        """The first part of the opcode."""
        return re.split(r"[.\[{]", self.pattern)[0]

    def parts(self) -> list[Part]:
        """Return the modifiers in their order."""
        return _parts(self.pattern)

    def slots(self) -> list[Slot]:
        """Return the operands in their order."""
        return _slots(self.operands)

    def modifiers(self, opcode: str) -> dict[str, str] | None:
        """Return the modifiers of an opcode by name, or None if it is not of this form."""
        words = opcode.split(".")
        found: dict[str, str] = {}
        at = 0
        for part in self.parts():
            if at < len(words) and words[at] in part.choices:
                found[part.name] = words[at]
                at += 1
            elif part.optional:
                found[part.name] = ""
            else:
                return None
        if at < len(words) or (self.only is not None and not self.only(found)):
            return None
        return found

    def variants(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield every opcode of this form, with its modifiers."""
        choices = [[*part.choices, *([""] if part.optional else [])] for part in self.parts()]
        for chosen in itertools.product(*choices):
            found = {part.name: word for part, word in zip(self.parts(), chosen, strict=True)}
            if self.only is None or self.only(found):
                yield ".".join(word for word in chosen if word), found


TABLE: list[Form] = []
"""Every form, in the order of the documents. Filled by the modules `ops_*`."""

_MEMORY: dict[tuple[str, str], Any] = {}


def form(
    pattern: str,
    operands: str,
    meaning: str,
    *,
    sync: str = "",
    resolve: Emitter | None = None,
    only: Callable[[Modifiers], bool] | None = None,
) -> Callable[[Emitter], Emitter]:
    """Enter the decorated function into the table.

    It is called as emit(machine, modifiers, *values) and returns the values that are written.
    """

    def enter(emit: Emitter) -> Emitter:
        group = emit.__module__.rpartition("_")[2]
        made = Form(pattern, operands, meaning, emit, sync, resolve, group, only)
        first = [at for at, other in enumerate(TABLE) if other.emit is emit]
        TABLE.insert(first[0] if first else len(TABLE), made)  # decorators are applied upwards
        return emit

    return enter


def _parts(pattern: str) -> list[Part]:
    key = ("parts", pattern)
    if key not in _MEMORY:
        made = []
        for word in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^.\[\]{}]+", pattern):
            name, _, choices = word.strip("{}[]").rpartition(":" if "::" not in word else "\0")
            if "::" in word:
                name, _, choices = word.strip("{}[]").partition(":")
            if word[0] in "{[":
                made.append(Part(name or choices, tuple(choices.split("|")), word[0] == "["))
            else:
                made.append(Part(f"={word}", (word,), False))
        _MEMORY[key] = made
    found: list[Part] = _MEMORY[key]
    return found


def _slots(text: str) -> list[Slot]:
    key = ("slots", text)
    if key not in _MEMORY:
        made = []
        for word in text.split():
            rest = word.removeprefix(">").removesuffix("?")
            kind, count = "value", ""
            if rest.endswith("#"):
                kind, rest = "number", rest[:-1] + ":u64"
            elif rest.endswith("@"):
                kind, rest = "label", rest[:-1] + ":u64"
            elif rest.startswith("["):
                kind, rest = "address", rest[1:-1]
            elif rest.startswith("{"):
                rest, _, count = rest[1:-1].partition("*")
            name, _, typed = rest.partition(":")
            typed, _, second = typed.partition("|")
            made.append(
                Slot(name, kind, typed, second, count, word.startswith(">"), word.endswith("?"))
            )
        _MEMORY[key] = made
    found: list[Slot] = _MEMORY[key]
    return found


def type_of(slot: Slot, modifiers: Modifiers) -> str:
    """Return the PTX type of an operand, given the modifiers."""
    text = modifiers.get(slot.type, slot.type)
    if slot.type.startswith("2"):
        base = modifiers[slot.type[1:]]
        return f"{base[0]}{2 * BITS[base]}"
    return text


def count_of(slot: Slot, modifiers: Modifiers) -> int:
    """Return how many registers a vector has; 0 is no vector."""
    text = modifiers.get(slot.count, slot.count)
    return int(text.lstrip("vx") or (1 if slot.count else 0))


@dataclass(frozen=True)
class Instruction:
    """A statement whose form is known."""

    statement: Statement
    form: Form
    modifiers: Modifiers
    bound: tuple[tuple[Slot, str, Operand | None], ...]  # slot, type, operand

    def reads(self) -> Iterator[str]:
        """Yield the names of the registers that are read."""
        if self.statement.guard:
            yield self.statement.guard.name
        for slot, _, operand in self.bound:
            if not slot.is_written or isinstance(operand, Address):
                yield from _names(operand)

    def writes(self) -> Iterator[str]:
        """Yield the names of the registers that are written."""
        for slot, _, operand in self.bound:
            if slot.is_written:
                yield from _names(operand)


def _names(operand: Operand | None) -> Iterator[str]:
    match operand:
        case Register(name):
            yield name
        case Address(Register(name)):
            yield name
        case Vector(parts):
            for part in parts:
                yield from _names(part)
        case Pair(first, second):
            yield from _names(first)
            yield from _names(second)


def match(statement: Statement, registers: Mapping[str, str]) -> Instruction:
    """Return the instruction that a statement is.

    Raises PtxUnsupportedError for an opcode that the table does not have, PtxError for operands
    that its forms do not take.
    """
    name = statement.opcode.split(".")[0]
    named = [form for form in TABLE if form.name == name]
    problems = []
    for form in named:
        modifiers = form.modifiers(statement.opcode)
        if modifiers is None:
            continue
        bound = _bind(form, modifiers, statement, registers)
        if not isinstance(bound, str):
            return Instruction(statement, form, modifiers, bound)
        problems.append(f"{form.pattern} {form.operands}: {bound}")
    where = f"{statement.place}: {statement.text!r}"
    if problems:
        raise PtxError(f"{where}: the operands do not fit; " + "; ".join(problems))
    known = ", ".join(form.pattern for form in named) or "none of that name"
    raise PtxUnsupportedError(
        f"{where}: {statement.opcode} is not supported; docs/ptx.md lists what is: {known}"
    )


def _bind(
    form: Form, modifiers: Modifiers, statement: Statement, registers: Mapping[str, str]
) -> tuple[tuple[Slot, str, Operand | None], ...] | str:
    slots = form.slots()
    given = list(statement.operands)
    least = sum(not slot.optional for slot in slots)
    if not least <= len(given) <= len(slots):
        return f"{len(given)} operands, expected {least}"
    bound: list[tuple[Slot, str, Operand | None]] = []
    for slot, operand in itertools.zip_longest(slots, given):
        if operand is None and len(bound) >= len(given):
            bound.append((slot, type_of(slot, modifiers), None))
            continue
        problem = _problem(form, slot, operand, modifiers, registers)
        if problem:
            return f"{slot.name} {problem}"
        bound.append((slot, type_of(slot, modifiers), operand))
    return tuple(bound)


def _problem(
    form: Form,
    slot: Slot,
    operand: Operand | None,
    modifiers: Modifiers,
    registers: Mapping[str, str],
) -> str:
    """Say what is wrong with an operand, or ""."""
    if slot.kind == "number":
        return "" if isinstance(operand, Immediate) else "has to be a number"
    if slot.kind == "label":
        return "" if isinstance(operand, Symbol) else "has to be a label"
    if slot.kind == "address":
        if not isinstance(operand, Address):
            return "has to be an address in brackets"
        if isinstance(operand.base, Register) and BITS[registers[operand.base.name]] < 32:
            return "has a base of less than 32 bits"
        return ""
    typed, count = type_of(slot, modifiers), count_of(slot, modifiers)
    parts = [operand]
    if isinstance(operand, Vector) and slot.count:
        parts = list(operand.parts)
        if len(parts) != count:
            return f"has {len(parts)} parts, expected {count}"
    elif slot.count and count != 1:
        return f"has to be a vector of {count}"
    if isinstance(operand, Pair):
        if not slot.second:
            return "is a pair"
        parts = [operand.first]
        if isinstance(operand.second, Register) and registers[operand.second.name] != "pred":
            return "|p has to be a predicate"
    loose = form.name in ("ld", "st", "ldu", "cvt")
    for part in parts:
        problem = _misfit(slot, part, typed, registers, loose)
        if problem:
            return problem
    return ""


def _misfit(
    slot: Slot, part: Operand | None, typed: str, registers: Mapping[str, str], loose: bool
) -> str:
    if part is None:
        return "" if slot.is_written else "is _"
    if isinstance(part, Register):
        have = registers[part.name]
        if (have == "pred") != (typed == "pred"):
            return f"is of type .{have}, expected .{typed}"
        fits = BITS[have] >= BITS[typed] if loose else BITS[have] == BITS[typed]
        return "" if fits else f"is of type .{have}, expected .{typed}"
    if slot.is_written:
        return "has to be a register"
    if isinstance(part, (Immediate, Special, Symbol)):
        return ""
    return "has to be a register or a number"
