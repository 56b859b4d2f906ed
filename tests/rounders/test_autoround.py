"""AutoRound loses no more output than round-to-nearest, row by row, and less where it can."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qframe import Scheme, rounding
from qframe.bounds import ETA, UNIT, decode, no_worse
from qframe.certificates import Evidence
from qframe.contracts import Rounder
from qframe.errors import HessianError, NonFiniteError, UncalibratedLayerError
from qframe.host import objection
from qframe_conformance.kinds import INPUTS, hessian_of, original_inputs
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
from qframe_plugins.kernels.numba_cpu.autoround import learn
from qframe_plugins.kernels.numba_cpu.autoround_block import Descent
from qframe_plugins.rounders.autoround import AutoRound
from qframe_plugins.rounders.gptq import revive
from tests.rounders.alike import depends_on_rows_alone, same

RNG = np.random.default_rng(0)  # the method takes no random numbers


def problems(**given):
    choices = {
        "strategy": st.sampled_from(["channel", "group"]),
        "observer": st.sampled_from(["minmax", "minmax", "mse"]),
    }
    outlier = functools.partial(one_outlier, size=2.0**9)
    return rounding_problems(
        max_columns=20,
        weight_kinds=(normal, normal, sparse, outlier, subnormal, halves),
        hessian_kinds=HESSIANS,
        **choices | given,
    )


def ordinary(rows=12, columns=40, seed=0, **settings):
    rng = np.random.default_rng(seed)
    hessian = correlated(rng, columns)
    return rounding_problem(rng.normal(size=(rows, columns)), Scheme(**settings), hessian)


def run(drawn, correction=0.0, **options):
    return AutoRound(correction=correction, **options).round(drawn, RNG)


def of_outputs(drawn, moved=original_inputs, seed=0):
    """Return the problem with inputs that have moved, and the inputs, x and y."""
    rng = np.random.default_rng(seed)
    x = INPUTS[0](rng, drawn.weight.shape[1])
    y = moved(x)
    mismatch = torch.from_numpy((y - x).T @ x * (2 / len(x)))
    statistics = {"hessian": torch.from_numpy(hessian_of(x)), "mismatch": mismatch}
    return dataclasses.replace(drawn, tokens=len(x), statistics=statistics), x, y


def losses(drawn, made):
    error = drawn.weight.double() - rounding.dequantize(made)
    return ((error @ drawn.statistics["hessian"]) * error).sum(1)


@given(problems(), st.sampled_from([0, 1, 9]), st.sampled_from([None, 0.3, 2.0]))
def test_what_it_claims_holds_with_any_options(drawn, iterations, rate):
    rounder = AutoRound(iterations=iterations, learning_rate=rate, correction=0.0)
    certificates = Evidence(drawn, rounder.round(drawn, RNG)).certificates(rounder.claims)
    assert len(certificates) == 2
    assert all(each.holds for each in certificates)


@given(problems(), st.sampled_from([0, 1, 9]), st.sampled_from([0.25, 1.0]))
def test_what_it_claims_holds_where_inputs_have_moved(drawn, iterations, correction):
    rounder = AutoRound(iterations=iterations, correction=correction)
    given, _, _ = of_outputs(drawn)
    certificates = Evidence(given, rounder.round(given, RNG)).certificates(rounder.claims)
    assert len(certificates) == 1
    assert all(each.holds for each in certificates)


@given(problems(), st.sampled_from([0, 9]))
def test_no_row_is_further_from_its_aim_than_nearest(drawn, iterations):
    """By the definition of the aim, solved anew with NumPy."""
    given, _, _ = of_outputs(drawn)
    hessian, _ = revive(given.statistics["hessian"])
    damped = hessian.numpy() + 0.1 * float(hessian.diagonal().mean()) * np.eye(len(hessian))
    pulled = given.weight.double().numpy() @ given.statistics["mismatch"].numpy()
    aim = given.weight.double().numpy() + 0.5 * np.linalg.solve(damped, pulled.T).T

    def away(made):
        error = aim - rounding.dequantize(made).double().numpy()
        return ((error @ hessian.numpy()) * error).sum(1)

    made, nearest = (
        away(each) for each in (run(given, 0.5, iterations=iterations), rounding.to_nearest(given))
    )
    # The rounder's aim is stored in float32, which moves either distance.
    moved = np.sqrt(hessian.diagonal().numpy()) @ (np.abs(aim).T * 4 * UNIT["float32"])
    assert (np.sqrt(made) <= np.sqrt(nearest) + 2 * moved + ETA["float32"]).all()


@pytest.mark.parametrize("seed", range(3))
def test_outputs_come_nearer_to_those_of_inputs_that_have_not_moved(seed):
    """||Y W^T - X Q^T||^2, computed from the inputs themselves."""
    given, x, y = of_outputs(ordinary(columns=24, seed=seed, group_size=8, num_bits=3), seed=seed)
    weight = given.weight.double().numpy()

    def lost(correction):
        made = run(given, correction, dampening_frac=0.01)
        return ((y @ weight.T - x @ rounding.dequantize(made).double().numpy().T) ** 2).sum()

    assert lost(1.0) < lost(0.5) < lost(0.0)


def test_inputs_that_have_not_moved_need_no_correction():
    given, _, _ = of_outputs(ordinary(group_size=8), moved=lambda x: x)
    assert same(run(given, 1.0), run(given))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_correlated_inputs_are_made_use_of(symmetric, observer):
    """That nothing gets worse would also hold of a search that never finds anything."""
    drawn = ordinary(group_size=10, symmetric=symmetric, observer=observer, num_bits=3)
    nearest = losses(drawn, rounding.to_nearest(drawn))
    few, many = (losses(drawn, run(drawn, iterations=n)) for n in (5, 200))
    assert 2 * int((many < nearest).sum()) > len(nearest)
    assert float(2 * many.sum()) < float(nearest.sum())
    assert float(many.sum()) < float(few.sum())


def test_ranges_are_learned_and_not_only_offsets():
    drawn = ordinary(group_size=10, symmetric=False, num_bits=2)
    nearest, made = rounding.to_nearest(drawn), run(drawn)
    assert bool((made.scale < nearest.scale).any())
    assert bool((made.scale <= nearest.scale).all())


@settings(max_examples=30)
@given(problems())
def test_without_iterations_it_rounds_to_nearest(drawn):
    assert same(run(drawn, iterations=0, sweeps=0), rounding.to_nearest(drawn))


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_iterates_is_kept(rate, seed):
    """Of each row; the descent is walked anew, by slopes in float64."""
    drawn = ordinary(columns=24, seed=seed, group_size=8, num_bits=3, symmetric=False)
    start, steps = rounding.to_nearest(drawn), 12
    arrays = [each.numpy() for each in (drawn.weight, start.codes, start.scale, start.zero_point)]
    walk = Descent(
        *arrays, 8, drawn.grid.qmin, drawn.grid.qmax, symmetric=False, scale_dtype="float16"
    )
    least = losses(drawn, start)
    for step in range(steps):
        error = drawn.weight.double() - torch.from_numpy(walk.values())
        slope = -(error @ drawn.statistics["hessian"])
        walk.step(slope.float().numpy(), rate * (1 - step / steps))
        codes, scale, zero_point = map(torch.from_numpy, walk.codes())
        met = dataclasses.replace(start, codes=codes, scale=scale, zero_point=zero_point)
        least = torch.minimum(least, losses(drawn, met))
    made = run(drawn, iterations=steps, learning_rate=rate, sweeps=0)
    size = (
        2 * float(drawn.weight.abs().sum(1).max()) ** 2 * float(drawn.statistics["hessian"].max())
    )
    assert (losses(drawn, made).numpy() <= no_worse(least, size, 24, "float32")).all()


def spared(drawn, made):
    """Return what float32 may take off values (B1.d)."""
    index, rows = made.group_index, len(made.codes)
    scale, zero = (rounding.expand(each, index, rows) for each in (made.scale, made.zero_point))
    return decode(scale.numpy(), made.codes.numpy() - zero.numpy())


@given(problems(), st.sampled_from([0, 9]), st.sampled_from([1, 4]))
def test_a_sweep_costs_no_row_output_and_moves_no_range(drawn, iterations, sweeps):
    swept, plain = (run(drawn, iterations=iterations, sweeps=n) for n in (sweeps, 0))
    assert torch.equal(swept.scale, plain.scale)
    assert torch.equal(swept.zero_point, plain.zero_point)
    hessian = drawn.statistics["hessian"].abs()
    both = [(drawn.weight.double() - rounding.dequantize(q)).abs() for q in (swept, plain)]
    size = sum(((error @ hessian) * error).sum(1) for error in both).numpy()
    lengths = sum(error.sum(1) for error in both).numpy()
    spare = [spared(drawn, q) for q in (swept, plain)]
    moved = sum(np.sqrt(((d @ hessian.numpy()) * d).sum(1)) for d in spare)
    allowed = no_worse(losses(drawn, plain), size, len(hessian), "float32", lengths, moved)
    assert (losses(drawn, swept).numpy() <= allowed).all()


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from([-1, 1, 2]), st.integers(0, 99))
def test_after_enough_sweeps_no_code_alone_can_be_bettered(columns, rows, group_size, seed):
    """Numbers are quarters of small integers and scales 1, so that nothing rounds but the codes."""
    rng = np.random.default_rng(seed)
    root = rng.integers(-2, 3, (columns, columns))
    weight = rng.integers(-12, 13, (rows, columns)) / 4
    weight[:, :: columns if group_size < 0 else group_size] = 3  # one of each group
    scheme = Scheme(group_size=group_size, scale_rule="restricted", num_bits=3)
    drawn = rounding_problem(weight, scheme, (root.T @ root).astype(np.float64))
    made = run(drawn, iterations=0, sweeps=100)
    assert bool((made.scale == 1).all())
    for column in range(columns):
        for code in range(drawn.grid.qmin, drawn.grid.qmax + 1):
            other = made.codes.clone()
            other[:, column] = code
            reached = (drawn.weight[:, column] - code).abs() <= 1  # an offset of 1/2, and rounding
            found = losses(drawn, dataclasses.replace(made, codes=other))
            assert bool((found >= losses(drawn, made))[reached].all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_sweeps_find_what_the_descent_leaves(symmetric):
    """Inputs are mixed, but not nearly dependent: a code alone can then do little."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(256, 64)) @ (rng.normal(size=(64, 64)) / 8 + np.eye(64))
    inputs[:, 5] = 0  # which must not keep the others from it
    scheme = Scheme(group_size=16, num_bits=3, symmetric=symmetric)
    drawn = rounding_problem(rng.normal(size=(12, 64)), scheme, hessian_of(inputs))
    none, one, many = (losses(drawn, run(drawn, iterations=50, sweeps=n)) for n in (0, 1, 10))
    assert float(10 * one.sum()) < float(9 * none.sum())
    assert float(many.sum()) < float(one.sum())


