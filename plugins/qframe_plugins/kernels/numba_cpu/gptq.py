"""GPTQ on the CPU: the whole column loop of 64 rows in one task, never leaving the cache.

Source: Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323, in the form of LDLQ (QuIP,
        arXiv:2307.13304), which is Babai's nearest plane: column i is rounded to the code
        nearest to t_i = w_i + sum_{j<i} (w_j - q_j) F_ij, F from cholesky.py.
Error:  the code of every weight is nearest to its float64 target given the codes before it, up to
        gamma_{n+3} (|w_i| + sum_j |w_j - q_j| |F_ij|)  +  sum_j |w_j - q_j| |F_ij - F64_ij|
        (docs/bounds.md, B3.b and B3.g).

A task holds 64 rows of the layer as 64 lanes. Sums run over j in ascending order whatever the
blocking, so a row's codes depend on that row and F alone: not on threads, panels or other rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.cholesky import BLOCK, DEPTH, Feedback, feedback_row
from qframe_plugins.kernels.numba_cpu.scales import SCALE_DTYPES, panel_minmax, panel_mse
from qframe_plugins.kernels.numba_cpu.simd import (
    LANES,
    QUAD,
    claim,
    kernel,
    prefetch,
    tile_add,
    transpose16,
)
from qframe_plugins.kernels.numba_cpu.threads import share

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


def solve_static(
    weight: Float32,
    feedback: Feedback,
    scale: Float32,
    zero_point: Int16,
    group_of_column: npt.NDArray[np.int32],
    qmin: int,
    qmax: int,
) -> Int16:
    """Return the GPTQ codes of a layer whose scales are given.

    weight            [rows, columns] float32, columns in processing order
    feedback          of the damped Hessian in the same order
    scale             [rows or 1, groups] float32, > 0
    zero_point        [rows or 1, groups] int16
    group_of_column   [columns] integers, the group of each column of `weight`
    codes             [rows, columns] int16: clip(rint(t / scale) + zero_point, qmin, qmax)
    """
    rows, columns = _check_weight(weight, feedback, qmin, qmax)
    if scale.ndim != 2 or scale.shape[0] not in (1, rows) or scale.shape != zero_point.shape:
        raise ValueError(
            f"scale {scale.shape} and zero_point {zero_point.shape} do not fit {rows} rows"
        )
    if scale.dtype != np.float32 or zero_point.dtype != np.int16:
        raise ValueError(f"scale is {scale.dtype}, zero_point {zero_point.dtype}; give f4, i2")
    if not ((scale > 0) & (scale < np.inf)).all():
        raise ValueError("a scale is not positive and finite")
    groups = np.require(group_of_column, np.int32, "CW")
    if groups.shape != (columns,) or not ((groups >= 0) & (groups < scale.shape[1])).all():
        raise ValueError(f"group_of_column must name one of {scale.shape[1]} groups per column")
    codes = np.empty((rows, columns), np.int16)
    scale = np.require(np.broadcast_to(scale, (rows, scale.shape[1])), requirements="CW")
    zero_point = np.require(np.broadcast_to(zero_point, scale.shape), requirements="CW")
    share(
        _share_panels,
        -(-rows // LANES),
        np.require(weight, requirements="CW"),
        feedback.packed,
        (np.int64(qmin), np.int64(qmax), False, np.int64(0)),
        np.int64(0),
        False,
        groups,
        scale,
        zero_point,
        codes,
    )
    return codes


def solve_dynamic(
    weight: Float32,
    feedback: Feedback,
    group_size: int,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    observer: Literal["minmax", "mse"] = "minmax",
) -> tuple[Int16, Float32, Int16]:
    """Return (codes, scale, zero_point) of GPTQ with scales taken when a group begins.

    At the first column of a group its scale comes from the group's weights as compensated so
    far for all earlier columns, whatever the block size (the published loop uses stale weights
    when a group does not begin a block).

    weight        [rows, columns] float32, columns in processing order
    group_size    consecutive columns that share a scale; the last group may be smaller
    observer      the rule of scales.py: the range, or the shrunk range of least squared error
    codes         [rows, columns] int16;  scale float32 and zero_point int16 [rows, groups]

    A scale that overflows its dtype is returned as inf, with zero for all codes of the group.
    """
    rows, columns = _check_weight(weight, feedback, qmin, qmax)
    if group_size < 1:
        raise ValueError(f"group_size={group_size}; give a positive number")
    if scale_dtype not in SCALE_DTYPES or observer not in ("minmax", "mse"):
        raise ValueError(f"unknown scale_dtype={scale_dtype!r} or observer={observer!r}")
    group_size = min(group_size, columns)
    groups = -(-columns // group_size)
    codes = np.empty((rows, columns), np.int16)
    scale = np.empty((rows, groups), np.float32)
    zero_point = np.empty((rows, groups), np.int16)
    share(
        _share_panels,
        -(-rows // LANES),
        np.require(weight, requirements="CW"),
        feedback.packed,
        (np.int64(qmin), np.int64(qmax), bool(symmetric), np.int64(SCALE_DTYPES[scale_dtype])),
        np.int64(group_size),
        observer == "mse",
        np.arange(columns, dtype=np.int32) // np.int32(group_size),
        scale,
        zero_point,
        codes,
    )
    return codes, scale, zero_point


def _check_weight(weight: Float32, feedback: Feedback, qmin: int, qmax: int) -> tuple[int, int]:
    """Return (rows, columns), or raise ValueError."""
    if weight.ndim != 2 or weight.shape[1] != feedback.columns:
        raise ValueError(f"weight {weight.shape} does not fit {feedback.columns} feedback columns")
    if weight.dtype != np.float32:
        raise ValueError(f"weight is {weight.dtype}; give float32")
    if not -(1 << 15) <= qmin < qmax < 1 << 15:
        raise ValueError(f"codes in [{qmin}, {qmax}] do not fit int16")
    return weight.shape


# In a task: w, t, y [any, LANES] hold weights and targets, a stripe per column from column `base`
# (a multiple of QUAD) on; d [columns, LANES] holds w - q; ready[quad] says up to which j the sums
# of a quad's targets go. A tile also updates targets that are already used up: no harm is done.


@kernel
def _catch_up(t, base, packed, d, first, last, start, stop):  # type: ignore[no-untyped-def]
    """Add to the targets of columns first..last the contributions of start <= j < stop."""
    j = start
    while j < stop:
        depth = min(stop, (j // DEPTH + 1) * DEPTH) - j
        for quad in range(first - first % QUAD, last, QUAD):
            tile_add(t, quad - base, packed, feedback_row(quad, j), 0, d, j, depth)
        j += depth


@kernel
def _block_end(start, last):  # type: ignore[no-untyped-def]
    """Return where the block that begins at `start` ends: all in one, or between two quads."""
    return last if last - start <= BLOCK else start - start % QUAD + BLOCK


@kernel
def _begin_block(t, base, packed, d, first, start, stop, ready):  # type: ignore[no-untyped-def]
    """Bring the targets of columns start..stop from sums up to `first` to sums up to `start`."""
    _catch_up(t, base, packed, d, start, stop, first, start)
    for quad in range(start - start % QUAD, stop, QUAD):
        ready[(quad - base) // QUAD] = start


@kernel
def _bring_to(t, base, packed, d, quad, column, ready):  # type: ignore[no-untyped-def]
    """Bring the targets of one quad to sums up to `column`."""
    place = (quad - base) // QUAD
    _catch_up(t, base, packed, d, quad, quad + QUAD, ready[place], column)
    ready[place] = column


@kernel
def _look_ahead(y, w, base, packed, d, first, last, ready):  # type: ignore[no-untyped-def]
    """Turn targets y with sums up to `first` into the compensated weights of first..last.

    The sums so far lack what GPTQ's update has: the later columns also follow the earlier
    compensated ones. Hence the recursion is run on without rounding. ready and d are scratch.
    """
    start = first
    while start < last:
        stop = _block_end(start, last)
        _begin_block(y, base, packed, d, first, start, stop, ready)
        for column in range(start, stop):
            _bring_to(y, base, packed, d, column - column % QUAD, column, ready)
            for lane in range(LANES):
                d[column, lane] = w[column - base, lane] - y[column - base, lane]
        start = stop


@kernel
def _round(t, w, d, codes, place, column, scale, zero, qmin, qmax):  # type: ignore[no-untyped-def]
    """Round the targets of one column to codes, and set d = w - value."""
    for lane in range(LANES):
        q = np.rint(t[place, lane] / scale[lane]) + zero[lane]
        # In this order a NaN becomes qmin and not an undefined integer.
        q = q if q > qmin else qmin
        q = q if q < qmax else qmax
        codes[place, lane] = np.int16(np.int32(q))
        d[column, lane] = w[place, lane] - scale[lane] * (q - zero[lane])


@kernel
def _load(weight, row, first, last, base, w, t):  # type: ignore[no-untyped-def]
    """Set w and t to the weights of columns first..last and LANES rows, a stripe per column."""
    live = min(LANES, weight.shape[0] - row)
    for left in range(first, last, 16):
        right = min(left + 16, last)
        for lane in range(0, LANES, 16):
            if right - left == 16 and live - lane >= 16:
                transpose16(w, left - base, lane, weight, row + lane, left)
            else:
                for place in range(left - base, right - base):
                    for i in range(lane, lane + 16):
                        w[place, i] = weight[row + i, base + place] if i < live else 0
    for lane in range(live):
        for column in range(last, 2 * last - first, LANES):
            prefetch(weight, row + lane, column)
    for place in range(first - base, last - base):
        for lane in range(LANES):
            t[place, lane] = w[place, lane]


@kernel
def _store(codes, row, first, last, base, out):  # type: ignore[no-untyped-def]
    """Write the codes of columns first..last and LANES rows."""
    live = min(LANES, out.shape[0] - row)
    for left in range(first, last, 16):
        right = min(left + 16, last)
        for lane in range(0, live, 16):
            if right - left == 16 and live - lane >= 16:
                transpose16(out, row + lane, left, codes, left - base, lane)
            else:
                for i in range(lane, min(lane + 16, live)):
                    for column in range(left, right):
                        out[row + i, column] = codes[column - base, i]


@kernel
def _share_panels(  # type: ignore[no-untyped-def]
    counter, weight, packed, grid, group_size, mse, groups, scales, zeros, out
):
    """Claim panels of LANES rows, and solve them. group_size 0: scales and zeros are given."""
    rows, columns = weight.shape
    qmin, qmax = np.float32(grid[0]), np.float32(grid[1])
    # A segment starts with complete sums. It holds whole groups, to look ahead in.
    segment = BLOCK
    if group_size > 0:
        segment = group_size * max(1, BLOCK // group_size)
    width = segment + 2 * QUAD
    d = np.empty((columns + QUAD, LANES), np.float32)
    w = np.empty((width, LANES), np.float32)
    t = np.empty((width, LANES), np.float32)
    y = np.empty((width, LANES), np.float32)
    codes = np.empty((width, LANES), np.int16)
    ready = np.empty(width // QUAD, np.int64)
    ahead = np.empty(width // QUAD, np.int64)
    scale, zero = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    row = claim(counter) * LANES
    while row < rows:
        live = min(LANES, rows - row)
        for lane in range(LANES):
            scale[lane], zero[lane] = 1, 0
        for first in range(0, columns, segment):
            last = min(first + segment, columns)
            base = first - first % QUAD
            _load(weight, row, first, last, base, w, t)
            _catch_up(t, base, packed, d, first, last, 0, first)
            start = first
            while start < last:
                stop = _block_end(start, last)
                _begin_block(t, base, packed, d, first, start, stop, ready)
                for column in range(start, stop):
                    group = groups[column]
                    if column == 0 or group != groups[column - 1]:
                        if group_size > 0:
                            end = min(column + group_size, columns)
                            if column > first:  # else all sums go up to `first`
                                for quad in range(column - column % QUAD, end, QUAD):
                                    _bring_to(t, base, packed, d, quad, column, ready)
                            for place in range(column - base, end - base):
                                for lane in range(LANES):
                                    y[place, lane] = t[place, lane]
                            if column > 0:
                                _look_ahead(y, w, base, packed, d, column, end, ahead)
                            if mse:
                                panel_mse(y, column - base, end - column, grid, scale, zero)
                            else:
                                panel_minmax(y, column - base, end - column, grid, scale, zero)
                            for lane in range(live):
                                scales[row + lane, group] = scale[lane]
                                zeros[row + lane, group] = np.int16(np.int32(zero[lane]))
                        else:
                            for lane in range(live):
                                scale[lane] = scales[row + lane, group]
                                zero[lane] = np.float32(zeros[row + lane, group])
                    _bring_to(t, base, packed, d, column - column % QUAD, column, ready)
                    _round(t, w, d, codes, column - base, column, scale, zero, qmin, qmax)
                start = stop
            _store(codes, row, first, last, base, out)
        row = claim(counter) * LANES
