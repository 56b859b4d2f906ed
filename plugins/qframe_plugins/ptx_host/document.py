"""Writes the list of instructions in docs/ptx.md from the table: python -m, and the file's name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from qframe_plugins.ptx_host.forms import Form
from qframe_plugins.ptx_host.table import GROUPS, TABLE

START, END = "<!-- opcodes:start -->", "<!-- opcodes:end -->"
TITLES = {
    "integer": "Integers", "logic": "Bits, comparisons, moves", "float": "Floats",
    "convert": "Conversions", "memory": "Memory", "control": "Control and barriers",
    "warp": "Warps", "mma": "Matrices",
}  # fmt: skip


def syntax(form: Form) -> str:
    """Return how a form is written: {.a|.b} may be left out, of .(a|b) one has to be there."""
    words = []
    for part in form.parts():
        choices = "|".join(part.choices)
        if part.optional:
            words.append("{." + choices.replace("|", "|.") + "}")
        else:
            words.append("." + (f"({choices})" if len(part.choices) > 1 else choices))
    return "".join(words)[1:]


def operands(form: Form) -> str:
    """Return the names of a form's operands."""
    words = []
    for slot in form.slots():
        name = {"address": f"[{slot.name}]"}.get(slot.kind, slot.name)
        name = f"{{{name}}}" if slot.count else name
        name = f"{name}{{|p}}" if slot.second else name
        words.append(f"{{{name}}}" if slot.optional else name)
    return ", ".join(words)


def lines() -> Iterator[str]:
    """Yield the lines of the list."""
    count = len({form.name for form in TABLE})
    yield f"{count} instructions in {len(TABLE)} forms."
    for group, text in GROUPS.items():
        yield from ("", f"### {TITLES[group]}", "", text, "")
        for form in TABLE:
            if form.group == group:
                written = f"{syntax(form)} {operands(form)}".strip()
                yield f"- `{written}`: {form.meaning}."
    yield ""


def written(text: str) -> str:
    """Return the document with the list as it is now."""
    made = "\n".join([START, *lines(), END])
    return re.sub(f"{START}.*{END}", lambda found: made, text, flags=re.DOTALL)


def main(path: str) -> None:
    """Write the list into the document at `path`."""
    document = Path(path)
    document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
