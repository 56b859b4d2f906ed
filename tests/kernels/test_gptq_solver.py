"""The GPTQ solver rounds every weight to the code nearest to its target, in any shape.

Allowed errors are computed from unit roundoffs, lengths and data (docs/bounds.md, B3). Together
they say: F is the feedback of the given Hessian, and every code is nearest given that F.
"""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Scheme, reference, rounding
from qframe.contracts import Grid
from qframe_plugins.kernels.numba_cpu import hessian as moments
from qframe_plugins.kernels.numba_cpu.cholesky import NotPositiveDefiniteError, feedback
from qframe_plugins.kernels.numba_cpu.gptq import solve_dynamic, solve_static
from qframe_plugins.kernels.numba_cpu.scales import SCALE_DTYPES, group_scale, round_up

U32, U64 = 2.0**-24, 2.0**-53
TINY = 2.0**-149  # the smallest float32: an operation that underflows is at most half of it off
GRIDS = [(0, 15), (-8, 7), (0, 3), (-1, 1), (0, 255)]


def gamma(operations, unit):
    return operations * unit / (1 - operations * unit)


# Problems -------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 257, 300]))
group_sizes = st.one_of(st.integers(1, 300), st.sampled_from([32, 64, 128, 135, 150]))
row_counts = st.one_of(st.integers(0, 5), st.sampled_from([63, 64, 65, 130]))
seeds = st.integers(0, 2**32 - 1)


def damped_hessian(rng, columns):
    mix = np.eye(columns) + rng.normal(size=(columns, columns)) * rng.choice([0, 0.1, 1])
    x = rng.normal(size=(2 * columns + 3, columns)) @ mix * rng.uniform(0.1, 3, columns)
    square = x.T @ x / len(x)
    return square + 0.01 * np.diag(square).mean() * np.eye(columns)


def weights(rng, rows, columns):
    weight = rng.normal(size=(rows, columns))
    kind = rng.choice(["gaussian", "zeros", "constant", "outlier", "subnormal", "zero rows"])
    if kind in ("zeros", "constant"):
        weight[:] = rng.normal() * (kind == "constant")
    elif kind == "outlier" and weight.size:
        weight.flat[rng.integers(weight.size)] = 2.0**13
    elif kind == "subnormal":
        weight = np.rint(weight * 100) * TINY
    elif kind == "zero rows":
        weight[::2] = 0
    return weight.astype(np.float32)


# Certificates ---------------------------------------------------------------------------------


def steps_off(weight, codes, scale, zero_point, groups, dense, qmin, qmax):
    """Return the worst (|value - target| - scale / 2) / allowance: at most 1 proves GPTQ."""
    columns = weight.shape[1]
    step = scale[:, groups]
    value = (step * (codes - zero_point[:, groups]).astype(np.float32)).astype(np.float64)
    delta, exact = weight - value, dense.astype(np.float64)
    away = value - (weight + delta @ exact.T)
    # The end codes are nearest to everything beyond them.
    away = np.where(codes == qmax, away, np.where(codes == qmin, -away, np.abs(away)))
    operations = np.arange(columns) + 3
    reach = np.abs(weight) + np.abs(delta) @ np.abs(exact).T
    allowance = gamma(operations, U32) * reach + operations * TINY
    return np.max((away - step.astype(np.float64) / 2) / allowance, initial=0)


@given(st.integers(1, 300), st.sampled_from(["float32", "float64"]), seeds)
def test_feedback_and_variances_reproduce_the_hessian(columns, precision, seed):
    hessian = damped_hessian(np.random.default_rng(seed), columns)
    lower_only = np.tril(hessian) + np.triu(np.full_like(hessian, np.nan), 1)
    found = feedback(lower_only, precision)
    v = np.sqrt(found.variances)[:, None] * (np.eye(columns) + found.dense())
    # Higham, theorem 10.3, + the root, the quotient, storing F in float32, and H in float32.
    unit = U32 if precision == "float32" else U64
    share = gamma(columns + 1, unit) + 2 * gamma(4, unit) + 2 * gamma(1, U32)
    allowed = share * (np.abs(v).T @ np.abs(v)) + unit * np.abs(hessian)
    assert (np.abs(v.T @ v - hessian) <= allowed).all()


@given(sizes, st.floats(0, 10), seeds)
def test_order_and_damp_mean_the_permuted_and_damped_hessian(columns, damp, seed):
    rng = np.random.default_rng(seed)
    hessian, order = damped_hessian(rng, columns), rng.permutation(columns)
    hessian = (hessian + hessian.T) / 2
    once = feedback(hessian, damp=damp, order=order)
    twice = feedback((hessian + damp * np.eye(columns))[order][:, order])
    assert np.array_equal(once.dense(), twice.dense())
    assert np.array_equal(once.variances, twice.variances)


@pytest.mark.parametrize("bad", [-1.0, 0.0, np.nan, np.inf])
@pytest.mark.parametrize("pivot", [0, 77, 299])
def test_a_pivot_that_is_not_positive_and_finite_is_named(bad, pivot):
    hessian = np.eye(300)
    hessian[pivot, pivot] = bad
    with pytest.raises(NotPositiveDefiniteError) as caught:
        feedback(hessian)
    assert caught.value.pivot == pivot


