"""The command line in the test's own process, so that libraries are imported once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qframe.cli import main


@dataclass(frozen=True)
class Ran:
    """How a command ended. `said` is stderr with its lines joined."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return " ".join(self.err.split())

    def json(self) -> Any:
        """Return what --json printed."""
        return json.loads(self.out)

    def made(self) -> list[str]:
        """Return the cells that `qframe compare` made, and did not find in the store."""
        return [line for line in self.err.splitlines() if line.endswith(": quantizing")]


def command(capture: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """Run `qframe ARGUMENTS`."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capture.readouterr()
    code = stopped.value.code
    return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)
