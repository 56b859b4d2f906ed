"""Where text goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

WIDTH = 100  # of tables in a file or a pipe, which have no width of their own


def stdout() -> Console:
    """Return the console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return the console for progress, notes and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def print_result(*parts: RenderableType) -> None:
    """Print tables and lines on stdout."""
    console = stdout()
    for part in parts:
        console.print(part)


def print_plain(line: str) -> None:
    """Print a line on stdout as it is, without breaking it."""
    stdout().print(line, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print JSON on stdout; what JSON has no number for (NaN, infinity) as a word."""
    sys.stdout.write(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return plain values in which NaN and infinities are words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value


def note(line: str) -> None:
    """Say on stderr what is going on."""
    stderr().print(Text(line, style="dim"), soft_wrap=True)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), line), soft_wrap=True)


def print_error(message: str, hint: str = "") -> None:
    """Print an error on stderr, each of its lines under the other."""
    first, *others = message.splitlines() or [""]
    text = Text.assemble(("error: ", "bold red"), first)
    for line in others:
        text.append(f"\n       {line}")
    if hint:
        text.append(f"\n       {hint}", style="dim")
    stderr().print(text, soft_wrap=True)
