"""What runs take at their peak, each in a process of its own: as predicted, whatever the depth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qframe.budget import activation_budget
from qframe.peak import peak_memory
from qframe.pipeline import plan_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of peaks on Linux")

MISS = 15 / 100  # of a peak: what a prediction may be wrong by
DEEPER = 5 / 100  # more, with four times the layers
W4 = {"num_bits": 4, "group_size": 32}
TEXT = {"num_calibration_samples": 16, "max_seq_length": 128}
RTN, GPTQ = {"method": "rtn", "scheme": W4}, {"method": "gptq", "scheme": W4, "calibration": TEXT}

RUN = """
import json, resource, sys
from pathlib import Path
asked = json.loads(sys.argv[1])
import qframe
if asked["limit"]:  # of what is private and can be written, beside libraries that are loaded by now
    qframe.quantize(asked["first"], asked["recipe"], out=asked["out"] + "-first", threads=1)
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + asked["limit"], now + asked["limit"]))
try:
    qframe.quantize(asked["model"], asked["recipe"], out=asked["out"], **asked["more"])
except BaseException:
    status = Path("/proc/self/status").read_text()
    sys.stderr.write(f"limit {resource.getrlimit(resource.RLIMIT_DATA)}\\n{status}")
    raise
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
"""


def peak(folder: Path, recipe: dict, out: Path, *, limit=None, first=None, **more) -> int:
    """Quantize in a process of its own; return its peak in bytes.

    limit   bytes that the system gives it beyond what quantizing `first` has left
    """
    asked = {"model": str(folder), "recipe": recipe, "out": str(out), "more": more}
    asked |= {"limit": limit, "first": str(first)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_a_dry_run_predicts_the_peak(tiny, tmp_path, recipe):
    folder = tiny.write_llama(tmp_path / "model")
    said = sum(peak_memory(plan_job(folder, recipe), 1).values())
    took = peak(folder, recipe, tmp_path / "out", threads=1)
    assert abs(said - took) <= MISS * took


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_four_times_the_layers_take_no_more(tiny, tmp_path, recipe):
    few, many = (
        peak(tiny.write_llama(tmp_path / f"{n}", layers=n), recipe, tmp_path / f"{n}-out")
        for n in (2, 8)
    )
    assert many <= (1 + DEEPER) * few


def test_more_weights_than_the_system_gives(tmp_path, wide, tiny_llama):
    """Four times as many: one layer after another is read, rounded, written, and let go."""
    folder, weights = wide(tmp_path / "wide")
    limit = weights // 4
    peak(folder, RTN, tmp_path / "out", limit=limit, first=tiny_llama, threads=1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_budget_is_kept(tmp_path, wide):
    """Activations alone are more than what is left beside the program."""
    folder, _ = wide(tmp_path / "model", layers=2)
    recipe = {**GPTQ, "calibration": {"num_calibration_samples": 256, "max_seq_length": 128}}
    job = plan_job(folder, recipe)
    whole, least = (sum(peak_memory(job, 1, budget).values()) for budget in (None, 0))
    limit = (whole + least) // 2
    assert activation_budget(job, None, limit, 1) is not None
    plain = peak(folder, recipe, tmp_path / "plain", threads=1)
    took = peak(folder, recipe, tmp_path / "out", threads=1, max_memory=limit)
    assert took <= (1 + MISS) * limit
    assert took < plain
