"""Round to nearest keeps every promise of docs/bounds.md, B1, and agrees with the oracle's bits.

A check takes a problem and what was made of it, and returns how much of the allowed error was
used: at most 1 is kept. The same checks judge the RTN plugin and deliberately wrong variants.
"""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qframe import QuantizedWeight, Scheme, bounds, reference, rounding
from qframe.errors import NonFiniteError
from qframe_conformance.strategies import (
    normal,
    one_outlier,
    one_sided,
    subnormal,
    ties,
    zeros,
)
from qframe_conformance.strategies import rounding_problem as problem
from qframe_conformance.strategies import rounding_problems as problems
from qframe_plugins.rounders.rtn import RTN

RNG = np.random.default_rng(0)  # RTN takes no random numbers


# Problems -------------------------------------------------------------------------------------


def planted_problems():
    """A fixed list for the mutants: every nasty weight in every kind of scheme."""
    for seed, kind in enumerate((normal, ties, one_sided, zeros, subnormal, one_outlier)):
        for bits, dtype in ((4, "float16"), (8, "bfloat16"), (3, "float32"), (2, "float16")):
            for symmetric, rule in ((True, "full"), (True, "restricted"), (False, "full")):
                for size in (None, 5):
                    rng = np.random.default_rng(seed)
                    scheme = Scheme(
                        num_bits=bits,
                        symmetric=symmetric,
                        scale_rule=rule,
                        scale_dtype=dtype,
                        group_size=size,
                    )
                    yield problem(kind(rng, (3, 12)), scheme)


def rtn(drawn):
    return RTN().round(drawn, RNG)


def per_weight(per_group, quantized, rows):
    return np.float64(rounding.expand(per_group, quantized.group_index, rows).numpy())


def arrays(drawn, made):
    """(weight, codes, scale, zero point), each [rows, columns] float64."""
    rows = len(drawn.weight)
    scale, zero = per_weight(made.scale, made, rows), per_weight(made.zero_point, made, rows)
    return np.float64(drawn.weight.numpy()), np.float64(made.codes.numpy()), scale, zero


def groups(drawn):
    """(row of scales, group, weights, rows, columns) of each group, by the scheme's words."""
    weight, scheme = np.float64(drawn.weight.numpy()), drawn.scheme
    rows, columns = weight.shape
    size = scheme.group_size or columns
    if scheme.strategy == "tensor":
        if rows:
            yield 0, 0, weight.ravel(), slice(None), slice(None)
        return
    for i in range(rows):
        for g, start in enumerate(range(0, columns, size)):
            yield i, g, weight[i, start : start + size], slice(i, i + 1), slice(start, start + size)


# Checks ---------------------------------------------------------------------------------------


def half_step(drawn, made):
    weight, codes, scale, zero = arrays(drawn, made)
    error = np.abs(weight - scale * (codes - zero))
    return bounds.ratio(error, bounds.half_step(weight, scale, zero, drawn.grid))


def nearest_code(drawn, made):
    weight, codes, scale, zero = arrays(drawn, made)
    error = np.abs(weight - scale * (codes - zero))
    return bounds.ratio(error, bounds.nearest_code(weight, scale, zero, drawn.grid))


def scale_rule(drawn, made):
    used = [0.0]
    for i, g, weights, *_ in groups(drawn):
        scale = float(made.scale[i, g])
        ideal = bounds.ideal_scale(
            weights.min(), weights.max(), drawn.grid, symmetric=drawn.scheme.symmetric
        )
        lowest, highest = bounds.scale_rule(ideal, drawn.scheme.scale_dtype)
        middle = (lowest + highest) / 2
        if ideal == 0:
            used.append(0.0 if scale == 1 else np.inf)
        else:
            used.append(bounds.ratio(scale - middle, highest - middle))
    return max(used)


def coverage(drawn, made):
    used = [0.0]
    for i, g, weights, *_ in groups(drawn):
        scale, zero = float(made.scale[i, g]), float(made.zero_point[i, g])
        lo, hi = weights.min(), weights.max()
        beyond = max(
            scale * (drawn.grid.qmin - zero) - lo, hi - scale * (drawn.grid.qmax - zero), 0
        )
        allowed = bounds.coverage(lo, hi, scale, drawn.grid, symmetric=drawn.scheme.symmetric)
        used.append(bounds.ratio(beyond, allowed))
    return max(used)


