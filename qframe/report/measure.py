"""What a layer's quantization does to its weights and outputs, in numbers for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qframe import parallel, rounding
from qframe.contracts import Grid, QuantizedWeight

ROWS_AT_ONCE = 256  # of a weight, in products whose bits must not depend on the thread count


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Measures ||X (W - Q)^T|| / ||X W^T|| from second moments of the inputs X.

    moments   [columns, columns] float32, X^T X up to a factor: of the calibration tokens, and of
              the held-out tokens where there are any

    The products are float32: relative to ||W - Q|| ||X|| the error is about columns * 2^-24.
    """

    moments: Sequence[torch.Tensor]
    threads: int

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
        """Return tr(delta M delta^T), summed over fixed pieces of rows."""
        sums = parallel.spread(
            lambda rows: _total((rows @ moment) * rows),
            delta.split(ROWS_AT_ONCE),
            self.threads,
        )
        return max(sum(sums), 0.0)


def sqnr_db(original: torch.Tensor, quantized: torch.Tensor) -> float:
    """Return 10 log10(||W||^2 / ||W - Q||^2), inf for an exact copy."""
    signal = _squares(original)
    noise = _squares(original - quantized)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def clipped_share(weight: torch.Tensor, quantized: QuantizedWeight, grid: Grid) -> float:
    """Return the share of weights more than half a step outside the range of the codes."""
    rows = weight.shape[0]
    scale = rounding.expand(quantized.scale, quantized.group_index, rows)
    zero = rounding.expand(quantized.zero_point, quantized.group_index, rows)
    place = weight / scale + zero
    outside = (place > grid.qmax + 0.5) | (place < grid.qmin - 0.5)
    return int(outside.sum()) / outside.numel() if outside.numel() else 0.0


def _squares(x: torch.Tensor) -> float:
    """Return the sum of squares."""
    return _total(x.square())


def _total(x: torch.Tensor) -> float:
    """Return the sum in float64: of each row, then of these in turn.

    torch splits the sum over a whole tensor by threads, which may change its last bit.
    """
    return float(x.sum(1, dtype=torch.float64).cumsum(0)[-1]) if x.numel() else 0.0
