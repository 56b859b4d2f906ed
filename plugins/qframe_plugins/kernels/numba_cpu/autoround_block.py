"""Learned rounding of a layer by signed gradients that come from elsewhere, on panels of 64 rows.

Source: Cheng et al., AutoRound, arXiv:2309.05516, eq. (3) and algorithm 1; see `autoround`, where
        the gradient is that of the layer's own output error.
Error:  no weight moves by more than a step of its group (docs/bounds.md, B10.a).

Every number of the state belongs to one row and one group, so its bits do not depend on threads.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.autoround import (
    descend,
    encode,
    hand_back,
    lay_out,
    set_ranges,
)
from qframe_plugins.kernels.numba_cpu.scales import check_groups, grid_of
from qframe_plugins.kernels.numba_cpu.simd import LANES, claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share

_OWN: Final = ("C", "W")

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


class Descent:
    """The offsets and ranges of one layer, on their way down.

    weight       [rows, columns] float32, finite
    codes        [rows, columns] int16: the start, with its scale float32 and zero_point int16
                 [rows, groups]
    group_size   neighbouring columns that share a scale; the last group may be smaller

    Raises ValueError for operands that do not fit.
    """

    def __init__(
        self,
        weight: Float32,
        codes: Int16,
        scale: Float32,
        zero_point: Int16,
        group_size: int,
        qmin: int,
        qmax: int,
        *,
        symmetric: bool,
        scale_dtype: str,
    ) -> None:
        check_groups(weight.shape, group_size, scale, zero_point)
        if codes.shape != weight.shape:
            raise ValueError(f"codes {codes.shape} do not fit a weight {weight.shape}")
        self._shape, self._groups = weight.shape, scale.shape[1]
        self._width = np.int64(group_size)
        self._grid = grid_of(qmin, qmax, symmetric=symmetric, scale_dtype=scale_dtype)
        panels = -(-weight.shape[0] // LANES)
        self._weight, self._offset, self._code = (
            np.zeros((panels, weight.shape[1], LANES), np.float32) for _ in range(3)
        )
        shape = (panels, self._groups, LANES)
        self._scale, self._lower, self._upper = (np.ones(shape, np.float32) for _ in range(3))
        self._zero, self._low, self._high = (np.zeros(shape, np.float32) for _ in range(3))
        share(
            _share_start,
            panels,
            np.require(weight, np.float32, _OWN),
            np.require(codes, np.int16, _OWN),
            np.require(scale, np.float32, _OWN),
            np.require(zero_point, np.int16, _OWN),
            self._width,
            self._grid,
            self._weight,
            self._code,
            self._scale,
            self._zero,
            self._low,
            self._high,
        )

    def step(self, gradient: Float32, speed: float) -> None:
        """Move against the signs of gradients by what the values of codes are.

        gradient   [rows, columns] float32
        speed      of offsets, in steps of the grid, and of shares of the range
        """
        if gradient.shape != self._shape:
            raise ValueError(f"a gradient {gradient.shape} does not fit a weight {self._shape}")
        share(
            _share_step,
            len(self._weight),
            np.require(gradient, np.float32, _OWN),
            self._weight,
            self._code,
            self._scale,
            self._zero,
            self._width,
            self._grid,
            self._low,
            self._high,
            np.float32(speed),
            self._offset,
            self._lower,
            self._upper,
        )

    def values(self) -> Float32:
        """Return what the codes stand for, [rows, columns] float32."""
        found = np.empty(self._shape, np.float32)
        share(_share_values, len(self._weight), self._code, self._scale, self._width, found)
        return found

    def codes(self) -> tuple[Int16, Float32, Int16]:
        """Return codes [rows, columns], scale and zero point [rows, groups]."""
        codes = np.empty(self._shape, np.int16)
        scale = np.empty((self._shape[0], self._groups), np.float32)
        zero = np.empty(scale.shape, np.int16)
        share(
            _share_codes,
            len(self._weight),
            self._code,
            self._scale,
            self._zero,
            self._width,
            codes,
            scale,
            zero,
        )
        return codes, scale, zero


@kernel
def _share_start(  # type: ignore[no-untyped-def]
    counter, weight, codes, scale, zero, width, grid, w, k, s, z, low, high
):
    """Claim panels, and lay out what belongs to their rows: lanes are rows."""
    panel = claim(counter)
    while panel < len(w):
        first = panel * LANES
        at = panel
        for lane in range(min(LANES, len(weight) - first)):
            row = first + lane
            lay_out(weight, codes, scale, zero, row, width, lane, w[at], k[at], s[at], z[at])
        set_ranges(w[panel], s[panel], z[panel], width, grid, low[panel], high[panel])
        panel = claim(counter)


@kernel
def _share_step(  # type: ignore[no-untyped-def]
    counter, gradient, w, k, s, z, width, grid, low, high, speed, offset, lower, upper
):
    """Claim panels, and take a step with each."""
    panel = claim(counter)
    force = np.zeros((gradient.shape[1], LANES), np.float32)
    while panel < len(w):
        first = panel * LANES
        count = min(LANES, len(gradient) - first)
        for column in range(gradient.shape[1]):
            for lane in range(LANES):
                down = -gradient[first + lane, column] if lane < count else np.float32(0)
                force[column, lane] = down
        at = panel
        descend(
            w[at],
            k[at],
            s[at],
            z[at],
            force,
            width,
            grid,
            low[at],
            high[at],
            speed,
            offset[at],
            lower[at],
            upper[at],
        )
        encode(
            w[at],
            offset[at],
            width,
            grid,
            low[at],
            high[at],
            lower[at],
            upper[at],
            k[at],
            s[at],
            z[at],
        )
        panel = claim(counter)


@kernel
def _share_values(counter, k, s, width, values):  # type: ignore[no-untyped-def]
    """Claim panels, and set what their codes stand for."""
    panel = claim(counter)
    while panel < len(k):
        first = panel * LANES
        for lane in range(min(LANES, len(values) - first)):
            for column in range(values.shape[1]):
                scale = s[panel, column // width, lane]
                values[first + lane, column] = scale * k[panel, column, lane]
        panel = claim(counter)


@kernel
def _share_codes(counter, k, s, z, width, codes, scale, zero):  # type: ignore[no-untyped-def]
    """Claim panels, and set the codes, scales and zero points of their rows."""
    panel = claim(counter)
    while panel < len(k):
        first = panel * LANES
        at = panel
        for lane in range(min(LANES, len(codes) - first)):
            hand_back(k[at], s[at], z[at], lane, width, first + lane, codes, scale, zero)
        panel = claim(counter)