def on_the_grid(drawn, made):
    grid = drawn.grid
    low, high = grid.qmin, grid.qmax
    good = (
        made.codes.dtype == made.zero_point.dtype == torch.int16
        and made.codes.shape == drawn.weight.shape
        and tuple(made.scale.shape) == drawn.scheme.scale_shape(*drawn.weight.shape)
        and made.scale.shape == made.zero_point.shape
        and bool(((made.codes >= low) & (made.codes <= high)).all())
        and bool(((made.zero_point >= low) & (made.zero_point <= high)).all())
        and bool((torch.isfinite(made.scale) & (made.scale > 0)).all())
        and (not drawn.scheme.symmetric or not made.zero_point.any())
        and torch.equal(made.scale, rounding.round_up(made.scale, drawn.scheme.scale_dtype))
    )
    return 0.0 if good else np.inf


def monotone(drawn, made):
    for *_, rows, columns in groups(drawn):
        weights = drawn.weight[rows, columns].flatten()
        codes = made.codes[rows, columns].flatten().int()
        order = torch.argsort(weights, stable=True)
        steps, rises = codes[order].diff(), weights[order].diff() > 0
        if (steps < 0).any() or steps[~rises].any():
            return np.inf
    return 0.0


def zeros_stay(drawn, made):
    """Every weight 0 is worth 0, and a group of zeros has scale 1."""
    values = rounding.dequantize(made)
    bare = [made.scale[i, g] != 1 for i, g, weights, *_ in groups(drawn) if not weights.any()]
    return np.inf if values[drawn.weight == 0].any() or any(bare) else 0.0


CHECKS = (half_step, nearest_code, scale_rule, coverage, on_the_grid, monotone, zeros_stay)


# What RTN promises ----------------------------------------------------------------------------


@given(problems())
def test_codes_lie_on_the_grid_and_scales_are_stored_numbers(drawn):
    assert on_the_grid(drawn, rtn(drawn)) <= 1


@given(problems())
def test_every_weight_is_within_half_a_step_of_its_code(drawn):
    assert half_step(drawn, rtn(drawn)) <= 1


@given(problems(observer="mse", max_columns=6))
def test_a_clipped_weight_still_gets_the_nearest_code(drawn):
    made = rtn(drawn)
    assert nearest_code(drawn, made) <= 1
    assert half_step(drawn, made) <= 1


@given(problems())
def test_every_code_is_the_nearest_one(drawn):
    assert nearest_code(drawn, rtn(drawn)) <= 1


@given(problems())
def test_every_scale_is_the_documented_one_rounded_up(drawn):
    assert scale_rule(drawn, rtn(drawn)) <= 1


@given(problems())
def test_no_group_reaches_further_beyond_its_codes_than_its_rule_allows(drawn):
    assert coverage(drawn, rtn(drawn)) <= 1


@given(problems())
def test_codes_never_fall_when_weights_rise(drawn):
    assert monotone(drawn, rtn(drawn)) <= 1


@given(problems())
def test_zeros_stay_zeros(drawn):
    assert zeros_stay(drawn, rtn(drawn)) <= 1


@given(problems())
def test_values_are_what_codes_and_scales_say(drawn):
    made = rtn(drawn)
    _, codes, scale, zero = arrays(drawn, made)
    values = rounding.dequantize(made)
    assert values.dtype == torch.float32
    allowed = bounds.decode(scale, codes - zero)
    assert bounds.ratio(values.numpy() - scale * (codes - zero), allowed) <= 1
    if drawn.scheme.scale_dtype != "float32":
        assert not allowed.any()  # 16-bit scales times 8-bit codes are float32 numbers


@given(problems())
def test_scales_zero_points_and_codes_have_the_bits_of_the_oracle(drawn):
    made = rtn(drawn)
    oracle = reference.rtn(drawn.weight.numpy(), drawn.scheme, drawn.grid)
    assert np.array_equal(made.scale.numpy(), oracle.scale)
    assert np.array_equal(made.zero_point.numpy(), oracle.zero_point)
    assert np.array_equal(made.group_index.numpy(), oracle.group_index)
    assert np.array_equal(made.codes.numpy(), oracle.codes)
    assert np.array_equal(rounding.dequantize(made).numpy(), oracle.values())


@given(problems(), st.integers(1, 40), st.randoms(use_true_random=False))
def test_strips_of_any_height_give_the_same_bits(drawn, strip, random):
    made = rtn(drawn)
    columns = list(range(drawn.weight.shape[1]))
    for order in (columns, random.sample(columns, len(columns))):
        weight = drawn.weight[:, order]
        own = dataclasses.replace(
            made, codes=made.codes[:, order], group_index=made.group_index[order]
        )
        with mock.patch.object(rounding, "_STRIP", strip):
            codes = rounding.encode(weight, own.scale, own.zero_point, own.group_index, drawn.grid)
            values = rounding.dequantize(own)
        assert torch.equal(codes, own.codes)
        assert torch.equal(values, rounding.dequantize(made)[:, order])


