"""kill -9 at any point, two runs at once: the table is the same, and little is done again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RENAMES = 4 + 1 + 4 * 2 + 1 + 3
"""Of an undisturbed run: windows of logits, the reference, a folder and an entry for each cell, the
distributions, the report."""

POINTS = [
    *map(str, sorted(random.Random(1).sample(range(2 * RENAMES), 5))),
    *(f"t{random.Random(i).uniform(0.1, 6):.2f}" for i in range(2)),
]
SCRIPT = Path(__file__).with_name("killed.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def killed(folder, points, arguments):
    """Run the script; return point -> how its processes ended."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *points, "--", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {point: [int(state) for state in states] for point, *states in lines}


@pytest.fixture(scope="module")
def left(tmp_path_factory, model, texts, matrix):
    """The folder with what each killed run left, how each ended, and how many cells it left."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["compare", str(model), "-o", "OUT", *texts, *matrix()]
    ended = killed(folder, POINTS, arguments)
    return folder, ended, [len(entries(folder / f"{point}.out")) for point in POINTS]


def entries(out):
    return {file.name: file.read_bytes() for file in (out / "cells").glob("*.json")}


@pytest.mark.parametrize("point", POINTS)
def test_after_a_kill_the_table_is_the_same_and_finished_cells_are_kept(
    left, compare, finished, figures, point
):
    folder, ended, _ = left
    out = folder / f"{point}.out"
    if not point.startswith("t"):  # a fast machine may be done before the time is up
        assert ended[point] == [-signal.SIGKILL]
    before = entries(out)
    logits = {file: file.stat().st_ino for file in out.glob("logits/*/*.f32")}
    resumed = compare(out)
    assert resumed.code == 0, resumed.err
    assert "damaged" not in resumed.said
    assert len(resumed.made()) == 4 - len(before)
    after = entries(out)
    assert {name: after[name] for name in before} == before
    assert {file: file.stat().st_ino for file in logits} == logits
    assert figures(out) == figures(finished)
    assert list((out / "work").iterdir()) == []
    assert not list(out.rglob("*.tmp"))


def test_the_kills_were_spread_over_the_run(left):
    """Else the test above shows less than it says."""
    assert len(set(left[2])) >= 3


def test_two_runs_at_once_share_the_work_and_disturb_nothing(
    tmp_path, model, texts, matrix, finished, figures, compare
):
    arguments = ["compare", str(model), "-o", "OUT", *texts, *matrix()]
    ended = killed(tmp_path, ["-&-"], arguments)
    logs = [(tmp_path / f"-&-.{i}.log").read_text() for i in range(2)]
    assert ended == {"-&-": [0, 0]}, logs
    made = [line for log in logs for line in log.splitlines() if line.endswith(": quantizing")]
    assert len(made) == 4
    out = tmp_path / "-&-.out"
    assert figures(out) == figures(finished)
    assert compare(out).made() == []
    assert json.loads((out / "results.json").read_text())["cells"]
    assert list((out / "work").iterdir()) == []
