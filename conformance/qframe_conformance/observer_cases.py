"""Activations that observers are tried on, and ways to show them.

A drawn case is a seed and a few small integers; NumPy makes batches of activations of them. Their
columns are of the nasty kinds one after another, so that a single statistic meets them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from qframe import InputGroup, LayerInfo
from qframe.claims import Mergeable, claims_of
from qframe.claims.observers import Float32, Seen, StatisticClaim
from qframe_conformance.checks import Outcome, certified, require
from qframe_conformance.engine import Scenario
from qframe_conformance.kinds import Float64
from qframe_conformance.report import Counterexample
from qframe_conformance.values import Leaves, copied, leaves, same_value

COLUMNS = (1, 2, 3, 7, 16, 17, 33, 40)

# How many tokens the updates bring: empty ones, single tokens, odd counts, uneven batches. Runs of
# tokens that are summed together are of some power of two; 700 is more than any of them, and the
# last run is a short one.
SHORT = ((1,), (2,), (5,), (3, 1), (4, 0, 9), (1, 1, 1), (0, 33, 2), (130, 7))
LONG = ((700,), (1, 599, 101), (257, 0, 510), (64, 64, 64, 641))


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


# Cases ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class ObserverCase:
    """Batches of activations, and the statistic of all of them.

    batches    [tokens, columns] float32 each, one for every update
    integers   they are small integers, so that no sum has an error
    """

    observer: Any
    columns: int
    batches: tuple[Float32, ...]
    integers: bool = False

    @property
    def group(self) -> InputGroup:
        """Two layers that read these activations."""
        return InputGroup(
            layers=tuple(
                LayerInfo(name=f"block.{name}", rows=rows, columns=self.columns)
                for name, rows in (("q", 3), ("k", 2))
            )
        )

    @property
    def tokens(self) -> Float32:
        """All tokens, [tokens, columns]."""
        return np.concatenate([np.zeros((0, self.columns), np.float32), *self.batches])

    def observed(self, *batches: Float32) -> Any:
        """Return a new statistic that has seen some batches."""
        statistic = self.observer.start(self.group)
        show(statistic, *batches)
        return statistic

    @cached_property
    def value(self) -> Any:
        """The value after all batches in order."""
        return self.observed(*self.batches).value()

    @cached_property
    def wanted(self) -> Leaves:
        """A copy of that value, leaf by leaf."""
        return copied(self.value)

    @cached_property
    def value_claims(self) -> list[StatisticClaim]:
        """What is claimed of values."""
        return [c for c in claims_of(self.observer) if isinstance(c, StatisticClaim)]

    def agrees(self, value: Any, batches: Sequence[Float32], what: str, merges: int = 0) -> Outcome:
        """Compare a value that came about otherwise with `value`, as far as claims allow.

        Bit for bit where a statistic merges exactly, or all its sums are exact; within the bound of
        its value claims; and always of the same form.

        batches, merges   in which parts the tokens came this time
        """
        found = leaves(value)
        for name, array in self.wanted.items():
            require(name in found, f"{what}: {name} is missing")
            require(
                found[name].shape == array.shape and found[name].dtype == array.dtype,
                f"{what}: {name} is {found[name].dtype} {list(found[name].shape)}, "
                f"else {array.dtype} {list(array.shape)}",
            )
        merging = (claim for claim in claims_of(self.observer) if isinstance(claim, Mergeable))
        if any(claim.exact or self.integers for claim in merging):
            same_value(self.wanted, value, what)
        return certify(self, value, batches, what, merges)

    def counterexample(self, check: str) -> Counterexample:
        """Return the batches as plain Python; `plugin` and `arrays` are defined before it."""
        arrays = {f"batch_{i}": batch for i, batch in enumerate(self.batches)}
        batches = "".join(f'arrays["{name}"], ' for name in arrays)
        text = f"""\
from qframe_conformance import replay
from qframe_conformance.observer_cases import ObserverCase

batches = ({batches.rstrip()})
case = ObserverCase(plugin, {self.columns}, batches, integers={self.integers})
print(replay({check!r}, case))
"""
        return Counterexample(snippet=text, arrays=arrays)


def show(statistic: Any, *batches: Float32) -> None:
    """Update a statistic with copies of batches, which lie in one piece of memory."""
    for x in tensors(batches):
        statistic.update(x)


def tensors(batches: Sequence[Float32]) -> list[torch.Tensor]:
    """Return copies of batches as contiguous parts of one larger tensor."""
    if not batches:
        return []
    together = torch.from_numpy(np.concatenate(batches))
    return list(together.split([len(batch) for batch in batches]))


def certify(
    case: ObserverCase, value: Any, batches: Sequence[Float32], what: str, merges: int = 0
) -> Outcome:
    """Return the worst ratio of the value claims, None without any; raise Violation above 1."""
    seen = Seen(columns=case.columns, batches=tuple(batches), merges=merges)
    ratios = [certified(claim.certify(seen, value), what) for claim in case.value_claims]
    return max(ratios, default=None)


# Scenarios ------------------------------------------------------------------------------------


def scenarios(observer: Any) -> list[Scenario]:
    """Return the scenarios: ordinary and long series of batches, integers, nothing, not finite."""
    return [
        Scenario("batches", batches(observer, SHORT), "finite"),
        Scenario("many-tokens", batches(observer, LONG), "finite"),
        Scenario("integers", batches(observer, SHORT + LONG[1:2], integers=True), "finite"),
        Scenario("nothing", batches(observer, ((), (0,), (0, 0))), "nothing"),
        Scenario("not-finite", batches(observer, SHORT, poison=True), "not finite"),
    ]


@st.composite
def batches(
    draw: st.DrawFn,
    observer: Any,
    counts: Sequence[tuple[int, ...]],
    integers: bool = False,
    poison: bool = False,
) -> ObserverCase:
    """Draw batches of activations.

    counts     tokens of each update, to choose from
    integers   only integers from -8 to 8
    poison     one number is not finite
    """
    columns = draw(st.sampled_from(COLUMNS))
    each = draw(st.sampled_from(list(counts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    total = sum(each)
    if integers:
        x = rng.integers(-8, 9, (total, columns)).astype(np.float32)
    else:
        first = draw(st.integers(0, len(KINDS) - 1))
        kinds = [KINDS[(first + i) % len(KINDS)] for i in range(columns)]
        x = np.array([kind(rng, total) for kind in kinds], np.float32).T
    if poison:
        bad = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        place = draw(st.sampled_from([0, total - 1, total // 2]))
        x[place, draw(st.integers(0, columns - 1))] = bad
    parts = np.split(np.ascontiguousarray(x), np.cumsum(each)[:-1]) if each else []
    return ObserverCase(observer, columns, tuple(parts), integers)
