"""PTX text -> `syntax.Source`. What it does not know is an error that names the line and the text.

Source: PTX ISA 8.5, chapters 4 (syntax), 5 (spaces, types, variables) and 11 (directives).
"""

from __future__ import annotations

import re
from dataclasses import replace

from qframe_plugins.ptx_host.declarations import NAME, variable
from qframe_plugins.ptx_host.errors import PtxError, PtxUnsupportedError
from qframe_plugins.ptx_host.literals import number, signed, split
from qframe_plugins.ptx_host.syntax import (
    BITS,
    Address,
    Function,
    Immediate,
    Label,
    Operand,
    Pair,
    Place,
    Register,
    Source,
    Special,
    Statement,
    Symbol,
    Variable,
    Vector,
)

LABEL = rf"({NAME})\s*:(?!:)"
TUNING = r"\.(?:maxntid|reqntid|minnctapersm|maxnreg|maxnctapersm|noreturn|pragma|unified)\b"
SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|lanemask_(?:eq|lt|le|gt|ge)"
    r"|dynamic_smem_size|total_smem_size)$"
)


ADDRESS = re.compile(r"\[\s*(?P<base>[^\s+\-]+)\s*(?:(?P<sign>[+-])\s*(?P<offset>-?\w+))?\s*\]$")


