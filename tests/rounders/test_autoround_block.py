"""AutoRound for blocks: the block's error falls, and what is kept is never worse than nearest."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Scheme, rounding
from qframe.blocks import BlockProblem
from qframe.contracts import Rounder
from qframe.errors import NonFiniteError, UncalibratedLayerError
from qframe.host import objection
from qframe_conformance.rounder_blocks import SPARE, UP, block_case, values
from qframe_conformance.strategies import correlated, rounding_problem
from qframe_plugins.kernels.numba_cpu.autoround_block import Descent
from qframe_plugins.rounders.autoround import AutoRound
from qframe_plugins.rounders.autoround_block import AutoRoundBlock, batches
from tests.rounders.alike import same

W3 = Scheme(num_bits=3, group_size=5, symmetric=False)


def case(seed=0, scheme=W3, **options):
    return block_case(AutoRoundBlock(**options), scheme, seed)


def nearest(problem):
    return {name: rounding.to_nearest(layer) for name, layer in problem.layers.items()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_the_error_of_blocks_falls(symmetric, strategy):
    """That nothing gets worse would also hold of a search that never finds anything."""
    size = 5 if strategy == "group" else None
    scheme = Scheme(num_bits=3, strategy=strategy, group_size=size, symmetric=symmetric)
    ratios = []
    for seed in range(8):
        drawn = case(seed, scheme, iterations=80)
        start = drawn.problem.error(values(nearest(drawn.problem)))
        if start:  # inputs of zeros make outputs of zeros
            ratios.append(drawn.problem.error(values(drawn.made)) / start)
    assert len(ratios) == 7
    assert np.median(ratios) < 3 / 4


def test_it_says_what_it_has_reached():
    drawn = case(iterations=40)
    problem, made = drawn.problem, drawn.made
    for each in made.values():
        assert each.info == {
            "block_error": problem.error(values(made)),
            "block_error_nearest": problem.error(values(nearest(problem))),
        }


@pytest.mark.parametrize("rate", [0.02, 0.3, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_iterates_is_kept(rate, seed):
    """Each batch is all of the inputs here, so every iterate's error is that of all tokens."""
    drawn = case(seed, iterations=12, learning_rate=rate, batch_chunks=3)
    problem, met = drawn.copy(), []

    class Watched(BlockProblem):
        def slopes(self, weights, inputs):
            met.append(self.error(weights))
            return super().slopes(weights, inputs)

    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    made = drawn.rounder.learn(Watched(**fields), np.random.default_rng(0))
    reached = problem.error(values(made))
    assert len(met) == 12
    assert met[0] == problem.error(values(nearest(problem)))
    assert reached <= min(met)  # or the one after the last step is better still
    assert made[UP].info["block_error"] == reached


def test_what_the_last_step_reaches_is_tried_as_well():
    """After one step there is nothing else."""
    drawn = [case(seed, iterations=1, learning_rate=0.1) for seed in range(8)]
    assert any(not same(each.made[UP], nearest(each.problem)[UP]) for each in drawn)


def test_without_iterations_it_rounds_to_nearest():
    drawn = case(iterations=0)
    assert all(same(drawn.made[n], q) for n, q in nearest(drawn.problem).items())


def test_a_layer_that_no_token_reaches_stays_rounded_to_nearest():
    drawn = case(iterations=40)
    assert same(drawn.made[SPARE], nearest(drawn.problem)[SPARE])
    assert not same(drawn.made[UP], nearest(drawn.problem)[UP])


def test_ranges_are_learned_and_not_only_offsets():
    drawn = case(iterations=80, scheme=W3.replace(num_bits=2))
    start = nearest(drawn.problem)
    scales = [(drawn.made[n].scale, start[n].scale) for n in start]
    assert any(bool((made < before).any()) for made, before in scales)
    assert all(bool((made <= before).all()) for made, before in scales)


def test_the_seed_decides_which_inputs_come_when():
    drawn = case(iterations=20, batch_chunks=1)
    one, other = (drawn.rounder.learn(drawn.copy(), np.random.default_rng(s)) for s in (1, 2))
    assert not all(same(one[name], other[name]) for name in one)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_all_chunks_have_had_their_turn_before_one_has_another(chunks, size, seed):
    drawn = batches(chunks, size, np.random.default_rng(seed))
    turns = list(itertools.islice(drawn, 3 * chunks))
    assert all(len(batch) == min(size, chunks) for batch in turns)
    numbers = list(itertools.chain(*turns))
    for start in range(0, len(numbers) - chunks + 1, chunks):
        assert sorted(numbers[start : start + chunks]) == list(range(chunks))


