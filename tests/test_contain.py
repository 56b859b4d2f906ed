"""A plugin that hangs, crashes or wants all memory is a finding, and the suite goes on after it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from qframe.errors import PluginError, UnknownNameError
from qframe_conformance import wire
from qframe_conformance.contain import check_contained
from qframe_conformance.report import Counterexample, Record
from qframe_conformance.target import Target

PLUGIN = '''
"""A rounder that does something in each scenario, and a suite in the place of the real one."""

import ctypes, os, sys, time
from hypothesis import strategies as st
from qframe import Capabilities, hookimpl
from qframe_conformance import suite
from qframe_conformance.checks import check, require
from qframe_conformance.engine import Scenario
from qframe_conformance.report import Counterexample

class Case:
    def __init__(self, plugin, scenario):
        self.plugin, self.scenario = plugin, scenario

    def counterexample(self, check):
        return Counterexample(snippet=f"print({self.scenario!r})\\n")

def scenarios(plugin):
    return [Scenario(n, st.just(Case(plugin, n)), n) for n in DEEDS]

@check("rounder", "structure")
def answers(case):
    """The answer is the name of the scenario."""
    answer = case.plugin.round(case.scenario, None)
    require(answer == case.scenario, f"it said {answer}")

suite.MODULES["rounder"] = __name__

DEFINITIONS

class Mine:
    name = "mine"
    needs = frozenset()
    capabilities = Capabilities()

    def round(self, problem, rng):
        DEEDS[problem]()
        return problem

@hookimpl
def qframe_rounders():
    return [Mine()]
'''

DEEDS = {
    "nothing": "pass",
    "hang": "while True: time.sleep(1)",
    "exit 0": "os._exit(0)",
    "exit 3": "os._exit(3)",
    "abort": "os.abort()",
    "raise": "raise ValueError('no')",
    "segfault": "ctypes.string_at(0)",
    "kill": "os.kill(os.getpid(), 9)",
    "memory": """
        kept = []
        while True:
            kept.append(bytearray(1 << 24))
        """,
    "print": """
        print('{"done": true}', flush=True)
        os.write(1, b'{"done": true}')
        os.system("echo '{}'")
        sys.stderr.write("a" * (1 << 20))
        """,
    "sys.exit": "sys.exit(0)",
    "fork": "os.fork()",
    "fork and stay": """
        child = os.fork()
        while child == 0:
            time.sleep(1)
        with open(__file__ + ".pid", "w") as file:
            file.write(str(child))
        os._exit(5)
        """,
    "nothing again": "pass",
}
HARMLESS = ("nothing", "print", "fork", "nothing again")
SECONDS = 15.0  # of silence until it is called a hang; the harmless ones take thousandths


def write(file: Path, deeds: dict[str, str]) -> Target:
    """Write a plugin with a scenario for each deed."""
    lines = []
    for number, deed in enumerate(deeds.values()):
        body = textwrap.indent(textwrap.dedent(deed).strip(), "    ")
        lines.append(f"def deed_{number}():\n{body}\n")
    table = ", ".join(f"{name!r}: deed_{number}" for number, name in enumerate(deeds))
    lines.append(f"DEEDS = {{{table}}}")
    file.write_text(PLUGIN.replace("DEFINITIONS", "\n".join(lines)))
    return Target(name="mine", files=[str(file)])


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plugin") / "mine.py", DEEDS)


@pytest.fixture(scope="module")
def report(target):
    """All deeds, one after the other."""
    return check_contained(
        target, seed=7, seconds=SECONDS, memory=1 << 28, restarts=len(DEEDS), shrink=False
    )


@pytest.fixture
def record(report):
    """Return the one record of a scenario."""

    def find(scenario):
        [found] = [record for record in report.records if record.scenario == scenario]
        return found

    return find


def test_every_scenario_has_its_record_in_order(report):
    assert [record.scenario for record in report.records] == list(DEEDS)
    assert (report.plugin, report.kind, report.seed) == ("mine", "rounder", 7)
    assert "mine.py" in report.code
    assert not report.ok


@pytest.mark.parametrize("scenario", HARMLESS)
def test_what_does_no_harm_holds(record, scenario):
    """What a plugin prints is not taken for a message, and a copy of the process says nothing."""
    assert record(scenario).status == "held"


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("hang", [f"did not come back within {SECONDS:g} s", "in deed_1 at ", "mine.py"]),
        ("exit 0", ["ended with exit code 0"]),
        ("exit 3", ["ended with exit code 3"]),
        ("abort", ["ended by SIGABRT", "in deed_4 at "]),
        ("segfault", ["ended by SIGSEGV", "in deed_6 at "]),
        ("kill", ["ended by SIGKILL", "when memory is short"]),
        ("memory", ["out of memory", "MemoryError"]),
        ("fork and stay", ["ended with exit code 5"]),
    ],
)
def test_a_plugin_that_does_not_come_back_is_found_out(record, scenario, words):
    found = record(scenario)
    assert found.status == "crashed"
    for word in words:
        assert word in found.message
    assert f"scenarios=[{scenario!r}]" in found.counterexample.snippet


@pytest.mark.parametrize(
    ("scenario", "message"), [("raise", "ValueError: no"), ("sys.exit", "SystemExit: 0")]
)
def test_an_error_is_a_violation_with_its_counterexample(record, scenario, message):
    found = record(scenario)
    assert (found.status, found.message) == ("failed", f"raised {message}")
    assert found.counterexample.snippet == f"print({scenario!r})\n"


def test_nothing_is_left_running(report, target):
    pid = int(Path(target.files[0] + ".pid").read_text())
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(1 / 16)  # it has been told; until it is gone this waits


def test_after_too_many_crashes_the_rest_is_given_up(tmp_path):
    target = write(tmp_path / "mine.py", dict.fromkeys(("a", "b", "c", "d"), "os.abort()"))
    report = check_contained(target, restarts=1)
    assert [record.scenario for record in report.records] == ["a", "b", "c"]
    assert "given up after 2 crashes; not tried: c, d" in report.records[-1].message


def test_a_plugin_that_ends_the_process_while_it_is_loaded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import os\nos._exit(9)\n")
    with pytest.raises(PluginError, match="loading 'mine': the process ended with exit code 9"):
        check_contained(Target(name="mine", files=[str(file)]))


def test_errors_of_the_other_process_are_those_of_this_one(target):
    with pytest.raises(UnknownNameError, match="did you mean 'mine'"):
        check_contained(Target(name="mind", files=target.files))


@pytest.mark.parametrize("ratio", [None, 0.5, float("inf")])
def test_records_survive_the_pipe(ratio):
    arrays = {"x": np.array([[1, np.nan], [np.inf, -0.0]], np.float32), "n": np.zeros((0, 3), int)}
    record = Record(
        check="c",
        plugin="p",
        scenario="s",
        level="bound",
        theorem="B1",
        promise="It holds.",
        status="failed",
        ratio=ratio,
        counterexample=Counterexample(snippet="pass", arrays=arrays),
    )
    back = wire.record(json.loads(json.dumps(wire.plain(record), allow_nan=False)))
    assert (back.ratio, back.status, back.id) == (ratio, "failed", "c[p-s]")
    for name, array in arrays.items():
        found = back.counterexample.arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


def test_importing_the_command_is_light():
    """`qframe --help` imports it."""
    code = (
        "import sys, qframe_conformance.command\n"
        "print([m for m in ('torch', 'numpy', 'hypothesis', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
