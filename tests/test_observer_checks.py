"""What the checks of observers promise: what is drawn, what applies, and what a failure shows."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given

from qframe import Grid, Host, bounds
from qframe.claims import ChannelAbsmax, Counts, LeastError, Mergeable, Reach, SecondMoments
from qframe.claims.observers import Seen
from qframe_conformance import check_plugin
from qframe_conformance.checks import Violation, checks_of
from qframe_conformance.observer_cases import ObserverCase
from qframe_conformance.observer_draws import KINDS, LONG, scenarios
from qframe_conformance.reproduce import script
from qframe_conformance.values import copied, leaves, same_value
from qframe_plugins.kernels.numba_cpu import hessian as kernel
from tests.mutants.observers import (
    ABSMAX,
    Largest,
    LastBatchOnly,
    MeanMagnitude,
    Moments,
    Tiles,
    Watcher,
)
from tests.mutants.observers_percentile import Binned, Sorted
from tests.mutants.observers_search import IgnoresTheGrid, Searcher

KIND = "observer"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def statuses(report):
    """Return check -> its statuses over all scenarios."""
    found = {}
    for record in report.records:
        found.setdefault(record.check, set()).add(record.status)
    return found


# The observers that come with qframe ----------------------------------------------------------


DEFAULT = ("absmax", "hessian", "histogram", "minmax", "mse", "percentile")
NOT_ASKED = {
    "absmax": ["many_tokens", "reach_fits"],
    "hessian": ["many_tokens", "reach_fits"],
    "histogram": ["reach_fits"],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DEFAULT)
def test_the_default_observers_keep_every_promise(name, seed):
    observer = Host.discover().get(KIND, name)
    report = check_plugin(observer, seed=seed)
    assert [f"{record.id}: {record.message}" for record in report.failures] == []
    held = {record.check for record in report.records if record.status == "held"}
    assert {each.name for each in checks_of(KIND)} - held == set(NOT_ASKED.get(name, ()))


def test_the_declared_run_is_that_of_the_kernel():
    claims = Host.discover().get(KIND, "hessian").claims
    assert [claim.run for claim in claims if isinstance(claim, SecondMoments)] == [kernel.RUN]


# What is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_squares_of_all_activations_are_finite_in_float32(kind, rng):
    x = kind(rng, max(map(sum, LONG))).astype(np.float32)
    with np.errstate(under="ignore"):
        assert np.isfinite((x * x).sum())


def test_a_float32_sum_of_the_stagnating_kind_stagnates(rng):
    x = KINDS[3](rng, 700).astype(np.float32)
    total = np.float32(0)
    for number in x:
        total += number * number
    error = (x.astype(np.float64) ** 2).sum() - float(total)
    assert error == 699
    assert error > bounds.accumulate(float(total), kernel.RUN)


# What applies ---------------------------------------------------------------------------------


def test_of_an_observer_without_claims_only_the_contract_is_asked():
    found = statuses(check_plugin(Watcher(MeanMagnitude, claims=())))
    assert found["statistic_travels"] == {"held", "not applicable"}
    for name in ("merge_sees_both", "order_of_tokens", "token_signs", "statistic_value"):
        assert found[name] == {"not applicable"}


def test_merging_exactly_is_more_than_merging_up_to_rounding():
    wrong = check_plugin(Watcher(Tiles, (SecondMoments(run=32), Mergeable(exact=True))))
    assert "order_of_tokens" in {record.check for record in wrong.failures}


def test_a_run_that_is_declared_too_short_is_found():
    wrong = check_plugin(Watcher(Tiles, (SecondMoments(run=1),)))
    assert "statistic_value" in {record.check for record in wrong.failures}


def test_global_generators_are_left_as_they_were():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    check_plugin(Watcher(Largest, ABSMAX), profile="fast")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


# What a failure shows -------------------------------------------------------------------------


def test_a_counterexample_is_a_script_that_shows_the_violation():
    plugin = Watcher(LastBatchOnly)
    report = check_plugin(plugin, only=["statistic_value"])
    record = report.failures[0]
    code = "from tests.mutants.observers import LastBatchOnly, Watcher\n\n"
    text = script(record, code + "plugin = Watcher(LastBatchOnly)\n")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(text, {})
    assert shown.getvalue().startswith("statistic_value is violated: the value: second moments")


def test_batches_lie_in_one_piece_of_memory(rng):
    batches = tuple(rng.normal(size=(n, 3)).astype(np.float32) for n in (2, 0, 5))

    class Reaches(Moments):
        def update(self, x):
            super().update(x)
            if len(x) == 5:
                x.as_strided((1,), (1,), 0).zero_()  # the first number of the first batch

    case = ObserverCase(Watcher(Reaches), 3, batches)
    [check] = [each for each in checks_of(KIND) if each.name == "update_leaves_activations"]
    with pytest.raises(Violation, match="activations after update"):
        check.function(case)


# Claims ---------------------------------------------------------------------------------------


def seen(*batches, merges=0):
    return Seen(columns=batches[0].shape[1], batches=batches, merges=merges)


def test_the_bound_of_second_moments_is_attained_by_a_product_that_underflows():
    x = np.full((1, 1), 3 * 2.0**-76, np.float32)  # 9 2^-152 lies 9/8 of the way to 2^-149
    value = np.full((1, 1), 2 * float(x[0, 0] * x[0, 0]))
    certificate = SecondMoments(run=1).certify(seen(x), value)
    assert certificate.holds
    assert certificate.ratio > 1 / 8


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (np.zeros((2, 3)), "not float64 [3, 3]"),
        (np.zeros((3, 3), np.float32), "the value is float32"),
        (np.triu(np.ones((3, 3))), "not symmetric"),
        (torch.full((3, 3), torch.nan, dtype=torch.float64), ""),
    ],
)
def test_second_moments_of_another_form_are_refused(value, note):
    certificate = SecondMoments().certify(seen(np.ones((4, 3), np.float32)), value)
    assert not certificate.holds
    assert note in certificate.note


def test_a_maximum_is_compared_without_any_allowance():
    x = np.array([[1, -3], [2, 0]], np.float32)
    claim = ChannelAbsmax()
    assert claim.certify(seen(x), np.array([2, 3], np.float32)).holds
    certificate = claim.certify(seen(x), np.nextafter(np.array([2, 3], np.float32), np.float32(0)))
    assert not certificate.holds
    assert not claim.certify(seen(x), np.array([2.0, 3.0])).holds


def test_a_quantile_is_no_other_number():
    x = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    for share, wanted in ((0.5, 5), (0.51, 6), (1.0, 10), (0.01, 1)):
        claim = Reach(share)
        assert claim.certify(seen(x), np.array([wanted], np.float32)).holds
        for wrong in (wanted - 1, wanted + 1, np.nan):
            assert not claim.certify(seen(x), np.array([wrong], np.float32)).holds
        wide = Reach(share, step=2.0**-3)
        end = np.float32(min(wanted * (1 + 2.0**-3), 10))
        assert wide.certify(seen(x), np.array([end])).holds
        assert not wide.certify(seen(x), np.nextafter(np.array([end]), np.float32(99))).holds
        assert not wide.certify(seen(x), np.nextafter(np.array([wanted], np.float32), 0)).holds


@pytest.mark.parametrize("value", [np.ones(2, np.float32), np.float32(1), np.ones(1), 1.0])
def test_a_reach_of_another_form_is_refused(value):
    x = np.ones((3, 2), np.float32)
    for claim in (Reach(), LeastError(Grid(-7, 7), 0.0)):
        assert "not float32 [1]" in claim.certify(seen(x), value).note


def test_counts_are_those_of_all_copies():
    x = np.array([[0.0, -1.5], [1.0, 2.0**-149]], np.float32)
    counts = np.bincount([0, 0x3FC0, 0x3F80, 0], minlength=1 << 15)
    assert Counts().certify(seen(x), counts).holds
    many = Seen(columns=2, batches=(x,), copies=3)
    assert Counts().certify(many, 3 * counts).holds
    assert not Counts().certify(many, counts).holds
    assert "not int64" in Counts().certify(seen(x), counts.astype(np.int32)).note


def test_of_the_reaches_that_are_claimed_none_is_better():
    x = np.ones((100, 1), np.float32)
    x[7] = -14  # at 7 the others are on the grid, and 7 is lost once; else 1 is, 99 times
    clipped, largest = np.float32([7]), np.float32([14])
    for shares, found in (((1.0,), largest), ((1.0,), clipped), ((1.0, 0.5), clipped)):
        assert LeastError(Grid(-7, 7), 0.0, shares).certify(seen(x), found).holds
    certificate = LeastError(Grid(-7, 7), 0.0, (1.0, 0.5)).certify(seen(x), largest)
    assert 1 < certificate.ratio < bounds.ratio(99**0.5, 7.0)
    for wrong in (0.0, -7.0, 15.0, np.nan):
        note = LeastError(Grid(-7, 7), 1.0).certify(seen(x), np.float32([wrong])).note
        assert "does not lie between 0 and the largest input" in note
    assert LeastError(Grid(-7, 7), 0.0).certify(seen(x[:0]), np.float32([0])).holds


# What is planted ------------------------------------------------------------------------------

SEARCH = Searcher()
[PLANTED] = [each.cases for each in scenarios(SEARCH) if each.subject == "planted"]


@given(case=PLANTED)
def test_a_search_that_finds_nothing_loses_more_than_is_allowed(case):
    """And the share that the inputs were planted for is allowed."""
    [claim] = [claim for claim in case.value_claims if isinstance(claim, LeastError)]
    every, size = seen(*case.batches), np.abs(case.tokens)
    assert claim.certify(every, size.max().reshape(1)).ratio > 1
    ratios = [claim.certify(every, (size.max() * s).reshape(1)).ratio for s in claim.shares]
    assert min(ratios) <= 1


def test_nothing_is_planted_for_a_search_that_does_not_say_what_it_tries():
    assert "planted" not in {each.id for each in scenarios(Searcher(shares=(1.0,)))}
    assert "planted" not in {each.id for each in scenarios(Searcher(step=0.25))}
    assert "other-codes" not in {each.id for each in scenarios(Watcher(Largest, ABSMAX))}


def test_a_counterexample_with_other_codes_says_which():
    report = check_plugin(Searcher(IgnoresTheGrid), only=["statistic_value"])
    [record] = [each for each in report.failures if each.scenario == "planted"]
    code = "from tests.mutants.observers_search import IgnoresTheGrid, Searcher\n\n"
    text = script(record, code + "plugin = Searcher(IgnoresTheGrid)\n")
    assert "grid=Grid(" in text
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(text, {})
    assert shown.getvalue().startswith("statistic_value is violated: the value: least error")


# Many tokens ----------------------------------------------------------------------------------


def test_a_statistic_that_keeps_all_tokens_is_not_asked_for_more_than_there_is_room():
    report = check_plugin(Watcher(Sorted, (Reach(Binned.share),)), only=["many_tokens"])
    assert not report.failures
    assert {record.status for record in report.records} == {"not drawn", "not applicable"}


# Values of any form ---------------------------------------------------------------------------


@dataclass
class Pair:
    low: torch.Tensor
    high: float


def test_values_of_any_form_are_compared_leaf_by_leaf():
    value = {"a": (Pair(torch.ones(2), 3.0), [np.int16(4)]), "b": None, "c": "word"}
    assert sorted(leaves(value)) == [
        "value['a'][0].high",
        "value['a'][0].low",
        "value['a'][1][0]",
        "value['c']",
    ]
    before = copied(value)
    same_value(before, value, "it")
    value["a"][0].low[1] = 2
    with pytest.raises(Violation, match=r"it: value\['a'\]\[0\].low: 2.0 at \[1\], expected 1.0"):
        same_value(before, value, "it")


def test_the_sign_of_a_zero_says_nothing():
    same_value(copied(np.array([0.0, 1.0])), np.array([-0.0, 1.0]), "it")
    with pytest.raises(Violation, match="-1"):
        same_value(copied(np.array([1.0])), np.array([-1.0]), "it")


def test_what_cannot_be_compared_is_named():
    with pytest.raises(Violation, match=r"value\[1\] is a object; return tensors"):
        leaves((1, object()))
