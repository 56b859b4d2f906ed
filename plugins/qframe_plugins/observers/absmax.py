"""The largest magnitude of each input channel: what AWQ, SmoothQuant and LLM.int8() look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import InputGroup, claims, hookimpl

if TYPE_CHECKING:
    import torch


class AbsmaxStatistic:
    """max |x| over tokens, [columns] float32. Merging is exact: a maximum has no order."""

    def __init__(self, columns: int) -> None:
        import torch

        self._absmax = torch.zeros(columns)

    def update(self, x: torch.Tensor) -> None:
        """Take in activations x [tokens, columns]."""
        if len(x):
            self._absmax = self._absmax.maximum(x.abs().amax(0))

    def merge(self, other: AbsmaxStatistic) -> None:
        """Take in what `other` has seen."""
        self._absmax = self._absmax.maximum(other._absmax)

    def value(self) -> torch.Tensor:
        """Return max |x|, [columns] float32, zero where nothing was seen."""
        return self._absmax.clone()


@dataclass(frozen=True)
class Absmax:
    """Observe the largest magnitude of each input channel."""

    name: str = field(init=False, default="absmax")
    claims = (
        claims.ChannelAbsmax(),
        claims.Mergeable(exact=True),
        claims.SignBlind(),
        claims.Reproducible(),
    )

    def start(self, group: InputGroup) -> AbsmaxStatistic:
        """Return an empty statistic."""
        return AbsmaxStatistic(group.columns)


@hookimpl
def qframe_observers() -> Iterable[Absmax]:
    """Register absmax."""
    return [Absmax()]
