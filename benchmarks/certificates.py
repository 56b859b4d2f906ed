"""What certificates cost: the share of the time of quantizing a real model, method by method.

    python benchmarks/certificates.py                       # SmolLM2-135M: RTN and GPTQ, 4 bits
    python benchmarks/certificates.py --methods rtn --runs 9 --threads 1

Layers are certified beside the pass through the network, so the seconds of that stage say little.
Instead each method runs in turn with its claims and without any, which makes no other difference,
and the share is 1 - without / with, pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qframe import Host, hookimpl
from qframe.demo import CALIBRATION_SAMPLES, GROUP_SIZE, WINDOW
from qframe.embedded import model_folder
from qframe.pipeline import Result, quantize
from qframe.report.certificates import certificate_text


class WithoutClaims:
    """A plugin with a twin of a rounder that claims nothing."""

    def __init__(self, rounder: Any) -> None:
        silent = type(f"Silent{type(rounder).__name__}", (type(rounder),), {"claims": ()})
        self.twin = copy.copy(rounder)
        object.__setattr__(self.twin, "__class__", silent)
        object.__setattr__(self.twin, "name", f"{rounder.name}-silent")

    @hookimpl
    def qframe_rounders(self) -> Iterable[Any]:
        return [self.twin]


def run(folder: Path, host: Host, method: str, bits: int, threads: int | None) -> Result:
    recipe: dict[str, Any] = {
        "method": method,
        "scheme": {"num_bits": bits, "group_size": GROUP_SIZE},
    }
    if host.get("rounder", method).needs:
        recipe["calibration"] = {
            "num_calibration_samples": CALIBRATION_SAMPLES,
            "max_seq_length": WINDOW,
        }
    with tempfile.TemporaryDirectory() as temporary:
        return quantize(folder, recipe, out=Path(temporary) / "out", host=host, threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    folder, host = model_folder(), Host.discover()
    for method in given.methods:
        silent = WithoutClaims(host.get("rounder", method))
        host.add(silent, silent.twin.name)
        run(folder, host, silent.twin.name, given.bits, given.threads)  # what is loaded once
        shares = []
        for number in range(given.runs):
            names = [method, silent.twin.name]
            pair = {  # every second pair the other way round
                name: run(folder, host, name, given.bits, given.threads)
                for name in (reversed(names) if number % 2 else names)
            }
            certified, plain = (pair[name] for name in names)
            if any(layer.certificates for layer in plain.report.layers):
                raise SystemExit("the twin was certified as well: there is nothing to compare")
            shares.append(1 - plain.report.seconds["total"] / certified.report.seconds["total"])
        print(
            f"{method} {given.bits} bits: certificates take {statistics.median(shares):.1%} of the "
            f"time (median of {given.runs} pairs, {min(shares):.1%} to {max(shares):.1%})\n"
            f"  {certificate_text(certified.report.layers)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