@given(row_counts, sizes, group_sizes, st.sampled_from(GRIDS), seeds)
def test_every_code_is_nearest_to_its_target(rows, columns, group_size, grid, seed):
    rng = np.random.default_rng(seed)
    weight, found = weights(rng, rows, columns), feedback(damped_hessian(rng, columns))
    symmetric = grid[0] < 0
    codes, scale, zero = solve_dynamic(weight, found, group_size, *grid, symmetric=symmetric)
    groups = np.arange(columns) // group_size
    assert scale.shape == zero.shape == (rows, groups[-1] + 1)
    assert codes.min(initial=grid[0]) >= grid[0]
    assert codes.max(initial=grid[0]) <= grid[1]
    assert steps_off(weight, codes, scale, zero, groups, found.dense(), *grid) <= 1

    # Static scales, scattered over the columns as act-order does, and shared by all rows.
    scattered = rng.integers(0, scale.shape[1], columns)
    for s, z in ((scale, zero), (scale[:1], zero[:1])):
        if len(s):
            codes = solve_static(weight, found, s, z, scattered, *grid)
            assert steps_off(weight, codes, s, z, scattered, found.dense(), *grid) <= 1


@given(row_counts, sizes, group_sizes, seeds)
def test_dynamic_scales_come_from_the_compensated_weights(rows, columns, group_size, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    found = feedback(damped_hessian(rng, columns))
    codes, scale, zero = solve_dynamic(weight, found, group_size, 0, 15, symmetric=False)
    groups = np.arange(columns) // group_size
    value = scale[:, groups] * (codes - zero[:, groups]).astype(np.float32)
    delta, f = weight - value.astype(np.float64), found.dense().astype(np.float64)
    for group in range(scale.shape[1]):
        known = np.arange(columns) < group * group_size
        these = groups == group
        # What the recursion gives for the group when no column of it is rounded, ...
        inner = f[np.ix_(these, these)]
        inverse = np.linalg.inv(np.eye(len(inner)) + inner)
        shift = delta[:, known] @ f[np.ix_(these, known)].T @ inverse.T
        compensated = weight[:, these] + shift
        # ... and how far rounding can take it: each step's error, carried on by the recursion.
        reach = (
            np.abs(weight[:, these]) + np.abs(delta[:, known]) @ np.abs(f[np.ix_(these, known)]).T
        )
        reach += np.abs(shift) @ np.abs(inner).T
        step = gamma(columns + 3, U32)
        spread = np.abs(inverse)
        carried = np.linalg.inv(np.eye(len(inner)) - step * spread @ np.abs(inner)) @ spread
        off = (step * reach @ carried.T).max(axis=1, initial=0)
        lo = np.minimum(compensated.min(axis=1), 0)
        extent = np.maximum(compensated.max(axis=1), 0) - lo
        s, z = scale[:, group].astype(np.float64), zero[:, group]
        assert (np.abs(s - extent / 15) <= 2 * off / 15 + gamma(3, U32) * (s + off)).all()
        wanted = np.clip(-lo / s, 0, 15)
        assert (np.abs(z - wanted) <= 1 / 2 + off / s + gamma(3, U32) * (wanted + 1)).all()


@given(row_counts, sizes, group_sizes, st.sampled_from(["minmax", "mse"]), seeds)
def test_codes_do_not_depend_on_blocking_rows_or_threads(rows, columns, group_size, observer, seed):
    rng = np.random.default_rng(seed)
    weight, hessian = weights(rng, rows, columns), damped_hessian(rng, columns)

    def solve(part):
        found = feedback(hessian)
        return solve_dynamic(part, found, group_size, 0, 15, symmetric=False, observer=observer)

    codes, scale, zero = solve(weight)
    # Blocks follow the groups when scales are dynamic, and not when they are static.
    groups = np.arange(columns) // group_size
    same = solve_static(weight, feedback(hessian), scale, zero, groups, 0, 15)
    assert np.array_equal(codes, same)

    some = rng.permutation(rows)[: rows // 2]
    for mine, all_rows in zip(solve(weight[some]), (codes, scale, zero), strict=True):
        assert np.array_equal(mine, all_rows[some])

    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone = solve(weight)
    finally:
        numba.set_num_threads(threads)
    for mine, shared in zip(alone, (codes, scale, zero), strict=True):
        assert np.array_equal(mine, shared)


def test_weights_and_scales_that_are_not_finite_are_refused():
    found = feedback(np.eye(70) + 0.5)
    one = np.ones((3, 1), np.float32)
    zero = np.zeros((3, 1), np.int16)
    groups = np.zeros(70, np.int32)
    for bad in (np.nan, np.inf, -np.inf):
        for column in (0, 69):
            weight = np.ones((3, 70), np.float32)
            weight[1, column] = bad
            with pytest.raises(ValueError, match="row 1"):
                solve_static(weight, found, one, zero, groups, 0, 15)
            with pytest.raises(ValueError, match="row 1"):
                solve_dynamic(weight, found, 32, 0, 15, symmetric=False)
        with pytest.raises(ValueError, match="positive and finite"):
            solve_static(weight, found, one * np.float32(bad), zero, groups, 0, 15)


# Scales ---------------------------------------------------------------------------------------

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
dtypes = st.sampled_from(sorted(SCALE_DTYPES))


@given(floats, floats, st.sampled_from(GRIDS), dtypes)
def test_group_scale_has_the_bits_of_the_oracle(one, other, grid, dtype):
    lo, hi = np.float32(min(one, other)), np.float32(max(one, other))
    for symmetric in (True, False):
        scheme = Scheme(strategy="channel", symmetric=symmetric, scale_dtype=dtype)
        expected = reference.scale_of_range(lo, hi, scheme, Grid(*grid))
        assert group_scale(lo, hi, *grid, symmetric, SCALE_DTYPES[dtype]) == expected


@pytest.mark.parametrize("dtype", sorted(SCALE_DTYPES))
def test_round_up_has_the_bits_of_the_oracle_at_every_float16(dtype):
    stored = np.arange(0x7C00, dtype=np.int16).view(np.float16).astype(np.float32)
    for scale in (stored, np.nextafter(stored, np.float32(np.inf))):
        expected = [reference.round_up(float(s), dtype) for s in scale]
        assert [round_up(s, SCALE_DTYPES[dtype]) for s in scale] == expected


@pytest.mark.parametrize("grid", GRIDS)
def test_every_candidate_of_the_mse_search_has_the_bits_of_fit_scales(grid):
    weight = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32) ** 3
    scheme = Scheme(
        strategy="channel", symmetric=grid[0] < 0, scale_dtype="float32", observer="mse"
    )
    scale, zero = rounding.fit_scales(torch.from_numpy(weight), scheme, Grid(*grid))
    _, mine, my_zero = solve_dynamic(
        weight, feedback(np.eye(16)), 16, *grid, symmetric=grid[0] < 0, observer="mse"
    )
    assert np.array_equal(mine, scale.numpy())
    assert np.array_equal(my_zero, zero.numpy())


@given(st.integers(1, 70), sizes, dtypes, st.sampled_from(["minmax", "mse"]), st.booleans(), seeds)
def test_the_first_group_has_the_scales_of_fit_scales(
    rows, columns, dtype, observer, symmetric, seed
):
    rng = np.random.default_rng(seed)
    weight, grid = weights(rng, rows, columns), Grid(-8, 7) if symmetric else Grid(0, 15)
    scheme = Scheme(strategy="channel", symmetric=symmetric, scale_dtype=dtype, observer=observer)
    scale, zero = rounding.fit_scales(torch.from_numpy(weight), scheme, grid)
    _, mine, my_zero = solve_dynamic(
        weight,
        feedback(damped_hessian(rng, columns)),
        columns,
        grid.qmin,
        grid.qmax,
        symmetric=symmetric,
        scale_dtype=dtype,
        observer=observer,
    )
    assert np.array_equal(mine, scale.numpy())
    assert np.array_equal(my_zero, zero.numpy())


# Hessian --------------------------------------------------------------------------------------

token_counts = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 2049]))


