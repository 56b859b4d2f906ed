"""A matrix that takes seconds, and the command line in the test's own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qframe.cli import main
from tests.ran import Ran, command

METHODS = ("rtn", "gptq")
SCHEMES = ("W4A16", "W3A16")
TEXT = "All happy families are alike; {} is unhappy in a way of its own, and {} in another.\n"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that take calibration and evaluation from two small files."""
    folder = tmp_path_factory.mktemp("texts")
    for name, start in (("calibration", 0), ("evaluation", 1000)):
        lines = [TEXT.format(i * i, 7 * i) for i in range(start, start + 60)]
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return [
        *("--dataset", str(folder / "calibration.txt")),
        *("--eval-dataset", str(folder / "evaluation.txt")),
        *("--num-calibration-samples", "6", "--max-seq-length", "48"),
        *("--window", "48", "--limit", "4", "--group-size", "32", "--threads", "1"),
    ]


@pytest.fixture(scope="session")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that no test changes."""
    folder: Path = tiny.write_llama(tmp_path_factory.mktemp("models") / "model")
    return folder


def matrix(methods: Any = METHODS, schemes: Any = SCHEMES) -> list[str]:
    """Return the options that ask for methods and schemes."""
    asked = [part for method in methods for part in ("-m", method)]
    return asked + [part for scheme in schemes for part in ("--scheme", scheme)]


@pytest.fixture
def compare(capfd: pytest.CaptureFixture[str], model: Path, texts: list[str]) -> Callable[..., Ran]:
    """Run `qframe compare` on the tiny model with the small texts; methods and schemes may vary."""

    def call(out: Path, *more: str, methods: Any = METHODS, schemes: Any = SCHEMES) -> Ran:
        return command(capfd, "compare", model, "-o", out, *texts, *matrix(methods, schemes), *more)

    return call


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `qframe ARGUMENTS`."""
    return lambda *arguments: command(capfd, *arguments)


@pytest.fixture(scope="session")
def finished(model: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a matrix that nothing disturbed; no test changes it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(model), "-o", str(out), *texts, *matrix()])
    assert not stopped.value.code
    return out


def figures(out: Path) -> Any:
    """Return everything that a run's results.json says, but for what was measured on a clock."""
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for cell in content["cells"]:
        for measured in ("seconds", "seconds_scoring", "peak_memory"):
            del cell[measured]
    return content


@pytest.fixture(scope="session", name="figures")
def _figures() -> Callable[[Path], Any]:
    return figures


@pytest.fixture(scope="session", name="matrix")
def _matrix() -> Callable[..., list[str]]:
    return matrix
