"""Number formats: the values of the standards, by other ways, and what the checks promise."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Grid, Host, bounds
from qframe.claims import UniformGrid
from qframe.claims.formats import GridUse, values_of
from qframe_conformance import check_plugin
from qframe_conformance.checks import checks_of
from qframe_conformance.format_checks import fault, probes
from qframe_conformance.reproduce import script
from tests.mutants.formats import E2M1, E4M3, E5M2, NF4, Integers, QmaxOffByOne, e2m1, e4m3, e5m2

KIND = "number format"
FLOATS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}


def shape_of(claim):
    return claim.significand, claim.min_exponent, claim.largest


# The formats that come with qframe ------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_default_formats_keep_every_promise(bits):
    report = check_plugin(Host.discover().get(KIND, f"int{bits}"))
    assert [f"{record.id}: {record.message}" for record in report.failures] == []
    held = {record.check for record in report.records if record.status == "held"}
    assert held == {each.name for each in checks_of(KIND)} - {"refusal_is_stable"}


# Floating point -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "claim", "right"),
    [(torch.float8_e4m3fn, E4M3, e4m3), (torch.float8_e5m2, E5M2, e5m2)],
    ids=["e4m3", "e5m2"],
)
def test_values_are_those_that_torch_knows(dtype, claim, right):
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
    values = np.unique(every[np.isfinite(every)])
    assert np.array_equal(values, bounds.representable(*shape_of(claim)))
    assert np.array_equal(values, right().values)


@pytest.mark.parametrize(
    ("dtype", "claim"), [(torch.float8_e4m3fn, E4M3), (torch.float8_e5m2, E5M2)]
)
@given(seed=st.integers(0, 2**32))
def test_torch_rounds_to_the_nearest_value_within_the_bound(dtype, claim, seed):
    values = bounds.representable(*shape_of(claim))
    x = probes(np.random.default_rng(seed), values)
    x = x[np.abs(x) <= claim.largest].astype(np.float32)
    cast = torch.from_numpy(x).to(dtype).double().numpy()
    error = np.abs(x - cast)
    assert np.array_equal(error, np.abs(x - bounds.nearest_value(x, values)))
    assert bounds.ratio(error, bounds.float_element(x, *shape_of(claim))) <= 1


def test_the_values_of_e2m1_are_those_of_the_specification():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wanted = [*(-x for x in reversed(positive[1:])), *positive]
    assert bounds.representable(*shape_of(E2M1)).tolist() == wanted
    assert list(e2m1().values) == wanted


@pytest.mark.parametrize("name", FLOATS)
def test_the_bound_of_an_element_is_attained_at_every_power_of_two(name):
    shape = shape_of(FLOATS[name])
    values = bounds.representable(*shape)
    middles = (values[1:] + values[:-1]) / 2
    ratios = np.abs(middles - bounds.nearest_value(middles, values)) / bounds.float_element(
        middles, *shape
    )
    after_powers = np.log2(np.abs(values[:-1][values[:-1] > 0])) % 1 == 0
    attained = ratios[values[:-1] > 0][after_powers]
    assert bounds.ratio(ratios, 1) <= 1
    assert bounds.ratio(1, attained) == pytest.approx(1, rel=bounds.CHECKER - 1)


@given(seed=st.integers(0, 2**32), levels=st.integers(2, 20))
def test_half_of_a_cell_is_what_rounding_may_cost(seed, levels):
    rng = np.random.default_rng(seed)
    values = np.unique(rng.normal(size=levels).astype(np.float32)).astype(np.float64)
    x = np.concatenate([probes(rng, values), values])
    error = np.abs(x[:, None] - values).min(1)
    assert np.array_equal(error, np.abs(x - bounds.nearest_value(x, values)))
    assert bounds.ratio(error, bounds.half_cell(x, values)) <= 1


def test_a_value_that_is_missing_makes_some_midpoint_move_too_far():
    values = bounds.representable(*shape_of(E4M3))
    for missing in range(1, len(values) - 1):
        left = np.delete(values, missing)
        x = probes(np.random.default_rng(0), left)
        error = np.abs(x - bounds.nearest_value(x, left))
        assert bounds.ratio(error, bounds.float_element(x, *shape_of(E4M3))) > 1


# Grids ----------------------------------------------------------------------------------------


def test_the_codes_of_an_integer_grid_stand_for_themselves():
    assert values_of(Grid(-2, 1)).tolist() == [-2, -1, 0, 1]
    assert values_of(Grid(0, 15, NF4)).tolist() == list(NF4)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Grid(-8, 7), ""),
        (Grid(0, 2, (-1.0, 0.0, 1.0)), ""),
        ([1, 2], "returned list, expected qframe.Grid"),
        (Grid(-8, 8), "17 codes, expected from 2 to 16, for 4 bits"),
        (Grid(0, 0), "1 codes"),
        (Grid(np.int64(0), 1), "qmin is a int64"),
        (Grid(0, 1, [0.0, 1.0]), "values should be a tuple of 2 numbers"),
        (Grid(0, 1, (0.0,)), "values should be a tuple of 2 numbers"),
        (Grid(0, 1, (0, 1)), "values should be Python floats"),
        (Grid(0, 1, (0.0, float("inf"))), "values should be finite"),
        (Grid(0, 2, (0.0, 1.0, 1.0)), "but 1.0 follows 1.0"),
        (Grid(0, 1, (-0.0, 0.0)), "but 0.0 follows -0.0"),
    ],
)
def test_what_is_no_grid_is_named(made, message):
    found = fault(made, 4)
    assert message in found
    assert bool(message) == bool(found)


@pytest.mark.parametrize("rule", ["full", "restricted"])
def test_a_restricted_grid_is_its_own_mirror_image(rule):
    grid = Integers(5).grid(symmetric=True, scale_rule=rule)
    use = GridUse(
        grid=grid, num_bits=5, symmetric=True, scale_rule=rule, probes=np.array([-16.5, 0.5, 15.5])
    )
    assert UniformGrid().certify(use).ratio == pytest.approx(1, rel=bounds.CHECKER - 1)
    assert (grid.qmin == -grid.qmax) == (rule == "restricted")


# What a failure shows -------------------------------------------------------------------------


def test_a_counterexample_is_a_script_that_shows_the_violation():
    report = check_plugin(QmaxOffByOne(), only=["grid_is_as_claimed"])
    code = "from tests.mutants.formats import QmaxOffByOne\n\nplugin = QmaxOffByOne()\n"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(script(report.failures[0], code), {})
    assert "Grid(qmin=-8, qmax=6, values=None) should be Grid(qmin=-8, qmax=7" in shown.getvalue()
