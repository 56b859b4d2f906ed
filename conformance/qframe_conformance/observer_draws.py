"""Draws the activations that observers are tried on.

A drawn case is a seed and a few small integers; NumPy makes batches of activations of them. Their
columns are of the nasty kinds one after another, so that a single statistic meets them all. What
is planted is what a search must find something in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qframe import Grid
from qframe.claims import LeastError, TokensSeen, claims_of, has_claim
from qframe.host import option_names
from qframe_conformance.engine import Scenario
from qframe_conformance.kinds import Float64
from qframe_conformance.observer_cases import ObserverCase, width_of

COLUMNS = (1, 2, 3, 7, 16, 17, 33, 40)

# How many tokens the updates bring: empty ones, single tokens, odd counts, uneven batches. Runs of
# tokens that are summed together are of some power of two; 700 is more than any of them, and the
# last run is a short one.
SHORT = ((1,), (2,), (5,), (3, 1), (4, 0, 9), (1, 1, 1), (0, 33, 2), (130, 7))
LONG = ((700,), (1, 599, 101), (257, 0, 510), (64, 64, 64, 641))

# Codes that an observer with a field `grid` may be given by the host, besides those that it has.
GRIDS = (
    Grid(-7, 7),
    Grid(-1, 1),
    Grid.of([-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
)
MOST_PLANTED = 1 << 15  # inputs of one case


# Columns --------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, tokens: int) -> Float64:
    """Return ordinary activations."""
    return rng.normal(size=tokens)


def dead(rng: np.random.Generator, tokens: int) -> Float64:
    """Return zeros: a channel that nothing excites."""
    return np.zeros(tokens)


def outlier(rng: np.random.Generator, tokens: int) -> Float64:
    """Return ordinary activations, one in a thousand of them (at least one) 2^10 times as large."""
    x = rng.normal(size=tokens)
    places = rng.integers(0, max(tokens, 1), -(-tokens // 1000))
    x[places] *= 2.0**10
    return x


def negative(rng: np.random.Generator, tokens: int) -> Float64:
    """Return numbers below zero: a largest number is no largest magnitude."""
    return -1 - rng.random(tokens)


def huge(rng: np.random.Generator, tokens: int) -> Float64:
    """Return numbers whose squares are near the largest float32."""
    return rng.normal(size=tokens) * 2.0**54


def tiny(rng: np.random.Generator, tokens: int) -> Float64:
    """Return numbers whose squares are subnormal or underflow."""
    return rng.normal(size=tokens) * 2.0 ** rng.integers(-149, -60, tokens)


def stagnating(rng: np.random.Generator, tokens: int) -> Float64:
    """Return 2^12 and then ones: a float32 sum of squares stays at 2^24 for ever."""
    x = np.ones(tokens)
    x[:1] = 2.0**12
    return x


def drifting(rng: np.random.Generator, tokens: int) -> Float64:
    """Return numbers that grow: a mean of the batches' means is not the mean."""
    return np.arange(tokens) / 8 + rng.random(tokens)


KINDS: tuple[Callable[[np.random.Generator, int], Float64], ...] = (
    normal,
    outlier,
    negative,
    stagnating,
    drifting,
    dead,
    tiny,
    huge,
)


# Scenarios ------------------------------------------------------------------------------------


def scenarios(observer: Any) -> list[Scenario]:
    """Return the scenarios: ordinary and long series of batches, integers, nothing, not finite.

    Where the host gives the observer the codes, it is tried with others, too; and where it claims
    to search, on inputs in which there is something to find.
    """
    found = [
        Scenario("batches", batches(observer, SHORT), "finite"),
        Scenario("many-tokens", batches(observer, LONG), "finite"),
        Scenario("integers", batches(observer, SHORT + LONG[1:2], integers=True), "finite"),
        Scenario("nothing", batches(observer, ((), (0,), (0, 0))), "nothing"),
        Scenario("not-finite", batches(observer, SHORT, poison=True), "not finite"),
        Scenario("one-of-many-not-finite", batches(observer, LONG, poison=True), "not finite"),
    ]
    if has_claim(observer, TokensSeen):
        found.append(Scenario("repeated", batches(observer, SHORT, repeated=True), "finite"))
    grids: tuple[Grid | None, ...] = (None,)
    if "grid" in option_names(observer):
        grids = (None, *GRIDS)
        found.append(Scenario("other-codes", batches(observer, SHORT, grids=GRIDS), "finite"))
    plants = [plant for grid in grids for plant in _plants(observer, grid)]
    plants.sort(key=lambda plant: plant.count)  # counterexamples become as small as the first
    if plants:
        found.append(Scenario("planted", planted(observer, plants), "planted"))
    return found


