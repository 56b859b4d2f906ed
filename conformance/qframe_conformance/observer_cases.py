"""Activations that observers are tried on, and ways to show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qframe import Grid, InputGroup, LayerInfo
from qframe.claims import Mergeable, claims_of
from qframe.claims.observers import Float32, Seen, StatisticClaim
from qframe_conformance.checks import Outcome, certified, require
from qframe_conformance.report import Counterexample
from qframe_conformance.values import Leaves, copied, leaves, same_value


@dataclass(eq=False)
class ObserverCase:
    """Batches of activations, and the statistic of all of them.

    columns    of the layers' input
    batches    [tokens, width] float32 each, one for every update
    integers   they are small integers, so that no sum has an error
    grid       what the observer's field `grid` is set to; None: it stays as it is
    """

    observer: Any
    columns: int
    batches: tuple[Float32, ...]
    integers: bool = False
    grid: Grid | None = None

    def __post_init__(self) -> None:
        """Give the observer the codes."""
        if self.grid is not None:
            self.observer = replace(self.observer, grid=self.grid)

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
    def width(self) -> int:
        """The columns of what the observer is shown."""
        return width_of(self.observer, self.columns)

    @property
    def tokens(self) -> Float32:
        """All tokens, [tokens, width]."""
        return np.concatenate([np.zeros((0, self.width), np.float32), *self.batches])

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
from qframe import Grid
from qframe_conformance import replay
from qframe_conformance.observer_cases import ObserverCase

batches = ({batches.rstrip()})
case = ObserverCase(plugin, {self.columns}, batches, integers={self.integers}, grid={self.grid!r})
print(replay({check!r}, case))
"""
        return Counterexample(snippet=text, arrays=arrays)


def width_of(observer: Any, columns: int) -> int:
    """Return the columns of what an observer is shown: one of pairs sees two inputs."""
    return 2 * columns if getattr(observer, "pairs", False) else columns


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
    case: ObserverCase,
    value: Any,
    batches: Sequence[Float32],
    what: str,
    merges: int = 0,
    copies: int = 1,
) -> Outcome:
    """Return the worst ratio of the value claims, None without any; raise Violation above 1."""
    seen = Seen(columns=case.width, batches=tuple(batches), merges=merges, copies=copies)
    ratios = [certified(claim.certify(seen, value), what) for claim in case.value_claims]
    return max(ratios, default=None)
