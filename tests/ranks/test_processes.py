"""Processes that do a run together: the same bytes as one alone, and no one is left waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import qframe
from qframe.unfinished import kept_blocks

LONG = 240  # seconds after which processes that wait for one another are ended
BLOCKS = 3
TEXT = {"num_calibration_samples": 70, "max_seq_length": 128}  # five chunks, and one held out
W4 = {"num_bits": 4, "group_size": 32}
RECIPES = {
    "rounding": {"method": "rtn", "scheme": W4},
    "compensation": {"method": "gptq", "scheme": W4, "calibration": TEXT},
    "a scale that goes into norms and layers": {
        "method": "awq+gptq",
        "scheme": W4,
        "calibration": TEXT,
        "keep_statistics": True,
    },
    "inputs of the original network": {"method": "qronos", "scheme": W4, "calibration": TEXT},
    "stored scales of inputs": {"scheme": "W8A8_STATIC", "calibration": TEXT},
    "columns that are kept": {
        "method": "llm_int8",
        "scheme": "W8A8",
        "calibration": TEXT,
        "options": {"threshold": 4.0},
    },
    "bits by layer": {
        "method": "rtn",
        "scheme": W4,
        "target_bits": 4.6,
        "calibration": {**TEXT, "num_calibration_samples": 40},
    },
}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("ranks") / "model", layers=BLOCKS)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Return the files that one process makes of a recipe, by its name; each is run once."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp("alone") / "out"
            qframe.quantize(model, RECIPES[name], out=out)
            made[name] = contents(out)
        return made[name]

    return run


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def processes(model, tmp_path):
    """Start so many processes on a plan; return their exit codes and what they said."""

    def run(size, runs, *, launcher=False):
        file = tmp_path / "plan.json"
        plan = {"model": str(model), "out": str(tmp_path), "runs": runs}
        file.write_text(json.dumps(plan), encoding="utf-8")
        worker = [str(Path(__file__).with_name("worker.py")), str(file)]
        if launcher:
            flags = ["--standalone", "--nproc-per-node", str(size)]
            commands = [[sys.executable, "-m", "torch.distributed.run", *flags, *worker]]
        else:
            commands = [[sys.executable, *worker]] * size
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        started = []
        for rank, command in enumerate(commands):
            own = {} if launcher else {**shared, "RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            started.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **own},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            said = [process.communicate(timeout=LONG)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        return [process.returncode for process in started], said

    return run


@pytest.mark.parametrize(
    ("size", "launcher", "names"),
    [(2, True, list(RECIPES)), (4, False, ["a scale that goes into norms and layers"])],
)
def test_the_bytes_do_not_depend_on_how_many_there_are(
    alone, processes, tmp_path, size, launcher, names
):
    recipes = [RECIPES[name] for name in names]
    codes, said = processes(size, [{"recipe": each} for each in recipes], launcher=launcher)
    assert not any(codes), said
    for number, name in enumerate(names):
        assert contents(tmp_path / str(number)) == alone(name), (name, said)
    assert kept_blocks(tmp_path / "0") is None


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_the_run_and_another_number_goes_on(
    model, alone, processes, tmp_path, killed
):
    recipe = RECIPES["compensation"]
    codes, said = processes(2, [{"recipe": recipe, "killed": [killed, 1]}])
    other = 1 - killed
    assert (codes[killed], codes[other]) == (-9, 0)
    assert f"run 0: RanksError: rank {other} (process " in said[other]
    assert "another one is gone" in said[other]
    assert kept_blocks(tmp_path / "0") is not None
    assert not (tmp_path / "0").exists()
    if killed:
        qframe.quantize(model, recipe, out=tmp_path / "0", state="resume")
    else:
        codes, said = processes(2, [{"recipe": recipe, "options": {"state": "resume"}}])
        assert not any(codes), said
    assert contents(tmp_path / "0") == alone("compensation")


@pytest.mark.parametrize(
    ("stopped", "told"),
    [
        (0, "the store in which ranks say that they are alive has not answered for"),
        (1, "nothing was heard of rank 1 (process "),
    ],
)
def test_one_that_is_stopped_ends_the_run_of_the_other(processes, stopped, told):
    """The store is rank 0's where there is no launcher: then it does not answer either."""
    run = {"recipe": RECIPES["rounding"], "stopped": [stopped, 1], "gone": 3.0, "until": 15}
    codes, said = processes(2, [run])
    other = 1 - stopped
    assert (codes[stopped], codes[other]) == (-9, 0), said
    assert told in said[other]


def test_one_that_takes_long_is_waited_for(processes, tmp_path):
    """It says that it is alive: longer than it takes to be gone, or to connect, is not too long."""
    run = {"recipe": RECIPES["rounding"], "slow": [1, 1], "gone": 2.0, "until": 7}
    codes, said = processes(2, [run])
    assert codes == [0, 0], said
    assert "run 0: " not in said[0] + said[1]
    assert (tmp_path / "0" / "qframe.json").is_file()


def test_one_that_fails_when_the_others_have_done_all_does_not_keep_them(processes, tmp_path):
    """Its last progress is told when there is nothing left to meet for but the end."""
    runs = [
        {"recipe": RECIPES["rounding"], "failed": [1, BLOCKS]},
        {"recipe": RECIPES["rounding"], "options": {"state": "restart", "overwrite": True}},
    ]
    codes, said = processes(2, runs)
    assert codes == [0, 0], said
    assert "run 0: AnythingError: which it was" in said[1]
    assert "has failed: AnythingError('which it was')" in said[0]
    assert "run 1: " not in said[0] + said[1]
    assert (tmp_path / "1" / "qframe.json").is_file()


def test_what_is_wrong_is_told_on_all_of_them_and_no_one_waits(processes, tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "in the way").touch()
    runs = [
        {"recipe": RECIPES["rounding"], "failed": [1, 1]},
        {"recipe": RECIPES["compensation"], "elsewhere": {"seed": 7}},
        {"recipe": {"method": "autoround_block", "scheme": W4, "calibration": TEXT}},
        {"recipe": RECIPES["rounding"]},
    ]
    codes, said = processes(2, runs)
    assert codes == [0, 0], said

    first, second = ([line for line in each.splitlines() if line[:4] == "run "] for each in said)
    assert second[0] == "run 0: AnythingError: which it was"
    assert first[0].startswith("run 0: RanksError: rank 0 (process ")
    assert "has failed: AnythingError('which it was')" in first[0]
    for each in (first, second):
        assert "recipe.seed is 42 on rank 0 and 7 on rank 1" in each[1]
        assert "UnsupportedError: method 'autoround_block' learns whole blocks" in each[2]
    assert first[3].startswith("run 3: OutputError: ")
    assert "has failed: output folder" in second[3]
    assert len(first) == len(second) == len(runs)
    kept = [kept_blocks(tmp_path / str(number)) is not None for number in range(len(runs))]
    assert kept == [True, False, False, False]