@given(problems(observer="mse", max_rows=2, max_columns=6))
def test_the_mse_scale_is_the_clipping_with_the_least_squared_error(drawn):
    made = rtn(drawn)
    for i, g, weights, *_ in groups(drawn):
        chosen = (made.scale[i, g].item(), made.zero_point[i, g].item())
        tried = reference.candidates(weights, drawn.scheme, drawn.grid)
        error = {(float(scale), zero): each for scale, zero, each in tried}
        assert chosen in error
        # Two sums of float64 that are compared differ by at most gamma_n of each.
        excess = error[chosen] - min(error.values())
        sums = 2 * bounds.accumulate(error[chosen], len(weights), bounds.UNIT["float64"])
        assert bounds.ratio(excess, sums) <= 1


@given(problems())
def test_values_are_fixed_points_of_encoding(drawn):
    made = rtn(drawn)
    again = rounding.encode(
        rounding.dequantize(made), made.scale, made.zero_point, made.group_index, drawn.grid
    )
    assert torch.equal(again, made.codes)


@given(problems())
def test_the_weight_is_not_changed(drawn):
    before = drawn.weight.clone()
    rtn(drawn)
    assert torch.equal(drawn.weight, before)


@given(problems(symmetric=True, scale_rule="restricted"))
def test_a_mirrored_weight_has_mirrored_codes(drawn):
    mirrored = rtn(dataclasses.replace(drawn, weight=-drawn.weight))
    assert torch.equal(mirrored.codes, -rtn(drawn).codes)


@given(problems(), st.integers(-6, 6))
def test_scaling_by_a_power_of_two_scales_only_the_scales(drawn, power):
    scaled = dataclasses.replace(drawn, weight=drawn.weight * 2.0**power)
    one = rtn(drawn)
    try:
        other = rtn(scaled)
    except NonFiniteError:
        assume(False)
    # Below its normal range a storage dtype has fewer bits to give.
    normal_range = torch.finfo(getattr(torch, drawn.scheme.scale_dtype)).tiny
    smallest = [np.abs(w).max() for *_, w, _, _ in groups(drawn) if w.any()]
    levels = drawn.grid.qmax - drawn.grid.qmin
    assume(all(a * min(1, 2.0**power) / levels > normal_range for a in smallest))
    assume(torch.equal(scaled.weight / 2.0**power, drawn.weight))
    alive = torch.zeros(one.scale.shape, dtype=torch.bool)
    for i, g, weights, *_ in groups(drawn):
        alive[i, g] = bool(weights.any())
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.zero_point, other.zero_point)
    assert torch.equal((one.scale * 2.0**power)[alive], other.scale[alive])


@given(problems(), st.randoms(use_true_random=False))
def test_rows_and_the_columns_of_a_group_may_be_shuffled(drawn, random):
    rows, columns = drawn.weight.shape
    row_order = torch.tensor(random.sample(range(rows), rows), dtype=torch.long)
    column_order = []
    size = drawn.scheme.group_size or columns
    for start in range(0, columns, size):
        members = range(start, min(start + size, columns))
        column_order += random.sample(members, len(members))
    shuffled = drawn.weight[row_order][:, column_order]
    made = rtn(dataclasses.replace(drawn, weight=shuffled))
    assert torch.equal(made.codes, rtn(drawn).codes[row_order][:, column_order])


@st.composite
def grid_problems(draw):
    """Weights that are codes times a power of two, both ends of the grid in every group."""
    symmetric = draw(st.booleans())
    rows, groups_, size = (draw(st.integers(*span)) for span in ((1, 3), (1, 3), (2, 6)))
    scheme = Scheme(
        num_bits=draw(st.sampled_from([2, 3, 4, 8])),
        symmetric=symmetric,
        scale_rule="restricted",
        group_size=size,
        scale_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )
    grid = problem(np.zeros((1, 1)), scheme).grid
    codes = draw(
        hnp.arrays(np.int64, (rows, groups_, size), elements=st.integers(grid.qmin, grid.qmax))
    )
    codes[..., 0], codes[..., 1] = grid.qmax, grid.qmin
    zero = 0 if symmetric else draw(st.integers(grid.qmin, grid.qmax))
    step = 2.0 ** draw(st.integers(-8, 5))
    return problem(((codes - zero) * step).reshape(rows, -1), scheme)


