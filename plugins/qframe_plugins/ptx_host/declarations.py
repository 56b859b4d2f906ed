"""Declarations of variables: where, how large, and what they begin with."""

from __future__ import annotations

import re

from qframe_plugins.ptx_host.errors import PtxError, PtxUnsupportedError
from qframe_plugins.ptx_host.literals import number, split
from qframe_plugins.ptx_host.syntax import BITS, Variable

NAME = r"[A-Za-z_$%][\w$]*"
VARIABLE = re.compile(
    rf"\.(?P<space>global|const|shared|local|param|reg)\s+(?P<rest>.*?)\.(?P<type>\w+)\s+"
    rf"(?:\.ptr\b.*?)?(?P<name>{NAME}|_)\s*(?P<dims>(?:\[\s*\w*\s*\])*)\s*(?:=(?P<initial>.*))?$",
    re.DOTALL,
)


def variable(text: str, line: int) -> Variable:
    """Return what a declaration declares."""
    found = VARIABLE.match(text.strip())
    if not found:
        raise PtxUnsupportedError(f"line {line}: the declaration {text[:80]!r}")
    kind = found["type"]
    if found["space"] == "reg" or kind not in BITS or kind == "pred":
        raise PtxUnsupportedError(f"line {line}: a variable of type .{kind}: {text[:80]!r}")
    aligned = re.search(r"\.align\s+(\d+)", found["rest"])
    count: int | None = 1
    for dimension in re.findall(r"\[\s*(\w*)\s*\]", found["dims"]):
        count = int(dimension, 0) * count if dimension and count is not None else None
    if count is None and found["space"] != "shared":
        raise PtxError(f"line {line}: the size of {found['name']!r} is missing")
    align = int(aligned[1]) if aligned else BITS[kind] // 8
    initial = _initial(found["initial"], kind, found["name"], line) if found["initial"] else None
    return Variable(found["name"], found["space"], kind, align, count, initial)


def _initial(text: str, kind: str, name: str, line: int) -> bytes:
    """Return the bytes that a variable begins with."""
    made = b""
    for part in split(re.sub(r"[{}]", "", text)):
        value = number(part)
        if value is None:
            raise PtxUnsupportedError(
                f"line {line}: the initial value {part!r} of {name}; numbers are known"
            )
        if value.is_float and value.width != BITS[kind]:
            raise PtxUnsupportedError(
                f"line {line}: {name} of .{kind} begins with {part!r}, "
                f"a literal of {value.width} bits"
            )
        made += (value.value % (1 << BITS[kind])).to_bytes(BITS[kind] // 8, "little")
    return made
