"""The suite under pytest: ids, failures, expected failures, the fixture, and that it is light."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from qframe_conformance import test_plugins
from qframe_conformance.suite import prepare
from qframe_conformance.target import Target

PLUGIN = """
from dataclasses import dataclass, field, replace
from qframe import Capabilities, claims, hookimpl, rounding

@dataclass(frozen=True)
class Rounder:
    name: str
    beside: int = 0
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Capabilities(
            num_bits=frozenset({4}), symmetric=frozenset({True}), strategies=frozenset({"channel"})
        ),
    )
    claims = (claims.HalfStep(),)

    def round(self, problem, rng):
        made = rounding.to_nearest(problem)
        codes = (made.codes + self.beside).clamp(problem.grid.qmin, problem.grid.qmax)
        return replace(made, codes=codes)

@hookimpl
def qframe_rounders():
    return [Rounder("nearest"), Rounder("beside", beside=1)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two rounders in a file; one of them is wrong."""
    made = tmp_path_factory.mktemp("author")
    (made / "mine.py").write_text(PLUGIN)
    return made


@pytest.fixture(scope="module")
def pytest_run(folder):
    """Run pytest in that folder, in another process."""

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *arguments]
        environment = {**os.environ, "COLUMNS": "200", "PYTEST_ADDOPTS": ""}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def suite_run(pytest_run):
    """Run the suite on rounders of the file."""

    def run(*arguments):
        return pytest_run("--pyargs", "qframe_conformance", "--qframe-file", "mine.py", *arguments)

    return run


def outcomes(done):
    """Return id -> outcome."""
    lines = [line.split() for line in done.stdout.splitlines() if "::test_promise[" in line]
    return {
        words[0].split("test_promise[")[1].rstrip("]"): words[1]
        for words in lines
        if len(words) > 1 and words[1].isupper()
    }


@pytest.fixture(scope="module")
def both(suite_run):
    """A run over the right rounder and the wrong one."""
    return suite_run("--qframe-plugin", "nearest", "--qframe-plugin", "beside")


def test_there_is_an_id_for_each_promise_and_none_for_what_does_not_apply(both):
    found = outcomes(both)
    assert found["nearest-int4-symmetric-channel-half_step"] == "PASSED"
    assert not any(name.endswith("-gptq_residual") for name in found)
    right = {outcome for name, outcome in found.items() if name.startswith("nearest-")}
    assert "PASSED" in right <= {"PASSED", "SKIPPED"}


def test_a_failure_shows_the_promise_and_how_to_see_it_alone(both):
    assert both.returncode == 1
    assert outcomes(both)["beside-int4-symmetric-channel-half_step"] == "FAILED"
    assert "at most half a step away" in both.stdout
    assert "host = Host.discover(files=" in both.stdout
    assert "print(replay('half_step'" in both.stdout


def test_an_expected_failure_is_strict(suite_run):
    plugins = ("--qframe-plugin", "nearest", "--qframe-plugin", "beside")
    done = suite_run(
        *plugins, "--qframe-expect-failure", "half_step=it is one beside", "-k", "half_step"
    )
    assert done.returncode == 1
    assert outcomes(done) == {
        "beside-int4-symmetric-channel-half_step": "XFAIL",
        "beside-somewhere-half_step": "PASSED",
        "nearest-int4-symmetric-channel-half_step": "PASSED",
        "nearest-somewhere-half_step": "FAILED",
    }
    assert "half_step is expected to fail (it is one beside), but it does not" in done.stdout


def test_a_plugin_that_is_not_there_is_no_pass(suite_run):
    done = suite_run("--qframe-plugin", "nearset")
    assert done.returncode not in (0, 5)
    assert "no plugin is called 'nearset'; did you mean 'nearest'?" in done.stdout + done.stderr


AUTHOR = """
import hypothesis
from mine import Rounder

def test_it_keeps_its_promises(qframe_check):
    before = hypothesis.settings.default
    report = qframe_check(Rounder("nearest"))
    assert (report.profile, report.seed) == ("fast", 9)
    assert hypothesis.settings.default is before

def test_it_does_not(qframe_check):
    qframe_check(Rounder("beside", beside=1), only=["half_step"])

def test_it_is_known(qframe_check):
    known = {"half_step": "it is one beside"}
    qframe_check(Rounder("beside", beside=1), only=["half_step"], expected_failures=known)
"""


def test_an_authors_own_test_needs_one_line(pytest_run, folder):
    (folder / "test_author.py").write_text(textwrap.dedent(AUTHOR))
    done = pytest_run("test_author.py", "--qframe-profile", "fast", "--qframe-seed", "9")
    assert "test_it_keeps_its_promises PASSED" in done.stdout
    assert "test_it_does_not FAILED" in done.stdout
    assert "test_it_is_known PASSED" in done.stdout
    assert "FAILED half_step (B1.b)" in done.stdout
    assert "from mine import Rounder" in done.stdout


# In this process --------------------------------------------------------------------------------


@pytest.fixture
def explored(folder):
    kind, plugin, host = Target(name="nearest", files=[str(folder / "mine.py")]).load()
    return test_plugins.Explored(prepare(plugin, kind=kind, profile="fast", host=host))


def test_a_scenario_is_explored_once_for_all_its_checks(explored):
    [scenario] = {scenario.id for scenario, check in explored.applying() if check == "half_step"}
    first = explored.records(scenario)
    assert len(first) == len(explored.run.checks)
    assert explored.records(scenario) is first


def test_every_test_has_a_record(explored):
    pairs = {(scenario.id, check) for scenario, check in explored.applying()}
    records = [record for scenario in explored.scenarios for record in explored.records(scenario)]
    answered = {(r.scenario, r.check) for r in records if r.status != "not applicable"}
    assert pairs == answered


def test_pytest_without_the_suite_imports_nothing_of_it():
    """Its plugin is imported by every run of pytest in the environment."""
    code = (
        "import sys, pytest\n"
        "before = set(sys.modules)\n"
        "import qframe_conformance.pytest_plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['qframe_conformance', 'qframe_conformance.pytest_plugin']"
