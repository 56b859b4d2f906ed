"""A layer in pieces of whole rows, and which of its weights need a closer look.

Certificates compare every weight with what its code stands for. Most are far from what is allowed;
`highest_ratios` and `highest_ratios_float32` tell cheaply how close a group of weights can come at
most, so that the exact bound is worked out only for the few groups that may come closest.
"""

from __future__ import annotations

import math
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

    def closest(
        self, strips: npt.NDArray[np.intp], grid: Grid, gamma: float, added: float
    ) -> tuple[npt.NDArray[np.intp], Float64, Float64]:
        """Return where strips come closest to `bounds.nearest` on a grid of equal steps, [strips].

        strips         their numbers, row by row
        gamma, added   of the weight, and of the scale: what is allowed besides half a step

        Returned are the places of weights in their strips, and their (error, allowed).
        """
        from qframe import passes

        shape = self.weight.shape[:-1]

        def flat(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            whole = np.broadcast_to(values, (*shape, values.shape[-1]))
            return np.ascontiguousarray(whole.reshape(-1, values.shape[-1]))

        weight, codes = flat(self.weight), flat(self.codes)
        scale, zero = flat(self.scale), flat(self.zero_point)
        place = np.empty(len(strips), np.int64)
        error, allowed = np.empty(len(strips)), np.empty(len(strips))
        passes.closest(
            weight,
            codes,
            scale,
            zero,
            strips.astype(np.int64),
            grid.qmin,
            grid.qmax,
            gamma,
            added,
            place,
            error,
            allowed,
        )
        return place, error, allowed

    def _steps(self) -> torch.Tensor:
        """Return what codes stand for at scale 1, before zero points; the caller may change it."""
        import torch

        codes = torch.from_numpy(self.codes)
        if self.grid is None or self.grid.values is None:
            return codes
        values = torch.tensor(self.grid.values, dtype=torch.float64)
        return values[(codes - self.grid.qmin).int()]

    def strips(self, places: npt.NDArray[np.intp]) -> Piece:
        """Return some rows, or groups of rows, as rows of their own.

        places   their numbers, row by row
        """
        shape = self.weight.shape[:-1]
        at = np.unravel_index(places, shape)

        def pick(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.asarray(np.broadcast_to(values, (*shape, values.shape[-1]))[at])

        return Piece(
            pick(self.weight),
            pick(self.codes),
            pick(self.scale),
            pick(self.zero_point),
            self.grid,
        )

    def whole_rows(self) -> Piece:
        """Return the same with arrays [rows, columns], whatever the groups."""
        shape = self.weight.shape

        def flat(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.broadcast_to(values, shape).reshape(shape[0], math.prod(shape[1:]))

        return Piece(
            flat(self.weight), flat(self.codes), flat(self.scale), flat(self.zero_point), self.grid
        )


def highest_ratios_float32(most: Float64, piece: Piece, grid: Grid) -> Float64:
    """Return for every strip of weights what no ratio of `bounds.nearest` in it exceeds, [...].

    most   `passes.differences`, which may be changed: values of codes, less than qmax - qmin steps,
           are rounded once to float32, and so are their differences from the weights
    """
    unit = bounds.UNIT["float32"]
    # A weight beyond an end is excused where it has the end's code, and with any other code it is
    # too far away from the end as well: half a step and more.
    over = ~(most <= 1)  # what was moved says too little there
    # In half steps: two units of each step for the value, and less for a difference of at most one.
    most += 4 * unit * (grid.qmax - grid.qmin)
    if over.any():
        part = piece.strips(np.flatnonzero(over))
        most[over] = _highest(part.delta(), part.codes, part.scale, grid)
    return most


def highest_ratios(
    delta: Float64, codes: npt.NDArray[np.int16], scale: Float64, grid: Grid
) -> Float64:
    """Return the same for other differences than those from the weights, [...].

    delta, codes   [..., width]
    scale          [..., 1 or width]
    """
    return _half_steps(np.where(bounds.beyond_ends(delta, codes, grid), 0.0, delta), scale)


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


def _highest(delta: Float64, codes: npt.NDArray[np.int16], scale: Float64, grid: Grid) -> Float64:
    """Return the largest ratio of each strip when half a step is allowed, but for the ends."""
    error, allowed = bounds.nearest(delta, codes, scale, grid)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray((error / allowed).max(-1))