def test_weights_that_lie_on_the_grid_are_given_back():
    rng = np.random.default_rng(0)
    weight = rng.integers(-7, 8, (4, 12)) * 1.0
    weight[:, 0] = 7
    scheme = Scheme(num_bits=4, scale_rule="restricted")
    drawn = rounding_problem(weight, scheme, np.diag(rng.random(12) + 1))
    assert torch.equal(rounding.dequantize(run(drawn)), drawn.weight)


def test_the_code_of_a_dead_column_is_the_nearest_as_long_as_its_range_stays():
    rng = np.random.default_rng(0)
    hessian = correlated(rng, 8)
    hessian[3] = hessian[:, 3] = 0
    drawn = rounding_problem(rng.normal(size=(9, 8)), Scheme(group_size=1), hessian)
    made, nearest = run(drawn), rounding.to_nearest(drawn)
    assert torch.equal(made.codes[:, 3], nearest.codes[:, 3])
    assert torch.equal(made.scale[:, 3], nearest.scale[:, 3])
    assert not torch.equal(made.codes, nearest.codes)


# Contract ---------------------------------------------------------------------------------------


def test_the_plugin_keeps_the_contract():
    assert objection(AutoRound(), Rounder) is None
    assert AutoRound(correction=0).needs == {"hessian"}
    assert AutoRound().needs == {"hessian", "mismatch"}
    assert AutoRound(correction=0.5).needs == {"hessian", "mismatch"}
    assert AutoRound().capabilities.objection(Scheme(strategy="tensor"))


