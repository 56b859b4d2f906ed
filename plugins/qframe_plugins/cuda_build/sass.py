"""SASS, the machine code of a GPU, as nvdisasm writes it -> how many instructions of each sort."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final

CLASSES: Final[Mapping[str, str]] = {
    "dp4a": r"IDP\.4A",
    "mma": r"(?!D)\w*MMA",
    "load128": r"LDG\.(?:\w+\.)*128",
    "store128": r"STG\.(?:\w+\.)*128",
    "shared128": r"LDS\.(?:\w+\.)*128",
    "cp_async": r"LDGSTS",
    "shuffle": r"SHFL|REDUX|CREDUX",
    "barrier": r"BAR",
    "atomic": r"(?:ATOM|RED)[GS]?(?:\.|$)",
    "fp64": r"D(?:ADD|MUL|FMA|SETP|MNMX|MMA)|\w+\.(?:\w+\.)*(?:F64|(?:RCP|RSQ)64H)",
    "local": r"LDL|STL",
    "call": r"CALL",
}
"""Sort -> how opcodes of it begin. What is in none of them is counted in "instructions" alone."""

_HEAD = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)")


def opcodes(text: str) -> dict[str, Counter[str]]:
    """Return function -> opcode with its modifiers -> how often; NOPs, which fill up, are left out.

    >>> opcodes('''
    ...     .section .text.k,"ax"
    ...     /*0000*/  @!P0 LDG.E.128 R4, [R2.64] ;
    ...     /*0010*/  NOP;
    ... ''')
    {'k': Counter({'LDG.E.128': 1})}
    """
    found: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[1].strip('"'), Counter())
        elif (code := _LINE.match(line)) and current is not None:
            current[code["opcode"]] += code["opcode"] != "NOP"
    return {name: +counted for name, counted in found.items()}


def mix(counted: Mapping[str, int]) -> dict[str, int]:
    """Return sort -> how many instructions; "instructions" is all of them.

    >>> mix({"IDP.4A.S8.S8": 16, "MOV": 2})["dp4a"]
    16
    """
    made = {"instructions": sum(counted.values())}
    for sort, pattern in CLASSES.items():
        begins = re.compile(pattern)
        made[sort] = sum(count for opcode, count in counted.items() if begins.match(opcode))
    return made
