"""What a layer's quantization does to its weights and outputs, in numbers for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qframe import rounding
from qframe.contracts import Grid, QuantizedWeight

COLUMNS_AT_ONCE = 192  # of a matrix of second moments
ROWS_AT_ONCE = 256  # of a weight: what is made of them stays in the cache


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Measures ||X (W - Q)^T|| / ||X W^T|| from second moments of the inputs X.

    moments   [columns, columns] float32, X^T X up to a factor: of the calibration tokens, and of
              the held-out tokens where there are any

    The products are float32: relative to ||W - Q|| ||X|| the error is about columns * 2^-24.
    """

    moments: Sequence[torch.Tensor]

    def relative(
        self, original: torch.Tensor, quantized: Sequence[torch.Tensor]
    ) -> list[list[float]]:
        """Return, for each set of tokens, the relative error of each quantized weight."""
        found = []
        for moment in self.moments:
            whole = self._energy(original, moment)
            errors = [self._energy(original - q, moment) for q in quantized]
            found.append([math.sqrt(e / whole) if whole > 0 else 0.0 for e in errors])
        return found

    def _energy(self, delta: torch.Tensor, moment: torch.Tensor) -> float:
        """Return tr(delta M delta^T).

        M is symmetric, so its upper triangle will do, which is half of the work.
        """
        pieces = delta.split(ROWS_AT_ONCE)
        return max(sum(_total(_upper_products(rows, moment).mul_(rows)) for rows in pieces), 0.0)


def _upper_products(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return what, times rows and summed, is rows M rows^T, for a symmetric M.

    That is the product with the square blocks on M's diagonal and twice what is above them.
    """
    found = torch.empty_like(rows)
    for first in range(0, len(moment), COLUMNS_AT_ONCE):
        last = first + COLUMNS_AT_ONCE
        corner = moment[first:last, first:last]
        part = found[:, first:last]
        torch.mm(rows[:, first:last], corner, out=part)
        if first:
            part.addmm_(rows[:, :first], moment[:first, first:last], alpha=2)
    return found


def sqnr_db(weight: torch.Tensor, change: torch.Tensor) -> float:
    """Return 10 log10(||W||^2 / ||Q - W||^2), inf for an exact copy.

    change   Q - W
    """
    signal, noise = (
        sum(_total(rows.square()) for rows in matrix.split(ROWS_AT_ONCE))
        for matrix in (weight, change)
    )
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def clipped_share(
    weight: torch.Tensor,
    quantized: QuantizedWeight,
    grid: Grid,
    ranges: tuple[torch.Tensor, torch.Tensor],
) -> float:
    """Return the share of weights more than half a step outside the range of the codes.

    ranges   smallest and largest weight of each group, [rows or 1, groups] float32. Rounding is
             monotone, so where both are inside, so is the whole group.
    """

    def outside(part: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        place = part / scale + zero
        return (place > grid.qmax + 0.5) | (place < grid.qmin - 0.5)

    if not weight.numel():
        return 0.0
    index, own = quantized.group_index, (quantized.scale, quantized.zero_point)
    reaching = (outside(ranges[0], *own) | outside(ranges[1], *own)).any(1).expand(len(weight))
    clipped = 0
    for rows in torch.nonzero(reaching)[:, 0].split(ROWS_AT_ONCE):
        scale, zero = (each.expand(len(weight), -1)[rows] for each in own)
        values = (rounding.expand(each, index, len(rows)) for each in (scale, zero))
        clipped += int(outside(weight[rows], *values).sum())
    return clipped / weight.numel()


def _total(x: torch.Tensor) -> float:
    """Return the sum in float64: of each row, then of these in turn.

    torch splits the sum over a whole tensor by threads, which may change its last bit.
    """
    return float(x.sum(1, dtype=torch.float64).cumsum(0)[-1]) if x.numel() else 0.0