# A layer by itself ------------------------------------------------------------------------------


def test_a_layer_by_itself_is_that_of_autoround():
    rng = np.random.default_rng(0)
    drawn = rounding_problem(rng.normal(size=(6, 20)), W3, correlated(rng, 20))
    made = AutoRoundBlock(iterations=30).round(drawn, rng)
    assert same(made, AutoRound(iterations=30, correction=0.0).round(drawn, rng))


def test_a_layer_without_tokens_is_refused_by_name():
    drawn = rounding_problem(np.ones((2, 3)), Scheme(), np.zeros((3, 3)), tokens=0)
    with pytest.raises(UncalibratedLayerError, match=r"block\.up"):
        AutoRoundBlock().round(drawn, np.random.default_rng(0))


# Contract ---------------------------------------------------------------------------------------


def test_the_plugin_keeps_the_contract():
    assert objection(AutoRoundBlock(), Rounder) is None
    assert AutoRoundBlock().capabilities.objection(Scheme(strategy="tensor"))


def test_it_keeps_its_promises(qframe_check):
    qframe_check(AutoRoundBlock(iterations=20), profile="fast")


def test_a_weight_that_is_not_finite_is_refused_by_layer():
    drawn = case()
    problem = drawn.copy()
    problem.layers[UP].weight[1, 1] = np.nan
    with pytest.raises(NonFiniteError, match=UP):
        drawn.rounder.learn(problem, np.random.default_rng(0))


# The kernel -------------------------------------------------------------------------------------


def descent(weight, scheme=W3, **changes):
    problem = rounding_problem(weight, scheme)
    start = rounding.to_nearest(problem)
    operands = {
        "weight": problem.weight.numpy(),
        "codes": start.codes.numpy(),
        "scale": start.scale.numpy(),
        "zero_point": start.zero_point.numpy(),
        "group_size": scheme.group_width(problem.weight.shape[1]),
        "qmin": problem.grid.qmin,
        "qmax": problem.grid.qmax,
        "symmetric": scheme.symmetric,
        "scale_dtype": scheme.scale_dtype,
    }
    return Descent(**(operands | changes)), start


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 1), (1, 7), (65, 3), (130, 12)])
def test_a_descent_begins_where_it_is_put_and_says_what_its_codes_stand_for(shape):
    rng = np.random.default_rng(0)
    state, start = descent(rng.normal(size=shape))
    for step in range(3):
        codes, scale, zero = map(torch.from_numpy, state.codes())
        if step == 0:
            assert torch.equal(codes, start.codes)
            assert torch.equal(scale, start.scale)
            assert torch.equal(zero, start.zero_point)
        index = start.group_index.long()
        value = scale[:, index] * (codes - zero[:, index])
        assert torch.equal(torch.from_numpy(state.values()), value)
        state.step(rng.normal(size=shape).astype(np.float32), 0.3)


def test_a_step_goes_against_the_sign_of_the_slope():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(70, 20))
    for sign in (1, -1):
        state, _ = descent(weight, Scheme(num_bits=8))
        before = state.values()
        for _ in range(4):
            state.step(np.full(weight.shape, sign, np.float32), 0.1)
        assert (sign * (before - state.values())).sum() > 0
        state.step(np.zeros(weight.shape, np.float32), 0.5)


def test_without_a_slope_nothing_moves():
    rng = np.random.default_rng(0)
    state, _ = descent(rng.normal(size=(5, 20)))
    state.step(np.zeros((5, 20), np.float32), 0.5)
    once = state.codes()
    state.step(np.zeros((5, 20), np.float32), 0.5)
    assert all(np.array_equal(a, b) for a, b in zip(once, state.codes(), strict=True))


def test_a_slope_that_does_not_fit_is_refused():
    state, _ = descent(np.ones((2, 5)))
    with pytest.raises(ValueError, match="does not fit"):
        state.step(np.zeros((2, 4), np.float32), 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"zero_point": np.zeros((2, 2), np.int16)}, "one for each group"),
        ({"codes": np.zeros((2, 3), np.int16)}, "do not fit"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        descent(np.ones((2, 5)), **changes)
