"""NVIDIA's offline tools, out of Python packages."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

from qframe.errors import MissingExtraError, QframeError

PACKAGES = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
"""Tool -> the package that has it."""

SECONDS = 300  # after which a tool is taken to hang


class ToolError(QframeError):
    """A tool refuses a kernel, hangs, or says something that is not understood."""


@cache
def find(tool: str) -> Path:
    """Return the program. Raises MissingExtraError with the pip command where there is none.

    tool   one of `PACKAGES`
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob(f"*/bin/{tool}*"), reverse=True):
            if path.stem == tool:
                return path
    raise MissingExtraError(PACKAGES[tool], "cuda", f"{tool}, which shows what becomes of PTX,")


def run(tool: str, *arguments: str | Path) -> tuple[str, str]:
    """Run a tool; return what it has written to stdout and stderr.

    Raises MissingExtraError, and ToolError where it fails.
    """
    command = [str(find(tool)), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{tool} is not done after {SECONDS} s") from None
    except OSError as error:
        raise ToolError(f"{tool} cannot be run: {error}; expected a program that runs here "
                        f"in the package {PACKAGES[tool]}") from error  # fmt: skip
    if done.returncode:
        raise ToolError(f"{tool} refuses it: {(done.stderr or done.stdout).strip()}")
    return done.stdout, done.stderr


@cache
def release() -> str:
    """Return the release of ptxas, such as "13.5"."""
    said, _ = run("ptxas", "--version")
    found = re.search(r"release (\d+\.\d+)", said)
    if not found:
        raise ToolError(f"ptxas --version: expected a release, got {said.strip()!r}")
    return found[1]
