"""`qframe new-plugin`: what it writes works at once, and keeps its promises."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qframe.cli.new_plugin import KINDS
from qframe.host import KINDS as HOST_KINDS
from qframe.host import Host, object_name
from qframe_conformance import check_plugin
from qframe_conformance.checks import Violation
from qframe_conformance.engine import explore
from qframe_conformance.reproduce import script
from qframe_conformance.suite import MODULES, prepare

ROOT = Path(__file__).parent.parent.parent


def test_there_is_a_template_for_what_people_write():
    assert {kind.replace("-", " ") for kind in KINDS} <= set(HOST_KINDS)


@pytest.fixture
def written(run, tmp_path):
    """Write a plugin called my-method, and return its folder."""

    def write(kind):
        done = run("new-plugin", "my-method", "--kind", kind, "-o", tmp_path / kind)
        assert done.code == 0, done.said
        return tmp_path / kind

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_the_suite(written, kind):
    folder = written(kind)
    host = Host.discover(files=[folder / "my_method.py"])
    kind = kind.replace("-", " ")
    [name] = host.records[-1].provides[kind]
    report = check_plugin(host.get(kind, name), profile="fast")
    assert report.ok, str(report)
    assert (report.kind, report.plugin) == (kind, object_name(kind, host.get(kind, name)))
    assert kind in MODULES


@pytest.mark.parametrize("kind", KINDS)
def test_a_counterexample_of_every_kind_runs_as_it_is(written, kind, tmp_path):
    """For a check that holds, on some case of every scenario, it says so."""
    folder = written(kind)
    host = Host.discover(files=[folder / "my_method.py"])
    kind = kind.replace("-", " ")
    [name] = host.records[-1].provides[kind]
    run = prepare(host.get(kind, name), kind=kind)

    def seen(case):
        raise Violation("seen")

    for scenario in run.scenarios()[:2] + run.scenarios()[-2:]:
        objections = run.objections(scenario)
        check = next(each for each in run.checks if each.name not in objections)
        spy = replace(check, function=seen)
        observed = explore(scenario, [spy], run.search)[check.name]
        example = observed.case.counterexample(check.name)
        record = replace(run.crash(scenario.id, "x"), check=check.name, counterexample=example)
        arrays = tmp_path / "arrays.npz"
        np.savez(arrays, **example.arrays)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            text = script(record, run.code(), file=arrays.name if example.arrays else None)
            exec(
                compile(text, tmp_path / "script.py", "exec"), {"__file__": tmp_path / "script.py"}
            )
        assert said.getvalue().startswith(f"{check.name} holds"), said.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_meets_the_rules_of_this_house(written, kind):
    folder = written(kind)
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", folder],
            capture_output=True,
            text=True,
        )
        # A test function needs no docstring.
        said = [line for line in done.stdout.splitlines() if line[:1].isalpha()]
        assert [line for line in said if not line.startswith(("D103", "Found", "All"))] == []


def test_the_package_is_found_by_its_entry_point(written):
    folder = written("rounder")
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-method"
    assert project["project"]["entry-points"]["qframe"] == {"my-method": "my_method"}
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == ["my_method.py"]


def test_listing_it_imports_no_torch(written):
    code = (
        "import sys\n"
        "from qframe.host import Host\n"
        f"host = Host.discover(files=[{str(written('rounder') / 'my_method.py')!r}])\n"
        "print(host.names('rounder'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "my-method" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_the_next_step_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("new-plugin", "my-method")
    assert "qframe check my-method --plugin my-method/my_method.py" in shown.out
    found = json.loads(run("new-plugin", "other", "--json").out)
    assert found["folder"] == "other"
    assert "other/test_other.py" in found["files"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["My Method"], "'My Method' is no name for a plugin"),
        (["class"], "'class' is no name for a plugin"),
        (["random"], "'random' is the name of a module that is needed"),
        (["mine", "--kind", "roundr"], "--kind roundr: no such kind; did you mean 'rounder'?"),
        (["mine", "-o", "full"], "full exists and is not an empty folder"),
    ],
)
def test_a_mistake_is_an_error_and_nothing_is_written(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full", "file").touch()
    failed = run("new-plugin", *arguments)
    assert failed.code == 2
    assert words in failed.said
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
