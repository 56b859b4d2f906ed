"""How far a layer's inputs have moved from those in the network that is not quantized.

M = (2/n) sum over tokens of (y - x) x^T, x the input in the quantized network and y the one in the
original. With H = (2/n) sum x x^T the weights whose outputs on x come nearest to W y are
W + W M H^-1: what a rounder has to aim at that makes up for layers before this one.

Sums are float32 within a tile of tokens and float64 between tiles, in a fixed order, for a fixed
number of columns at a time, so the bits do not depend on the thread count.

Source: Zhang et al., Qronos, 2025, arXiv:2505.11695 (the mismatched objective); Li et al., GPTAQ,
ICML 2025, arXiv:2504.02692 (asymmetric calibration).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import InputGroup, claims, hookimpl

if TYPE_CHECKING:
    import torch

RUN = 256  # tokens that are summed in float32
_COLUMNS = 192  # that a thread takes at a time


class MismatchStatistic:
    """The sum of (y - x) x^T and the number of tokens. Merging adds."""

    def __init__(self, columns: int) -> None:
        import torch

        self._sum = torch.zeros(columns, columns, dtype=torch.float64)
        self._tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Take in x beside y, [tokens, 2 columns]."""
        from qframe import parallel

        here, there = x.chunk(2, dim=1)

        def work(first: int) -> None:
            """Sum up some rows of M."""
            rows = slice(first, first + _COLUMNS)
            for some, others in zip(here.split(RUN), there.split(RUN), strict=True):
                self._sum[rows] += (others[:, rows] - some[:, rows]).T @ some

        with parallel.one_torch_thread():
            pieces = range(0, len(self._sum), _COLUMNS)
            parallel.spread(work, pieces, parallel.default_threads())
        self._tokens += len(x)

    def merge(self, other: MismatchStatistic) -> None:
        """Take in what `other` has seen."""
        self._sum += other._sum
        self._tokens += other._tokens

    def value(self) -> torch.Tensor:
        """Return M, [columns, columns] float64; row j is about y_j - x_j. Zero for n = 0."""
        return self._sum * (2 / max(self._tokens, 1))


@dataclass(frozen=True)
class MismatchObserver:
    """Observe how far inputs have moved."""

    name: str = field(init=False, default="mismatch")
    pairs = True
    claims = (
        claims.CrossMoments(run=RUN),
        claims.Mergeable(),
        claims.SignBlind(),
        claims.Reproducible(),
    )

    def start(self, group: InputGroup) -> MismatchStatistic:
        """Return an empty statistic."""
        return MismatchStatistic(group.columns)


@hookimpl
def qframe_observers() -> Iterable[MismatchObserver]:
    """Register mismatch."""
    return [MismatchObserver()]
