"""How the suite judges: a toy kind of plugin; checks that hold, fail, object, or say nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import types
import warnings

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from qframe import bounds
from qframe.errors import HessianError, PluginError, RecipeError
from qframe_conformance import SUITE_VERSION, check_plugin, checks, suite
from qframe_conformance.checks import SKIPPED, Violation, check, require, same_bits, within
from qframe_conformance.engine import Refused, Scenario
from qframe_conformance.report import Counterexample

KIND = "toy"


def ratio(error, allowed=1.0):
    """A ratio as the suite computes it: a little below the quotient, for its own rounding."""
    return bounds.worst(error, allowed)[0]


class Toy:
    """A plugin that maps numbers to numbers."""

    name = "toy"

    def __init__(self, function=lambda n: n):
        self.function = function
        self.seen = []

    def __call__(self, n):
        self.seen.append(n)
        return self.function(n)


class Case:
    def __init__(self, toy, n):
        self.toy, self.n = toy, n

    def counterexample(self, check):
        return Counterexample(
            snippet=f"print({check!r}, 'at', arrays['n'])\n", arrays={"n": np.array(self.n)}
        )


def scenarios(toy):
    return [
        Scenario(name, st.integers(low, 1 << 20).map(lambda n: Case(toy, n)), low)
        for name, low in (("all", 0), ("large", 1000))
    ]


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    """A kind of plugin with the checks below."""
    module = types.ModuleType("qframe_test_toy_checks")
    module.scenarios = scenarios
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(suite.MODULES, KIND, module.__name__)
    monkeypatch.setitem(checks._CHECKS, KIND, [])

    @check(KIND, "bound", "T1")
    def near(case):
        """The answer is at most one away."""
        return within(abs(case.toy(case.n) - case.n), 1, "|f(n) - n|")

    @check(KIND, "structure")
    def whole(case):
        """The answer is a whole number."""
        require(isinstance(case.toy(case.n), int), "it is no whole number")

    @check(KIND, "algebra", unless=lambda toy, low: "zero is drawn too" if low == 0 else None)
    def divides(case):
        """The answer is not zero."""
        require(case.toy(case.n) != 0, "it is zero")

    @check(KIND, "objective", since="1.0")
    def never_drawn(case):
        """It is about something that is never drawn."""
        return SKIPPED


def run(function=lambda n: n, **options):
    return check_plugin(Toy(function), kind=KIND, **options)


def statuses(report):
    return {(record.check, record.scenario): record.status for record in report.records}


# What holds -----------------------------------------------------------------------------------


def test_what_holds_is_counted_and_what_does_not_apply_is_told_apart():
    report = run()
    assert report.ok
    assert statuses(report) == {
        ("whole", "all"): "held",
        ("divides", "all"): "not applicable",
        ("near", "all"): "held",
        ("never_drawn", "all"): "not drawn",
        ("whole", "large"): "held",
        ("divides", "large"): "held",
        ("near", "large"): "held",
        ("never_drawn", "large"): "not drawn",
    }
    assert report.ran == 5
    assert report.counts() == {"held": 5, "not applicable": 1, "not drawn": 2}
    assert report.line() == (
        "toy 'toy': 5 ran, 5 held, 0 failed, 1 not applicable, 2 not drawn "
        f"(suite {SUITE_VERSION}, profile default, seed 0)"
    )


def test_zero_checks_are_no_pass():
    report = run(only=["never_drawn"])
    assert not report.failures
    assert not report.ok
    assert "nothing was tested, which is no pass" in report.line()


def test_a_profile_says_how_many_cases_are_drawn():
    for name, profile in suite.PROFILES.items():
        examples = {record.examples for record in run(profile=name).records} - {0}
        assert examples == {profile.examples}


def test_the_largest_ratio_of_each_theorem_is_kept():
    assert run(lambda n: n + n % 2).worst() == {"T1": ratio(1.0)}


# What fails -----------------------------------------------------------------------------------


def test_a_failure_says_by_how_much_and_is_made_small():
    report = run(lambda n: n if n < 5000 else n + 3)
    failed = {(r.check, r.scenario): r for r in report.failures}
    assert {check for check, _ in failed} == {"near"}
    record = failed["near", "all"]
    assert (record.theorem, record.ratio) == ("T1", ratio(3.0))
    assert record.message == "|f(n) - n| = 3 at [], allowed 1"
    assert int(record.counterexample.arrays["n"]) == 5000


def test_one_small_counterexample_for_each_check_is_enough():
    toy = Toy(lambda n: n + 3)
    first = check_plugin(toy, kind=KIND)
    assert int(first.failures[0].counterexample.arrays["n"]) == 0
    calls = len(toy.seen)
    toy.seen.clear()
    check_plugin(toy, kind=KIND, shrink=False)
    assert len(toy.seen) < calls
    assert {record.scenario for record in first.failures} == {"all", "large"}


def test_an_error_is_a_violation_and_a_refusal_is_not():
    def raises(n):
        raise KeyError("x")

    def refuses(n):
        raise Refused("too hard")

    def typed(n):
        raise HessianError("no factor")

    assert {r.message for r in run(raises).failures} == {"raised KeyError: 'x'"}
    assert {r.message for r in run(typed).failures} == {"refused: HessianError: no factor"}
    refused = run(refuses)
    assert not refused.failures
    assert not refused.ok


@pytest.mark.parametrize("stop", [SystemExit, GeneratorExit, pytest.skip.Exception])
def test_a_plugin_cannot_end_or_skip_the_suite(stop):
    def ends(n):
        raise stop("bye")

    assert len(run(ends).failures) == 5


def test_the_user_can_end_the_suite():
    def interrupt(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupt)


@pytest.mark.parametrize(
    "error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")]
)
def test_lack_of_memory_ends_a_scenario_and_not_the_suite(error):
    def takes_all(n):
        raise error

    report = run(takes_all)
    assert statuses(report) == {
        ("comes_back", "all"): "crashed",
        ("comes_back", "large"): "crashed",
    }
    assert report.failures[0].message.startswith("out of memory: ")
    assert "scenarios=['all']" in report.failures[0].counterexample.snippet


def test_a_plugin_that_is_not_the_same_twice_keeps_the_case_that_was_seen():
    calls = []

    def once(n):
        calls.append(n)
        return n + 9 if len(calls) == 1 else n

    report = run(once, only=["near"])
    assert [record.status for record in report.records] == ["failed", "held"]
    assert report.failures[0].counterexample is not None


def test_a_ratio_that_is_not_a_number_is_a_violation():
    @check(KIND, "bound")
    def nan(case):
        """It cannot be said."""
        return float("nan")

    assert {record.check for record in run().failures} == {"nan"}


# Expected failures ----------------------------------------------------------------------------


def test_an_expected_failure_is_none_and_keeps_its_reason():
    report = run(lambda n: n + 3, expected_failures={"near": "known: it adds three"})
    assert report.ok
    assert statuses(report)["near", "all"] == "expected failure"
    assert "known: it adds three (|f(n) - n| = 3" in report.records[2].message
    assert report.counts()["expected failure"] == 2


def test_it_may_hold_in_some_scenarios():
    report = run(lambda n: 0 if n == 0 else n, expected_failures={"near": "x"})
    assert not report.ok
    report = run(lambda n: n + 3 if n < 1000 else n, expected_failures={"near": "x"})
    assert report.ok
    assert statuses(report)["near", "large"] == "held"


@pytest.mark.parametrize("check", ["near", "never_drawn"])
def test_a_check_that_is_expected_to_fail_and_does_not_is_a_failure(check):
    report = run(expected_failures={check: "an old bug"})
    assert not report.ok
    record = report.failures[0]
    assert (record.check, record.status) == (check, "unexpected pass")
    assert "expected to fail (an old bug), but it" in record.message


# What is asked for ----------------------------------------------------------------------------


def test_one_check_or_one_scenario_alone():
    assert {record.check for record in run(only=["whole"]).records} == {"whole"}
    assert {record.scenario for record in run(scenarios=["large"]).records} == {"large"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profile": "defualt"}, "unknown profile 'defualt'; did you mean 'default'?"),
        ({"only": ["nera"]}, "no check 'nera' for toys; did you mean 'near'?"),
        ({"expected_failures": {"nera": "x"}}, "did you mean 'near'?"),
        ({"scenarios": ["larg"]}, "toy 'toy' has no scenario 'larg'; did you mean 'large'?"),
        ({"suite": "0.9"}, "there is no version '0.9' of the suite"),
        ({"suite": "next"}, "there is no version 'next' of the suite"),
    ],
)
def test_a_mistake_gets_a_suggestion(options, words):
    with pytest.raises(RecipeError) as raised:
        run(**options)
    assert words in str(raised.value)


def test_a_pinned_version_leaves_out_what_came_later(monkeypatch):
    @check(KIND, "bound", since="1.1")
    def later(case):
        """It came later."""
        raise Violation("it fails")

    monkeypatch.setattr(suite, "SUITE_VERSION", "1.1")
    assert {record.check for record in run(suite="1.1").failures} == {"later"}
    pinned = run(suite="1.0")
    assert pinned.ok
    assert pinned.suite == "1.0"


def test_an_object_that_keeps_no_contract_is_told_what_it_lacks():
    with pytest.raises(PluginError, match=r"rounder: Rounder .* has no 'capabilities'"):
        check_plugin(object())
    with pytest.raises(PluginError, match="no checks of the kind 'exporter'"):
        check_plugin(object(), kind="exporter")


# Repeatable, and a good guest -------------------------------------------------------------------


def test_the_same_seed_gives_the_same_cases_whatever_the_callers_profile():
    def seen(seed):
        toy = Toy()
        check_plugin(toy, kind=KIND, seed=seed)
        return toy.seen

    first = seen(3)
    assert seen(3) == first
    assert seen(4) != first
    before = hypothesis.settings()
    hypothesis.settings.register_profile("other", max_examples=1, derandomize=True)
    hypothesis.settings.load_profile("other")
    try:
        assert seen(3) == first
        assert hypothesis.settings().max_examples == 1
    finally:
        hypothesis.settings.register_profile("before", before)
        hypothesis.settings.load_profile("before")


def test_what_modules_the_caller_has_loaded_does_not_matter(monkeypatch):
    """Hypothesis likes to draw the numbers that stand in the user's source files."""
    from hypothesis.internal.conjecture import providers

    def look():
        pytest.fail("it looked at the caller's modules")

    monkeypatch.setattr(providers, "_get_local_constants", look)
    assert run(profile="thorough").ok


