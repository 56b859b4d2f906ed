"""GPTQ keeps its certificate (docs/bounds.md, B3) and is the oracle's GPTQ, up to ties.

Everything is checked from the outside: weight, Hessian, options and what `round` returned.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qframe import Scheme, bounds, claims, reference, rounding
from qframe.certificates import Evidence
from qframe.errors import HessianError, NonFiniteError, UncalibratedLayerError, UnsupportedError
from qframe.host import objection
from qframe_conformance import check_plugin
from qframe_conformance.strategies import (
    HESSIANS,
    correlated,
    halves,
    normal,
    one_outlier,
    rounding_problem,
    rounding_problems,
    sparse,
    subnormal,
    white,
)
from qframe_plugins.rounders.gptq import DAMPINGS, GPTQ
from qframe_plugins.rounders.rtn import RTN
from tests.rounders.alike import depends_on_rows_alone, same

RNG = np.random.default_rng(0)  # GPTQ takes no random numbers
OPTIONS = [
    {"actorder": actorder, "static_groups": static}
    for actorder, static in [
        (None, True),
        (None, False),
        ("static", True),
        ("group", True),
        ("group", False),
    ]
]


# Problems -------------------------------------------------------------------------------------


def problem(weight, hessian, scheme, tokens=100):
    return rounding_problem(weight, scheme, hessian, tokens)


def problems(**settings):
    """Columns of blocks and more; one outlier that fits float16 also when errors move to it."""
    often = {
        "strategy": st.sampled_from(["tensor", "channel", "group", "group"]),
        "observer": st.sampled_from(["minmax", "minmax", "mse"]),
    }
    outlier = functools.partial(one_outlier, size=2.0**9)
    return rounding_problems(
        max_columns=20,
        weight_kinds=(normal, normal, sparse, outlier, subnormal, halves),
        hessian_kinds=HESSIANS,
        **{**often, **settings},
    )


dampings = st.sampled_from([1 / 100, 1 / 10])


# Judging --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Verdict:
    """One quantized layer in processing order, in float64."""

    weight: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    damped: np.ndarray
    at: reference.Residuals
    allowance: np.ndarray

    @property
    def loss(self):
        return (self.at.diagonal * self.at.residual**2).sum(1)


def judge(drawn, made, damping):
    """Look at codes through B3: residuals, and what float32 arithmetic may move them."""
    weight, damped, _ = reference.prepare(
        drawn.weight.numpy(), drawn.statistics["hessian"].numpy(), damping, "keep"
    )
    order = made.order.numpy()
    rows = len(weight)
    index = made.group_index
    scale = np.float64(rounding.expand(made.scale, index, rows).numpy())[:, order]
    zero = np.float64(rounding.expand(made.zero_point, index, rows).numpy())[:, order]
    codes = made.codes.numpy()[:, order]
    steps = codes - zero
    values = np.empty(weight.shape)
    values[:, order] = scale * steps
    at = reference.gptq_residuals(weight, damped, values, order)
    # Of the solver's feedback only this is used: float64 factorization, rounded to float32.
    rounded = at.feedback * (1 + bounds.UNIT["float32"])
    allowance = bounds.gptq_residual(
        weight[:, order],
        at.delta,
        rounded,
        at.feedback,
        value_error=bounds.decode(scale, steps),
    )
    loss = (at.diagonal * at.residual**2).sum(1)
    allowance += bounds.gptq_factorization(at.feedback, at.diagonal, loss)
    return Verdict(
        weight[:, order], codes, scale, zero, damped[np.ix_(order, order)], at, allowance
    )


def certificate(drawn, made, damping=1 / 100):
    """How much of what B3.b allows is used."""
    seen = judge(drawn, made, damping)
    return bounds.ratio(
        *bounds.gptq_certificate(
            seen.at.residual, seen.codes, seen.scale, drawn.grid, seen.allowance
        )
    )


def run(drawn, damping=1 / 100, **options):
    return GPTQ(dampening_frac=damping, **options).round(drawn, RNG)


# The certificate ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@given(drawn=problems(), damping=dampings)
def test_every_code_is_the_nearest_to_its_compensated_weight(options, drawn, damping):
    assert certificate(drawn, run(drawn, damping, **options), damping) <= 1


@given(problems(), dampings, st.sampled_from(OPTIONS))
def test_the_loss_is_at_most_its_bound(drawn, damping, options):
    seen = judge(drawn, run(drawn, damping, **options), damping)
    limit = bounds.gptq_loss(seen.at.diagonal, seen.scale, seen.at.residual, seen.allowance)
    assert bounds.ratio(seen.loss, limit) <= 1
    inside = ((seen.codes > drawn.grid.qmin) & (seen.codes < drawn.grid.qmax)).all(1)
    limit = bounds.gptq_loss(seen.at.diagonal, seen.scale, allowance=seen.allowance)
    assert bounds.ratio(seen.loss[inside], limit[inside]) <= 1


@given(problems(observer="minmax"), dampings, st.sampled_from(OPTIONS))
def test_codes_are_the_oracles_up_to_a_tie(drawn, damping, options):
    made = run(drawn, damping, **options)
    static = options["static_groups"]
    oracle = reference.gptq(
        drawn.weight.numpy(),
        drawn.statistics["hessian"].numpy(),
        drawn.scheme,
        drawn.grid,
        dampening_frac=damping,
        dead="keep",
        **options,
    )
    # A mean that rounds otherwise may move a dead column past one as large as the mean.
    assume(np.array_equal(made.order, oracle.order))
    assert np.array_equal(made.group_index, oracle.group_index)
    scale, zero = made.scale.numpy(), made.zero_point.numpy()
    if static or drawn.scheme.strategy != "group":
        assert np.array_equal(scale, oracle.scale)
        assert np.array_equal(zero, oracle.zero_point)
    seen = judge(drawn, made, damping)
    order, index = oracle.order, oracle.group_index
    differs = (made.codes.numpy() != oracle.codes)[:, order]
    for row in np.flatnonzero(differs.any(1)):
        first = np.argmax(differs[row])
        k = 0 if len(scale) == 1 else row
        g = index[order[first]]
        if (scale[k, g], zero[k, g]) == (oracle.scale[k, g], oracle.zero_point[k, g]):
            from_tie = np.abs(seen.at.residual[row, first]) - seen.scale[row, first] / 2
            assert bounds.ratio(from_tie, 2 * seen.allowance[row, first]) <= 1
        # else this group's scale, from weights already compensated, has its own test below


def look_ahead(seen, first, last):
    """(compensated weights of columns first..last before any is rounded, their allowance).

    Each follows the earlier ones of the group as if they had been rounded to what they are, so
    an error of one is fed back to the next: the second result is that recursion, of magnitudes.
    """
    n, unit = len(seen.damped), bounds.UNIT["float32"]
    feedback = np.triu(seen.at.feedback, 1)
    delta, error = seen.at.delta.copy(), np.zeros(seen.weight.shape)
    delta[:, first:] = 0
    current = np.empty((len(seen.weight), last - first))
    sums = bounds.gamma(n + 3)
    values = bounds.decode(seen.scale, seen.codes - seen.zero)
    values[:, first:] = 0
    error += values
    for j in range(first, last):
        moved = np.abs(delta) @ np.abs(feedback[:, j])
        current[:, j - first] = seen.weight[:, j] - delta @ feedback[:, j]
        own = sums * (np.abs(seen.weight[:, j]) + moved) + unit * moved
        error[:, j] = own + error @ np.abs(feedback[:, j]) + (n + 1) * bounds.ETA["float32"]
        delta[:, j] = current[:, j - first] - seen.weight[:, j]
    return current, error[:, first:last] + seen.allowance[:, first:last]


@pytest.mark.parametrize("actorder", [None, "group"])
@given(drawn=problems(strategy="group", group_size=5, observer="minmax"), damping=dampings)
def test_dynamic_scales_come_from_the_weights_as_compensated_so_far(actorder, drawn, damping):
    """B3.f: the rule, applied to the conditional optimum of the group."""
    made = run(drawn, damping, actorder=actorder, static_groups=False)
    seen = judge(drawn, made, damping)
    grid, scheme = drawn.grid, drawn.scheme
    for first in range(0, len(seen.damped), 5):
        current, error = look_ahead(seen, first, min(first + 5, len(seen.damped)))
        for row in range(len(current)):
            lo, hi, slack = current[row].min(), current[row].max(), error[row].max()
            scale, zero = seen.scale[row, first], seen.zero[row, first]
            if max(abs(lo), abs(hi)) <= slack:
                continue  # perhaps a group of zeros
            narrow, wide = ideal_scales(lo, hi, slack, grid, scheme.symmetric)
            assert scale >= bounds.scale_rule(narrow, scheme.scale_dtype)[0] / bounds.CHECKER
            assert scale <= bounds.scale_rule(wide, scheme.scale_dtype)[1] * bounds.CHECKER
            if not scheme.symmetric:
                ends = [grid.qmin - min(lo + each, 0) / scale for each in (slack, -slack)]
                away = bounds.gamma(2) * (abs(ends[1]) + abs(grid.qmin))
                lowest, highest = np.rint([ends[0] - away, ends[1] + away])
                assert min(lowest, grid.qmax) <= zero <= min(highest, grid.qmax)


def ideal_scales(lo, hi, slack, grid, symmetric):
    """The least and the largest ideal scale of ranges whose ends are uncertain by `slack`."""
    inner = (min(lo + slack, 0), max(hi - slack, 0))
    if symmetric:
        reach = max(abs(lo), abs(hi))
        inner = (0, max(reach - slack, 0))
    return (
        bounds.ideal_scale(*inner, grid, symmetric=symmetric),
        bounds.ideal_scale(lo - slack, hi + slack, grid, symmetric=symmetric),
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 48},
        {"group_size": 7, "symmetric": False},
        {"symmetric": False},
    ],
)
def test_layers_of_several_blocks_keep_the_certificate(options, settings):
    rng = np.random.default_rng(1)
    drawn = problem(rng.normal(size=(70, 200)), correlated(rng, 200), Scheme(**settings))
    assert certificate(drawn, run(drawn, **options)) <= 1


# Order and groups -----------------------------------------------------------------------------


@given(problems(), dampings)
def test_columns_are_taken_by_falling_diagonal_or_left_to_right(drawn, damping):
    columns = drawn.weight.shape[1]
    stored = rounding.group_index(columns, drawn.scheme)
    diagonal = drawn.statistics["hessian"].diagonal().numpy().copy()
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1
    for actorder in (None, "static", "group"):
        made = run(drawn, damping, actorder=actorder)
        order = made.order.numpy()
        assert sorted(order) == list(range(columns))
        if actorder is None:
            assert np.array_equal(order, np.arange(columns))
        else:
            rises = np.maximum(np.diff(diagonal[order]), 0)
            allowed = bounds.gamma(2 * columns, bounds.UNIT["float64"]) * diagonal.max()
            assert bounds.ratio(rises, allowed) <= 1
        if actorder == "group":
            assert torch.equal(made.group_index[made.order.long()], stored)
        else:
            assert torch.equal(made.group_index, stored)


@pytest.mark.parametrize(
    ("actorder", "static"), [(None, False), ("static", True), ("group", False)]
)
def test_groups_are_dynamic_unless_told_otherwise_or_impossible(actorder, static):
    rng = np.random.default_rng(0)
    hessian = correlated(rng, 30)
    drawn = problem(rng.normal(size=(5, 30)), hessian, Scheme(group_size=8))
    made = run(drawn, actorder=actorder)
    assert same(made, run(drawn, actorder=actorder, static_groups=static))


def test_columns_of_equal_diagonal_keep_their_order():
    drawn = problem(np.ones((2, 6)), np.eye(6), Scheme(group_size=2))
    for actorder in ("static", "group"):
        assert run(drawn, actorder=actorder).order.tolist() == list(range(6))


# Special Hessians -----------------------------------------------------------------------------


@given(problems(), dampings, st.sampled_from(OPTIONS), st.data())
def test_dead_columns_are_rounded_to_nearest(drawn, damping, options, data):
    columns = drawn.weight.shape[1]
    dies = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, unique=True))
    hessian = drawn.statistics["hessian"].clone()
    hessian[dies] = hessian[:, dies] = 0
    drawn = dataclasses.replace(drawn, statistics={"hessian": hessian})
    made = run(drawn, damping, **options)
    dead = hessian.diagonal().numpy() == 0
    assert made.info["dead_columns"] == int(dead.sum())
    weight = np.float64(drawn.weight.numpy())
    scale, zero = (
        np.float64(rounding.expand(each, made.group_index, len(weight)).numpy())
        for each in (made.scale, made.zero_point)
    )
    error = np.abs(weight - scale * (made.codes.numpy() - zero))
    nearest = bounds.nearest_code(weight, scale, zero, drawn.grid)
    assert bounds.ratio(error[:, dead], nearest[:, dead]) <= 1


def test_no_other_code_depends_on_a_dead_column():
    rng = np.random.default_rng(0)
    hessian = correlated(rng, 8)
    hessian[3] = hessian[:, 3] = 0
    weight = rng.uniform(-1, 1, (5, 8))
    weight[:, 6] = 7  # fixes the scales
    one = run(problem(weight, hessian, Scheme()))
    weight[:, 3] = rng.uniform(-5, 5, 5)
    other = run(problem(weight, hessian, Scheme()))
    alive = [j for j in range(8) if j != 3]
    assert torch.equal(one.codes[:, alive], other.codes[:, alive])
    assert not torch.equal(one.codes[:, 3], other.codes[:, 3])


def test_a_hessian_of_no_correlations_gives_round_to_nearest():
    rng = np.random.default_rng(0)
    weight, diagonal = rng.normal(size=(5, 30)), np.diag(rng.random(30))
    drawn = problem(weight, diagonal, Scheme(group_size=8))
    made, nearest = run(drawn, actorder="static"), RTN().round(drawn, RNG)
    assert torch.equal(made.codes, nearest.codes)
    assert torch.equal(made.scale, nearest.scale)


def test_the_second_of_two_equal_columns_makes_up_for_the_first():
    """With x_0 = x_1 only the sum of the two weights matters, up to the damping."""
    hessian = np.zeros((3, 3))
    hessian[:2, :2] = 1
    hessian[2, 2] = 1
    scheme = Scheme(num_bits=4, scale_rule="restricted", scale_dtype="float32")
    drawn = problem([[0.4, 0.3, 7], [-0.4, -0.3, 7]], hessian, scheme)
    made = run(drawn, actorder=None)
    assert made.scale.flatten().tolist() == [1, 1]
    assert made.codes.tolist() == [[0, 1, 7], [0, -1, 7]]


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 1), (1, 7), (65, 3)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "settings", [{"strategy": "tensor"}, {}, {"group_size": 1}, {"group_size": 4}]
)
def test_small_shapes_are_no_exception(shape, options, settings):
    rng = np.random.default_rng(0)
    drawn = problem(rng.normal(size=shape), white(rng, shape[1]), Scheme(**settings))
    made = run(drawn, **options)
    assert made.codes.shape == shape
    assert tuple(made.scale.shape) == drawn.scheme.scale_shape(*shape)
    assert certificate(drawn, made) <= 1


# Damping --------------------------------------------------------------------------------------


def rank_one(columns):
    """Its Cholesky pivots are exactly 0 until the damping is more than a rounding error."""
    return np.ones((columns, columns))


def test_damping_is_raised_until_the_hessian_can_be_factorized():
    rng = np.random.default_rng(0)
    drawn = problem(rng.normal(size=(4, 9)), rank_one(9), Scheme(group_size=4))
    too_little = bounds.UNIT["float64"] / 1000
    made = run(drawn, too_little)
    damp = made.info["damp"]
    assert damp >= 10 * too_little
    [event] = made.events
    assert (event.kind, event.layer) == ("damping raised", "block.up")
    assert f"{damp:g} was used" in event.message
    assert certificate(drawn, made, damp) <= 1


def test_enough_damping_is_left_as_it_is():
    drawn = problem(np.ones((2, 9)), rank_one(9), Scheme())
    made = run(drawn)
    assert made.info["damp"] == 1 / 100
    assert made.events == ()


def test_damping_stops_at_its_cap_with_an_error_that_names_all_that_was_tried():
    indefinite = np.array([[1, 3], [3, 1]])
    drawn = problem(np.ones((2, 2)), indefinite, Scheme())
    with pytest.raises(HessianError) as error:
        run(drawn, 1 / 10)
    assert all(word in str(error.value) for word in ("'block.up'", "100 tokens", "0.1, 1"))
    with pytest.raises(HessianError, match=r"0\.1, 0\.5;"):
        run(drawn, 1 / 10, dampening_cap=1 / 2)
    assert certificate(drawn, run(drawn, 1 / 10, dampening_cap=10.0), 10.0) <= 1


def with_held_out(drawn, seed):
    """The same with tokens of another kind held out."""
    columns = drawn.weight.shape[1]
    held_out = torch.from_numpy(correlated(np.random.default_rng(seed), columns))
    return dataclasses.replace(drawn, held_out={"hessian": held_out})


@given(problems(), st.integers(0, 2**32), st.sampled_from(OPTIONS))
def test_automatic_damping_does_best_on_held_out_tokens(drawn, seed, options):
    drawn = with_held_out(drawn, seed)
    moment = drawn.held_out["hessian"]
    made = run(drawn, "auto", **options)
    tried = [run(drawn, damping, **options) for damping in DAMPINGS]
    assert any(same(made, each) and made.info == each.info for each in tried)
    weight = drawn.weight.double()

    def root_of_loss(each):
        """B4.c's root, and its allowance for a loss that was summed in float32."""
        values = rounding.dequantize(each).double()
        loss = ((weight - values) @ moment * (weight - values)).sum()
        sizes = (weight.abs() + values.abs(), (weight - values).abs())
        weighed, missed = (float((a @ moment.abs() * a).sum()) for a in sizes)
        lengths, columns = sizes[1].sum(1).numpy(), weight.shape[1]
        return float(loss.clamp(min=0).sqrt()), bounds.search_slack(
            weighed, missed, lengths, columns, float(moment.diagonal().max()), "float32"
        )

    found, sigma = root_of_loss(made)
    for each in tried:
        other, slack = root_of_loss(each)
        assert bounds.ratio(found, other + sigma + slack) <= 1