def parse(text: str) -> Source:
    """Return what a PTX text says. Raises PtxError and PtxUnsupportedError."""
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        blank = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
        self.text = blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        self.at, self.line = 0, 1
        self.files: dict[str, str] = dict(re.findall(r"\.file\s+(\d+)\s+\"([^\"]*)\"", self.text))
        self.source = ""
        self.target = ""
        self.variables: dict[str, Variable] = {}
        self.functions: dict[str, Function] = {}
        self.scopes: list[dict[str, str]] = []
        self.taken: set[str] = set()

    def fail(self, problem: str) -> PtxError:
        return PtxError(f"line {self.line}: {problem}")

    def place(self) -> Place:
        return Place(self.line, self.source)

    # Text to pieces ---------------------------------------------------------------------------

    def skip(self) -> None:
        found = re.compile(r"\s*").match(self.text, self.at)
        self.move(found.end() if found else self.at)

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def take(self, pattern: str) -> re.Match[str] | None:
        """Take what matches here, or leave all as it is."""
        found = re.compile(pattern, re.DOTALL).match(self.text, self.at)
        if found:
            self.move(found.end())
        return found

    def until(self, stops: str) -> str:
        """Take the text up to one of `stops` that is in no brackets, and that letter with it."""
        depth, position, start = 0, self.at, self.at
        while position < len(self.text):
            letter = self.text[position]
            if not depth and letter in stops:
                taken = self.text[start:position].strip()
                self.move(position + 1)
                self.stop = letter
                return taken
            depth += (letter in "{[(") - (letter in "}])")
            position += 1
        expected = " or ".join(map(repr, stops))
        raise self.fail(f"{self.text[start : start + 40].strip()!r} has no {expected} at its end")

    # Whole texts ------------------------------------------------------------------------------

    def parse(self) -> Source:
        self.skip()
        while self.at < len(self.text):
            if found := self.take(r"\.target\s+([^\n]+)"):
                self.target = found[1].split(",")[0].strip()
            elif found := self.take(r"\.address_size\s+(\d+)"):
                if found[1] != "64":
                    raise PtxUnsupportedError(
                        f"line {self.line}: addresses of {found[1]} bits; compile for 64"
                    )
            elif self.take(r"\.version\s+[\d.]+"):
                pass
            elif self.take(r"\.section\b[^{]*\{"):
                self.until("}")
            elif not self.note():
                self.declaration()
            self.skip()
        if not self.target:
            raise PtxError("this is no PTX: a directive .target is missing, such as .target sm_80")
        return Source(self.target, self.variables, self.functions)

    def note(self) -> bool:
        """Take a directive that says something about the text; return whether there was one."""
        if self.take(r"\.file\s+\d+\s+\"[^\"]*\"[^\n]*"):
            return True
        if found := self.take(r"\.loc\s+(\d+)\s+(\d+)[^\n;]*;?"):
            self.source = f"{self.files.get(found[1], found[1]).rpartition('/')[2]}:{found[2]}"
        elif not self.take(r"\.pragma\s+[^;]*;"):
            return False
        return True

    def declaration(self) -> None:
        while self.take(r"\.(?:visible|extern|weak|common)\b\s*"):
            pass
        if found := self.take(r"\.(entry|func)\b"):
            self.function(found[1] == "entry")
            return
        text = self.until(";")
        if text.startswith((".alias", ".metadata")):
            raise PtxUnsupportedError(f"line {self.line}: the directive {text.split()[0]}")
        declared = variable(text, self.line)
        self.variables[declared.name] = declared

    # Functions --------------------------------------------------------------------------------

    def function(self, is_kernel: bool) -> None:
        self.skip()
        results = self.parameters() if self.text[self.at] == "(" else []
        self.skip()
        found = self.take(NAME)
        if not found:
            raise self.fail("a function without a name")
        function = Function(found[0], is_kernel, [], results, self.place())
        self.skip()
        if self.text[self.at] == "(":
            function.params = self.parameters()
        head = self.until("{;")
        unknown = re.sub(TUNING + r"[\s\d,\"\w]*", "", head).strip()
        if unknown:
            raise PtxUnsupportedError(f"line {self.line}: {unknown!r} of {function.name}")
        known = self.functions.get(function.name)
        if known is None or not known.is_defined:
            self.functions[function.name] = function
        if self.stop == "{":
            function.is_defined = True
            self.scopes, self.taken, self.source = [{}], set(), ""
            for parameter in [*results, *function.params]:
                self.declare(parameter.name)
                if parameter.space == "reg":
                    function.registers[parameter.name] = parameter.type
            self.body(function)

    def parameters(self) -> list[Variable]:
        self.take(r"\(")
        inside = self.until(")")
        made = []
        for text in split(inside):
            if found := re.match(rf"\.reg\s*\.(\w+)\s+({NAME})$", text):
                made.append(Variable(found[2], "reg", found[1], 1, 1))
            else:
                made.append(variable(text, self.line))
        return made

    def body(self, function: Function) -> None:
        self.open()
        self.skip()
        while len(self.scopes) > 1:
            if self.at >= len(self.text):
                raise self.fail(f"the body of {function.name} has no end; a '}}' is missing")
            if self.take(r"\{"):
                self.open()
            elif self.take(r"\}"):
                self.scopes.pop()
            elif found := self.take(LABEL):
                function.body.append(Label(self.local(found[1])))
            elif not self.note():
                self.line_of_statement(function)
            self.skip()
        function.body = [
            replace(piece, operands=tuple(_registers(o, function) for o in piece.operands))
            if isinstance(piece, Statement)
            else piece
            for piece in function.body
        ]

    def open(self) -> None:
        """Begin a scope. Its labels are known from its start, as jumps may lead forward."""
        self.scopes.append({})
        depth = 1
        for found in re.compile(rf"[{{}};]\s*(?:{LABEL})?|{LABEL}").finditer(self.text, self.at):
            depth += (found[0][0] == "{") - (found[0][0] == "}")
            if not depth:
                return
            name = found[1] or found[2]
            if name and depth == 1:
                self.declare(name)

    def local(self, name: str) -> str:
        """Return the unique name of what `name` means here."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def declare(self, name: str) -> str:
        """Return a unique name for what `name` means from here to the end of its scope."""
        unique, count = name, 1
        while unique in self.taken:
            count += 1
            unique = f"{name}.{count}"
        self.taken.add(unique)
        self.scopes[-1][name] = unique
        return unique

    def line_of_statement(self, function: Function) -> None:
        place = self.place()
        text = " ".join(self.until(";").split())
        if not text:
            return
        if text.startswith(".reg"):
            self.registers(function, text)
        elif text.startswith("."):
            declared = variable(text, self.line)
            unique = self.declare(declared.name)
            function.variables[unique] = replace(declared, name=unique)
        else:
            function.body.append(self.statement(text, place))

    def registers(self, function: Function, text: str) -> None:
        found = re.match(r"\.reg\s*\.(\w+)\s+(.*)$", text)
        if not found or found[1] not in BITS:
            raise PtxUnsupportedError(f"line {self.line}: the registers {text!r}")
        for name in split(found[2]):
            many = re.match(rf"({NAME})<(\d+)>$", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for one in names:
                function.registers[self.declare(one)] = found[1]

    def statement(self, text: str, place: Place) -> Statement:
        guard, rest = None, text
        if found := re.match(rf"@\s*(!?)\s*({NAME})\s+(.*)", text):
            guard, rest = Register(self.local(found[2]), bool(found[1])), found[3]
        opcode, _, operands = rest.partition(" ")
        parsed = tuple(self.operand(part, text) for part in split(operands))
        return Statement(opcode, parsed, guard, place, text)

    def operand(self, text: str, whole: str) -> Operand | None:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith(("{", "(")):
            return Vector(tuple(self.operand(part, whole) for part in split(text[1:-1])))
        if text.startswith("["):
            return self.address(text, whole)
        if "|" in text:
            first, _, second = text.partition("|")
            return Pair(self.operand(first, whole), self.operand(second, whole))
        if (value := number(text)) is not None:
            return value
        if SPECIAL.match(text):
            return Special(text)
        if found := re.match(rf"(!?)\s*({NAME})$", text):
            name = self.local(found[2])
            return Register(name, True) if found[1] else Symbol(name)
        if found := re.match(rf"({NAME})\s*\+\s*(-?\w+)$", text):
            offset = number(found[2])
            if offset is not None:
                return Symbol(self.local(found[1]), signed(offset.value))
        raise PtxUnsupportedError(f"line {self.line}: the operand {text!r} of {whole!r}")

    def address(self, text: str, whole: str) -> Address:
        found = ADDRESS.match(text)
        inner = self.operand(found["base"], whole) if found else None
        value = number(found["offset"] or "0") if found else None
        if not found or value is None or not isinstance(inner, (Symbol, Immediate)):
            raise PtxUnsupportedError(f"line {self.line}: the address {text!r} of {whole!r}")
        offset = signed(value.value)
        if isinstance(inner, Symbol) and inner.offset:
            raise PtxUnsupportedError(f"line {self.line}: the address {text!r} of {whole!r}")
        return Address(inner, -offset if found["sign"] == "-" else offset)


def _registers(operand: Operand | None, function: Function) -> Operand | None:
    """Return the operand with registers where its names are registers'."""
    match operand:
        case Symbol(name, 0) if name in function.registers:
            return Register(name)
        case Address(Symbol(name, 0), offset) if name in function.registers:
            return Address(Register(name), offset)
        case Vector(parts):
            return Vector(tuple(_registers(part, function) for part in parts))
        case Pair(first, second):
            return Pair(_registers(first, function), _registers(second, function))
    return operand
