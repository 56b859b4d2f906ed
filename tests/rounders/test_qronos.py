"""Qronos: GPTQ for an aim that makes up for inputs that have moved (docs/bounds.md, B3.h)."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Scheme, bounds, claims, rounding
from qframe.certificates import Evidence
from qframe.errors import NonFiniteError, UncalibratedLayerError, UnsupportedError
from qframe_conformance import check_plugin
from qframe_conformance.kinds import INPUTS, hessian_of, original_inputs
from qframe_conformance.strategies import rounding_problem
from qframe_plugins.rounders.gptq import GPTQ
from qframe_plugins.rounders.qronos import CORRECTIONS, Qronos, aim_of, relative_change

RNG = np.random.default_rng(0)  # it takes no random numbers
W4 = Scheme(num_bits=4, group_size=8)


def statistics(x, y):
    """Return what is observed of inputs x, y [tokens, columns] float64."""
    return {
        "hessian": torch.from_numpy(hessian_of(x)),
        "mismatch": torch.from_numpy((y - x).T @ x * (2 / len(x))),
    }


def problem(seed=0, rows=6, columns=24, scheme=W4, kind=0, moved=original_inputs):
    rng = np.random.default_rng(seed)
    drawn = rounding_problem(rng.normal(size=(rows, columns)), scheme)
    x = INPUTS[kind](rng, columns)
    aside = INPUTS[kind](rng, columns)
    return dataclasses.replace(
        drawn,
        tokens=len(x),
        statistics=statistics(x, moved(x)),
        held_out=statistics(aside, moved(aside)),
    ), (x, moved(x))


def loss(drawn, made, x, y):
    """Return ||Y W^T - X Q^T||^2."""
    weight, values = drawn.weight.double().numpy(), rounding.dequantize(made).double().numpy()
    return ((y @ weight.T - x @ values.T) ** 2).sum()


@pytest.mark.parametrize(
    "options", [{}, {"correction": "auto"}, {"actorder": None}, {"correction": 1.0}]
)
def test_the_suite_holds_whatever_the_options(options):
    report = check_plugin(Qronos(**options), kind="rounder", profile="fast")
    assert report.ok, [(record.id, record.message) for record in report.failures]


@given(st.integers(0, 2**16), st.integers(0, len(INPUTS) - 1))
def test_without_a_correction_it_is_gptq(seed, kind):
    drawn, _ = problem(seed, kind=kind)
    one, other = (
        r.round(drawn, RNG) for r in (GPTQ(), Qronos(correction=0, dampening_frac=1 / 100))
    )
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


@given(st.integers(0, 2**16))
def test_it_comes_nearer_to_the_original_outputs(seed):
    """With 8 bits and nothing clipped rounding is small beside what is made up for."""
    scheme = Scheme(num_bits=8, group_size=None, strategy="channel", scale_dtype="float32")
    drawn, (x, y) = problem(seed, scheme=scheme, moved=lambda x: x + np.roll(x, 1, axis=1) / 64)
    corrected, plain = (
        loss(drawn, r.round(drawn, RNG), x, y) for r in (Qronos(), Qronos(correction=0))
    )
    assert corrected < plain


def test_the_aim_is_the_minimum_of_the_damped_objective():
    """Its gradient A (H + damping) - W (H + damping) - W M is within rounding of zero."""
    drawn, _ = problem()
    hessian = drawn.statistics["hessian"]
    aim = aim_of(drawn, hessian, 0.01, 1.0).double()
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    weight = drawn.weight.double()
    wanted = weight @ drawn.statistics["mismatch"]
    gradient = (aim - weight) @ damped - wanted
    stored = aim.abs() @ damped.abs() * bounds.UNIT["float32"]  # the aim is rounded to float32
    solved = bounds.accumulate(
        (aim - weight).abs() @ damped.abs() + wanted.abs(), 8 * 24, bounds.UNIT["float64"]
    )
    assert bounds.ratio(gradient.numpy(), stored.numpy() + solved) <= 1


def test_auto_takes_what_does_best_on_held_out_tokens():
    scheme = Scheme(num_bits=8, group_size=None, strategy="channel")
    drawn, _ = problem(scheme=scheme, moved=lambda x: x + np.roll(x, 1, axis=1) / 16)
    auto = Qronos(correction="auto", dampening_frac=1 / 100)
    best = auto.round(drawn, RNG)
    assert best.info["correction"] == 1.0
    aside = drawn.held_out["hessian"]
    still = {"hessian": aside, "mismatch": torch.zeros_like(aside)}
    careful = auto.round(dataclasses.replace(drawn, held_out=still), RNG)
    assert careful.info["correction"] == 0.0
    assert set(CORRECTIONS) >= {0.0, 1.0}
    with pytest.raises(UnsupportedError, match="held_out_fraction"):
        auto.round(dataclasses.replace(drawn, held_out={}), RNG)


def test_the_certificate_says_when_another_correction_was_taken():
    drawn, _ = problem()
    made = Qronos(correction=0.5).round(drawn, RNG)
    [babai, *_] = Qronos(correction=0.5).claims
    assert babai.certify(Evidence(problem=drawn, quantized=made)).holds
    [other, *_] = Qronos(correction=1).claims
    found = other.certify(Evidence(problem=drawn, quantized=made))
    assert not found.holds
    assert "correction 0.5" in found.note
    lied = dataclasses.replace(made, info={**made.info, "correction": 1.0})
    assert not other.certify(Evidence(problem=drawn, quantized=lied)).holds


def test_a_claim_without_its_statistic_says_so():
    drawn, _ = problem()
    made = Qronos(correction=1, dampening_frac=1 / 100).round(drawn, RNG)
    only = dataclasses.replace(drawn, statistics={"hessian": drawn.statistics["hessian"]})
    with pytest.raises(UncalibratedLayerError, match="'mismatch'"):
        claims.Babai(dampening_frac=0.01, correction=1.0).certify(
            Evidence(problem=only, quantized=made)
        )


def test_what_is_not_finite_is_named():
    drawn, _ = problem()
    broken = drawn.statistics["mismatch"].clone()
    broken[0, 0] = torch.inf
    statistics = {**drawn.statistics, "mismatch": broken}
    with pytest.raises(NonFiniteError, match=r"block\.up.*should become"):
        Qronos().round(dataclasses.replace(drawn, statistics=statistics), RNG)
    with pytest.raises(UncalibratedLayerError, match="no calibration tokens"):
        Qronos().round(dataclasses.replace(drawn, tokens=0), RNG)


@pytest.mark.parametrize("size", [2.0**-80, 2.0**63])
def test_what_auto_takes_does_not_depend_on_the_size_of_inputs(size):
    """Losses in float32 would underflow, or overflow."""
    scheme = Scheme(num_bits=8, group_size=None, strategy="channel")
    drawn, _ = problem(scheme=scheme, moved=lambda x: x + np.roll(x, 1, axis=1) / 16)
    auto = Qronos(correction="auto", dampening_frac=1 / 100)
    rescaled = dataclasses.replace(
        drawn,
        statistics={name: value * size**2 for name, value in drawn.statistics.items()},
        held_out={name: value * size**2 for name, value in drawn.held_out.items()},
    )
    one, other = (auto.round(each, RNG) for each in (drawn, rescaled))
    assert one.info["correction"] == other.info["correction"] == 1.0
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("size", [2.0**-75, 2.0**70])
def test_what_auto_takes_does_not_depend_on_the_size_of_weights(size):
    scheme = Scheme(num_bits=8, group_size=None, strategy="channel", scale_dtype="float32")
    drawn, _ = problem(scheme=scheme, moved=lambda x: x + np.roll(x, 1, axis=1) / 16)
    auto = Qronos(correction="auto", dampening_frac=1 / 100)
    one, other = (
        auto.round(dataclasses.replace(drawn, weight=drawn.weight * times), RNG)
        for times in (1.0, size)
    )
    assert one.info["correction"] == other.info["correction"] == 1.0
    assert torch.equal(one.codes, other.codes)


def test_what_is_told_does_not_depend_on_threads():
    """The matrices are so large that torch splits a sum among them."""
    rng = np.random.default_rng(0)
    weight, aim = (torch.from_numpy(np.float32(rng.normal(size=(576, 1536)))) for _ in range(2))
    before, told, split = torch.get_num_threads(), set(), set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            told.add(relative_change(weight, aim))
            split.add(float(weight.square().sum()))
    finally:
        torch.set_num_threads(before)
    assert len(told) == 1 < len(split)
    assert relative_change(weight, weight) == relative_change(weight * 0, weight) == 0
    assert relative_change(weight, 2 * weight) == 1