def test_automatic_damping_depends_on_the_tokens_held_out():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(8, 16))
    drawn = problem(weight, correlated(rng, 16), Scheme(num_bits=3, group_size=8))
    chosen = {run(with_held_out(drawn, seed), "auto").info["damp"] for seed in range(20)}
    assert len(chosen) > 1


def test_of_equals_the_least_damping_is_taken():
    drawn = problem(np.ones((2, 4)), np.eye(4), Scheme(group_size=4))
    nothing = {"hessian": torch.zeros(4, 4, dtype=torch.float64)}
    made = run(dataclasses.replace(drawn, held_out=nothing), "auto")
    assert made.info["damp"] == DAMPINGS[0]


def test_of_several_declared_dampings_the_codes_must_be_those_of_one():
    rng = np.random.default_rng(3)
    drawn = problem(rng.normal(size=(8, 16)), correlated(rng, 16), Scheme(num_bits=3, group_size=8))
    claim = claims.Babai((0.01, 0.1), order="falling")

    def certify(made, **changes):
        changed = dataclasses.replace(made, info={**made.info, **changes})
        return claim.certify(Evidence(drawn, changed))

    for damping in (0.01, 0.1):
        assert certify(run(drawn, damping)).holds
    assert not certify(run(drawn, 0.1), damp=0.01).holds
    between = certify(run(drawn, 0.05))
    assert between.note == "damping 0.05 is not one of the declared 0.01, 0.1, 1"
    raised = certify(run(drawn, 1.0))
    assert raised.note == "damping was raised to 1, and no event says so"