def test_a_layer_without_tokens_is_refused_by_name():
    drawn = rounding_problem(np.ones((2, 3)), Scheme(), np.zeros((3, 3)), tokens=0)
    with pytest.raises(UncalibratedLayerError, match=r"block\.up"):
        run(drawn)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_layer(bad):
    hessian = np.eye(3)
    with pytest.raises(NonFiniteError, match=r"block\.up"):
        run(rounding_problem([[1, bad, 1]], Scheme(), hessian))
    hessian[1, 1] = bad
    with pytest.raises(HessianError, match=r"block\.up"):
        run(rounding_problem(np.ones((2, 3)), Scheme(), hessian))


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 1), (1, 7), (65, 3)])
@pytest.mark.parametrize("sizes", [{}, {"group_size": 1}, {"group_size": 4}])
def test_small_shapes_are_no_exception(shape, sizes):
    rng = np.random.default_rng(0)
    drawn = rounding_problem(
        rng.normal(size=shape), Scheme(symmetric=False, **sizes), white(rng, shape[1])
    )
    made = run(drawn, iterations=5)
    assert made.codes.shape == shape
    assert tuple(made.scale.shape) == drawn.scheme.scale_shape(*shape)


@settings(max_examples=20)
@given(problems())
def test_nothing_given_is_changed_and_the_result_is_the_same_again(drawn):
    weight, hessian = drawn.weight.clone(), drawn.statistics["hessian"].clone()
    made = run(drawn, iterations=5)
    assert torch.equal(drawn.weight, weight)
    assert torch.equal(drawn.statistics["hessian"], hessian)
    assert same(made, run(drawn, iterations=5))


