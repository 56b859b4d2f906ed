"""Optimal RTN finds the least squared error of all scales that can be stored and all zero points.

The oracle tries every positive number of a 16-bit dtype with every zero point, so nothing is left
to a tolerance: the least error of both must be the same number.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qframe import Scheme, bounds, rounding
from qframe.certificates import Evidence
from qframe.claims.fitted import _next
from qframe.contracts import Rounder
from qframe.errors import NonFiniteError
from qframe.host import objection
from qframe_conformance.kinds import NASTY, heavy_tailed, on_grid, small
from qframe_conformance.strategies import rounding_problem, rounding_problems
from qframe_plugins.kernels.numba_cpu.best_scale import best_scales, neighbours
from qframe_plugins.kernels.numba_cpu.scales import SCALE_DTYPES
from qframe_plugins.rounders.optimal_rtn import OptimalRTN
from tests.rounders.alike import depends_on_rows_alone, same

RNG = np.random.default_rng(0)  # the method takes no random numbers


def numbers(dtype):
    """All positive finite numbers of a 16-bit dtype, ascending, float64."""
    patterns = np.arange(1, 0x7F80 if dtype == "bfloat16" else 0x7C00, dtype=np.uint16)
    if dtype == "bfloat16":
        return (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return patterns.view(np.float16).astype(np.float64)


NUMBERS = {dtype: numbers(dtype) for dtype in ("float16", "bfloat16")}


def test_there_are_as_many_scales_as_there_should_be():
    assert [len(NUMBERS[dtype]) for dtype in ("float16", "bfloat16")] == [31743, 32639]


def least(weight, scheme, grid):
    """The least error of a group over all scales and zero points, summed in column order."""
    scale = NUMBERS[scheme.scale_dtype]
    zeros = [0] if scheme.symmetric else range(grid.qmin, grid.qmax + 1)
    found = np.inf
    for zero in zeros:
        total = np.zeros(len(scale))
        for w in np.float64(weight):
            steps = np.clip(np.rint(w / scale), grid.qmin - zero, grid.qmax - zero)
            total += np.square(w - scale * steps)
        found = min(found, total.min())
    return found


def losses(drawn, made):
    """The squared error of each group, [rows, groups] float64, summed in column order."""
    index, (rows, _) = made.group_index, drawn.weight.shape
    step, zero = (rounding.expand(each, index, rows) for each in (made.scale, made.zero_point))
    error = drawn.weight.double() - step.double() * (made.codes - zero)
    found = np.zeros(made.scale.shape)
    for column, group in enumerate(index.tolist()):
        found[:, group] += np.square(error[:, column].numpy())
    return found


def run(drawn):
    return OptimalRTN().round(drawn, RNG)


def problems(max_columns=12, **given):
    """What a minmax scale can span in every dtype."""
    kinds = [None, *NASTY, heavy_tailed, small]
    choices = {
        "num_bits": st.sampled_from([2, 3, 4]),
        "strategy": st.sampled_from(["channel", "group"]),
    }
    return rounding_problems(max_columns=max_columns, weight_kinds=kinds, **(choices | given))


# The least of all -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(problems(5, scale_dtype=st.sampled_from(list(NUMBERS))))
def test_no_scale_of_sixteen_bits_and_no_zero_point_is_better(drawn):
    made = run(drawn)
    found = losses(drawn, made)
    for group in range(found.shape[1]):
        columns = made.group_index.numpy() == group
        for row, weight in enumerate(drawn.weight.numpy()[:, columns]):
            assert found[row, group] == least(weight, drawn.scheme, drawn.grid)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_so_it_is_of_ordinary_groups(num_bits, symmetric):
    rng = np.random.default_rng(num_bits)
    scheme = Scheme(num_bits=num_bits, group_size=24, symmetric=symmetric)
    drawn = rounding_problem(rng.standard_t(3, (4, 48)) / 50, scheme)
    found = losses(drawn, run(drawn))
    groups = drawn.weight.numpy().reshape(4, 2, 24)
    for row, group in np.ndindex(4, 2):
        assert found[row, group] == least(groups[row, group], scheme, drawn.grid)


@given(problems(scale_dtype="float32"), st.data())
def test_no_other_float32_scale_that_is_tried_is_better(drawn, data):
    """All cannot be tried: those next to the one found, and any."""
    made = run(drawn)
    found = losses(drawn, made)
    if not found.size:
        return
    n = drawn.scheme.group_width(drawn.weight.shape[1])
    allowed = found * (1 - 2 * bounds.gamma(n + 2, bounds.UNIT["float64"]))
    factor = data.draw(st.floats(2**-4, 2**4, width=32))
    near = made.scale.numpy().view(np.int32) + np.int32(data.draw(st.integers(-3, 3)))
    for scale in (near.view(np.float32), made.scale.numpy() * np.float32(factor)):
        scale = torch.from_numpy(np.where(scale > 0, scale, np.float32(1)))
        zero = made.zero_point
        if not drawn.scheme.symmetric:
            zero = torch.full_like(zero, data.draw(st.integers(drawn.grid.qmin, drawn.grid.qmax)))
        codes = rounding.encode(drawn.weight, scale, zero, made.group_index, drawn.grid)
        other = dataclasses.replace(made, scale=scale, zero_point=zero, codes=codes)
        assert (losses(drawn, other) >= allowed).all()


@given(problems(scale_dtype="float32"), st.integers(-2, 2))
def test_it_does_not_stay_next_to_the_best(drawn, away):
    """A start a step away leaves so little to gain that a piece is easily taken for a worse one."""
    made = run(drawn)
    if not made.codes.numel():
        return
    start = (made.scale.numpy().view(np.int32) + np.int32(away)).view(np.float32)
    start = np.where((start > 0) & (start < np.inf), start, made.scale.numpy())
    scheme, width = drawn.scheme, drawn.scheme.group_width(drawn.weight.shape[1])
    codes, scale, zero_point = map(
        torch.from_numpy,
        best_scales(
            drawn.weight.numpy(),
            start,
            made.zero_point.numpy(),
            width,
            drawn.grid.qmin,
            drawn.grid.qmax,
            symmetric=scheme.symmetric,
            scale_dtype="float32",
        ),
    )
    again = dataclasses.replace(made, codes=codes, scale=scale, zero_point=zero_point)
    assert (losses(drawn, again) <= losses(drawn, made)).all()


@given(problems())
def test_what_it_claims_holds(drawn):
    certificates = Evidence(drawn, run(drawn)).certificates(OptimalRTN.claims)
    assert len(certificates) == 4
    assert all(each.holds for each in certificates)


def test_the_observer_plays_no_part():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 32))
    one, other = (
        run(rounding_problem(weight, Scheme(group_size=8, observer=observer)))
        for observer in ("minmax", "mse")
    )
    assert same(one, other)


# Exact properties -----------------------------------------------------------------------------


@given(problems(scale_dtype=st.sampled_from(list(NUMBERS))))
def test_what_was_quantized_is_given_back_bit_for_bit(drawn):
    """Values of 16-bit scales are float32 numbers (B1.d), so an error of 0 can be reached."""
    values = rounding.dequantize(run(drawn))
    again = run(dataclasses.replace(drawn, weight=values))
    assert torch.equal(rounding.dequantize(again), values)


@given(st.data())
def test_weights_that_lie_on_a_grid_are_given_back(data):
    symmetric = data.draw(st.booleans())
    scheme = Scheme(
        num_bits=data.draw(st.sampled_from([2, 3, 4])),
        group_size=6,
        symmetric=symmetric,
        scale_rule="restricted",
    )
    drawn = rounding_problem(np.zeros((3, 12)), scheme)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weight = on_grid(rng, (3, 12), drawn.grid, 6, symmetric=symmetric)
    drawn = rounding_problem(weight, scheme)
    assert torch.equal(rounding.dequantize(run(drawn)), drawn.weight)


@given(problems(symmetric=False))
def test_a_mirrored_group_has_the_same_error(drawn):
    """The zero point mirrors it, so the range of codes is no obstacle."""
    mirrored = dataclasses.replace(drawn, weight=-drawn.weight)
    assert np.array_equal(losses(drawn, run(drawn)), losses(mirrored, run(mirrored)))


@given(problems())
def test_zeros_keep_scale_one(drawn):
    empty = dataclasses.replace(drawn, weight=torch.zeros_like(drawn.weight))
    made = run(empty)
    assert bool((made.scale == 1).all())
    assert torch.equal(
        made.codes, rounding.expand(made.zero_point, made.group_index, len(made.codes))
    )


# Numbers next to one another --------------------------------------------------------------------


@given(
    st.sampled_from(list(SCALE_DTYPES)),
    st.one_of(
        st.floats(2.0**-150, 2.0**129, exclude_min=True),
        st.floats(2.0**-26, 2.0**-13),
        st.sampled_from([65504.0, 65505.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-126, 2.0**-133]),
    ),
)
def test_neighbours_are_the_nearest_on_either_side(dtype, x):
    low, high = neighbours(x, SCALE_DTYPES[dtype])
    assert low <= x <= high
    if low == high:
        return
    stored = np.array([low if low > 0 else high])
    next_one = _next(stored, dtype, 1 if low > 0 else -1)[0]
    assert next_one == (high if low > 0 else -np.inf)


# Contract ---------------------------------------------------------------------------------------


def test_the_plugin_keeps_the_contract():
    assert objection(OptimalRTN(), Rounder) is None


@pytest.mark.parametrize("scheme", [Scheme(num_bits=8), Scheme(strategy="tensor")])
def test_what_would_take_too_long_is_not_declared(scheme):
    assert OptimalRTN().capabilities.objection(scheme)


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 1), (1, 7), (65, 3)])
@pytest.mark.parametrize("sizes", [{}, {"group_size": 1}, {"group_size": 4}, {"group_size": 9}])
@pytest.mark.parametrize("symmetric", [True, False])
def test_small_shapes_are_no_exception(shape, sizes, symmetric):
    weight = np.random.default_rng(0).normal(size=shape)
    drawn = rounding_problem(weight, Scheme(symmetric=symmetric, **sizes))
    made = run(drawn)
    assert made.codes.shape == shape
    assert tuple(made.scale.shape) == drawn.scheme.scale_shape(*shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_layer(bad):
    with pytest.raises(NonFiniteError, match=r"block\.up"):
        run(rounding_problem([[1.0, bad]], Scheme()))


def test_a_range_that_no_scale_can_span_is_refused_by_layer():
    with pytest.raises(NonFiniteError, match=r"block\.up.*float16"):
        run(rounding_problem([[1, 2.0**21]], Scheme()))


@settings(max_examples=20)
@given(problems())
def test_the_weight_is_left_as_it_was(drawn):
    before = drawn.weight.clone()
    made = run(drawn)
    assert torch.equal(drawn.weight, before)
    assert same(made, run(drawn))


def test_bits_depend_neither_on_threads_nor_on_the_other_rows():
    rng = np.random.default_rng(2)
    scheme = Scheme(group_size=48, symmetric=False, scale_dtype="float32")
    drawn = rounding_problem(rng.normal(size=(100, 150)), scheme)
    assert depends_on_rows_alone(run, drawn, [50, 3, 64, 99, 63])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"scale": np.ones((2, 3), np.float32)}, "one for each group"),
        ({"zero_point": np.zeros((2, 1), np.int16)}, "one for each group"),
        ({"qmin": 1}, "hold 0"),
        ({"scale_dtype": "e8m0"}, "unknown scale_dtype"),
        ({"qmax": 0, "qmin": 0}, "another one"),
    ],
)
def test_the_kernel_refuses_operands_that_do_not_fit(changes, message):
    operands = {
        "weight": np.ones((2, 4), np.float32),
        "scale": np.ones((2, 2), np.float32),
        "zero_point": np.zeros((2, 2), np.int16),
        "group_size": 2,
        "qmin": -8,
        "qmax": 7,
        "symmetric": True,
        "scale_dtype": "float16",
    }
    with pytest.raises(ValueError, match=message):
        best_scales(**(operands | changes))


def test_it_keeps_its_promises(qframe_check):
    qframe_check(OptimalRTN(), profile="fast")
