"""The oracle is judged too: by algebra, by theorems, and by examples worked out by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qframe import Scheme, bounds, reference
from qframe.contracts import Grid
from qframe_conformance.strategies import HESSIANS, normal, rounding_problems, sparse, zeros

DOUBLE = bounds.UNIT["float64"]
OPTIONS = [  # actorder, static_groups
    (None, True),
    (None, False),
    ("static", True),
    ("group", True),
    ("group", False),
]


def grid_of(scheme):
    half = 2 ** (scheme.num_bits - 1)
    if not scheme.symmetric:
        return Grid(0, 2 * half - 1)
    return Grid(-half if scheme.scale_rule == "full" else 1 - half, half - 1)


def problems():
    """(weight, hessian, scheme, grid)."""
    drawn = rounding_problems(
        max_columns=10,
        weight_kinds=(normal, sparse, zeros),
        hessian_kinds=HESSIANS,
        grid_of=grid_of,
    )
    return drawn.map(
        lambda each: (
            each.weight.numpy(),
            each.statistics["hessian"].numpy(),
            each.scheme,
            each.grid,
        )
    )


dampings = st.sampled_from([1 / 100, 1 / 10])


def per_weight(made, rows):
    """Scale of each weight, [rows, columns]."""
    return np.broadcast_to(np.float64(made.scale)[:, made.group_index], (rows, len(made.order)))


def zero_per_weight(made, rows):
    return np.broadcast_to(made.zero_point[:, made.group_index], (rows, len(made.order)))


def exact_values(made, rows):
    """Scale times steps, in float64 without rounding."""
    return per_weight(made, rows) * (made.codes - zero_per_weight(made, rows))


def judge(weight, damped, made):
    """(residuals, what the oracle's float64 may move them), in processing order."""
    at = reference.gptq_residuals(weight, damped, exact_values(made, len(weight)), made.order)
    allowance = bounds.gptq_residual(
        weight[:, made.order], at.delta, at.feedback, at.feedback, "float64"
    )
    loss = (at.diagonal * at.residual**2).sum(1)
    return at, allowance + bounds.gptq_factorization(at.feedback, at.diagonal, loss)


def certificate(weight, damped, made, grid):
    """How much of what B3.b allows the codes use."""
    at, allowance = judge(weight, damped, made)
    scale = per_weight(made, len(weight))[:, made.order]
    codes = made.codes[:, made.order]
    return bounds.ratio(*bounds.gptq_certificate(at.residual, codes, scale, grid, allowance))


# The oracle itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(("actorder", "static_groups"), OPTIONS)
@pytest.mark.parametrize("dead", ["zero", "keep"])
@given(drawn=problems(), damping=dampings)
def test_the_oracle_keeps_the_certificate_of_gptq(actorder, static_groups, dead, drawn, damping):
    weight, hessian, scheme, grid = drawn
    made = reference.gptq(
        weight,
        hessian,
        scheme,
        grid,
        dampening_frac=damping,
        actorder=actorder,
        static_groups=static_groups,
        dead=dead,
    )
    start, damped, _ = reference.prepare(weight, hessian, damping, dead)
    assert certificate(start, damped, made, grid) <= 1


@given(problems(), dampings, st.sampled_from(OPTIONS))
def test_every_code_of_the_oracle_is_the_nearest_to_its_target(drawn, damping, options):
    weight, hessian, scheme, grid = drawn
    made = reference.gptq(
        weight,
        hessian,
        scheme,
        grid,
        dampening_frac=damping,
        actorder=options[0],
        static_groups=options[1],
    )
    scale, zero = (each(made, len(weight)) for each in (per_weight, zero_per_weight))
    error = np.abs(made.target - scale * (made.codes - zero))
    assert bounds.ratio(error, bounds.nearest_code(made.target, scale, zero, grid)) <= 1


@given(problems(), dampings)
def test_gptq_without_correlations_is_round_to_nearest(drawn, damping):
    weight, hessian, scheme, grid = drawn
    diagonal = np.diag(np.diag(hessian))
    made = reference.gptq(weight, diagonal, scheme, grid, dampening_frac=damping, dead="keep")
    nearest = reference.rtn(weight, scheme, grid)
    assert np.array_equal(made.scale, nearest.scale)
    # The quotient of GPTQ is float64: it may see a tie, or miss one, that float32 sees not.
    error = np.abs(weight - made.values().astype(np.float64))
    scale, zero = (each(made, len(weight)) for each in (per_weight, zero_per_weight))
    assert (
        bounds.ratio(
            error,
            bounds.nearest_code(weight, scale, zero, grid)
            + bounds.decode(scale, made.codes - zero),
        )
        <= 1
    )


@given(problems(), st.data())
def test_a_dead_column_is_zeroed_or_kept_and_coupled_to_nothing(drawn, data):
    weight, hessian, *_ = drawn
    dies = data.draw(st.lists(st.integers(0, len(hessian) - 1), min_size=1))
    hessian = hessian.copy()
    hessian[dies] = hessian[:, dies] = 0
    dead = np.diag(hessian) == 0
    zeroed, one, _ = reference.prepare(weight, hessian, 0.0, "zero")
    kept, mean, _ = reference.prepare(weight, hessian, 0.0, "keep")
    assert not zeroed[:, dead].any()
    assert np.array_equal(kept, weight)
    assert (one.diagonal()[dead] == 1).all()
    # The mean of the others leaves the mean, hence the damping, as it is: to one rounding more.
    live = mean.diagonal()[~dead].mean() if not dead.all() else 1
    allowed = bounds.gamma(2 * len(dead), DOUBLE) * live
    assert bounds.ratio(mean.diagonal().mean() - live, allowed) <= 1


def ldlq(weight, damped, made, grid):
    """QuIP's form, on the scales of `made`: feed back differences to the original weights."""
    h = damped[np.ix_(made.order, made.order)]
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    feedback = upper / upper.diagonal()
    rows = len(weight)
    scale, zero = per_weight(made, rows), zero_per_weight(made, rows)
    delta, codes = np.zeros(weight.shape), np.empty(weight.shape, np.int64)
    for j, column in enumerate(made.order):
        target = weight[:, column] - delta[:, :j] @ feedback[:j, j]
        steps = np.rint(target / scale[:, column]) + zero[:, column]
        codes[:, column] = np.clip(steps, grid.qmin, grid.qmax)
        values = scale[:, column] * (codes[:, column] - zero[:, column])
        delta[:, j] = values - weight[:, column]
    return dataclasses.replace(made, codes=codes)


@given(problems(), dampings, st.sampled_from(OPTIONS))
def test_gptq_is_ldlq_up_to_ties(drawn, damping, options):
    weight, hessian, scheme, grid = drawn
    made = reference.gptq(
        weight,
        hessian,
        scheme,
        grid,
        dampening_frac=damping,
        actorder=options[0],
        static_groups=options[1],
    )
    start, damped, _ = reference.prepare(weight, hessian, damping)
    other = ldlq(start, damped, made, grid)
    assert certificate(start, damped, other, grid) <= 1
    at, allowance = judge(start, damped, made)
    scale = per_weight(made, len(weight))[:, made.order]
    differs = (other.codes != made.codes)[:, made.order]
    for row in np.flatnonzero(differs.any(1)):
        first = np.argmax(differs[row])
        from_tie = np.abs(at.residual[row, first]) - scale[row, first] / 2
        assert bounds.ratio(from_tie, 2 * allowance[row, first]) <= 1


# Residuals and losses -------------------------------------------------------------------------


@given(problems(), dampings, st.integers(0, 2**32))
def test_the_loss_of_any_codes_is_the_weighted_sum_of_their_residuals(drawn, damping, seed):
    """B3.a, of arbitrary values in an arbitrary order."""
    weight, hessian, *_ = drawn
    rng = np.random.default_rng(seed)
    start, damped, _ = reference.prepare(weight, hessian, damping)
    values = start + rng.normal(size=start.shape)
    order = rng.permutation(start.shape[1])
    at = reference.gptq_residuals(start, damped, values, order)
    delta, n = values - start, len(order)
    loss = ((delta @ damped) * delta).sum(1)
    upper = at.feedback * np.sqrt(at.diagonal)
    # Cholesky: gamma_{n+1} |R||R|^T; delta H delta^T: gamma_{2n}; sum D r^2 with r = delta U:
    # gamma_{3n+8}; all of them times the same sum of magnitudes.
    magnitude = ((np.abs(at.delta) @ np.abs(upper)) ** 2).sum(1)
    allowed = bounds.accumulate(magnitude, 6 * n + 9, DOUBLE)
    assert bounds.ratio(loss - (at.diagonal * at.residual**2).sum(1), allowed) <= 1


@given(problems(), dampings)
def test_what_gptq_loses_is_at_most_its_bound(drawn, damping):
    """B3.c: with the residuals of clipped weights always, without them where none is clipped."""
    weight, hessian, scheme, grid = drawn
    made = reference.gptq(weight, hessian, scheme, grid, dampening_frac=damping)
    start, damped, _ = reference.prepare(weight, hessian, damping)
    at, allowance = judge(start, damped, made)
    scale = per_weight(made, len(weight))[:, made.order]
    loss = (at.diagonal * at.residual**2).sum(1)
    assert bounds.ratio(loss, bounds.gptq_loss(at.diagonal, scale, at.residual, allowance)) <= 1
    inside = ((made.codes > grid.qmin) & (made.codes < grid.qmax)).all(1)
    limit = bounds.gptq_loss(at.diagonal, scale, allowance=allowance)
    assert bounds.ratio(loss[inside], limit[inside]) <= 1


def sentinel(hessian, weight, size):
    """Add an uncoupled last column that fixes the scale of every row at 1."""
    n = len(hessian)
    wider = np.eye(n + 1)
    wider[:n, :n] = hessian
    return np.column_stack([weight, np.full(len(weight), size)]), wider


def test_gptq_can_lose_several_times_what_round_to_nearest_loses():
    """B3.d: a counterexample with three columns, in sixteenths, worked out by hand."""
    hessian = np.array([[5, 4, 4], [4, 6, 6], [4, 6, 13]])
    weight, wider = sentinel(hessian, np.array([[-2, -7, 5]]) / 16, 7)
    scheme, grid = Scheme(num_bits=4, scale_rule="restricted"), Grid(-7, 7)
    made = reference.gptq(weight, wider, scheme, grid, dampening_frac=0.0)
    nearest = reference.rtn(weight, scheme, grid)
    assert made.scale.tolist() == nearest.scale.tolist() == [[1]]
    assert made.codes.tolist() == [[0, -1, 1, 7]]
    assert nearest.codes.tolist() == [[0, 0, 0, 7]]
    # delta is (2, -9, 11) / 16 and (2, 7, -5) / 16
    assert 2 * reference.output_error(weight, made.values(), wider) == 923 / 256
    assert 2 * reference.output_error(weight, nearest.values(), wider) == 251 / 256


@given(st.integers(0, 2**32))
def test_gptq_never_loses_to_round_to_nearest_on_two_columns(seed):
    """B3.d (i): the first code is the same, the last one optimal."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 2)) @ rng.normal(size=(2, 2))
    hessian = 2 / 5 * x.T @ x
    weight, wider = sentinel(hessian, rng.uniform(-6, 6, (4, 2)), 7)
    scheme, grid = Scheme(num_bits=4, scale_rule="restricted"), Grid(-7, 7)
    weight = np.float32(weight)
    made = reference.gptq(weight, wider, scheme, grid)
    nearest = reference.rtn(weight, scheme, grid)
    start, damped, _ = reference.prepare(weight, wider, 1 / 100)
    at, allowance = judge(start, damped, made)
    assume((np.abs(made.codes[:, :2]) < 7).all())
    assume((made.codes[:, 0] == nearest.codes[:, 0]).all())  # all but a tie
    other = reference.gptq_residuals(start, damped, exact_values(nearest, 4), made.order)
    loss = (at.diagonal * at.residual**2).sum(1)
    limit = (at.diagonal * (np.abs(other.residual) + 2 * allowance) ** 2).sum(1)
    assert bounds.ratio(loss, limit) <= 1


def test_the_output_error_is_the_mean_squared_change_of_the_output():
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-3, 4, (8, 5)), rng.integers(-3, 4, (2, 5))
    values = weight + rng.integers(-2, 3, weight.shape)
    hessian = 2 / 8 * (x.T @ x)
    expected = ((x @ (values - weight).T) ** 2).mean(0).sum()
    assert reference.output_error(weight, values, hessian) == expected


# Mutants --------------------------------------------------------------------------------------


def solver(weight, hessian, scheme, grid, mistake=None):
    """The published loop once more, left to right, with a place for every mistake."""
    start, damped, _ = reference.prepare(weight, hessian, 1 / 100)
    if mistake == "not damped":
        damped = reference.prepare(weight, hessian, 1 / 10000)[1]
    if mistake == "damped by the largest":
        damped = reference.prepare(weight, hessian, 0.0)[1]
        damped = damped + np.eye(len(damped)) * damped.max() / 100
    if mistake == "only the diagonal":
        damped = np.diag(np.diag(damped))
    made = reference.rtn(start, scheme, grid)
    inverse = damped if mistake == "not inverted" else np.linalg.inv(damped)
    factor = np.linalg.cholesky(inverse).T
    if mistake == "wrong triangle":
        factor = np.linalg.cholesky(inverse[::-1, ::-1])[::-1, ::-1]
    if mistake == "inverse not updated":
        factor = inverse / np.sqrt(inverse.diagonal())[:, None]
    rows, columns = start.shape
    scale, zero = per_weight(made, rows), zero_per_weight(made, rows)
    if mistake == "groups shifted":
        scale, zero = np.roll(scale, 1, 1), np.roll(zero, 1, 1)
    w, codes = start.copy(), np.empty((rows, columns), np.int64)
    for j in range(columns):
        steps = w[:, j] / scale[:, j]
        steps = np.floor(steps) if mistake == "floor" else np.rint(steps)
        top = grid.qmax - (mistake == "top code missing")
        codes[:, j] = np.clip(steps + zero[:, j], grid.qmin, top)
        value = scale[:, j] * (codes[:, j] - zero[:, j])
        base = start[:, j] if mistake == "error of the original weight" else w[:, j]
        error = (base - value) / (1 if mistake == "error not divided" else factor[j, j])
        sign = -1 if mistake == "wrong sign" else 1
        last = columns - (mistake == "last column forgotten")
        if mistake != "no update":
            w[:, j + 1 : last] -= sign * np.outer(error, factor[j, j + 1 : last])
    return dataclasses.replace(made, codes=codes)


def worst(mistake):
    """How much of what the certificate allows is used, over a fixed list of problems."""
    used = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(30, 9)) + 2 * rng.normal(size=(30, 1))
        x *= 2.0 ** rng.integers(-2, 3, 9)
        weight, hessian = np.float32(rng.normal(size=(4, 9))), 2 / 30 * x.T @ x
        scheme = Scheme(num_bits=(3, 4, 8)[seed % 3], symmetric=seed % 2 > 0, group_size=4)
        grid = grid_of(scheme)
        start, damped, _ = reference.prepare(weight, hessian, 1 / 100)
        made = solver(weight, hessian, scheme, grid, mistake)
        used.append(certificate(start, damped, made, grid))
    return max(used)


def test_the_certificate_accepts_the_published_loop():
    assert worst(None) <= 1


@pytest.mark.parametrize(
    "mistake",
    [
        "not damped",
        "damped by the largest",
        "only the diagonal",
        "not inverted",
        "wrong triangle",
        "inverse not updated",
        "groups shifted",
        "floor",
        "top code missing",
        "error of the original weight",
        "error not divided",
        "wrong sign",
        "last column forgotten",
        "no update",
    ],
)
def test_the_certificate_rejects(mistake):
    assert worst(mistake) > 1


def test_the_bound_on_the_loss_is_too_weak_to_tell_gptq_from_round_to_nearest():
    """Why the certificate and not only B3.c: plain rounding often keeps the loss bound too."""
    rng = np.random.default_rng(0)
    scheme, grid = Scheme(num_bits=4), Grid(-8, 7)
    x = rng.normal(size=(30, 9))
    weight, hessian = np.float32(rng.normal(size=(4, 9))), 2 / 30 * x.T @ x
    start, damped, _ = reference.prepare(weight, hessian, 1 / 100)
    nearest = reference.rtn(weight, scheme, grid)
    at, _ = judge(start, damped, nearest)
    loss = (at.diagonal * at.residual**2).sum(1)
    assert bounds.ratio(loss, bounds.gptq_loss(at.diagonal, per_weight(nearest, 4))) <= 1
    assert certificate(start, damped, nearest, grid) > 1


# Bounds ---------------------------------------------------------------------------------------


def test_gamma_says_when_it_knows_nothing():
    assert bounds.gamma(1) > bounds.UNIT["float32"]
    with pytest.raises(ValueError, match="says nothing"):
        bounds.gamma(2**24)


@given(st.integers(0, 40), st.integers(1, 16), st.integers(0, 2**32))
def test_a_hessian_summed_in_tiles_keeps_its_bound(tokens, tile, seed):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=(tokens, 3)) * 2.0 ** rng.integers(-70, 30, (1, 3)))
    total = np.zeros((3, 3))
    for start in range(0, tokens, tile):
        inner = np.zeros((3, 3), np.float32)
        for row in x[start : start + tile]:
            inner += np.outer(row, row)
        total += inner
    exact = np.float64(x).T @ np.float64(x) * (2 / max(tokens, 1))
    magnitude = np.abs(np.float64(x)).T @ np.abs(np.float64(x)) * (2 / max(tokens, 1))
    allowed = bounds.hessian_sum(magnitude, tokens, tile)
    made = total * (2 / max(tokens, 1))
    # The check sums in float64 too: as far again, for its own.
    allowed = allowed + bounds.accumulate(magnitude, tokens + 2, DOUBLE)
    assert bounds.ratio(made - exact, allowed) <= 1


def test_the_bound_of_the_hessian_rejects_a_forgotten_tile():
    x = np.ones((40, 1))
    allowed = bounds.hessian_sum(2 / 40 * x.T @ x, 40, 8)
    assert bounds.ratio(2 / 40 * (x[8:].T @ x[8:] - x.T @ x), allowed) > 1
