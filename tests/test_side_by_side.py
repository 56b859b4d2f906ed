"""Plugins that are checked several at a time: one that ends its process takes no other along."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from qframe.errors import PluginError, UnknownNameError
from qframe.host import Host
from qframe_conformance.contain import check_contained
from qframe_conformance.crosscheck import Apart, crosscheck
from qframe_conformance.process import Place
from qframe_conformance.side_by_side import side_by_side
from qframe_conformance.target import Target
from tests.test_contain import write

KERNELS = """
import copy, os

from qframe import hookimpl
from qframe_plugins.kernels import torch_ops

[TORCH] = [each for each in torch_ops.qframe_kernels() if each.op == "hadamard"]


def machine(backend, deed):
    kernel = copy.copy(TORCH)
    kernel.backend = backend
    kernel.function = lambda x, signs, block: deed(TORCH.function(x, signs, block))
    return kernel


@hookimpl
def qframe_kernels():
    several = machine("several", lambda y: y)
    several.targets = {
        "right": machine("several", lambda y: y),
        "dies": machine("several", lambda y: os.abort()),
        "doubles": machine("several", lambda y: 2 * y),
    }
    return [several, machine("one", lambda y: 2 * y)]
"""


def pid_of(deed: str) -> str:
    """Return a deed that also writes the number of its process to the plugin's folder."""
    return f"open(os.path.join(os.path.dirname(__file__), str(os.getpid())), 'w')\n{deed}"


def processes(folder) -> set[int]:
    return {int(each.name) for each in folder.iterdir() if each.name.isdigit()}


def test_a_group_has_one_process_and_reports_come_in_their_order(tmp_path):
    groups = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        target = write(tmp_path / name / "mine.py", {f"{name} deed": pid_of("pass")})
        groups.append([target] * 3)
    began = []
    found = side_by_side(groups, processes=2, begins=began.append, seed=5)
    assert [[report.records[0].scenario for report in group] for group in found] == [
        ["a deed"] * 3,
        ["b deed"] * 3,
    ]
    assert all(report.ok and report.seed == 5 for group in found for report in group)
    assert sorted(target.files for target in began) == sorted(t.files for g in groups for t in g)
    first, second = processes(tmp_path / "a"), processes(tmp_path / "b")
    assert len(first) == len(second) == 1
    assert first != second
    assert os.getpid() not in first | second


def test_a_process_that_is_taken_along_is_replaced(tmp_path):
    """What follows in its group is checked all the same, in a new one."""
    crash = write(tmp_path / "crash.py", {"dies": pid_of("os.abort()"), "after": "pass"})
    well = write(tmp_path / "well.py", {"lives": pid_of("pass")})
    [[first, died, last]] = side_by_side([[well, crash, well]], processes=1)
    assert [record.status for record in died.records] == ["crashed", "held"]
    assert "SIGABRT" in died.records[0].message
    assert first.ok
    assert last.ok
    assert len(processes(tmp_path)) == 2  # one that died, and the one after it


def test_threads_are_shared_and_a_case_is_counted_in_its_own_job(tmp_path, monkeypatch):
    monkeypatch.setenv("QFRAME_THREADS", "6")
    say = "open(__file__ + os.environ['QFRAME_THREADS'] + os.environ['OMP_NUM_THREADS'], 'w')"
    well, dies = tmp_path / "well.py", tmp_path / "dies.py"
    last = Target(name="mine", files=[str(dies)])
    dies.write_text("import os\nos._exit(9)\n")
    groups = [[write(well, {"says": say}), last], [write(tmp_path / "other.py", {"x": "pass"})]]
    with pytest.raises(PluginError, match=r"process ended with exit code 9$"):
        side_by_side(groups, processes=2)
    assert Path(f"{well}33").exists()


