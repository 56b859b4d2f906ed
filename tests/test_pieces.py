"""Looking closely at few weights finds the same as looking closely at all of them."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qframe import Grid, Scheme, bounds, certificates, rounding
from qframe.certificates import Closest, Evidence
from qframe.claims import Babai, Covers, HalfStep, Radius, SchemeScale
from qframe.contracts import RoundingProblem
from qframe.pieces import highest_ratios
from qframe.report.measure import clipped_weights, sqnr_db
from qframe_plugins.rounders.gptq import GPTQ

ROWS = (
    lambda rng, n: rng.standard_normal(n),
    lambda rng, n: np.zeros(n),
    lambda rng, n: np.full(n, 0.3),
    lambda rng, n: rng.integers(-15, 16, n) / 2,  # ties
    lambda rng, n: rng.standard_normal(n) * 1e-42,
    lambda rng, n: np.where(np.arange(n) == n // 2, 3e4, rng.standard_normal(n)),
)


@st.composite
def layers(draw, min_columns=1):
    """A layer and codes for it: the nearest, but for some that are wrong."""
    columns, rows = draw(st.integers(min_columns, 70)), draw(st.integers(1, 40))
    symmetric = draw(st.booleans())
    bits = draw(st.sampled_from([2, 4, 8]))
    strategy = draw(st.sampled_from(["group", "group", "channel", "tensor"]))
    scheme = Scheme(
        num_bits=bits,
        strategy=strategy,
        group_size=draw(st.sampled_from([1, 7, 16, 64])) if strategy == "group" else None,
        symmetric=symmetric,
        observer=draw(st.sampled_from(["minmax", "mse"])),
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kinds = [ROWS[k] for k in draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))]
    weight = torch.from_numpy(np.float32(np.stack([kind(rng, columns) for kind in kinds])))
    half = 1 << (bits - 1)
    grid = Grid(-half, half - 1) if symmetric else Grid(0, 2 * half - 1)
    problem = RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
    made = rounding.to_nearest(problem)
    wrong = rng.random(weight.shape) < draw(st.sampled_from([0, 0, 0.01, 0.5]))
    other = torch.from_numpy(rng.integers(grid.qmin, grid.qmax + 1, weight.shape))
    codes = torch.where(torch.from_numpy(wrong), other.to(torch.int16), made.codes)
    return problem, replace(made, codes=codes)


def cut_into(height, monkeypatch):
    whole = Evidence.cut
    monkeypatch.setattr(Evidence, "cut", lambda evidence, _=None: whole(evidence, height))


@pytest.mark.parametrize("height", [1, 5, 64])
@given(layer=layers())
def test_the_half_step_certificate_is_that_of_all_weights(layer, height):
    problem, made = layer
    evidence = Evidence(problem, made)
    piece, grid = evidence.piece(slice(None)), problem.grid
    allowance = bounds.gamma(1) * np.abs(piece.weight, dtype=np.float64)
    judged = bounds.nearest(piece.delta(), piece.codes, piece.scale, grid, allowance)
    error, allowed = (np.broadcast_to(each, piece.weight.shape) for each in judged)
    shape = problem.weight.shape
    with pytest.MonkeyPatch.context() as patch:
        cut_into(height, patch)
        found = HalfStep().certify(evidence)
    assert found == Closest.of(error.reshape(shape), allowed.reshape(shape)).certificate(HalfStep())


@pytest.mark.parametrize("bits", [2, 4])
@given(layer=layers(min_columns=4), seed=st.integers(0, 99))
def test_the_gptq_certificate_is_that_of_all_weights(layer, seed, bits):
    drawn, _ = layer
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((99, drawn.weight.shape[1])))
    problem = replace(drawn, statistics={"hessian": 2 / 99 * x.T @ x}, tokens=99)
    made = GPTQ().round(problem, np.random.default_rng(0))
    codes = made.codes.clone()
    codes[seed % len(codes), seed % codes.shape[1]] = seed % problem.grid.qmax
    claim: Babai = GPTQ().claims[0]
    for evidence in (Evidence(problem, made), Evidence(problem, replace(made, codes=codes))):
        replay = claim.replay(evidence, claim)
        rows = replay.rows(evidence, 0)
        feedback = replay.feedback
        allowance = bounds.gptq_allowance(
            rows.weight,
            rows.delta,
            rows.residual,
            feedback.norms,
            feedback.diagonal,
            feedback.moved,
            claim.sums,
            bounds.decode(rows.scale, rows.codes - rows.zero_point),
        )
        error, allowed = bounds.nearest(
            rows.residual, rows.codes, rows.scale, problem.grid, allowance
        )
        with pytest.MonkeyPatch.context() as patch:
            cut_into(5, patch)
            found = claim.certify(evidence)
        wanted, back = Closest.of(error, allowed), np.argsort(replay.order)
        assert found.holds == (wanted.ratio <= 1)
        # Sums over a row are made in another order: of two that are as close either may be found.
        there = (error[:, back] / allowed[:, back])[found.place] / bounds.CHECKER
        for ratio in (found.ratio, there):
            assert bounds.ratio(ratio - wanted.ratio, wanted.ratio * (bounds.CHECKER - 1)) <= 1


@given(layer=layers())
def test_the_radius_certificate_is_that_of_all_weights(layer):
    problem, made = layer
    evidence, claim = Evidence(problem, made), Radius(steps=1)
    piece = evidence.piece(slice(None))
    judged = bounds.radius(
        piece.weight, piece.delta(), piece.codes, piece.scale, problem.grid, claim.steps
    )
    with pytest.MonkeyPatch.context() as patch:
        cut_into(5, patch)
        found = claim.certify(evidence)
    assert found == Closest.of(*judged).certificate(claim)


@given(layer=layers())
def test_no_ratio_of_a_strip_is_higher_than_float32_says(layer):
    problem, made = layer
    evidence, grid = Evidence(problem, made), problem.grid
    piece, highest = evidence.piece(slice(None)), evidence.differences().highest
    error, allowed = bounds.nearest(piece.delta(), piece.codes, piece.scale, grid)
    assert (error <= allowed * highest[..., None] * bounds.CHECKER).all()
    exact = highest_ratios(piece.delta(), piece.codes, piece.scale, grid)
    assert np.array_equal(exact, (error / allowed).max(-1))


@pytest.mark.parametrize("below", [0.0, 2.0**-26, 2.0**-25])
def test_a_difference_that_float32_rounds_down_to_half_a_step_is_more(below):
    weight = torch.full((1, 4), 0.5 - below)
    problem = RoundingProblem(
        name="layer", weight=weight, scheme=Scheme(group_size=4), grid=Grid(-8, 7)
    )
    made = replace(
        rounding.to_nearest(problem),
        codes=torch.ones(1, 4, dtype=torch.int16),
        scale=torch.ones(1, 1),
    )
    evidence = Evidence(problem, made)
    delta = evidence.piece(slice(None)).delta()
    assert (2 * np.abs(delta).max() <= evidence.differences().highest).all()


QUARTERS = st.integers(0, 8).map(lambda quarters: quarters / 4)


@given(
    error=st.lists(st.lists(QUARTERS, min_size=6, max_size=6), min_size=1, max_size=5),
    spare=st.lists(st.sampled_from([0, 0, 1, 3]), min_size=30, max_size=30),
    per_row=st.sampled_from([1, 2, 3, 6]),
)
@example(error=[[0.5, 1, 0, 0, 0, 0]], spare=[0, 1] * 15, per_row=6)
def test_the_first_of_equally_close_weights_is_found_in_whatever_strip(error, spare, per_row):
    errors = np.array(error)
    allowed = 1.0 + np.array(spare[: errors.size]).reshape(errors.shape)
    strips = (len(errors), per_row, 6 // per_row)
    most = errors.reshape(strips).max(-1)

    def judge(places):
        each = (errors, allowed)
        return Closest.of(*(values.reshape(-1, strips[-1])[places] for values in each))

    for at_once in (1, strips[-1], 2 * strips[-1], 100):
        with mock.patch.object(certificates, "_CLOSELY", at_once):
            found = Closest.screened(most, judge, strips[-1])
        assert found == Closest.of(errors, allowed)


def test_a_wrong_code_of_a_weight_that_zero_points_shift_is_found():
    weight = torch.linspace(0, 1, 32).reshape(1, 32).clone()
    weight[0, ::16] = -1  # alone below 0, so that no other one makes its group suspicious
    scheme, grid = Scheme(num_bits=4, group_size=16, symmetric=False), Grid(0, 15)
    made = rounding.to_nearest(
        RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
    )
    for column in (0, 15, 16, 31):
        codes = made.codes.clone()
        codes[0, column] = made.zero_point[0, column // 16]  # it stands for 0
        problem = RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
        found = HalfStep().certify(Evidence(problem, replace(made, codes=codes)))
        right = bool((codes == made.codes).all())
        assert found.holds == right
        assert right or found.place == (0, column)


@pytest.mark.parametrize("claim", [SchemeScale(), Covers()], ids=lambda claim: claim.name)
@given(layer=layers(), wrong=st.integers(0, 999), factor=st.sampled_from([0.5, 1, 3]))
def test_the_certificates_of_groups_are_those_of_all_groups(claim, layer, wrong, factor):
    problem, made = layer
    scale = made.scale.clone()
    scale.view(-1)[wrong % scale.numel()] *= factor
    found = claim.certify(Evidence(problem, replace(made, scale=scale)))
    for piece in (1, 5, 64):
        with mock.patch.object(certificates, "_CLOSELY", piece):
            assert claim.certify(Evidence(problem, replace(made, scale=scale))) == found


@given(layer=layers())
def test_clipped_weights_are_counted_over_all(layer):
    problem, made = layer
    scale, zero = (
        rounding.expand(each, made.group_index, len(problem.weight))
        for each in (made.scale, made.zero_point)
    )
    place = problem.weight / scale + zero
    outside = (place > problem.grid.qmax + 0.5) | (place < problem.grid.qmin - 0.5)
    low, high = (torch.from_numpy(ends).float() for ends in Evidence(problem, made).ranges())
    found = clipped_weights(problem.weight, made, problem.grid, (low, high))
    assert found == int(outside.sum())


def test_what_is_not_finite_is_found_wherever_it_is():
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    scheme, grid = Scheme(num_bits=4, group_size=16), Grid(-8, 7)
    made = rounding.to_nearest(
        RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
    )
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight[7, 21] = bad
        problem = RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
        for code in (grid.qmin, 0, grid.qmax):  # at an end it is not excused
            made.codes[7, 21] = code
            found = HalfStep().certify(Evidence(problem, made))
            assert (found.ratio, found.place) == (float("inf"), (7, 21))


@pytest.mark.parametrize("height", [1, 5, 64])
@given(layer=layers())
def test_signal_and_noise_are_those_of_all_weights(layer, height):
    problem, made = layer
    with pytest.MonkeyPatch.context() as patch:
        cut_into(height, patch)
        found = Evidence(problem, made).differences()
    weight = problem.weight.double()
    change = (rounding.dequantize(made) - problem.weight).double()
    signal, noise = (math.fsum((each**2).flatten().tolist()) for each in (weight, change))
    allowed = bounds.gamma(weight.numel() + 1, bounds.UNIT["float64"])
    assert bounds.ratio(abs(found.signal - signal), allowed * signal) <= 1
    assert bounds.ratio(abs(found.noise - noise), allowed * noise) <= 1
    assert sqnr_db(signal, noise) == (
        math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    )
