"""docs/bounds.md and qframe.bounds say the same."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qframe import bounds

DOCUMENT = (Path(__file__).parents[1] / "docs" / "bounds.md").read_text(encoding="utf-8")
HELPERS = {"gamma", "ratio", "worst"}  # explained under the notation, not theorems
FUNCTIONS = {
    name: function
    for name, function in vars(bounds).items()
    if inspect.isfunction(function) and not name.startswith("_")
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - HELPERS))
def test_every_bound_is_proved_in_the_document(name):
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - HELPERS - {"ideal_scale"}))
def test_every_bound_names_a_theorem_that_the_document_has(name):
    theorems = re.findall(r"\bB\d+\.[a-z]\b", inspect.getdoc(FUNCTIONS[name]))
    assert theorems
    assert all(re.search(rf"^### {t} ", DOCUMENT, re.MULTILINE) for t in theorems)


def test_the_document_names_no_bound_that_is_not_there():
    named = set(re.findall(r"\(`(\w+)`\)", DOCUMENT))
    assert named <= FUNCTIONS.keys()


def test_the_counterexample_of_b3_c_is_one():
    hessian = np.array([[5.0, 4, 4], [4, 6, 6], [4, 6, 13]])
    weight = np.array([-0.1, -0.45, 0.3])
    loss = [float((q - weight) @ hessian @ (q - weight)) for q in ([0, -1, 1], [0, 0, 0])]
    assert [round(x, 3) for x in loss] == [3.735, 0.935]


def test_no_number_that_is_not_one_passes():
    assert bounds.ratio([np.nan], [1.0]) == np.inf
    assert bounds.ratio([1.0], [np.nan]) == np.inf
    assert bounds.ratio([0.0], [0.0]) == 0
    assert bounds.ratio([1.0], [-1.0]) == np.inf


# B3.g: factors of nearly the same matrix --------------------------------------------------------


def upper_factor(matrix):
    """Return R, upper triangular, matrix = R R^T."""
    return np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]


def positive_definite(rng, n):
    x = rng.normal(size=(3 * n, n)) + 2 * rng.normal(size=(3 * n, 1))
    return x.T @ x + np.eye(n)


def apart(one, other, delta):
    """Return how far the residuals of two factors are apart, times sqrt(D_j / loss)."""
    units = (each / each.diagonal() for each in (one, other))
    mine, its = (delta @ unit for unit in units)
    return np.abs(mine - its) * one.diagonal() / np.linalg.norm(delta @ one, axis=1)[:, None]


def test_residuals_of_two_factors_are_apart_by_at_most_what_b3_g_says():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 9))
        factor = upper_factor(positive_definite(rng, n))
        moved = rng.normal(size=(n, n))
        if seed % 2:  # of rank one, which is the worst
            moved = np.outer(moved[0], moved[0])
        moved = moved + moved.T
        moved *= 1 / 4 / np.linalg.norm(moved)
        other = factor @ upper_factor(np.eye(n) + moved)
        assert apart(factor, other, rng.normal(size=(20, n))).max() <= 2 * 1 / 4


def test_a_float32_factor_is_as_near_as_b3_g_says():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 9))
        matrix = positive_definite(rng, n)
        factor, other = upper_factor(matrix), upper_factor(np.float32(matrix))
        reach = np.abs(np.linalg.inv(factor)) @ np.linalg.norm(factor, axis=1)
        allowed = bounds.gptq_moved(float(reach @ reach), n, "float32")
        found = apart(factor, np.float64(other), rng.normal(size=(20, n))).max()
        assert found <= allowed
        above = np.triu(factor / factor.diagonal(), 1)
        norms = bounds.gptq_norms(np.linalg.norm(above, axis=0), factor.diagonal() ** 2, allowed)
        its = np.triu(np.float64(other) / other.diagonal(), 1)
        assert bounds.ratio(np.linalg.norm(its, axis=0), norms) <= 1


def test_of_a_matrix_that_is_singular_to_working_precision_nothing_is_known():
    assert bounds.gptq_moved(2.0**60, 8) == np.inf
    assert bounds.gptq_moved(2.0**30, 8) < 1 / 2


def test_the_certificate_is_round_to_nearest_of_compensated_weights():
    from qframe import Grid

    grid = Grid(-2, 1)
    residual, codes = np.array([0.5, 0.75, 0.75, -9, 9, -9]), np.array([0, 0, -2, -2, 1, 1])
    error, allowed = bounds.gptq_certificate(residual, codes, 1.0, grid)
    assert (error <= allowed).tolist() == [True, False, True, False, False, True]
    nearest, half = bounds.nearest(residual, codes, 1.0, grid)
    assert np.array_equal(nearest, error)
    assert np.array_equal(half, allowed)


def test_only_what_lies_beyond_an_end_is_excused_and_whatever_its_distance():
    from qframe import Grid

    grid, ends = Grid(-2, 1), np.array([-2, -2, -2, 1, 1, 1, 0, -1])
    delta = np.array([0.1, 9, -0.1, -0.1, -9, 0.1, 9, -9])
    beyond = bounds.beyond_ends(delta, ends, grid)
    assert beyond.tolist() == [True, True, False, True, True, False, False, False]
    error, _ = bounds.nearest(delta, ends, 1.0, grid)
    assert error.tolist() == [0, 0, 0.1, 0, 0, 0.1, 9, 9]
    for infinite in (np.inf, -np.inf, np.nan):  # that is no distance
        delta = np.full(2, infinite)
        assert not bounds.beyond_ends(delta, np.array([-2, 1]), grid).any()


@pytest.mark.parametrize("form", ["quotient", "product", "reciprocal"])
@given(
    x=st.lists(st.integers(-400, 400), min_size=1, max_size=9).filter(any),
    exponent=st.integers(-149, -110),
    seed=st.integers(0, 99),
)
@example(x=[1, 0, 3], exponent=-149, seed=0)
@example(x=[127, -64, 65], exponent=-149, seed=0)
def test_faint_tokens_are_off_by_no_more_than_b5_e_says(form, x, exponent, seed):
    f32 = np.float32
    token = np.array([x], f32) * f32(2.0) ** f32(exponent)
    largest = np.abs(token).max()
    with np.errstate(all="ignore"):
        made = {
            "quotient": lambda: largest / f32(127),
            "product": lambda: largest * (f32(1) / f32(127)),
            "reciprocal": lambda: f32(1) / (f32(127) / largest),
        }[form if np.isfinite(f32(127) / largest) else "quotient"]()
        scale = max(made, f32(2.0**-149))
        codes = np.clip(np.rint(token / scale), -127, 127).astype(np.float64)
    w = np.random.default_rng(seed).integers(-127, 128, (4, len(x)))
    exact = np.float64(largest) / 127
    quotient = token.astype(np.float64) / exact
    wanted = exact * (np.rint(quotient) @ w.T)
    off = np.abs(np.float64(scale) * (codes @ w.T) - wanted)
    allowed = bounds.doubtful_codes(quotient, w, [exact], np.ones(4))
    assert (
        bounds.ratio(off, (1 + bounds.gamma(6)) * allowed + bounds.gamma(6) * np.abs(wanted)) <= 1
    )


def test_a_worst_case_of_half_steps_attains_b10_b():
    """All errors of half a step, and inputs that all move together."""
    step = np.ones(8)
    error, hessian = step / 2, np.ones((8, 8))
    reach = (step / 2 * np.sqrt(hessian.diagonal())).sum()
    found = np.sqrt(error @ hessian @ error)
    assert found == reach
    assert bounds.ratio(found, bounds.output_bound(reach, 1.0, 0.0, 8)) <= 1
    assert bounds.ratio(found, bounds.output_bound(reach, 1 / 2, 0.0, 8)) > 1


def test_a_search_may_compare_with_a_large_hessian_over_its_largest_number():
    """One weight is off by 2^-75, H is 2^30: over 2^30, what is compared underflows to 0."""
    off, largest = 2.0**-75, 2.0**30
    compared = np.float32(off) * np.float32(off)
    energy = off * off * largest
    slack = bounds.search_slack(4 * energy, energy, [off], 1, largest)
    assert compared == 0
    assert bounds.ratio(np.sqrt(energy) - 0, slack) <= 1


# Stored numbers (B1.h) ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(number=st.floats(-65504, 65504, width=32), exponent=st.integers(-150, 0))
def test_a_number_is_stored_as_near_as_b1_h_says(dtype, number, exponent):
    exact = torch.tensor(math.ldexp(number, exponent), dtype=torch.float32)
    stored = exact.to(getattr(torch, dtype))
    apart = abs(float(stored) - float(exact))
    assert apart <= bounds.stored_apart(float(stored), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_between_two_stored_ones_attain_b1_h(dtype):
    for exact in (1 + bounds.UNIT[dtype], bounds.ETA[dtype]):
        stored = torch.tensor(exact, dtype=torch.float64).to(getattr(torch, dtype))
        assert abs(float(stored) - exact) == bounds.stored_apart(float(stored), dtype)
