"""Kill a comparison on the real model at random points: how much is done again, and is it the same?

    python benchmarks/interrupted_comparison.py --kills 2

Twelve cells are compared twice. One run is left alone; the other gets kill -9 after random times
and is started again, until it ends. Exit code 1 if the two tables differ in any figure that does
not measure time or memory, or if more than one cell was done again for a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qframe.embedded import model_folder

METHODS = ("rtn", "gptq", "hqq", "awq+gptq")
SCHEMES = ("W8A16", "W4A16", "W3A16")
MEASURED = ("seconds", "seconds_scoring", "peak_memory")  # of the machine, not of the network


def command(out: Path) -> list[str]:
    """Return the command of twelve cells."""
    words = [sys.executable, "-m", "qframe", "compare", str(model_folder()), "-o", str(out)]
    for method in METHODS:
        words += ["-m", method]
    for scheme in SCHEMES:
        words += ["--scheme", scheme]
    words += ["--group-size", "64", "--num-calibration-samples", "4", "--max-seq-length", "256"]
    return [*words, "--window", "256", "--limit", "2", "--no-distributions"]


def finished(out: Path) -> set[str]:
    """Return the cells that a folder holds."""
    return {file.name for file in (out / "cells").glob("*.json")}


def run(out: Path, log: Path, seconds: float | None) -> tuple[int, int]:
    """Run the command; return (exit code, cells begun). It is killed after so many seconds."""
    before = log.stat().st_size if log.exists() else 0
    with log.open("ab") as said:
        process = subprocess.Popen(command(out), stdout=said, stderr=said, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_bytes()[before:].decode("utf-8", "replace")
    return process.returncode, sum(line.endswith(": quantizing") for line in text.splitlines())


def figures(out: Path) -> dict[str, Any]:
    """Return what a comparison found, without what measures the machine."""
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for cell in found["cells"]:
        for key in MEASURED:
            del cell[key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    draw = random.Random(given.seed)
    cells = len(METHODS) * len(SCHEMES)
    with tempfile.TemporaryDirectory() as temporary:
        alone, often = Path(temporary) / "alone", Path(temporary) / "often"
        started = time.monotonic()
        code, begun = run(alone, Path(temporary) / "alone.log", None)
        took = time.monotonic() - started
        print(f"left alone: exit code {code}, {begun} of {cells} cells begun", flush=True)
        if code or begun != cells:
            raise SystemExit((Path(temporary) / "alone.log").read_text(encoding="utf-8")[-2000:])
        total = 0
        for number in range(given.kills + 1):
            last = number == given.kills
            after = None if last else took * draw.uniform(0.1, 0.9) / given.kills
            before = len(finished(often))
            code, begun = run(often, Path(temporary) / "often.log", after)
            total += begun
            said = "left alone" if last else f"killed after {after / took:.0%} of the time"
            print(
                f"{said}: exit code {code}, {before} cells found, {begun} begun, "
                f"{len(finished(often))} finished",
                flush=True,
            )
        again, same = total - cells, figures(alone) == figures(often)
        print(f"seed {given.seed}: {given.kills} kills, {again} cells begun again, tables ", end="")
        print("are the same" if same else "differ")
    sys.exit(not same or again > given.kills)


if __name__ == "__main__":
    main()
