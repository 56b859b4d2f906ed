"""kill -9 at any moment: the run is gone on with, to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qframe.unfinished import kept_blocks
from tests.survival.conftest import FLAGS

REPLACED = 5 * 2 + 2
"""Files that get their names in a run: of five blocks and their list each, the list once more, and
the output."""

POINTS = [
    *map(str, sorted(random.Random(2).sample(range(2, 2 * REPLACED - 1), 5))),
    str(2 * REPLACED - 2),  # right before the output gets its name
    str(2 * REPLACED - 1),  # and right after
    *(f"t{random.Random(i).uniform(0.1, 1.5):.2f}" for i in range(2)),
]
SCRIPT = Path(__file__).parent.parent / "comparison" / "killed.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture(scope="module")
def left(tmp_path_factory, model):
    """The folder with what each killed run left, and how each ended."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *POINTS, "--", "quantize", str(model), "-o", "OUT", *FLAGS],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "QFRAME_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    ended = {point: int(state) for point, state in lines}
    return folder, ended, {point: kept_blocks(folder / f"{point}.out") for point in POINTS}


@pytest.fixture(scope="module")
def whole(undisturbed):
    return undisturbed(
        {
            "method": "gptq",
            "scheme": {"num_bits": 4, "group_size": 32},
            "calibration": {"num_calibration_samples": 8, "max_seq_length": 32},
        }
    )


@pytest.mark.parametrize("point", POINTS)
def test_after_a_kill_the_same_bytes(left, whole, run, model, contents, point):
    folder, ended, kept = left
    out = folder / f"{point}.out"
    if not point.startswith("t"):
        assert ended[point] == -signal.SIGKILL
    elif ended[point] == 0:  # a fast machine may be done before the time is up
        assert contents(out).keys() == whole.keys()
        return
    resumed = run("quantize", model, "-o", out, *FLAGS, "--resume")
    assert resumed.code == 0, resumed.err
    if kept[point] is not None and kept[point][0] > 1:
        assert f"{kept[point][0]} of 5 blocks are kept" in resumed.said
    assert contents(out) == whole
    assert not list(folder.glob(f".{point}.out*"))


def test_the_kills_were_spread_over_the_run(left):
    """Else the test above shows less than it says."""
    assert len({None if kept is None else kept[0] for kept in left[2].values()}) >= 4