@given(token_counts, sizes, seeds)
def test_second_moments_are_within_the_rounding_of_one_run(tokens, columns, seed):
    x = np.random.default_rng(seed).normal(size=(tokens, columns)).astype(np.float32)
    sums = np.zeros((columns, columns))
    moments.accumulate(sums, x)
    assert not np.triu(sums, 1).any()
    moments.symmetrize(sums)
    assert np.array_equal(sums, sums.T)
    wide = x.astype(np.float64)
    allowed = gamma(moments.RUN, U32) + 2 * gamma(tokens + 1, U64)
    assert (np.abs(sums - wide.T @ wide) <= allowed * (np.abs(wide).T @ np.abs(wide))).all()


@given(token_counts, sizes, seeds)
def test_second_moments_of_small_integers_are_exact_on_any_thread_count(tokens, columns, seed):
    rng = np.random.default_rng(seed)
    wide = rng.integers(-8, 9, size=(tokens, 2 * columns))
    x = wide[:, ::2].astype(np.float32)
    sums = np.full((columns, columns), 7.0)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        moments.accumulate(sums, wide.astype(np.float32)[:, ::2])  # a strided operand
    finally:
        numba.set_num_threads(threads)
    moments.accumulate(sums, x)
    assert np.array_equal(np.tril(sums), np.tril(7 + 2 * (x.T @ x)))
    assert (np.triu(sums, 1) == np.triu(np.full_like(sums, 7.0), 1)).all()


@given(token_counts, sizes, seeds)
def test_second_moments_have_the_same_bits_on_any_thread_count(tokens, columns, seed):
    x = np.random.default_rng(seed).normal(size=(tokens, columns)).astype(np.float32)
    threads, results = numba.get_num_threads(), []
    for count in (1, threads):
        numba.set_num_threads(count)
        results.append(np.zeros((columns, columns)))
        moments.accumulate(results[-1], x)
    assert np.array_equal(*results)