def test_automatic_damping_keeps_its_promises():
    report = check_plugin(GPTQ(dampening_frac="auto"), profile="fast", shrink=False)
    assert report.ok, str(report)


def test_automatic_damping_without_held_out_tokens_is_refused():
    drawn = problem(np.ones((2, 4)), np.eye(4), Scheme(group_size=4))
    with pytest.raises(UnsupportedError, match=r"'block.up'.*held_out_fraction more than 0"):
        run(drawn, "auto")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_is_an_error(bad):
    hessian = np.eye(3)
    hessian[1, 1] = bad
    with pytest.raises(HessianError, match=r"block\.up"):
        run(problem(np.ones((2, 3)), hessian, Scheme()))


# Contract -------------------------------------------------------------------------------------


def test_the_plugin_keeps_the_contract():
    from qframe.contracts import Rounder

    assert objection(GPTQ(), Rounder) is None
    assert GPTQ().needs == {"hessian"}


def test_a_layer_without_tokens_is_refused_by_name():
    drawn = problem(np.ones((2, 3)), np.zeros((3, 3)), Scheme(), tokens=0)
    with pytest.raises(UncalibratedLayerError, match=r"block\.up"):
        run(drawn)


def test_dynamic_groups_in_an_order_across_groups_are_refused():
    with pytest.raises(UnsupportedError, match="static_groups=False is not possible"):
        GPTQ(actorder="static", static_groups=False)


