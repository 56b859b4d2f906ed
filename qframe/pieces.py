"""A layer in pieces of whole rows, and which of its weights need a closer look.

Certificates compare every weight with what its code stands for. Most are far from what is allowed;
`highest_ratios` and `highest_ratios_float32` tell cheaply how close a group of weights can come at
most, so that the exact bound is worked out only for the few groups that may come closest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.contracts import Grid
from qframe.hessian import Float64

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a layer, as arrays that broadcast against one another.

    weight   float32; arrays are [rows, columns], or [rows, groups, columns of a group]
    codes    int16
    scale, zero_point   float64, of each weight
    grid     what codes stand for where it has values; None where they stand for themselves
    """

    weight: npt.NDArray[np.float32]
    codes: npt.NDArray[np.int16]
    scale: Float64
    zero_point: Float64
    grid: Grid | None = None

    @property
    def width(self) -> int:
        """How many weights a strip has: a group of a row, or a row."""
        return int(self.weight.shape[-1])

    def delta(self) -> Float64:
        """Return what the codes stand for minus the weight; the product is exact in float64."""
        import torch

        values = self._steps().double()
        if self.zero_point.any():
            values -= torch.from_numpy(self.zero_point)
        values *= torch.from_numpy(self.scale)
        found = values.numpy()
        found -= self.weight
        return found

    def change(self) -> npt.NDArray[np.float32]:
        """Return the same in float32, which is twice as fast and rounds."""
        import torch

        values = self._steps().float()
        if self.zero_point.any():
            values -= torch.from_numpy(self.zero_point).float()
        values *= torch.from_numpy(self.scale).float()
        values -= torch.from_numpy(self.weight)
        found: npt.NDArray[np.float32] = values.numpy()
        return found

    def _steps(self) -> torch.Tensor:
        """Return what codes stand for at scale 1, before zero points; the caller may change it."""
        import torch

        codes = torch.from_numpy(self.codes)
        if self.grid is None or self.grid.values is None:
            return codes
        values = torch.tensor(self.grid.values, dtype=torch.float64)
        return values[(codes - self.grid.qmin).int()]

    def strips(self, chosen: npt.NDArray[np.bool_]) -> Piece:
        """Return some rows, or groups of rows, as rows of their own.

        chosen   [rows], or like the arrays but for the columns
        """
        shape, places = self.weight.shape, np.flatnonzero(chosen)
        wide = shape if chosen.ndim == 1 else (*shape[:-1], self.scale.shape[-1])

        def pick(values: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
            return np.broadcast_to(values, shape).reshape(chosen.size, -1)[places]

        return Piece(
            pick(self.weight, shape),
            pick(self.codes, shape),
            pick(self.scale, wide),
            pick(self.zero_point, wide),
            self.grid,
        )


def highest_ratios_float32(change: npt.NDArray[np.float32], piece: Piece, grid: Grid) -> Float64:
    """Return for every strip of weights what no ratio of `bounds.nearest` in it exceeds, [...].

    change   `Piece.change`: the values of codes, less than qmax - qmin steps, are rounded once,
             and so are their differences from the weights
    """
    unit = bounds.UNIT["float32"]
    most = _half_steps(change, piece.scale)
    over = ~(most <= 1)  # perhaps the range of the codes excuses it
    # In half steps: two units of each step for the value, and less for a difference of at most one.
    most += 4 * unit * (grid.qmax - grid.qmin)
    if over.any():
        part = piece.strips(over)
        most[over] = _unexcused(part.delta(), part.codes, part.scale, grid)
    return most


def highest_ratios(
    delta: Float64, codes: npt.NDArray[np.int16], scale: Float64, grid: Grid
) -> Float64:
    """Return the same for other differences than those from the weights, [...].

    delta, codes   [..., width]
    scale          [..., 1 or width]
    """
    most = _half_steps(delta, scale)
    over = ~(most <= 1)
    if over.any():
        own = np.broadcast_to(scale, (*most.shape, scale.shape[-1]))[over]
        most[over] = _unexcused(delta[over], codes[over], own, grid)
    return most


def _half_steps(delta: npt.NDArray[Any], scale: Float64) -> Float64:
    """Return for every strip the largest |delta| in half steps, [...]."""
    import torch

    if not delta.size:
        return np.zeros(delta.shape[:-1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if scale.shape[-1] > 1:
            return torch.from_numpy(np.abs(delta) / (scale / 2)).amax(-1).double().numpy()
        numbers = torch.from_numpy(delta)
        largest = torch.maximum(numbers.amax(-1), -numbers.amin(-1)).double().numpy()
        return np.asarray(largest / (scale[..., 0] / 2))


def _unexcused(delta: Float64, codes: npt.NDArray[np.int16], scale: Float64, grid: Grid) -> Float64:
    """Return the largest ratio of each strip when half a step is allowed, but for the ends."""
    error, allowed = bounds.nearest(delta, codes, scale, grid)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray((error / allowed).max(-1))
