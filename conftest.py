"""Runs the blocks of README.md and docs/*.md: Python, shell commands of qframe, and their output.

Each document is one session in a temporary folder that holds a tiny model, MODEL.

* ```python   is executed; names last until the end of the document.
* ```bash     lines that start with qframe or torchrun are run; "# exit code 2" says what to expect.
              Other commands (pip, ...) are not run here; of PARSED_ONLY the options are checked.
* ```text     right after commands: what they print, line by line; "..." stands for any lines, or
              for the rest of a line.
* <!-- file: NAME --> writes the block that follows to that file.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

os.environ.pop("COLUMNS", None)  # what is shown must not depend on whose screen runs the tests

TINY = Path(__file__).parent / "tests" / "tiny.py"
PARSED_ONLY = {"demo", "doctor"}  # one takes minutes, the other judges the machine
TEXT = 20_000  # characters of each half of the text, so that blocks take seconds

collect_ignore = ["docs/example_plugin"]  # a project of its own; tests/test_third_party.py runs it

_FILE = re.compile(r"^<!-- file: (\S+) -->\n+(?=```\w+\n(.*?)^```$)", re.MULTILINE | re.DOTALL)
_EXIT_CODE = re.compile(r"#\s*exit code (\d+)\s*$")


@cache
def tiny() -> ModuleType:
    """Return tests/tiny.py, which writes the tiny model."""
    spec = importlib.util.spec_from_file_location("qframe_documents_tiny", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_up(namespace: dict[str, Any]) -> None:
    """Enter a new folder with MODEL in it."""
    from qframe import embedded

    halves = tuple(half[:TEXT] for half in embedded.topics_text())
    cleanup = namespace["_cleanup"] = contextlib.ExitStack()
    folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="qframe-document-"))
    tiny().write_llama(Path(folder, "MODEL"))
    cleanup.enter_context(contextlib.chdir(folder))
    cleanup.enter_context(mock.patch.dict(os.environ))
    cleanup.enter_context(mock.patch.object(embedded, "topics_text", return_value=halves))


def tear_down(namespace: dict[str, Any]) -> None:
    """Leave the folder."""
    namespace["_cleanup"].close()


def files(document: Document) -> Iterator[Region]:
    """Yield the files that a document writes."""
    for match in _FILE.finditer(document.text):
        yield Region(match.start(), match.end(), match.groups(), write_file)


def write_file(example: Example) -> None:
    name, text = example.parsed
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")


def run_commands(example: Example) -> str | None:
    """Run the qframe commands of a shell block in this process; return what went wrong."""
    said = example.namespace["_said"] = []
    for line in example.parsed.replace("\\\n", " ").splitlines():
        expected = _EXIT_CODE.search(line)
        words = shlex.split(line, comments=True)
        if words and words[0] in ("qframe", "torchrun"):
            code, output = (run if words[0] == "qframe" else launch)(words[1:])
            said += output.splitlines()
            if code != int(expected[1] if expected else 0):
                return f"{line}\nexit code {code}\n{output}"
    return None


def run(args: list[str]) -> tuple[int, str]:
    """Return the exit code and the output of a qframe command."""
    from typer.main import get_command

    from qframe.cli import main
    from qframe.cli.app import app

    if args[0] in PARSED_ONLY:
        get_command(app).get_command(None, args[0]).make_context(args[0], args[1:])
        return 0, ""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(args)
        except SystemExit as stop:
            return int(stop.code or 0), output.getvalue()
    return 0, output.getvalue()


def launch(args: list[str]) -> tuple[int, str]:
    """Return the exit code and the output of what torchrun is to start."""
    command = [sys.executable, "-m", "torch.distributed.run", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def compare_output(example: Example) -> str | None:
    """Return how the last commands' output differs from what the document shows."""
    said = example.namespace.get("_said")
    if said is None:
        return None
    place, skipping = 0, True
    for line in filter(None, map(str.strip, example.parsed.splitlines())):
        if line == "...":
            skipping = True
            continue
        while (
            place < len(said)
            and not _same(said[place], line)
            and (skipping or not said[place].strip())
        ):
            place += 1
        if place == len(said) or not _same(said[place], line):
            return "the document shows:\n  {}\nwhich is not so in:\n{}".format(
                line, "\n".join(f"  {other}" for other in said)
            )
        place, skipping = place + 1, False
    return None


def _same(said: str, shown: str) -> bool:
    """Whether a line was said as shown, whatever the spaces; "..." at its end is any end."""
    there, here = said.split(), shown.split()
    if here[-1] == "...":
        here.pop()
        there = there[: len(here)]
    return there == here


pytest_collect_file = Sybil(
    parsers=[
        files,
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_commands),
        CodeBlockParser("text", compare_output),
        SkipParser(),
    ],
    patterns=["*.md"],
    setup=set_up,
    teardown=tear_down,
).pytest()
