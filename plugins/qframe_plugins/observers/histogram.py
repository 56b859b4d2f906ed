"""How many inputs have which magnitude: what percentiles and least squared errors are read from.

Bins are as wide as bfloat16 numbers are apart: a magnitude's bin is the upper half of its bits. So
they need not be chosen before all inputs have been seen, and counts of two parts can be added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import InputGroup, claims, hookimpl
from qframe.errors import NonFiniteError

if TYPE_CHECKING:
    import torch

BINS = 1 << 15
STEP = 2.0**-7  # how far a bin reaches above its smallest number, relative
_FINITE = 0x7F80  # how many bins hold finite numbers


class Histogram:
    """Counts of |x| by the upper 15 bits of its 31, and the largest. Merging is exact."""

    def __init__(self) -> None:
        import torch

        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._largest = torch.zeros(1)

    def update(self, x: torch.Tensor) -> None:
        """Take in activations x [tokens, columns]."""
        import torch

        if x.numel():
            size = x.abs().contiguous()
            places = size.view(torch.int32).reshape(-1) >> 16
            self._counts += torch.bincount(places, minlength=BINS)
            self._largest = self._largest.maximum(size.amax())

    def merge(self, other: Histogram) -> None:
        """Take in what `other` has seen."""
        self._counts = self._counts + other._counts
        self._largest = self._largest.maximum(other._largest)

    def value(self) -> torch.Tensor:
        """Return the counts, [32768] int64; bin b holds what has the bits b in front.

        Raises NonFiniteError where an input was not finite.
        """
        import torch

        if not bool(torch.isfinite(self._largest)):
            raise NonFiniteError(f"an input is {float(self._largest)}; look at the network")
        return self._counts.clone()

    @property
    def largest(self) -> torch.Tensor:
        """The largest |x|, [1] float32; not finite where a number was not."""
        return self._largest.clone()

    def reach(self, share: float) -> torch.Tensor:
        """Return the least end of a bin that a share of all inputs do not exceed, [1] float32.

        Of the largest inputs' bin it is the largest input; 0 where nothing was seen.
        """
        import torch

        total = int(self._counts.sum())
        if not total or not bool(torch.isfinite(self._largest)):
            return self.largest
        rank = min(max(ceil_of(share, total), 1), total)
        place = int(torch.searchsorted(self._counts.cumsum(0), rank))
        return ends(torch.tensor([place])).minimum(self._largest)


def ceil_of(share: float, total: int) -> int:
    """Return how many of `total` a share of them are, rounded up; exactly, as floats are."""
    from fractions import Fraction
    from math import ceil

    return ceil(Fraction(share) * total)


def ends(places: torch.Tensor) -> torch.Tensor:
    """Return the largest number of bins, float32."""
    import torch

    return ((places.to(torch.int32) << 16) | 0xFFFF).view(torch.float32)


def middles() -> torch.Tensor:
    """Return a number in the middle of each bin of finite numbers, float32."""
    import torch

    return ((torch.arange(_FINITE, dtype=torch.int32) << 16) | 0x8000).view(torch.float32)


@dataclass(frozen=True)
class HistogramObserver:
    """Observe how many inputs have which magnitude."""

    name: str = field(init=False, default="histogram")
    claims = (
        claims.Counts(),
        claims.Mergeable(exact=True),
        claims.SignBlind(),
        claims.Reproducible(),
    )

    def start(self, group: InputGroup) -> Histogram:
        """Return an empty statistic."""
        return Histogram()


@hookimpl
def qframe_observers() -> Iterable[HistogramObserver]:
    """Register histogram."""
    return [HistogramObserver()]