@pytest.mark.parametrize("static", [True, False])
def test_a_scale_that_its_dtype_cannot_hold_is_refused_by_layer(static):
    drawn = problem([[1, 2, 2.0**20, 3]], np.eye(4), Scheme(num_bits=4, group_size=2))
    with pytest.raises(NonFiniteError, match=r"block\.up.*float16"):
        run(drawn, actorder=None, static_groups=static)


@given(problems(), dampings, st.sampled_from(OPTIONS))
def test_nothing_given_is_changed_and_the_result_is_the_same_again(drawn, damping, options):
    weight, hessian = drawn.weight.clone(), drawn.statistics["hessian"].clone()
    made = run(drawn, damping, **options)
    assert torch.equal(drawn.weight, weight)
    assert torch.equal(drawn.statistics["hessian"], hessian)
    assert same(made, run(drawn, damping, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(options):
    rng = np.random.default_rng(2)
    drawn = problem(
        rng.normal(size=(200, 150)),
        correlated(rng, 150),
        Scheme(group_size=48, symmetric=False),
    )
    asked = functools.partial(run, **options)
    assert depends_on_rows_alone(asked, drawn, [150, 3, 64, 199, 63])


# Mutants --------------------------------------------------------------------------------------


def with_codes(made, codes):
    return dataclasses.replace(made, codes=codes.to(torch.int16))


def rounded_to_nearest(drawn, made):
    codes = rounding.encode(drawn.weight, made.scale, made.zero_point, made.group_index, drawn.grid)
    return with_codes(made, codes)


def damped_tenfold(drawn, made):
    return GPTQ(dampening_frac=1 / 10).round(drawn, RNG)


def hessian_of_half_the_tokens(drawn, made):
    other = drawn.statistics["hessian"] + torch.eye(len(drawn.statistics["hessian"]))
    return run(dataclasses.replace(drawn, statistics={"hessian": other}))


def order_reversed_undeclared(drawn, made):
    return dataclasses.replace(made, order=made.order.flip(0))


def codes_not_put_back_in_place(drawn, made):
    return with_codes(made, made.codes[:, made.order.long()])


def groups_shifted(drawn, made):
    return dataclasses.replace(made, group_index=made.group_index.roll(1))


def one_code_off_by_one(drawn, made):
    codes = made.codes.clone()
    codes[0, 0] += 1 if codes[0, 0] < drawn.grid.qmax else -1
    return with_codes(made, codes)


def last_column_forgotten(drawn, made):
    codes, last = made.codes.clone(), made.order[-1].long()
    codes[:, last] = rounded_to_nearest(drawn, made).codes[:, last]
    return with_codes(made, codes)


@pytest.mark.parametrize(
    "mistake",
    [
        rounded_to_nearest,
        damped_tenfold,
        hessian_of_half_the_tokens,
        order_reversed_undeclared,
        codes_not_put_back_in_place,
        groups_shifted,
        one_code_off_by_one,
        last_column_forgotten,
    ],
)
def test_the_certificate_rejects(mistake):
    rng = np.random.default_rng(3)
    drawn = problem(rng.normal(size=(20, 40)), correlated(rng, 40), Scheme(group_size=16))
    made = run(drawn)
    assert certificate(drawn, made) <= 1
    assert certificate(drawn, mistake(drawn, made)) > 1


def test_the_certificate_is_not_vacuous_at_this_size():
    """What float32 arithmetic is allowed stays far below the half step that it is added to."""
    rng = np.random.default_rng(3)
    drawn = problem(rng.normal(size=(20, 300)), correlated(rng, 300), Scheme(group_size=16))
    seen = judge(drawn, run(drawn), 1 / 100)
    assert (seen.allowance < seen.scale / 2 / 10).all()