def test_global_random_states_are_left_alone():
    def disturbs(n):
        random.seed(n)
        np.random.seed(n % 1000)
        torch.manual_seed(n)
        return n

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    run(disturbs)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_callers_warning_filters_do_not_matter():
    def warns(n):
        warnings.warn("careful", stacklevel=1)
        return n

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(warns).ok


# Reports --------------------------------------------------------------------------------------


@pytest.fixture
def failing():
    return run(lambda n: n if n < 7 else n + 3, expected_failures={"whole": "x"})


def test_the_text_has_a_row_for_each_check_and_says_how_to_see_what_failed(failing):
    text = str(failing)
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    [row] = [line for line in lines if line.startswith("near ")]
    _, theorem, scenarios, _, ratio, *result = row.split()
    assert (theorem, scenarios, ratio) == ("T1", "2", "3.00")
    assert " ".join(result) == "FAILED in 2 of 2 scenarios"
    assert "FAILED near (T1): The answer is at most one away." in text
    assert "print('near', 'at', arrays['n'])" in text
    assert "UNEXPECTED PASS whole" in text
    assert lines[-1] == failing.line()


def test_the_markdown_has_the_same_rows(failing):
    text = failing.to_markdown()
    [row] = [line for line in text.splitlines() if line.startswith("| `near`")]
    assert row.split("|")[5:7] == [" 3.00 ", " FAILED "]
    assert "## near[toy-all]" in text


