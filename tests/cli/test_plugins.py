"""`qframe plugins`: what is there, where it comes from, and what does not work."""

from __future__ import annotations

import json

PLUGIN = """
from dataclasses import dataclass, field
from qframe import Capabilities, hookimpl

@dataclass(frozen=True)
class Nothing:
    name: str = field(init=False, default={name!r})
    needs: frozenset = field(init=False, default=frozenset())
    capabilities: Capabilities = field(init=False, default=Capabilities())

    def round(self, problem, rng):
        raise NotImplementedError

@hookimpl
def qframe_rounders():
    return [Nothing()]
"""


def test_the_default_plugins_are_listed(run):
    found = json.loads(run("plugins", "--json").out)
    by_name = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert by_name["rtn"]["status"] == "loaded"
    assert by_name["rtn"]["source"] == "qframe"
    assert by_name["rtn"]["provides"] == {"rounder": ["rtn"]}
    assert found["contested"] == []


def test_a_file_is_listed_with_its_path(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(name="mine"))
    shown = run("plugins", "--plugin", file)
    assert shown.code == 0
    assert "rounder mine" in shown.out
    found = json.loads(run("plugins", "--plugin", file, "--json").out)
    assert found["plugins"][-1]["source"] == str(file)


def test_a_disabled_plugin_says_so(run):
    found = json.loads(run("plugins", "--no-plugin", "gptq", "--json").out)
    assert {p["name"]: p["status"] for p in found["plugins"]}["gptq"] == "disabled"


def test_disabling_a_plugin_that_is_not_there_gets_a_suggestion(run):
    failed = run("plugins", "--no-plugin", "gtpq")
    assert failed.code == 2
    assert "did you mean 'gptq'" in failed.said


def test_a_broken_entry_point_is_shown_and_the_others_work(run, monkeypatch):
    import importlib.metadata as metadata

    broken = metadata.EntryPoint("broken", "no_such_module_here", "qframe")
    real = metadata.entry_points

    def entry_points(**wanted):
        return [*real(**wanted), broken]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    found = json.loads(run("plugins", "--json").out)
    by_name = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert by_name["broken"]["status"] == "failed"
    assert "no_such_module_here" in by_name["broken"]["error"]
    assert by_name["rtn"]["status"] == "loaded"
    assert "no_such_module_here" in run("plugins").out


def test_a_name_that_another_plugin_has_is_refused(run, tmp_path):
    file = tmp_path / "second.py"
    file.write_text(PLUGIN.format(name="rtn"))
    failed = run("plugins", "--plugin", file)
    assert failed.code == 2
    assert "rtn" in failed.said
    assert str(file) in failed.said
