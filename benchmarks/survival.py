"""What it costs a run that it could be killed: of its time, by turns, into docs/survival.md.

    python benchmarks/survival.py

A run is compared with the same one that keeps no blocks, and with one that does not read its folder
once more. Hashing a model is what it takes by itself. GPTQ is held against RTN once a round.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

from memory import W4, put, recipe, write_model

import qframe
from qframe.unfinished import Unfinished
from qframe.weights import ModelFolder

PAGE = Path(__file__).parent.parent / "docs" / "survival.md"
NETWORK = (1024, 2816, 6, "float32")  # hidden and intermediate size, blocks, dtype
ROUNDS, CALIBRATED_ROUNDS = 15, 3
THREADS = 2


def main() -> None:
    """Measure, and write the table."""
    with tempfile.TemporaryDirectory() as work:
        model = write_model(Path(work, "model"), *NETWORK)
        rows = table(model, Path(work, "out"))
    put(PAGE, "cost", "\n".join(rows))
    print("\n".join(rows))


def table(model: Path, out: Path) -> list[str]:
    """Return the rows, each the median of ratios within a round."""

    def run(method: str = "rtn", samples: int = 0, *, verify: bool = True) -> None:
        shutil.rmtree(out, ignore_errors=True)
        fields = recipe(method, W4, samples)
        if samples:
            fields["calibration"]["max_seq_length"] = 128
        qframe.quantize(model, fields, out=out, threads=THREADS, verify=verify)

    def without_keeping() -> None:
        with mock.patch.object(Unfinished, "add", return_value=None):
            run()

    def hashing() -> None:
        folder = ModelFolder(model)
        for name in folder.tensors:
            folder.fingerprint(name)

    run()  # what is loaded once is there
    shares: dict[str, list[float]] = {
        "hashing the model, to recognize it": [],
        "keeping blocks": [],
        "reading the folder once more, from the disk": [],
    }
    for _ in range(ROUNDS):
        whole = seconds(run)
        found = (seconds(hashing), whole - seconds(without_keeping))
        last = whole - seconds(lambda: run(verify=False))
        for share, each in zip(shares.values(), (*found, last), strict=True):
            share.append(each / whole)
    times = [seconds(lambda: run("gptq", 8)) / seconds(run) for _ in range(CALIBRATED_ROUNDS)]
    longer = statistics.median(times)
    rows = [f"| | of an RTN run | of a GPTQ run, which takes {longer:.0f} times as long |"]
    rows.append("|---|---|---|")
    for name, share in shares.items():
        part = 100 * statistics.median(share)
        rows.append(f"| {name} | {part:.0f} % | {part / longer:.1f} % |")
    return rows


def seconds(act: Callable[[], None]) -> float:
    """Return how long it takes to do something."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