def test_the_json_has_every_record(failing):
    found = json.loads(failing.to_json())
    assert found["schema_version"] == 1
    assert found["ok"] is False
    assert found["worst"] == {"T1": ratio(3.0)}
    assert len(found["records"]) == 8
    [record] = [r for r in found["records"] if r["id"] == "near[toy-all]"]
    assert "arrays['n']" in record["snippet"]


def test_saved_scripts_run_alone(failing, tmp_path):
    scripts = failing.save(tmp_path / "found")
    assert sorted(path.name for path in scripts) == ["toy-near-all.py", "toy-near-large.py"]
    assert {path.name for path in (tmp_path / "found").iterdir()} >= {
        "toy-near-all.npz",
        "report.json",
        "report.md",
    }
    [script] = [path for path in scripts if path.stem == "toy-near-all"]
    done = subprocess.run(
        [sys.executable, str(script)], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout == "near at 7\n"
    head = script.read_text().splitlines()
    assert head[:3] == [
        "# near[toy-all] (T1)",
        "# The answer is at most one away.",
        "# |f(n) - n| = 3 at [], allowed 1",
    ]


# What checks say ------------------------------------------------------------------------------


def test_an_array_is_compared_bit_by_bit():
    zeros = np.zeros(3, np.float32)
    same_bits(zeros, zeros.copy(), "x")
    for other, words in (
        (-zeros, "x: -0.0 at \\[0\\], expected 0.0"),
        (zeros.astype(np.float64), "float64"),
        (zeros[:2], r"\[2\], expected float32 \[3\]"),
    ):
        with pytest.raises(Violation, match=words):
            same_bits(zeros, other, "x")
    nan = np.full(2, np.nan)
    same_bits(nan, nan.copy(), "x")


def test_within_names_the_place_of_the_largest_ratio():
    assert within(np.array([1.0, 2.0]), np.array([2.0, 8.0]), "e") == ratio(1.0, 2.0)
    assert within(np.zeros(0), np.zeros(0), "e") == 0
    with pytest.raises(Violation, match=r"e = 3 at \[1, 0\], allowed 2") as raised:
        within(np.array([[1.0], [3.0]]), 2.0, "e", "T9")
    assert (raised.value.ratio, raised.value.theorem) == (ratio(1.5), "T9")
