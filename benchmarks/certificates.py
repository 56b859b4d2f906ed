"""What certificates cost: their share of the time of quantizing a real model, method by method.

    python benchmarks/certificates.py                       # SmolLM2-135M: RTN and GPTQ, 4 bits
    python benchmarks/certificates.py --methods rtn --runs 5 --threads 1

Every run records its seconds by stage for every layer; the share is the stage "certify" over the
whole run, in the same run, so a busy machine slows both. Shown are the run with the median share
and what its certificates say.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from qframe.demo import CALIBRATION_SAMPLES, GROUP_SIZE, WINDOW
from qframe.embedded import model_folder
from qframe.pipeline import Result, quantize
from qframe.report.certificates import certificate_text


def run(folder: Path, method: str, bits: int, threads: int | None) -> Result:
    recipe = {
        "method": method,
        "scheme": {"num_bits": bits, "group_size": GROUP_SIZE},
        "on_violated_certificate": "warn",
    }
    if method != "rtn":
        recipe["calibration"] = {
            "num_calibration_samples": CALIBRATION_SAMPLES,
            "max_seq_length": WINDOW,
        }
    with tempfile.TemporaryDirectory() as temporary:
        return quantize(folder, recipe, out=Path(temporary) / "out", threads=threads)


def stages(result: Result) -> dict[str, float]:
    """Return seconds by stage, summed over the layers, and of the whole run."""
    found: Counter[str] = Counter()
    for layer in result.report.layers:
        found.update(layer.seconds)
    return {**found, "total": result.report.seconds["total"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    folder = model_folder()
    for method in given.methods:
        runs = [run(folder, method, given.bits, given.threads) for _ in range(given.runs)]
        runs.sort(key=lambda result: stages(result)["certify"] / stages(result)["total"])
        result = runs[len(runs) // 2]
        seconds = stages(result)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        share = 100 * seconds["certify"] / seconds["total"]
        print(f"{method} {given.bits} bits: certificates take {share:.1f} % ({parts} s)")
        print(f"  {certificate_text(result.report.layers)}")


if __name__ == "__main__":
    main()
