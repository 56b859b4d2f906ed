"""What a layer's quantization does to its weights and outputs, in numbers for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qframe import rounding
from qframe.contracts import Grid, QuantizedWeight
from qframe.hessian import ROWS_AT_ONCE, energy, total
from qframe.stored import StoredLayer

TOKENS = 512  # inputs that are quantized to see what that loses


@dataclass(frozen=True, slots=True)
class Drift:
    """How far inputs X have moved from Y, those in the network that is not quantized.

    cross     (2/n) (Y - X)^T X, [columns, columns] float32
    moments   (2/n) (Y - X)^T (Y - X), the same
    """

    cross: torch.Tensor
    moments: torch.Tensor


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Measures ||X (W - Q)^T|| / ||X W^T|| from second moments of the inputs X.

    moments   [columns, columns] float32, (2/n) X^T X: of the calibration tokens, and of the
              held-out tokens where there are any
    drifts    the same number of them, where the method looks at the inputs Y of the original
              network: then ||Y W^T - X Q^T|| / ||X W^T|| is measured

    The products are float32: relative to ||W - Q|| ||X|| the error is about columns * 2^-24.
    """

    moments: Sequence[torch.Tensor]
    drifts: Sequence[Drift] = ()

    def held_out(self) -> OutputErrors:
        """Return the same for the held-out tokens alone."""
        return OutputErrors(self.moments[1:], self.drifts[1:])

    def drift(self, original: torch.Tensor) -> float | None:
        """Return ||(Y - X) W^T|| / ||X W^T|| of the first set of tokens; None where no Y is known.

        original   W, [rows, columns]
        """
        return self.relative(original, (original,))[0][0] if self.drifts else None

    def relative(
        self, original: torch.Tensor, quantized: Sequence[torch.Tensor]
    ) -> list[list[float]]:
        """Return, for each set of tokens, the relative error of each quantized weight."""
        found = []
        for number, moment in enumerate(self.moments):
            whole = energy(original, moment)
            errors = [energy(original - q, moment) for q in quantized]
            if self.drifts:  # ||(Y - X) W^T + X (W - Q)^T||^2
                drift = self.drifts[number]
                moved, towards = energy(original, drift.moments), original @ drift.cross
                both = [2 * total(towards.double() * (original - q)) for q in quantized]
                errors = [max(e + b + moved, 0.0) for e, b in zip(errors, both, strict=True)]
            found.append([math.sqrt(e / whole) if whole > 0 else 0.0 for e in errors])
        return found


def input_errors(
    stored: StoredLayer,
    original: torch.Tensor,
    multiplied: torch.Tensor,
    x: torch.Tensor | None,
) -> dict[str, float | int | str]:
    """Return what quantizing the inputs of a layer does, for its report; {} where they are not.

    original     W, [rows, columns]
    multiplied   what the layer multiplies with
    x            some inputs, [tokens, columns]; None where there are none

    A dynamic scale that is one for all tokens, and a threshold, are those of this sample.
    """
    found: dict[str, float | int | str] = {}
    if stored.inputs is None:
        return found
    if stored.inputs.scale is not None:
        found["step"] = float(stored.inputs.scale)
    if x is None:
        return found
    z = x if stored.transform is None else stored.transform.move(x)
    change = stored.quantized(z) - z
    lost, whole = (total((a @ w.T).square()) for a, w in ((change, multiplied), (x, original)))
    found["error"] = math.sqrt(lost / whole) if whole > 0 else 0.0
    if stored.inputs.scale is not None:
        rest = z if stored.transform is None else stored.transform.rest(z)
        found["clipped"] = stored.inputs.clipped(rest)
    return found


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 log10(||W||^2 / ||Q - W||^2), inf for an exact copy.

    signal, noise   the two sums of squares
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def clipped_weights(
    weight: torch.Tensor,
    quantized: QuantizedWeight,
    grid: Grid,
    ranges: tuple[torch.Tensor, torch.Tensor],
) -> int:
    """Return how many weights are more than half a step outside the range of the codes.

    ranges   smallest and largest weight of each group, [rows or 1, groups] float32. Rounding is
             monotone, so where both are inside, so is the whole group.
    """
    lowest, highest = grid.qmin - 0.5, grid.qmax + 0.5
    if grid.values is not None:
        first, second, *_ = grid.values
        *_, before, last = grid.values
        lowest, highest = first - (second - first) / 2, last + (last - before) / 2

    def outside(part: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        place = part / scale + zero
        return (place > highest) | (place < lowest)

    if not weight.numel():
        return 0
    index, own = quantized.group_index, (quantized.scale, quantized.zero_point)
    reaching = (outside(ranges[0], *own) | outside(ranges[1], *own)).any(1).expand(len(weight))
    clipped = 0
    for rows in torch.nonzero(reaching)[:, 0].split(ROWS_AT_ONCE):
        scale, zero = (each.expand(len(weight), -1)[rows] for each in own)
        values = (rounding.expand(each, index, len(rows)) for each in (scale, zero))
        clipped += int(outside(weight[rows], *values).sum())
    return clipped
