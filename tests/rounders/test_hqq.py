"""HQQ has no larger sum of errors than round-to-nearest, and does as its formulas say."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qframe import Scheme, bounds, rounding
from qframe.certificates import Evidence
from qframe.contracts import Rounder
from qframe.errors import NonFiniteError
from qframe.host import objection
from qframe_conformance.kinds import NASTY, heavy_tailed, small
from qframe_conformance.strategies import rounding_problem, rounding_problems
from qframe_plugins.kernels.numba_cpu.hqq import half_quadratic
from qframe_plugins.rounders.hqq import HQQ
from tests.rounders.alike import depends_on_rows_alone, same

RNG = np.random.default_rng(0)  # the method takes no random numbers


def problems(**given):
    choices = {
        "num_bits": st.sampled_from([2, 3, 4, 8]),
        "strategy": st.sampled_from(["channel", "group"]),
        "observer": st.sampled_from(["minmax", "minmax", "mse"]),
    }
    return rounding_problems(weight_kinds=[None, *NASTY, heavy_tailed, small], **choices | given)


def run(drawn, **options):
    return HQQ(**options).round(drawn, RNG)


@given(problems(), st.sampled_from([0.3, 0.7, 1.0]), st.sampled_from([0.1, 10.0]))
def test_what_it_claims_holds_with_any_options(drawn, power, beta):
    rounder = HQQ(lp_norm=power, beta=beta)
    certificates = Evidence(drawn, rounder.round(drawn, RNG)).certificates(rounder.claims)
    assert len(certificates) == 3
    assert all(each.holds for each in certificates)


def test_without_iterations_scales_are_those_of_the_range_or_next_to_them():
    """The search moves nothing, so only how a scale is stored can differ."""
    drawn = rounding_problem(
        np.random.default_rng(0).normal(size=(4, 32)), Scheme(group_size=8, symmetric=False)
    )
    made, nearest = run(drawn, iterations=0), rounding.to_nearest(drawn)
    assert torch.equal(made.scale, nearest.scale)
    assert torch.equal(made.codes, nearest.codes)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_errors_of_ordinary_weights_fall(num_bits):
    """It would hold of a search that never finds anything that nothing gets worse."""
    weight = np.random.default_rng(num_bits).standard_t(5, (16, 256))
    drawn = rounding_problem(weight, Scheme(num_bits=num_bits, group_size=64, symmetric=False))
    found = [
        (drawn.weight.double() - rounding.dequantize(each)).abs().sum(1)
        for each in (run(drawn), rounding.to_nearest(drawn))
    ]
    assert bool((found[0] < found[1]).all())


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_defaults_do_not_clip_what_squares_cannot_bear(num_bits):
    """With a beta of 10 steps, most of each error is left to e, and squared errors grow."""
    weight = np.random.default_rng(num_bits).standard_t(5, (16, 256))
    drawn = rounding_problem(weight, Scheme(num_bits=num_bits, group_size=64, symmetric=False))
    found = [
        (drawn.weight.double() - rounding.dequantize(each)).square().sum(1)
        for each in (run(drawn), rounding.to_nearest(drawn))
    ]
    assert bool((found[0] < found[1]).all())


def test_the_zero_point_is_the_mean_of_eq_6():
    """With beta so small that every error is shrunk to 0, a shift of the grid is found."""
    from qframe_plugins.kernels.numba_cpu.hqq import _zero_point

    w = np.float32([-1.25, -0.25, 0.75, 1.75])
    grid = (np.int64(0), np.int64(3), False, np.int64(1))
    found = [_zero_point(w, 1.0, 1, grid, (0.5, beta, 1.0, np.int64(20))) for beta in (2**-9, 2**9)]
    assert found[0] == 1.25
    assert 1 < found[1] < 1.25  # most of the errors is left to e


def test_shrinkage_takes_small_errors_away_and_keeps_large_ones():
    from qframe_plugins.kernels.numba_cpu.hqq import _shrink

    assert _shrink(0.0, 0.5, 2.0) == 0
    assert _shrink(1.0, 0.5, 2.0) == 0.5  # 1 - 1^(-1/2) / 2
    assert _shrink(-4.0, 0.5, 2.0) == -3.75
    assert _shrink(0.25, 0.5, 2.0) == 0  # 1/4 - 2/2 < 0


# Contract ---------------------------------------------------------------------------------------


def test_the_plugin_keeps_the_contract():
    assert objection(HQQ(), Rounder) is None
    assert HQQ().capabilities.objection(Scheme(strategy="tensor"))


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 1), (1, 7), (65, 3)])
@pytest.mark.parametrize("sizes", [{}, {"group_size": 1}, {"group_size": 4}, {"group_size": 9}])
def test_small_shapes_are_no_exception(shape, sizes):
    weight = np.random.default_rng(0).normal(size=shape)
    drawn = rounding_problem(weight, Scheme(symmetric=False, **sizes))
    made = run(drawn)
    assert made.codes.shape == shape
    assert tuple(made.scale.shape) == drawn.scheme.scale_shape(*shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_layer(bad):
    with pytest.raises(NonFiniteError, match=r"block\.up"):
        run(rounding_problem([[1.0, bad]], Scheme()))


@settings(max_examples=20)
@given(problems())
def test_the_weight_is_left_as_it_was_and_the_result_is_the_same_again(drawn):
    before = drawn.weight.clone()
    made = run(drawn)
    assert torch.equal(drawn.weight, before)
    assert same(made, run(drawn))


def test_bits_depend_neither_on_threads_nor_on_the_other_rows():
    rng = np.random.default_rng(2)
    scheme = Scheme(group_size=48, symmetric=False, scale_dtype="float32")
    drawn = rounding_problem(rng.normal(size=(60, 150)), scheme)
    assert depends_on_rows_alone(run, drawn, [50, 3, 24, 59])


def test_the_kernel_refuses_scales_that_do_not_fit():
    one = np.ones((2, 1), np.float32), np.zeros((2, 1), np.int16)
    with pytest.raises(ValueError, match="one for each group"):
        half_quadratic(
            np.ones((2, 4), np.float32),
            one,
            one,
            2,
            -8,
            7,
            symmetric=True,
            scale_dtype="float16",
            power=0.7,
            beta=0.1,
            kappa=1.01,
            iterations=20,
        )


def test_the_certificate_finds_what_is_worse():
    drawn = rounding_problem(
        np.random.default_rng(0).normal(size=(4, 32)), Scheme(group_size=8, symmetric=False)
    )
    made = run(drawn)
    for claim in HQQ().claims[1:3]:
        worse = dataclasses.replace(made, scale=made.scale * 2)
        assert claim.certify(Evidence(drawn, made)).holds
        assert not claim.certify(Evidence(drawn, worse)).holds


def test_what_the_power_allows_is_next_to_nothing():
    assert bounds.no_worse_power(1.0, 0.0, 1024) <= 1 + bounds.gamma(1)


def test_it_keeps_its_promises(qframe_check):
    qframe_check(HQQ(), profile="fast")