@given(grid_problems())
def test_weights_on_the_grid_come_back_exactly(drawn):
    assert torch.equal(rounding.dequantize(rtn(drawn)), drawn.weight)


@pytest.mark.parametrize(
    ("weight", "codes"),
    [
        # scale 1: the last weight spans the range; halves go to the even neighbour
        ([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7], [0, 2, 2, 0, -2, -2, 7]),
        ([0, 0, 0], [0, 0, 0]),
        ([-7, 7], [-7, 7]),
    ],
)
def test_ties_go_to_even(weight, codes):
    scheme = Scheme(num_bits=4, scale_rule="restricted")
    assert rtn(problem([weight], scheme)).codes.tolist() == [codes]


def test_an_asymmetric_range_always_holds_zero():
    made = rtn(problem([[10, 11, 12.5]], Scheme(num_bits=2, symmetric=False)))
    assert made.zero_point.tolist() == [[0]]
    made = rtn(problem([[-10, -11, -12.5]], Scheme(num_bits=2, symmetric=False)))
    assert made.zero_point.tolist() == [[3]]


@pytest.mark.parametrize("settings", [{"strategy": "tensor"}, {}, {"group_size": 4}])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_matrices_without_rows_or_columns_are_no_exception(settings, shape):
    drawn = problem(np.zeros(shape), Scheme(**settings))
    made = rtn(drawn)
    assert on_the_grid(drawn, made) <= 1
    assert rounding.dequantize(made).shape == shape


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_scale_that_its_dtype_cannot_hold_is_refused_by_layer(observer):
    scheme = Scheme(num_bits=4, group_size=2, observer=observer)
    with pytest.raises(NonFiniteError, match=r"block\.up.*float16"):
        rtn(problem([[1, 2, 2.0**20, 3]], scheme))
    assert half_step(*(lambda p: (p, rtn(p)))(problem([[1, 2, 2.0**18, 3]], scheme))) <= 1


# Storage --------------------------------------------------------------------------------------

STORED = ("float16", "bfloat16")


@given(
    st.floats(0, 2.0**127, width=32) | st.floats(0, 2.0**-100, width=32),
    st.sampled_from(STORED),
)
@example(65504.0, "float16")
@example(65505.0, "float16")
@example(float(np.finfo(np.float32).max), "bfloat16")
@example(2.0**-149, "bfloat16")
def test_a_scale_is_stored_as_the_least_number_not_below_it(scale, dtype):
    tensor = torch.tensor([scale], dtype=torch.float32)
    up = rounding.round_up(tensor, dtype)
    assert up.item() == reference.round_up(tensor.item(), dtype)
    kept = up.to(getattr(torch, dtype))
    assert torch.equal(kept.float(), up)
    assert up.item() >= tensor.item()
    below = torch.nextafter(kept, torch.zeros_like(kept)).float()
    assert scale == 0 or below.item() < tensor.item()


@pytest.mark.parametrize("dtype", STORED)
def test_the_test_of_storage_rejects_rounding_to_nearest(dtype):
    nearest = torch.tensor([1 + 2.0**-20]).to(getattr(torch, dtype)).float()
    assert nearest.item() != reference.round_up(1 + 2.0**-20, dtype)


@pytest.mark.parametrize("dtype", ["float32", *STORED])
def test_a_group_that_is_not_zero_never_gets_scale_zero(dtype):
    scheme = Scheme(num_bits=8, scale_dtype=dtype)
    made = rtn(problem([[2.0**-149, 0]], scheme))
    assert made.scale.item() == rounding.smallest_positive(dtype)
    assert made.scale.item() == reference.smallest_positive(dtype)


# Mutants --------------------------------------------------------------------------------------


def half_up(steps):
    return torch.floor(steps + 0.5)