def test_time_and_memory_are_limited_anew_for_each(tmp_path):
    wants = "kept = bytearray(1 << 29)"
    large, small = (write(tmp_path / f"{n}.py", {"wants": wants}) for n in ("large", "small"))
    with Place(30) as place:
        for _ in range(2):
            assert check_contained(large, memory=1 << 31, place=place).ok
            [record] = check_contained(small, memory=1 << 27, place=place).records
            assert record.status == "crashed"
            assert "out of memory" in record.message
    Path(large.files[0]).write_text(f"{wants}\n{Path(large.files[0]).read_text()}")
    with Place(30) as place:  # what a plugin takes while it is loaded is not limited
        check_contained(small, memory=1 << 27, place=place)
        assert check_contained(large, memory=1 << 31, place=place).ok
    hang = write(tmp_path / "hang.py", {"hang": "while True: time.sleep(1)"})
    [[report]] = side_by_side([[hang]], processes=1, seconds=1.0)
    assert "did not come back within 1 s" in report.records[0].message


def test_a_plugin_finds_its_stdin_empty(tmp_path):
    target = write(tmp_path / "mine.py", {"reads": "assert sys.stdin.read() == ''"})
    assert check_contained(target, seconds=30).ok


def test_an_error_ends_the_others_at_once(tmp_path):
    """The first group would be there for as long as its time limit."""
    hang = write(tmp_path / "hang.py", {"hang": pid_of("while True: time.sleep(1)")})
    unknown = Target(name="mind", files=hang.files)
    with pytest.raises(UnknownNameError, match="did you mean 'mine'"):
        side_by_side([[hang], [unknown, hang]], processes=2, seconds=1e6)
    for pid in processes(tmp_path):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(1 / 16)  # it has been told; until it is gone this waits


def test_a_place_that_was_left_does_nothing_more(tmp_path):
    target = write(tmp_path / "mine.py", {"nothing": "pass"})
    with Place(30) as place:
        assert check_contained(target, place=place).ok
    with pytest.raises(PluginError, match="were ended"):
        check_contained(target, place=place)


# Kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(KERNELS, encoding="utf-8")
    return str(file)


def test_each_target_of_a_kernel_is_a_row_whatever_the_others_do(kernels):
    began = []
    found = crosscheck(
        Host.discover([kernels]),
        ops=["hadamard"],
        backends=["one", "several"],
        progress=began.append,
        apart=Apart(files=[kernels], processes=1),
    )
    rows = {row.label: row.report for row in found.rows}
    assert list(rows) == ["one", "several right", "several dies", "several doubles"]
    assert [label for label, report in rows.items() if report.ok] == ["several right"]
    assert {record.status for record in rows["several dies"].records} == {"crashed"}
    # What has targets, as it is simulated, takes longest and comes first.
    assert began == [
        "[1/4] hadamard several right",
        "[2/4] hadamard several dies",
        "[3/4] hadamard several doubles",
        "[4/4] hadamard one",
    ]


def test_apart_or_here_a_row_says_the_same(kernels):
    """Also of what other kernels answer, where one of them is wrong."""
    wanted = {"ops": ["hadamard"], "backends": ["one", "torch"], "seed": 3}
    host = Host.discover([kernels])
    here = crosscheck(host, **wanted)
    apart = crosscheck(host, **wanted, apart=Apart(files=[kernels], processes=2))
    for one, other in zip(here.rows, apart.rows, strict=True):
        assert one.label == other.label
        plain = [
            [(r.id, r.status, r.examples, r.ratio, r.message) for r in row.report.records]
            for row in (one, other)
        ]
        assert plain[0] == plain[1]
        assert one.report.code == other.report.code
    assert any("furthest from float64: one" in r.message for r in apart.rows[0].report.failures)


def test_a_machine_that_a_kernel_has_not(kernels):
    target = Target(name="hadamard/several", kind="kernel", files=[kernels], machine="rigth")
    with pytest.raises(UnknownNameError, match="no target 'rigth'; did you mean 'right'"):
        target.load()
    _, plugin, _ = replace(target, machine="right").load()
    assert plugin.backend == "several"
