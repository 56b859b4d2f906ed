"""The largest magnitude of all inputs: a stored scale that reaches it clips nothing it was shown.

It is what every framework calls minmax, for codes that have no zero point.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import InputGroup, claims, hookimpl

if TYPE_CHECKING:
    import torch


class LargestStatistic:
    """max |x| over tokens and columns, [1] float32. Merging is exact: a maximum has no order."""

    def __init__(self) -> None:
        import torch

        self._largest = torch.zeros(1)

    def update(self, x: torch.Tensor) -> None:
        """Take in activations x [tokens, columns]."""
        if x.numel():
            self._largest = self._largest.maximum(x.abs().amax())

    def merge(self, other: LargestStatistic) -> None:
        """Take in what `other` has seen."""
        self._largest = self._largest.maximum(other._largest)

    def value(self) -> torch.Tensor:
        """Return max |x|, [1] float32, zero where nothing was seen."""
        return self._largest.clone()


@dataclass(frozen=True)
class MinMax:
    """Observe how far a stored scale has to reach so that nothing is clipped."""

    name: str = field(init=False, default="minmax")
    finds_reach: bool = field(init=False, default=True)
    claims = (
        claims.Reach(),
        claims.Mergeable(exact=True),
        claims.SignBlind(),
        claims.Reproducible(),
    )

    def start(self, group: InputGroup) -> LargestStatistic:
        """Return an empty statistic."""
        return LargestStatistic()


@hookimpl
def qframe_observers() -> Iterable[MinMax]:
    """Register minmax."""
    return [MinMax()]