def test_bits_depend_neither_on_threads_nor_on_the_other_rows():
    drawn = ordinary(rows=150, columns=90, group_size=48, symmetric=False, scale_dtype="float32")
    few = functools.partial(run, iterations=20)
    assert depends_on_rows_alone(few, drawn, [120, 3, 64, 149, 63])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"zero_point": np.zeros((2, 1), np.int16)}, "one for each group"),
        ({"codes": np.zeros((2, 3), np.int16)}, "do not fit"),
        ({"hessian": np.eye(3)}, "4 columns"),
    ],
)
def test_the_kernel_refuses_operands_that_do_not_fit(changes, message):
    operands = {
        "weight": np.ones((2, 4), np.float32),
        "hessian": np.eye(4),
        "codes": np.zeros((2, 4), np.int16),
        "scale": np.ones((2, 2), np.float32),
        "zero_point": np.zeros((2, 2), np.int16),
        "group_size": 2,
        "qmin": -8,
        "qmax": 7,
        "symmetric": True,
        "scale_dtype": "float16",
        "iterations": 1,
        "rate": 1.0,
        "sweeps": 1,
    }
    with pytest.raises(ValueError, match=message):
        learn(**(operands | changes))


def test_a_mismatch_that_is_not_finite_is_refused_by_layer():
    given, _, _ = of_outputs(ordinary())
    given.statistics["mismatch"][1, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"block\.up.*what its weight should become"):
        run(given, 1.0)


def test_a_damping_that_had_to_be_raised_is_told():
    given, _, _ = of_outputs(ordinary(columns=24, group_size=8))
    given.statistics["hessian"][0, 0] = 0  # not dead: the column has other entries
    made = run(given, 0.5, dampening_frac=2.0**-40)
    assert [event.kind for event in made.events] == ["damping raised"]
    assert made.info["damp"] > 2.0**-40
    assert not run(of_outputs(ordinary(columns=24))[0], 0.5).events


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_it_keeps_its_promises(qframe_check, correction):
    qframe_check(AutoRound(iterations=20, correction=correction), profile="fast")