def variant(
    drawn,
    rint=torch.round,
    storage=rounding.round_up,
    stretch=1,
    zero_rint=torch.round,
    decode_zero=0,
    shift=0,
    cut=0,
    low=0,
    absmax=True,
    zero_in_range=True,
    zero_scale=1.0,
    precision=torch.float32,
):
    """RTN once more, with a place for every mistake; by default there is none."""
    scheme, grid = drawn.scheme, drawn.grid
    index = rounding.group_index(drawn.weight.shape[1], scheme)
    scale = torch.ones(scheme.scale_shape(*drawn.weight.shape))
    zero = torch.zeros_like(scale)
    for i, g, weights, *_ in groups(drawn):
        lo, hi = np.float32(weights.min()), np.float32(weights.max())
        if scheme.symmetric:
            extent = 2 * (max(abs(lo), abs(hi)) if absmax else abs(hi))
        else:
            lo, hi = (min(lo, 0), max(hi, 0)) if zero_in_range else (lo, hi)
            extent = np.float32(hi) - np.float32(lo)
        quotient = torch.tensor(extent / np.float32(grid.qmax - grid.qmin) * np.float32(stretch))
        stored = storage(quotient, scheme.scale_dtype)
        if stored == 0:
            stored = torch.tensor(rounding.smallest_positive(scheme.scale_dtype))
        scale[i, g] = stored if extent else zero_scale
        if not scheme.symmetric:
            place = zero_rint(grid.qmin - torch.tensor(lo) / scale[i, g])
            zero[i, g] = place.clamp(grid.qmin, grid.qmax)
    spread = rounding.expand(scale, index.roll(shift), len(drawn.weight))
    offset = rounding.expand(zero, index.roll(shift), len(drawn.weight))
    steps = rint((drawn.weight.to(precision) / spread.to(precision)).float())
    codes = (steps + offset).clamp(grid.qmin + low, grid.qmax - cut)
    return QuantizedWeight(
        codes=codes.to(torch.int16),
        scale=scale,
        zero_point=(zero + decode_zero).to(torch.int16),
        group_index=index,
    )


def to_nearest(scale, dtype):
    return scale.to(getattr(torch, dtype)).float()


def no_storage(scale, dtype):
    return scale


def worst(check, **mistake):
    """How much of the allowed error the variant uses, over all planted problems."""
    return max(check(drawn, variant(drawn, **mistake)) for drawn in planted_problems())


@pytest.mark.parametrize("check", CHECKS)
def test_a_variant_without_mistakes_passes(check):
    assert worst(check) <= 1


@pytest.mark.parametrize("check", CHECKS)
def test_rounding_halves_away_is_no_mistake_to_a_bound(check):
    away = {"rint": lambda steps: torch.copysign(half_up(steps.abs()), steps)}
    assert worst(check, **away) <= 1


@pytest.mark.parametrize(
    ("check", "mistake"),
    [
        (half_step, {"rint": torch.floor}),
        (nearest_code, {"rint": torch.floor}),
        (half_step, {"rint": torch.ceil}),
        (half_step, {"rint": torch.trunc}),
        (coverage, {"storage": to_nearest}),
        (on_the_grid, {"storage": no_storage}),
        (scale_rule, {"stretch": 2}),
        (scale_rule, {"stretch": 0.5}),
        (coverage, {"stretch": 0.5}),
        (scale_rule, {"absmax": False}),
        (coverage, {"zero_rint": torch.trunc}),
        (scale_rule, {"zero_in_range": False}),
        (half_step, {"decode_zero": 1}),
        (on_the_grid, {"decode_zero": 1}),
        (half_step, {"shift": 1}),
        (nearest_code, {"cut": 1}),
        (nearest_code, {"low": 1}),
        (half_step, {"cut": 1}),
        (on_the_grid, {"cut": -1}),
        (zeros_stay, {"decode_zero": 1}),
        (zeros_stay, {"zero_scale": 2.0**-14}),
        (on_the_grid, {"zero_scale": 0.0}),
        (nearest_code, {"precision": torch.float16}),
        (monotone, {"rint": lambda steps: torch.round(steps) * (steps.abs() != 1)}),
    ],
)
def test_a_mistake_is_found(check, mistake):
    assert worst(check, **mistake) > 1


def test_the_oracle_finds_what_no_bound_can_see():
    # Halves rounded up keep every bound: the error of a tie is the same on both sides.
    assert all(worst(check, rint=half_up) <= 1 for check in CHECKS if check is not monotone)
    differs = [
        not np.array_equal(
            variant(drawn, rint=half_up).codes.numpy(),
            reference.rtn(drawn.weight.numpy(), drawn.scheme, drawn.grid).codes,
        )
        for drawn in planted_problems()
    ]
    assert any(differs)


def test_a_nan_never_passes_a_bound():
    assert bounds.ratio(float("nan"), 1) == bounds.ratio(1, float("nan")) == np.inf
    assert bounds.ratio(np.inf, np.inf) == np.inf
    assert bounds.ratio([0, 1], [0, 2]) <= 1 < bounds.ratio([1, 0], [0, 2])
