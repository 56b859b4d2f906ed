"""Learned rounding by signed gradients, and code by code after that, on panels of 64 rows.

Source: Cheng et al., AutoRound, arXiv:2309.05516, eq. (3) (offsets and clipping) and algorithm 1
        (SignSGD, the best iterate is kept), with the output error tr(E H E^T) of one layer. Sweeps
        are the coordinate descent of Behdin et al., QuantEase, arXiv:2309.01885, algorithm 1, on
        codes that an offset can give.
Error:  the output error of a row is at most that of the codes it starts from (docs/bounds.md,
        B10.c): products are float32, a sum over columns in ascending order, and their sum float64.

Lanes are rows, so the bits of a row depend neither on the other rows nor on threads.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.scales import check_groups, grid_of, group_scale
from qframe_plugins.kernels.numba_cpu.simd import LANES, QUAD, claim, kernel, tile_add
from qframe_plugins.kernels.numba_cpu.threads import share

_OWN: Final = ("C", "W")
_NARROWEST = 2.0**-4  # share of its range that a group may be clipped to

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int16 = npt.NDArray[np.int16]


def learn(
    weight: Float32,
    hessian: Float64,
    codes: Int16,
    scale: Float32,
    zero_point: Int16,
    group_size: int,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    scale_dtype: str,
    iterations: int,
    rate: float,
    sweeps: int,
) -> tuple[Int16, Float32, Int16]:
    """Return the (codes, scale, zero point) of least output error that were met, row by row.

    weight       [rows, columns] float32, finite
    hessian      [columns, columns] float64, symmetric and finite
    codes        [rows, columns] int16: the start, with its scale float32 and zero_point int16
                 [rows, groups]; it stays where nothing is better
    group_size   neighbouring columns that share a scale; the last group may be smaller
    rate         of the first step, of offsets and of shares of the range; it falls linearly to 0
    sweeps       how often each code is then made the best one as the others are

    Raises ValueError for operands that do not fit.
    """
    rows, columns = weight.shape
    check_groups(weight.shape, group_size, scale, zero_point)
    if codes.shape != weight.shape:
        raise ValueError(f"codes {codes.shape} do not fit a weight {weight.shape}")
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian {hessian.shape} does not fit {columns} columns")
    grid = grid_of(qmin, qmax, symmetric=symmetric, scale_dtype=scale_dtype)
    made = codes.astype(np.int16), scale.astype(np.float32), zero_point.astype(np.int16)
    share(
        _share_panels,
        -(-rows // LANES),
        np.require(weight, np.float32, _OWN),
        _scaled(hessian),
        np.int64(group_size),
        grid,
        np.int64(iterations),
        np.float64(rate),
        np.int64(sweeps),
        *made,
    )
    return made


def _scaled(hessian: Float64) -> Float32:
    """Return H in float32, over the power of two that makes its largest diagonal about 1.

    Columns are filled up with zeros to a multiple of what a tile takes.
    """
    columns = len(hessian)
    _, exponent = np.frexp(hessian.diagonal().max(initial=0))
    padded = np.zeros((columns, -(-columns // QUAD) * QUAD), np.float32)
    padded[:, :columns] = np.ldexp(hessian, -int(exponent))
    return padded


@kernel
def _share_panels(  # type: ignore[no-untyped-def]
    counter, weight, hessian, width, grid, iterations, rate, sweeps, codes, scale, zero
):
    """Claim panels of rows, and improve their codes, scales and zero points."""
    rows, columns = weight.shape
    groups = scale.shape[1]
    panel = claim(counter)
    while panel * LANES < rows:
        first = panel * LANES
        count = min(LANES, rows - first)
        w = np.zeros((columns, LANES), np.float32)
        k = np.zeros((columns, LANES), np.float32)  # codes minus zero points
        s, z = np.ones((groups, LANES), np.float32), np.zeros((groups, LANES), np.float32)
        for lane in range(count):
            lay_out(weight, codes, scale, zero, first + lane, width, lane, w, k, s, z)
        taken = _learn(w, hessian, width, grid, iterations, rate, sweeps, k, s, z)
        for lane in range(count):
            if taken[lane]:
                hand_back(k, s, z, lane, width, first + lane, codes, scale, zero)
        panel = claim(counter)


@kernel
def lay_out(weight, codes, scale, zero, row, width, lane, w, k, s, z):  # type: ignore[no-untyped-def]
    """Put a row into a lane of a panel: k is codes minus zero points, which are floats there."""
    for group in range(scale.shape[1]):
        s[group, lane] = scale[row, group]
        z[group, lane] = np.float32(zero[row, group])
    for column in range(weight.shape[1]):
        w[column, lane] = weight[row, column]
        k[column, lane] = np.float32(codes[row, column] - zero[row, column // width])


@kernel
def hand_back(k, s, z, lane, width, row, codes, scale, zero):  # type: ignore[no-untyped-def]
    """Put a lane of a panel back into a row of codes, scales and zero points."""
    for group in range(scale.shape[1]):
        scale[row, group] = s[group, lane]
        zero[row, group] = np.int16(z[group, lane])
    for column in range(codes.shape[1]):
        codes[row, column] = np.int16(k[column, lane] + z[column // width, lane])


@kernel
def _learn(w, hessian, width, grid, iterations, rate, sweeps, best_k, best_s, best_z):  # type: ignore[no-untyped-def]
    """Replace best_k, best_s, best_z, lane by lane, by what has less error; return where it has.

    All [columns or groups, LANES] float32.
    """
    low, high = np.empty_like(best_s), np.empty_like(best_s)  # the range that codes reach
    lower, upper = np.ones_like(best_s), np.ones_like(best_s)  # shares of it
    set_ranges(w, best_s, best_z, width, grid, low, high)
    error, offset = np.empty_like(w), np.zeros_like(w)
    pull = np.empty((hessian.shape[1], LANES), np.float32)
    k, s, z = best_k.copy(), best_s.copy(), best_z.copy()
    taken = np.zeros(LANES, np.bool_)
    best = _loss(w, hessian, k, s, width, error, pull)
    for step in range(iterations):
        speed = np.float32(rate * (1 - step / iterations))
        descend(w, k, s, z, pull, width, grid, low, high, speed, offset, lower, upper)
        encode(w, offset, width, grid, low, high, lower, upper, k, s, z)
        loss = _loss(w, hessian, k, s, width, error, pull)
        _keep(loss, k, s, z, best, taken, best_k, best_s, best_z)
    k[:], s[:], z[:] = best_k, best_s, best_z
    _loss(w, hessian, k, s, width, error, pull)
    for _ in range(sweeps):
        if not _sweep(w, hessian, s, z, width, grid, k, error, pull):
            break
        loss = _loss(w, hessian, k, s, width, error, pull)
        _keep(loss, k, s, z, best, taken, best_k, best_s, best_z)
    return taken


@kernel
def _loss(w, hessian, k, s, width, error, pull):  # type: ignore[no-untyped-def]
    """Set error = w - s k and pull = H error, half of the loss's slope; return each lane's loss."""
    for column in range(len(w)):
        group = column // width
        for lane in range(LANES):
            error[column, lane] = w[column, lane] - s[group, lane] * k[column, lane]
    for column in range(0, len(pull), QUAD):
        _pull(hessian, error, column, pull)
    loss = np.zeros(LANES, np.float64)
    for column in range(len(w)):
        for lane in range(LANES):
            loss[lane] += np.float64(error[column, lane]) * np.float64(pull[column, lane])
    return loss


@kernel
def _pull(hessian, error, column, pull):  # type: ignore[no-untyped-def]
    """Set some rows of pull = H error, from `column` on."""
    for row in range(column, column + QUAD):
        for lane in range(LANES):
            pull[row, lane] = 0
    tile_add(pull, column, hessian, 0, column, error, 0, len(error))


@kernel
def _keep(loss, k, s, z, best, taken, best_k, best_s, best_z):  # type: ignore[no-untyped-def]
    """Keep the lanes that have less loss than the best so far."""
    for lane in range(LANES):
        if loss[lane] < best[lane] < np.inf:  # inf: float32 overflowed
            best[lane], taken[lane] = loss[lane], True
            best_k[:, lane], best_s[:, lane], best_z[:, lane] = k[:, lane], s[:, lane], z[:, lane]


@kernel
def _sweep(w, hessian, s, z, width, grid, k, error, pull):  # type: ignore[no-untyped-def]
    """Make each code, in turn, the best one that an offset can give it; return how many changed.

    error = w - s k, which is kept so. With all other codes as they are the loss is a parabola in a
    value, lowest at s k + (H error)_j / H_jj.
    """
    qmin, qmax = np.float32(grid[0]), np.float32(grid[1])
    half, changed = np.float32(0.5), 0
    for first in range(0, len(w), QUAD):
        _pull(hessian, error, first, pull)
        last = min(first + QUAD, len(w))
        for column in range(first, last):
            weight, group = hessian[column, column], column // width
            if not weight > 0:
                continue
            for lane in range(LANES):
                scale, zero = s[group, lane], z[group, lane]
                x = w[column, lane] / scale
                aim = np.rint(k[column, lane] + pull[column, lane] / (weight * scale))
                aim = min(max(aim, np.rint(x - half)), np.rint(x + half))
                aim = min(max(aim + zero, qmin), qmax) - zero
                moved = aim - k[column, lane]
                if moved != 0:
                    changed += 1
                    k[column, lane] = aim
                    error[column, lane] = w[column, lane] - scale * aim
                    for later in range(column + 1, last):
                        pull[later, lane] -= hessian[column, later] * scale * moved
    return changed


@kernel
def set_ranges(w, s, z, width, grid, low, high):  # type: ignore[no-untyped-def]
    """Set the ranges that the codes of groups reach; that of a group of zeros is empty."""
    qmin, qmax = np.float32(grid[0]), np.float32(grid[1])
    for group in range(len(s)):
        used = np.zeros(LANES, np.bool_)
        for column in range(group * width, min((group + 1) * width, len(w))):
            for lane in range(LANES):
                used[lane] |= w[column, lane] != 0
        for lane in range(LANES):
            scale, zero = s[group, lane], z[group, lane]
            if not used[lane]:  # zeros have scale 1 and keep it
                low[group, lane] = high[group, lane] = 0
            elif grid[2]:
                high[group, lane] = scale * ((qmax - qmin) / np.float32(2))
                low[group, lane] = -high[group, lane]
            else:
                low[group, lane], high[group, lane] = scale * (qmin - zero), scale * (qmax - zero)


@kernel
def descend(w, k, s, z, pull, width, grid, low, high, speed, offset, lower, upper):  # type: ignore[no-untyped-def]
    """Take a step against the sign of each gradient; rounding has slope 1 (straight through).

    A value q = s k has the gradient -2 pull. Where the code is not clipped dq = s dv + (k - w / s)
    ds, s = (upper high - lower low) / (qmax - qmin); where it is, q moves with the range's end.
    """
    qmin, qmax = np.float32(grid[0]), np.float32(grid[1])
    half, steps = np.float32(0.5), qmax - qmin
    ups, downs = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    for group in range(len(s)):
        ups[:] = 0
        downs[:] = 0
        for column in range(group * width, min((group + 1) * width, len(w))):
            for lane in range(LANES):
                scale, force = s[group, lane], pull[column, lane]
                x = w[column, lane] / scale
                code = np.rint(x + offset[column, lane]) + z[group, lane]
                slope = np.float64(k[column, lane])
                if qmin <= code <= qmax:
                    slope -= np.float64(x)
                    moved = offset[column, lane] + speed * np.sign(force)
                    offset[column, lane] = min(max(moved, -half), half)
                elif not grid[2]:
                    ups[lane] += force * high[group, lane] if code > qmax else 0.0
                    downs[lane] += force * low[group, lane] if code < qmin else 0.0
                    continue
                ups[lane] += force * slope * high[group, lane] / steps
                downs[lane] -= force * slope * low[group, lane] / steps
        for lane in range(LANES):
            if grid[2]:  # one share for both ends
                ups[lane] += downs[lane]
                downs[lane] = ups[lane]
            upper[group, lane] = _share(upper[group, lane], speed * np.sign(ups[lane]))
            lower[group, lane] = _share(lower[group, lane], speed * np.sign(downs[lane]))


@kernel
def _share(share, change):  # type: ignore[no-untyped-def]
    """Return a share of the range after a step."""
    return np.float32(min(max(share + change, _NARROWEST), 1.0))


@kernel
def encode(w, offset, width, grid, low, high, lower, upper, k, s, z):  # type: ignore[no-untyped-def]
    """Set scales and zero points of the ranges, and k = clip(rint(w / s + offset) + z) - z."""
    qmin, qmax = np.float32(grid[0]), np.float32(grid[1])
    for group in range(len(s)):
        for lane in range(LANES):
            s[group, lane], z[group, lane] = group_scale(
                low[group, lane] * lower[group, lane],
                high[group, lane] * upper[group, lane],
                grid[0],
                grid[1],
                grid[2],
                grid[3],
            )
    for column in range(len(w)):
        group = column // width
        for lane in range(LANES):
            code = np.rint(w[column, lane] / s[group, lane] + offset[column, lane]) + z[group, lane]
            k[column, lane] = min(max(code, qmin), qmax) - z[group, lane]
