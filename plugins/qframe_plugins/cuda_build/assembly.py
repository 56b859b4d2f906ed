"""PTX -> machine code -> figures: what a kernel costs on an architecture."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from qframe_plugins.cuda_build import sass
from qframe_plugins.cuda_build.tools import ToolError, run
from qframe_plugins.ptx_host.parsing import parse
from qframe_plugins.ptx_host.syntax import Function, Statement

PTX_CLASSES: Final[Mapping[str, str]] = {
    "div64": r"(?:div|rem)\.[su]64",
    "ftz": r"\S*\.ftz",
    "approx": r"\S*\.approx|\S*\.full",
}
"""Sort -> the PTX opcodes of it; machine code has no one instruction for these."""

MEMORY: Final = ("registers", "shared", "stack", "spills")


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture.

    kernel   its name in the PTX
    arch     e.g. "sm_90"
    counts   registers of a thread; shared, stack and spills in bytes; instructions, and how many
             of them are of each of `sass.CLASSES` and `PTX_CLASSES`
    """

    kernel: str
    arch: str
    counts: Mapping[str, int]


def assemble(ptx: str, arch: str, keep: Path | None = None) -> list[Figures]:
    """Return the figures of every kernel of a PTX text.

    arch   what it is assembled for, such as "sm_90"; an older target in the text is allowed
    keep   where to leave the text, the machine code and its listing: this path with the suffixes
           .ptx, .cubin and .sass

    Raises MissingExtraError without the tools, ToolError where ptxas refuses the text, PtxError for
    what is no PTX.
    """
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ToolError(f"architecture {arch!r}: expected something like sm_90")
    functions = parse(ptx).functions
    with tempfile.TemporaryDirectory(prefix="qframe-cuda-") as folder:
        place = str(keep or Path(folder, "kernel"))
        text, cubin = Path(f"{place}.ptx"), Path(f"{place}.cubin")
        text.write_text(ptx, encoding="utf-8")
        _, said = run("ptxas", "-v", f"-arch={arch}", text, "-o", cubin)
        code, _ = run("nvdisasm", "-c", cubin)
        Path(f"{place}.sass").write_text(code, encoding="utf-8")
    resources, machine = resources_of(said), sass.opcodes(code)
    made = []
    for name in (f.name for f in functions.values() if f.is_kernel and f.is_defined):
        if name not in resources or name not in machine:
            raise ToolError(f"{name}: ptxas and nvdisasm say nothing of it for {arch}")
        counts = {**resources[name], **sass.mix(machine[name]), **_of_ptx(functions[name])}
        made.append(Figures(name, arch, counts))
    return made


def resources_of(said: str) -> dict[str, dict[str, int]]:
    """Return kernel -> `MEMORY` -> how much, out of what `ptxas -v` says.

    >>> resources_of('''
    ... ptxas info : Compiling entry function 'k' for 'sm_80'
    ... ptxas info : Function properties for k
    ...     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
    ... ptxas info : Used 32 registers, used 1 barriers, 2176 bytes smem, 380 bytes cmem[0]''')
    {'k': {'registers': 32, 'shared': 2176, 'stack': 16, 'spills': 12}}
    """
    found = {}
    pieces = re.split(r"Compiling entry function '([^']+)'", said)[1:]
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        number = partial(_number, text)
        if not re.search(r"Used \d+ registers", text):
            raise ToolError(f"{name}: ptxas -v says nothing of registers: {text.strip()!r}")
        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "shared": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        }
    return found


def _number(text: str, pattern: str) -> int:
    """Return what stands first in the text, 0 where ptxas leaves it out."""
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _of_ptx(function: Function) -> dict[str, int]:
    counted = Counter(each.opcode for each in function.body if isinstance(each, Statement))
    return {
        sort: sum(count for opcode, count in counted.items() if re.match(pattern, opcode))
        for sort, pattern in PTX_CLASSES.items()
    }
