"""The scale and zero point of each group that have the least squared error of the weights.

With codes fixed, the error sum (w - s k)^2, k = code - zero point, is a parabola in the scale s:
C - 2 A s + B s^2 with A = sum w k, B = sum k^2, C = sum w^2. As s falls, the nearest codes change
at the breakpoints |w| / (k + 1/2) alone, where one |k| grows by 1: A by |w|, B by 2 |k| + 1. So one
sweep over the sorted breakpoints meets every piece of the error of every zero point, which only
bounds how far the k of either sign reach.

Source: least squares in s alone, as for one bit in XNOR-Net (Rastegari et al., ECCV 2016,
        eq. (6)); the sweep over breakpoints is qframe's own (docs/bounds.md, B10.d).
Error:  none but that of float64: no number of the scale's dtype, with no zero point, has an error
        that is computed to be smaller. Errors are sums of squares in column order, n terms, each
        within gamma_{n+2} of itself. What the sweep adds up only says which of them to compute.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.scales import check_groups, grid_of, round_up
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share

_OWN: Final = ("C", "W")
_UNIT = 2.0**-53  # unit roundoff of float64
_HALF_LARGEST = 65504.0
_HALF_STEP = 2.0**-24  # between float16 numbers below _HALF_NORMAL
_HALF_NORMAL = 2.0**-14

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


def best_scales(
    weight: Float32,
    scale: Float32,
    zero_point: Int16,
    group_size: int,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    scale_dtype: str,
) -> tuple[Int16, Float32, Int16]:
    """Return (codes, scale, zero point) of the least squared error for every group.

    weight       [rows, columns] float32, finite
    scale        [rows, groups] float32, > 0 and finite: what stays where nothing is better
    zero_point   [rows, groups] int16, that belongs to it
    group_size   neighbouring columns that share a scale; the last group may be smaller
    codes        [rows, columns] int16, nearest to the weights, ties to even

    Raises ValueError for operands that do not fit.
    """
    check_groups(weight.shape, group_size, scale, zero_point)
    if not qmin <= 0 <= qmax or qmax == qmin:
        raise ValueError(f"codes in [{qmin}, {qmax}] do not hold 0 and another one")
    grid = grid_of(qmin, qmax, symmetric=symmetric, scale_dtype=scale_dtype)
    made = scale.astype(np.float32), zero_point.astype(np.int16)
    codes = np.empty(weight.shape, np.int16)
    share(
        _share_rows,
        len(weight),
        np.require(weight, np.float32, _OWN),
        np.int64(group_size),
        grid,
        *made,
        codes,
    )
    return codes, *made


@kernel
def _share_rows(counter, weight, width, grid, scale, zero, codes):  # type: ignore[no-untyped-def]
    """Claim rows, improve scale and zero of their groups, and encode them."""
    rows, columns = weight.shape
    qmin, qmax = grid[0], grid[1]
    points = 1 if grid[2] else qmax - qmin + 1
    sums = np.empty((3, points), np.float64)
    row = claim(counter)
    while row < rows:
        for group in range(scale.shape[1]):
            first = group * width
            w = weight[row, first : min(first + width, columns)]
            s, z = _best(w, np.float64(scale[row, group]), np.int64(zero[row, group]), grid, sums)
            scale[row, group], zero[row, group] = np.float32(s), np.int16(z)
            for j in range(len(w)):
                k = nearest_steps(w[j], s, qmin - z, qmax - z)
                codes[row, first + j] = np.int16(np.int64(k) + z)
        row = claim(counter)


@kernel
def nearest_steps(w, s, low, high):  # type: ignore[no-untyped-def]
    """Return the integer in [low, high] nearest to w / s.

    Ties go to even. The quotient of float32 numbers in float64 is never rounded to a tie.
    """
    return min(max(np.rint(np.float64(w) / s), np.float64(low)), np.float64(high))


@kernel
def _loss(w, s, low, high):  # type: ignore[no-untyped-def]
    """Return sum (w - s k)^2 with the nearest k; s k is exact in float64."""
    total = 0.0
    for j in range(len(w)):
        gap = np.float64(w[j]) - s * nearest_steps(w[j], s, low, high)
        total += gap * gap
    return total


@kernel
def _best(w, s, z, grid, sums):  # type: ignore[no-untyped-def]
    """Return the scale and zero point of least error; (s, z) where none is better.

    sums   [3, zero points] scratch: of the current piece of each zero point A, B, and its upper end
    """
    qmin, qmax = grid[0], grid[1]
    lowest = 0 if grid[2] else qmin
    points, reach = sums.shape[1], qmax - qmin
    energy = 0.0
    for j in range(len(w)):
        energy += np.float64(w[j]) * np.float64(w[j])
    best = _loss(w, s, qmin - z, qmax - z)
    floor = _floor(w, best, grid)
    breakpoints = np.empty(len(w) * reach, np.float64)
    which = np.empty(len(w) * reach, np.int64)
    events = 0
    for j in range(len(w)):
        size = abs(np.float64(w[j]))
        for k in range(reach):
            breakpoint = size / (k + 0.5)
            if breakpoint <= floor:
                break
            breakpoints[events], which[events] = -breakpoint, j * reach + k
            events += 1
    # More than rounding takes from what is compared below: sums of `events` positive terms, and
    # A s, B s^2 <= 4 C where codes are nearest.
    slack = 16 * (events + len(w) + 8) * _UNIT * energy
    sums[:2] = 0
    sums[2] = np.inf
    for event in np.argsort(breakpoints[:events]):
        bottom = -breakpoints[event]
        j, k = which[event] // reach, which[event] % reach
        size = abs(np.float64(w[j]))
        # The zero points that leave room for one step more on this side.
        if w[j] > 0:
            start, stop = np.int64(0), min(points, qmax - k - lowest)
        else:
            start, stop = max(np.int64(0), qmin + k + 1 - lowest), points
        for point in range(start, stop):
            a, b = sums[0, point], sums[1, point]
            if b > 0 and a * a >= (energy - slack - best) * b:
                best, s, z = _improve(
                    w, a, b, bottom, sums[2, point], energy, slack, best, s, z, lowest + point, grid
                )
            sums[0, point] = a + size
            sums[1, point] = b + (2 * k + 1)
            sums[2, point] = bottom
    for point in range(points):
        a, b = sums[0, point], sums[1, point]
        if b > 0:
            best, s, z = _improve(
                w, a, b, floor, sums[2, point], energy, slack, best, s, z, lowest + point, grid
            )
    return s, z


@kernel
def _floor(w, best, grid):  # type: ignore[no-untyped-def]
    """Return a scale >= 0 below which clipping alone costs more than `best`.

    Codes reach over (qmax - qmin) s, so what the ends of the weights lie beyond them adds up to at
    least the rest of the range, d, and costs at least d^2 / 2; without zero points each end alone
    costs the square of what it lies beyond.
    """
    low, high = 0.0, 0.0
    for j in range(len(w)):
        low, high = min(low, np.float64(w[j])), max(high, np.float64(w[j]))
    less, more = 1 - 2.0**-32, 1 + 2.0**-32  # far more than rounding takes
    if grid[2]:
        over = np.sqrt(best) * more
        top, bottom = max(grid[1], 1), max(-grid[0], 1)
        return max((high * less - over) / top, (-low * less - over) / bottom, 0.0)
    return max(((high - low) * less - np.sqrt(2 * best) * more) / (grid[1] - grid[0]), 0.0)


@kernel
def _improve(w, a, b, bottom, top, energy, slack, best, s, z, point, grid):  # type: ignore[no-untyped-def]
    """Return (best, s, z), or what is better in the piece [bottom, top] of a zero point.

    Of the numbers of a piece one of the two next to the lowest point of its parabola is best.
    """
    low, high = neighbours(min(max(a / b, bottom), top), grid[3])
    for trial in (high, low):
        if bottom <= trial <= top and 0 < trial < np.inf:
            if energy - 2 * a * trial + b * trial * trial > best + slack:
                continue
            loss = _loss(w, trial, grid[0] - point, grid[1] - point)
            if loss < best:
                best, s, z = loss, trial, point
    return best, s, z


@kernel
def neighbours(x, scale_dtype):  # type: ignore[no-untyped-def]
    """Return the largest number of the dtype <= x, and the least one >= x, as float64.

    x   float64 > 0; below the smallest positive number is 0, above the largest one inf
    """
    nearest = np.float32(x)
    bits = np.int64(nearest.view(np.int32))
    if np.float64(nearest) < x:
        bits += 1
    up = round_up(np.int32(bits).view(np.float32), scale_dtype)
    above = np.float64(up)
    if above == x:
        return above, above
    bits = np.int64(np.float32(up).view(np.int32))
    if scale_dtype == 0:
        bits -= 1
    elif scale_dtype == 2:
        bits -= 1 << 16
    elif above == np.inf:
        return _HALF_LARGEST, above
    elif above <= _HALF_NORMAL:
        return above - _HALF_STEP, above
    else:
        bits -= 1 << 13
    return np.float64(np.int32(bits).view(np.float32)), above
