"""The column loop of GPTQ for 64 rows at once, as one task that never leaves the cache.

A task holds 64 rows of the layer as 64 lanes and goes through all columns. Columns are taken in
blocks; the targets of a block first get the sums over all earlier columns from register tiles,
then its columns are rounded one by one. Sums run over j in ascending order whatever the
blocking, so a row's codes depend on that row and F alone: not on threads, panels or other rows.

Source: see gptq.py. Lazy blocks are those of the paper (arXiv:2210.17323, section 3.2), but seen
        from the column that receives (left-looking), which writes each target once.
"""

from __future__ import annotations

import numpy as np

from qframe_plugins.kernels.numba_cpu.feedback import BLOCK, DEPTH, feedback_row
from qframe_plugins.kernels.numba_cpu.scales import panel_scale
from qframe_plugins.kernels.numba_cpu.simd import (
    LANES,
    QUAD,
    claim,
    kernel,
    tile_add,
    transpose16,
)

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
def _look_ahead(y, t, w, base, packed, d, first, last, ready):  # type: ignore[no-untyped-def]
    """Set y to the compensated weights of first..last, from targets t with sums up to `first`.

    The targets lack what GPTQ's update has: its later columns also follow the earlier ones as
    compensated. Hence the recursion is run on without rounding. ready and d are scratch.
    """
    for place in range(first - base, last - base):
        for lane in range(LANES):
            y[place, lane] = t[place, lane]
    start = first if first > 0 else last  # nothing is compensated yet at column 0
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
def share_panels(  # type: ignore[no-untyped-def]
    counter, weight, packed, grid, group_size, mse, groups, scales, zeros, out, finite
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
                    begins = column == 0 or group != groups[column - 1]
                    if begins and group_size > 0:
                        end = min(column + group_size, columns)
                        if column > first:  # at `first` the sums are complete
                            for quad in range(column - column % QUAD, end, QUAD):
                                _bring_to(t, base, packed, d, quad, column, ready)
                        _look_ahead(y, t, w, base, packed, d, column, end, ahead)
                        panel_scale(y, column - base, end - column, grid, mse, scale, zero)
                        for lane in range(live):
                            scales[row + lane, group] = scale[lane]
                            zeros[row + lane, group] = np.int16(np.int32(zero[lane]))
                    elif begins:
                        for lane in range(live):
                            scale[lane] = scales[row + lane, group]
                            zero[lane] = np.float32(zeros[row + lane, group])
                    _bring_to(t, base, packed, d, column - column % QUAD, column, ready)
                    _round(t, w, d, codes, column - base, column, scale, zero, qmin, qmax)
                start = stop
            _store(codes, row, first, last, base, out)
        # What is not finite anywhere in a row reaches its last target through the sums.
        for lane in range(live):
            finite[row + lane] = np.isfinite(t[columns - 1 - base, lane])
        row = claim(counter) * LANES