@dataclass(frozen=True)
class Plant:
    """Inputs in which a search must find something: see B12.f.

    grid        what the observer's field `grid` is set to; None: it stays as it is
    magnitude   of the many inputs
    outlier     of the one that has to be clipped
    count       of the many, so that it has to be
    """

    grid: Grid | None
    magnitude: float
    outlier: float
    count: int


def _plants(observer: Any, grid: Grid | None) -> list[Plant]:
    """Return what can be planted for each share of the largest input that is claimed as tried."""
    given, found = observer if grid is None else replace(observer, grid=grid), []
    for claim in claims_of(given):
        if not isinstance(claim, LeastError):
            continue
        values = (1.0,) if claim.grid.values is None else claim.grid.values
        least = min(value for value in values if value > 0)
        for share in claim.shares:
            outlier, slack = claim.grid.reach / share, 2 * claim.step
            if share == 1 or slack >= 1 / 2:
                continue
            # sqrt(n) v > clipped + 2 sigma, where sigma <= step (sqrt(n) v + outlier)
            root = (outlier - claim.grid.reach + slack * outlier) / (least * (1 - slack))
            count = ceil((9 / 8 * root) ** 2) + 1
            if count <= MOST_PLANTED:
                found.append(Plant(grid, least, outlier, count))
    return found


@st.composite
def planted(draw: st.DrawFn, observer: Any, plants: Sequence[Plant]) -> ObserverCase:
    """Draw many inputs of one magnitude, and one that is much larger, all of any sign."""
    plant, columns = draw(st.sampled_from(list(plants))), draw(st.sampled_from(COLUMNS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens = ceil((plant.count + 1) / columns)
    size = np.full(tokens * columns, plant.magnitude)
    size[rng.integers(len(size))] = plant.outlier
    size *= rng.choice([-1.0, 1.0], len(size)) * 2.0 ** draw(st.integers(-20, 20))
    x = size.astype(np.float32).reshape(tokens, columns)
    return ObserverCase(observer, columns, tuple(np.array_split(x, 3)), grid=plant.grid)


@st.composite
def batches(
    draw: st.DrawFn,
    observer: Any,
    counts: Sequence[tuple[int, ...]],
    integers: bool = False,
    poison: bool = False,
    repeated: bool = False,
    grids: Sequence[Grid | None] = (None,),
) -> ObserverCase:
    """Draw batches of activations.

    counts     tokens of each update, to choose from
    integers   only integers from -8 to 8
    poison     one number is not finite
    repeated   every third token is new, on average
    grids      what the observer's field `grid` is set to, to choose from
    """
    columns = draw(st.sampled_from(COLUMNS))
    width = width_of(observer, columns)
    each = draw(st.sampled_from(list(counts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    total = sum(each)
    if integers:
        x = rng.integers(-8, 9, (total, width)).astype(np.float32)
    else:
        first = draw(st.integers(0, len(KINDS) - 1))
        kinds = [KINDS[(first + i) % len(KINDS)] for i in range(width)]
        x = np.array([kind(rng, total) for kind in kinds], np.float32).T
        if width > columns:
            x[:, columns::3] = 2 * x[:, :columns:3]  # the inputs move as they are
            x[:, columns + 1 :: 3] = x[:, 1:columns:3] * np.float32(1 + 2.0**-12)  # hardly at all
    if repeated and total:
        x = x[rng.integers(0, -(-total // 3), total)]
    if poison:
        bad = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        place = draw(st.sampled_from([0, total - 1, total // 2]))
        x[place, draw(st.integers(0, width - 1))] = bad
    parts = np.split(np.ascontiguousarray(x), np.cumsum(each)[:-1]) if each else []
    return ObserverCase(
        observer, columns, tuple(parts), integers, draw(st.sampled_from(list(grids)))
    )
