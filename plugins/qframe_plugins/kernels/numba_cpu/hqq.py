"""Half-quadratic quantization of groups: zero point and scale by shrinkage and least squares.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, eq. (4)
        (shrinkage) and eq. (6) (zero point), and the published solver's constants.
Error:  the sum |w - s k| of a group, in float64, is at most that of the scale and zero point it
        starts from (docs/bounds.md, B10.e).

Everything is in steps of the group's first scale, so that weights times 2^k give the same codes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.best_scale import nearest_steps, neighbours
from qframe_plugins.kernels.numba_cpu.scales import check_groups, grid_of
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share

_OWN: Final = ("C", "W")
_SETTLED = 2.0**-13  # a scale that moves by less would be stored as the same float16, or its next

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


def half_quadratic(
    weight: Float32,
    first: tuple[Float32, Int16],
    kept: tuple[Float32, Int16],
    group_size: int,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    scale_dtype: str,
    power: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> tuple[Int16, Float32, Int16]:
    """Return (codes, scale, zero point) of the least sum of errors that was met, for every group.

    weight       [rows, columns] float32, finite
    first        (scale float32, zero point int16), [rows, groups]: where the search starts
    kept         the same: what stays where nothing is better
    group_size   neighbouring columns that share a scale; the last group may be smaller
    power        p of the objective, in (0, 1]
    beta, kappa  the weight of the quadratic term, and what it grows by
    codes        [rows, columns] int16, nearest to the weights, ties to even

    Raises ValueError for operands that do not fit.
    """
    check_groups(weight.shape, group_size, *first, *kept)
    grid = grid_of(qmin, qmax, symmetric=symmetric, scale_dtype=scale_dtype)
    made = kept[0].astype(np.float32), kept[1].astype(np.int16)
    codes = np.empty(weight.shape, np.int16)
    share(
        _share_rows,
        len(weight),
        np.require(weight, np.float32, _OWN),
        np.int64(group_size),
        grid,
        (float(power), float(beta), float(kappa), np.int64(iterations)),
        np.require(first[0], np.float32, _OWN),
        np.require(first[1], np.int16, _OWN),
        *made,
        codes,
    )
    return codes, *made


@kernel
def _share_rows(counter, weight, width, grid, options, first, first_zero, scale, zero, codes):  # type: ignore[no-untyped-def]
    """Claim rows, improve scale and zero of their groups, and encode them."""
    rows, columns = weight.shape
    row = claim(counter)
    while row < rows:
        for group in range(scale.shape[1]):
            start = group * width
            w = weight[row, start : min(start + width, columns)]
            s, z = _search(
                w,
                np.float64(first[row, group]),
                np.int64(first_zero[row, group]),
                np.float64(scale[row, group]),
                np.int64(zero[row, group]),
                grid,
                options,
            )
            scale[row, group], zero[row, group] = np.float32(s), np.int16(z)
            for j in range(len(w)):
                k = nearest_steps(w[j], s, grid[0] - z, grid[1] - z)
                codes[row, start + j] = np.int16(np.int64(k) + z)
        row = claim(counter)


@kernel
def _search(w, first, first_zero, kept, kept_zero, grid, options):  # type: ignore[no-untyped-def]
    """Return the scale and zero point of the least sum of errors met; (kept, ...) else."""
    s, z = kept, kept_zero
    best = _errors(w, s, z, grid)
    trial = _errors(w, first, first_zero, grid)
    if trial < best:
        best, s, z = trial, first, first_zero
    if grid[2]:
        low, high = np.int64(0), np.int64(0)
    else:
        point = min(max(_zero_point(w, first, first_zero, grid, options), grid[0]), grid[1])
        low, high = np.int64(np.floor(point)), np.int64(np.ceil(point))
    for zero in range(low, high + 1):
        below, above = neighbours(_scale(w, first, zero, grid, options), grid[3])
        for stored in (above, below):
            if 0 < stored < np.inf:
                trial = _errors(w, stored, zero, grid)
                if trial < best:
                    best, s, z = trial, stored, zero
    return s, z


@kernel
def _errors(w, s, z, grid):  # type: ignore[no-untyped-def]
    """Return sum |w - s k| with the nearest k."""
    total = 0.0
    for j in range(len(w)):
        total += abs(np.float64(w[j]) - s * nearest_steps(w[j], s, grid[0] - z, grid[1] - z))
    return total


@kernel
def _shrink(x, power, beta):  # type: ignore[no-untyped-def]
    """Return the minimum over e of |e|^p + beta/2 (e - x)^2, as approximated in eq. (4)."""
    size = abs(x)
    if size == 0:
        return 0.0
    return np.copysign(max(size - size ** (power - 1) / beta, 0.0), x)


@kernel
def _zero_point(w, s, z, grid, options):  # type: ignore[no-untyped-def]
    """Return the real zero point of scale s, eq. (6): the mean of code - (w / s - e)."""
    power, beta, kappa, iterations = options
    point, best = np.float64(z), np.inf
    for _ in range(iterations):
        total, error = 0.0, 0.0
        for j in range(len(w)):
            x = np.float64(w[j]) / s
            code = min(max(np.rint(x + point), np.float64(grid[0])), np.float64(grid[1]))
            gap = x - (code - point)
            error += abs(gap)
            total += code - (x - _shrink(gap, power, beta))
        if error >= best:
            break
        best, point, beta = error, np.float64(total / len(w)), beta * kappa
    return point


@kernel
def _scale(w, s, z, grid, options):  # type: ignore[no-untyped-def]
    """Return the scale of an integer zero point, by the same alternation: sum k (w - e) / sum k^2.

    The paper keeps the scale and moves a real zero point; an integer one leaves the scale to move.
    """
    power, beta, kappa, iterations = options
    for _ in range(iterations):
        products, squares = 0.0, 0.0
        for j in range(len(w)):
            k = nearest_steps(w[j], s, grid[0] - z, grid[1] - z)
            x = np.float64(w[j]) / s
            products += k * (x - _shrink(x - k, power, beta))
            squares += k * k
        if squares == 0 or products <= 0:
            break
        change = products / squares
        s, beta = s * change, beta * kappa
        if abs(change - 1) < _SETTLED:
            break
    return s
