"""What the checks of outlier handlers promise: what is planted, and that it has power."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Capabilities, Rewrite, Scheme, bounds
from qframe.claims import (
    FunctionPreserving,
    KeepsOutliers,
    NoWorseThanUnscaled,
    ProtectsSalient,
)
from qframe_conformance import check_plugin
from qframe_conformance.checks import Violation, checks_of
from qframe_conformance.outlier_cases import HandlerCase, Statistics, fault
from qframe_conformance.outlier_draws import LOUD, STEP, scenarios
from qframe_conformance.reproduce import script
from tests.mutants.handlers import (
    ANY_SCHEME,
    AWQ,
    Nothing,
    SinglePrecision,
    SmoothQuant,
    WeightsInHalf,
)
from tests.mutants.handlers_kept import THRESHOLD, Keeper

KIND = "outlier handler"
SALIENT = ProtectsSalient(gain=4)
WATCHER = Nothing(needs=frozenset({"hessian"}), capabilities=ANY_SCHEME, claims=(SALIENT,))
PLANTED = st.one_of([each.cases for each in scenarios(WATCHER) if each.subject == "planted"])


# The planted layers ---------------------------------------------------------------------------


@given(case=PLANTED)
def test_a_handler_that_does_nothing_protects_no_channel(case):
    """Or else the bound would say nothing."""
    unscaled = case.rewriting.unscaled()
    assert SALIENT.certify(unscaled).ratio > 2
    assert NoWorseThanUnscaled().certify(unscaled).holds


@given(case=PLANTED)
def test_without_a_rewrite_every_row_loses_half_a_step_of_the_loud_channel(case):
    unscaled = case.rewriting.unscaled()
    error = np.abs(unscaled.original() - unscaled.effective())
    assert (error[:, list(case.loud)] == STEP / 2).all()
    assert (unscaled.steps() >= STEP).all()
    assert unscaled.hessian[case.loud[0], case.loud[0]] == 2 * LOUD**2


@given(case=PLANTED)
def test_a_candidate_with_the_declared_gain_keeps_the_bound(case):
    scale = torch.ones(case.columns)
    scale[list(case.loud)], scale[list(case.quiet)] = 4, 1 / 4
    rewrite = Rewrite(weights={n: w * scale for n, w in case.weights.items()}, input_scale=scale)
    certificate = SALIENT.certify(replace(case.rewriting, rewrite=rewrite))
    assert certificate.holds


@pytest.mark.parametrize("size", [2.0**-62, 2.0**-70, 2.0**-74])
def test_losses_that_underflow_say_nothing_of_which_candidate_is_better(size):
    """B4.c allows for it in float32; not in float64, where nothing of this underflows."""
    claims = NoWorseThanUnscaled(sums="float32"), NoWorseThanUnscaled(sums="float64")
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        case = HandlerCase(
            SinglePrecision(),
            weights={"block.q": torch.from_numpy(np.float32(rng.normal(size=(3, 4)) / 2**10))},
            inputs=np.float32(rng.normal(size=(6, 4)) * size),
            scheme=Scheme(num_bits=3, group_size=8, scale_dtype="float32"),
        )
        ratios.append([claim.certify(case.rewriting).ratio for claim in claims])
    single, double = np.array(ratios).T
    assert (single <= 1).all()
    assert (double > 1).any()


# Columns at the edge --------------------------------------------------------------------------

EDGES = next(each.cases for each in scenarios(Keeper()) if each.id == "edges")


@given(case=EDGES)
def test_columns_just_reach_the_threshold_or_just_do_not(case):
    largest, edge = np.abs(case.inputs).max(0), np.float32(THRESHOLD)
    near = {edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf))}
    assert near & set(largest.tolist())
    root = np.sqrt((case.inputs.astype(np.float64) ** 2).mean(0))
    assert len(case.inputs) == 1 or (root[largest <= edge] < THRESHOLD / 2).all()
    for weight in case.weights.values():  # the threshold would find other columns in them
        assert not (np.abs(weight.numpy()) >= THRESHOLD)[:, largest >= edge].any()


@given(case=EDGES, threshold=st.floats(5.5, 6.5))
def test_a_threshold_is_compared_as_inputs_are(case, threshold):
    """In float32: what torch makes of a comparison of a tensor with a number."""
    case = replace(case, handler=Keeper(threshold=threshold))
    x = case.inputs
    x[0, 0] = threshold
    assert KeepsOutliers(threshold).certify(case.rewriting).holds


def test_what_is_kept_is_named_when_it_should_not_be():
    weights = {"q": torch.ones(2, 3)}
    case = HandlerCase(Keeper(), weights, np.array([[1, 7, -6]], np.float32), Scheme())
    made = replace(case.rewriting, rewrite=Rewrite(weights=weights, input_scale=torch.ones(3)))
    assert KeepsOutliers(6.0).certify(case.rewriting).holds
    assert "[1, 2] hold outliers and are not kept" in KeepsOutliers(6.0).certify(made).note
    assert "[1, 2] are and do not" in KeepsOutliers(0).certify(case.rewriting).note
    later = replace(made, rewrite=replace(made.rewrite, threshold=6.7))
    assert KeepsOutliers(0, 6.7).certify(later).holds
    note = KeepsOutliers(0, 6.0).certify(later).note
    assert note == "the threshold at run time is 6.7, expected 6.0"
    assert "is None, expected 6.7" in KeepsOutliers(0, 6.7).certify(made).note
    assert "is 6.7, expected None" in KeepsOutliers(0).certify(later).note


# What applies ---------------------------------------------------------------------------------


def test_only_declared_schemes_are_tried():
    handler = SmoothQuant(
        capabilities=Capabilities(
            num_bits=frozenset({5}),
            strategies=frozenset({"tensor"}),
            symmetric=frozenset({False}),
        )
    )
    found = scenarios(handler)
    assert [each.id for each in found] == ["asymmetric", "not-finite"]
    schemes = []

    @hypothesis.settings(max_examples=10)
    @given(case=found[0].cases)
    def draw(case):
        schemes.append(case.scheme)

    draw()
    assert {(s.num_bits, s.strategy, s.symmetric) for s in schemes} == {(5, "tensor", False)}


def test_a_handler_for_no_scheme_that_is_known_is_not_passed():
    handler = SmoothQuant(capabilities=Capabilities(types=frozenset({"float"})))
    report = check_plugin(handler)
    assert report.ran == 0
    assert not report.ok


def test_a_search_that_cannot_gain_so_much_with_few_bits_is_not_asked_for_it():
    handler = AWQ(capabilities=Capabilities(num_bits=frozenset({2, 3})))
    assert not any(each.subject == "planted" for each in scenarios(handler))


def test_a_statistic_that_is_not_needed_is_not_there():
    with pytest.raises(Violation, match="reads the statistic 'hessian', which its `needs`"):
        Statistics(absmax=1)["hessian"]


# What a rewrite is ----------------------------------------------------------------------------


WEIGHTS = {"q": torch.ones(2, 3), "k": torch.ones(1, 3)}
HOLED = {name: torch.tensor([[1.0, 0.0, 1.0]] * len(w)) for name, w in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("weights", "scale", "message"),
    [
        (WEIGHTS, torch.ones(3), ""),
        ({"q": torch.ones(2, 3)}, torch.ones(3), r"rewrote the layers ['q']"),
        ({**WEIGHTS, "k": torch.ones(3)}, torch.ones(3), "weight of 'k' is torch.float32 [3]"),
        (WEIGHTS, torch.ones(2), "input_scale is torch.float32 [2]"),
        (WEIGHTS, torch.ones(3).double(), "input_scale is torch.float64"),
        (WEIGHTS, torch.tensor([1.0, 0.0, 2.0]), "input_scale is 0 at its smallest"),
        (WEIGHTS, torch.tensor([1.0, torch.inf, 2.0]), "input_scale has a number that is not"),
        (WEIGHTS, np.ones(3), "input_scale is a ndarray"),
        ({**WEIGHTS, "q": torch.ones(3, 2).t()}, torch.ones(3), "not contiguous"),
    ],
)
def test_what_is_no_rewrite_is_named(weights, scale, message):
    found = fault(Rewrite(weights=weights, input_scale=scale), WEIGHTS)
    assert message in found
    assert bool(message) == bool(found)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"kept": torch.tensor([1])}, "weight of 'q' is not 0 in the columns that are kept"),
        ({"kept": torch.tensor([1]), "weights": HOLED}, ""),
        ({"kept": torch.tensor([], dtype=torch.int64)}, ""),
        ({"kept": torch.tensor([2, 1])}, "ascending"),
        ({"kept": torch.tensor([1, 1])}, "each once"),
        ({"kept": torch.tensor([3])}, "columns 0..2"),
        ({"kept": torch.tensor([-1])}, "columns 0..2"),
        ({"kept": torch.tensor([1], dtype=torch.int32)}, "should be int64 [k]"),
        ({"kept": [1]}, "kept is list, expected a tensor or None"),
        ({"threshold": 6.0}, ""),
        ({"threshold": 0.0}, "must be positive and finite"),
        ({"threshold": 1e-60}, "must be positive and finite, got 0.0 in float32"),
        ({"threshold": 1e60}, "must be positive and finite, got inf in float32"),
        ({"threshold": "6"}, "threshold is str, expected a number or None"),
    ],
)
def test_what_can_be_kept_is_no_other_thing(parts, message):
    made = Rewrite(**{"weights": WEIGHTS, "input_scale": torch.ones(3), **parts})
    found = fault(made, WEIGHTS)
    assert message in found
    assert bool(message) == bool(found)


@given(seed=st.integers(0, 2**32), power=st.integers(-20, 20))
def test_the_bound_of_an_element_is_kept_with_a_reciprocal_and_nearly_attained(seed, power):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(8, 4096)).astype(np.float32)
    scale = (np.float32(2.0**power) * rng.uniform(1, 2, 4096)).astype(np.float32)
    made = (weight / (1 / scale)).astype(np.float64)
    ratio = bounds.ratio(weight - made / scale, bounds.rewrite_element(weight, scale))
    assert 1 / 2 < ratio <= 1
    once = (weight * scale).astype(np.float64)
    assert bounds.ratio(weight - once / scale, bounds.rewrite_element(weight, scale, 1)) <= 1


@given(seed=st.integers(0, 2**32))
def test_the_output_through_float32_quotients_keeps_its_bound(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(5, 9)).astype(np.float32)
    x = (rng.normal(size=(7, 9)) * 2.0 ** rng.integers(-130, 20, 9)).astype(np.float32)
    scale = (rng.uniform(1, 2, 9) * 2.0 ** rng.integers(-12, 12, 9)).astype(np.float32)
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    through = (x / scale).astype(np.float64) @ (weight * scale).astype(np.float64).T
    assert bounds.ratio(y - through, bounds.rewrite_output(x, weight, scale)) <= 1


# What a failure shows -------------------------------------------------------------------------


def test_a_counterexample_is_a_script_that_shows_the_violation():
    report = check_plugin(WeightsInHalf(), only=["function_preserved"])
    code = "from tests.mutants.handlers import WeightsInHalf\n\nplugin = WeightsInHalf()\n"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(script(report.failures[0], code), {})
    assert shown.getvalue().startswith("function_preserved is violated: |W - W' / s| of 'block.")


def test_what_is_not_claimed_is_not_applicable():
    report = check_plugin(Nothing(claims=(FunctionPreserving(),)))
    assert report.ok
    reasons = {r.check: r.message for r in report.records if r.status == "not applicable"}
    assert reasons["rewrite_is_as_claimed"] == "RewriteClaim is not claimed"
    assert reasons["powers_of_two"] == "FunctionPreserving(powers_of_two=True) is not claimed"
    assert {each.name for each in checks_of(KIND)} >= reasons.keys()
