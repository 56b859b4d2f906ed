"""Scripts that run for hours, or once in a while: what they begin with works."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script, with what lies beside it."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_default_plugin_is_tried_at_night(script):
    found = script("nightly").objects(())
    assert ("rounder", "gptq") in found
    assert ("kernel", "hadamard/numba") in found
    assert script("nightly").objects(["gptq"]) == [("rounder", "gptq")]
    with pytest.raises(SystemExit, match="gptk"):
        script("nightly").objects(["gptk"])


def test_tightness_is_measured_of_plugins_and_of_twins(script):
    found = script("tightness").subjects(["awq", "chopped"])
    assert ("outlier handler", "awq", -1) in found
    assert {name for _, name, number in found if number >= 0} >= {"chopped"}


def test_reasons_of_mutants_are_those_of_the_records(script):
    """A range of lines says something about one PTX: the table refuses one that is of another."""
    table = script("ptx_mutants_table")
    records = {
        name: {"ptx": text, "of": 1, "killed": {"answers": [0]}, "survivors": []}
        for each in table.reasons()
        if "lines" in each
        for name, text in zip(each["kernels"], each["ptx"], strict=True)
    }
    assert any("lines" in each for each in table.reasons())
    assert list(table.lines(records))
    for name in records:
        records[name]["ptx"] = "another"
        with pytest.raises(SystemExit, match="another PTX"):
            list(table.lines(records))


def test_what_was_measured_on_other_processors_stays(script):
    generation = script("generation")
    found = {1: {"times": {"float32": [(1.0, 1.0)]}, "inside": {}}}
    before = f"# Title\n\n## {generation.machine()}\n\nold\n\n## Another\n\nkept\n"
    made = generation.document(found, 1, before)
    assert made.startswith(generation.INTRODUCTION)
    assert made.count(f"## {generation.machine()}\n") == 1
    assert "old" not in made
    assert made.endswith("\n## Another\n\nkept\n")
