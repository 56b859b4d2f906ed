"""Bits for layers: never over the budget, the least loss there is, and never more for more bits.

Losses are whole numbers here, so that sums of them are exact and nothing needs a tolerance.
"""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe import allocation
from qframe.allocation import (
    Option,
    allocate,
    budget_of,
    check_target,
    hull,
    search,
    steepest,
)
from qframe.errors import RecipeError

ONE = st.builds(Option, st.integers(1, 14), st.integers(0, 60).map(float))
PROBLEMS = st.lists(st.lists(ONE, min_size=1, max_size=4), min_size=1, max_size=5)


def least(options):
    return sum(min(option.bits for option in each) for each in options)


def most(options):
    return sum(max(option.bits for option in each) for each in options)


def best(options, budget):
    """Return the least (loss, bits) of all choices within the budget, each looked at."""
    choices = itertools.product(*options)
    totals = [(sum(o.loss for o in each), sum(o.bits for o in each)) for each in choices]
    return min(total for total in totals if total[1] <= budget)


@st.composite
def problems(draw):
    """Options, and budgets in ascending order that all of them keep."""
    options = draw(PROBLEMS)
    extra = st.integers(0, most(options) - least(options) + 3)
    return options, sorted(least(options) + draw(extra) for _ in range(2))


def adds_up(options, solution):
    picked = [each[pick] for each, pick in zip(options, solution.picks, strict=True)]
    return (sum(o.loss for o in picked), sum(o.bits for o in picked)) == (
        solution.loss,
        solution.bits,
    )


@given(problems())
def test_it_is_the_best_of_all_choices(problem):
    options, budgets = problem
    for budget in budgets:
        found = allocate(options, budget)
        assert adds_up(options, found)
        assert found.bits <= budget
        assert (found.loss, found.bits) == best(options, budget)
        assert found.gap == 0 or search(options, budget) is None


@given(problems())
def test_steps_end_within_the_last_one_of_the_best(problem):
    """The bound that the docstring of `steepest` proves, and what it says of its size."""
    options, budgets = problem
    for budget in budgets:
        found = steepest(options, budget)
        assert adds_up(options, found)
        assert found.bits <= budget
        assert found.loss - best(options, budget)[0] <= found.gap
        left = []
        for each, pick in zip(options, found.picks, strict=True):
            corners = hull(each)
            place = corners.index(pick)
            for above in corners[place + 1 : place + 2]:
                drop = Fraction(each[pick].loss) - Fraction(each[above].loss)
                left.append((drop / (each[above].bits - each[pick].bits), drop))
        if left:
            slope = max(slope for slope, _ in left)
            assert found.gap == float(slope * (budget - found.bits))
            assert found.gap < max(drop for s, drop in left if s == slope)
        else:
            assert found.gap == 0


@given(problems(), st.sampled_from([1, 2, 5, allocation.STATES]))
def test_more_bits_never_lose_more(problem, states):
    options, (less, more) = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "STATES", states)
        for way in (allocate, steepest):
            assert way(options, more).loss <= way(options, less).loss


@given(problems(), st.integers(1, 6))
def test_where_amounts_are_too_many_the_budget_is_kept_and_the_gap_is_true(problem, states):
    options, budgets = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "STATES", states)
        for budget in budgets:
            found = allocate(options, budget)
            assert adds_up(options, found)
            assert found.bits <= budget
            assert found.loss - best(options, budget)[0] <= found.gap
            assert found.loss <= steepest(options, budget).loss


@given(st.lists(ONE, min_size=1, max_size=6))
def test_no_option_lies_below_the_hull(options):
    corners = [options[i] for i in hull(options)]
    assert corners[0].bits == min(o.bits for o in options)
    assert corners[-1].loss == min(o.loss for o in options)
    pairs = list(itertools.pairwise(corners))
    slopes = [Fraction(a.loss - b.loss) / (b.bits - a.bits) for a, b in pairs]
    assert slopes == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes)
    for option in options:
        for (low, _), slope in zip(pairs, slopes, strict=True):
            assert Fraction(option.loss) >= Fraction(low.loss) - slope * (option.bits - low.bits)


@given(problems())
def test_less_than_the_fewest_bits_is_refused(problem):
    options, _ = problem
    for way in (allocate, steepest, search):
        with pytest.raises(ValueError, match="more than the budget"):
            way(options, least(options) - 1)


def test_bits_that_gain_nothing_are_not_spent():
    options = [[Option(2, 5.0), Option(8, 5.0)], [Option(2, 3.0), Option(4, 1.0)]]
    assert allocate(options, 100).picks == (0, 1)


def test_it_does_what_steps_alone_cannot():
    """The steepest step does not fit, and a less steep one does."""
    options = [[Option(1, 10.0), Option(5, 0.0)], [Option(1, 4.0), Option(3, 0.0)]]
    assert steepest(options, 4).picks == (0, 0)
    assert allocate(options, 4).picks == (0, 1)


def test_a_target_is_the_number_that_is_written():
    assert budget_of(4.3, 10) == 43
    assert budget_of(0.1, 30) == 3
    assert budget_of(4.25, 3) == 12


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached():
    with pytest.raises(RecipeError, match=r"the smallest is 2\.3334 bits per weight"):
        check_target(2.3333, 7, 20, 3)
    with pytest.raises(RecipeError, match=r"the largest is 6\.6666 bits per weight"):
        check_target(7, 7, 20, 3)
    check_target(2.3334, 7, 20, 3)
    check_target(6.6666, 7, 20, 3)
