"""Products of codes of tokens with a weight in codes: `linear_int8` and `linear_int8_groups`.

Method: a part of a panel, some groups or a piece of one, meets all tokens of a block in the tile;
        codes of less than eight bits are unpacked to bytes in the fastest cache before, or, where
        tokens are few, in registers. Blocks are as many tokens as stay in L2, so that a weight is
        read once for each of them.
        The codes of a weight have no sign: sum x (c - z) = sum x u - (z - lowest) sum x, per group,
        all of it in integers. One scale per channel is one group.
Error:  docs/bounds.md, B5.b and B5.f: sums of groups are exact, and added in float32 in order. The
        bits are the same on every processor, for any number of threads and of tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    HEIGHTS,
    PANEL,
    QUAD_BYTES,
    height_of,
    part_of,
    share_arrange,
)
from qframe_plugins.kernels.numba_cpu.few_codes import arrange_few, few, multiply_few
from qframe_plugins.kernels.numba_cpu.group_tile import multiply_part
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels, unpack
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import (
    QUAD,
    claim,
    inner,
    kernel,
    run_of,
    tile_add,
    zeros,
)
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.tokens import quantize, quantize_token

# Quads of a panel that all tokens of a block meet before the next.
_UNPACKED = 64  # 16 KiB of bytes: they stay in L1
_AS_THEY_ARE = 1024  # 256 KiB of bytes: they stay in L2

_WORDS = 3 << 17  # of a block of tokens, 1.5 MiB: they stay in L2
_NOTHING = np.float32(-0.0)  # what added to any number is that number, to zeros of both signs too

Int8 = npt.NDArray[np.int8]
Float32 = npt.NDArray[np.float32]

Kept = tuple[Float32 | None, npt.NDArray[np.int64] | None, Float32 | None]
"""Columns that are kept as they are: their tokens, [kept columns, tokens up to a multiple of QUAD];
which they are; and the weight transposed, [columns, panels * PANEL], None where it is what its
codes, of eight bits in one group, stand for."""


def multiply(
    x_codes: Int8,
    x_scale: Float32,
    weight: PackedPanels,
    kept: Kept = (None, None, None),
) -> Float32:
    """Return x W^T, [tokens, rows] float32, and the products of columns kept as they are.

    x_codes   [tokens, columns] int8
    x_scale   [tokens] float32
    kept      the columns; without them their part of the kernels is not compiled
    """
    tokens = len(x_codes)
    y = np.empty((tokens, weight.rows), np.float32)
    if not y.size:
        return y
    x, x_scale = weight.taken(x_codes).view(np.int32), np.ascontiguousarray(x_scale)
    panels, quads = len(weight.scale), x.shape[1]
    tasks = worth_sharing(panels, weight.nbytes, tokens * weight.rows * weight.columns)
    if tokens <= few(weight.bits):
        share(share_few, tasks, x, x_scale, *weight.filled, weight.scale, weight.points, *kept, y)
        return y
    limit = _AS_THEY_ARE if weight.bits == 8 else _UNPACKED
    in_tiles = weight.centre is not None or weight.are_bytes
    if not in_tiles:  # what makes up for codes without sign is computed before, group by group
        limit = min(limit, weight.quads)
    blocks = -(-tokens * quads // _WORDS)
    block = -(-tokens // blocks // BLOCK) * BLOCK
    flat, totals = np.empty(x.size, np.int32), np.empty((tokens, weight.groups), np.int32)
    copies = worth_sharing(-(-tokens // BLOCK), x.nbytes, 0)
    share(share_arrange, copies, x, block, limit, flat, totals)
    sizes = block, limit, weight.bits, in_tiles
    rows = flat, totals, x_scale
    operands = rows, weight.planes, weight.scale, weight.points, sizes
    share(_share_panels, tasks * blocks, *operands, *kept, y.reshape(-1))
    return y


def multiply_activations(x: Float32, weight: PackedPanels) -> Float32:
    """Return the same for activations [tokens, columns] float32, of which it makes codes."""
    if len(x) > few(weight.bits) or not x.size or not weight.rows:
        return multiply(*quantize(x), weight)
    y = np.empty((len(x), weight.rows), np.float32)
    tasks = worth_sharing(len(weight.scale), weight.nbytes, len(x) * weight.rows * weight.columns)
    operands = *weight.filled, weight.scale, weight.points
    quads = weight.groups * weight.quads
    share(_share_few_floats, tasks, np.ascontiguousarray(x), weight.spread, quads, *operands, y)
    return y


@inner
def _zero_of(zero, panel, group, lane):  # type: ignore[no-untyped-def]
    """Return a zero point; `zero` may be one for all."""
    return np.int32(zero) if isinstance(zero, int) else zero[panel, group, lane]


@inner
def _owed(sums, totals, start, count, panel, group, zero):  # type: ignore[no-untyped-def]
    """Set the sums of a block to what makes up for codes without sign, before a group."""
    for m in range(count):
        total = totals[start + m, group]
        for lane in range(PANEL):
            sums[m, lane] = -_zero_of(zero, panel, group, lane) * total


@inner
def _weights_of(outliers, columns, codes, scale, zero, panel, stripes):  # type: ignore[no-untyped-def]
    """Set stripes[i] to the weights of a panel in the column outliers[i]; see `Kept`.

    codes   [panels, bytes] uint8
    """
    for i in range(len(outliers)):
        quad, byte = outliers[i] // BYTES, outliers[i] % BYTES
        for lane in range(PANEL):
            if columns is None:
                code = np.int32(codes[panel, (quad * PANEL + lane) * BYTES + byte])
                step = code - _zero_of(zero, panel, 0, lane)
                stripes[i, lane] = np.float32(step) * scale[panel, 0, lane]
            else:
                stripes[i, lane] = columns[outliers[i], panel * PANEL + lane]


@inner
def _kept_products(others, stripes, start, count, extra):  # type: ignore[no-untyped-def]
    """Set extra [count, PANEL] to the products of the kept columns of some tokens with a panel."""
    for token in range(0, count, QUAD):
        for m in range(QUAD):
            for lane in range(PANEL):
                extra[token + m, lane] = _NOTHING
        tile_add(extra, token, others, 0, start + token, stripes, 0, len(others))


@kernel
def share_few(  # type: ignore[no-untyped-def]
    counter, x, x_scale, planes, widths, scale, zero, others, outliers, columns, y
):
    """Claim panels, and compute their columns of y, for a few tokens."""
    tokens = len(x)
    laid, totals = np.empty(x.shape, np.int32), np.empty((tokens, scale.shape[1]), np.int32)
    arrange_few(x, laid, totals)
    sums, made = zeros(tokens, PANEL).view(np.int32), zeros(tokens, PANEL)
    rows = sums, made
    if others is not None:
        extra, stripes = zeros(others.shape[1], PANEL), zeros(len(others), PANEL)
    panels = len(scale)
    run = run_of(counter, panels)
    first = claim(counter) * run
    while first < panels:
        for panel in range(first, min(first + run, panels)):
            made[:] = _NOTHING
            multiply_few(rows, laid, totals, planes, widths, scale, zero, panel)
            row = panel * PANEL
            if others is not None:
                _weights_of(outliers, columns, planes[0], scale, zero, panel, stripes)
                _kept_products(others, stripes, 0, tokens, extra)
            for token in range(tokens):
                for lane in range(min(PANEL, y.shape[1] - row)):
                    value = made[token, lane] * x_scale[token]
                    if others is not None:
                        value += extra[token, lane]
                    y[token, row + lane] = value
        first = claim(counter) * run


@kernel
def quantize_few(x, keep, spread, quads):  # type: ignore[no-untyped-def]
    """Return (codes, four in each number, [tokens, quads] int32, scales) of a few tokens.

    keep     as for `quantize_kept`
    spread   where each column lies among those of the quads; None: where it is
    """
    codes, scale = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    for token in range(len(x)):
        quantize_token(x, keep, token, codes, scale)
    if spread is not None:
        wide = np.zeros((len(x), quads * BYTES), np.int8)
        for token in range(len(x)):
            for column in range(x.shape[1]):
                wide[token, spread[column]] = codes[token, column]
    else:
        wide = codes
    return wide.view(np.int32), scale


@kernel
def _share_few_floats(counter, x, spread, quads, planes, widths, scale, zero, y):  # type: ignore[no-untyped-def]
    """Do the same for activations, of which every thread makes codes, and lays them out."""
    codes, x_scale = quantize_few(x, None, spread, quads)
    share_few(counter, codes, x_scale, planes, widths, scale, zero, None, None, None, y)


@kernel
def _share_panels(counter, rows, planes, scale, zero, sizes, others, outliers, columns, y):  # type: ignore[no-untyped-def]
    """Claim panels for a block of tokens, and compute their columns of y, which is flat."""
    flat, totals, _ = rows
    block, limit, bits, in_tiles = sizes
    tokens, groups = totals.shape
    width = len(flat) // tokens // groups
    goes_on = width > limit or not in_tiles  # with sums that are there before
    codes = zeros(0 if bits == 8 else limit, PANEL).view(np.uint8).reshape(-1)
    sums = zeros(block if goes_on else 0, PANEL).view(np.int32)
    made, ragged = zeros(block, PANEL), zeros(block, PANEL).reshape(-1)
    extra = zeros(0 if others is None else block, PANEL)
    stripes = zeros(0 if others is None else len(others), PANEL)
    room = codes, sums, made, ragged, extra, stripes
    kept = others, outliers, columns
    _claim_panels(counter, rows, planes, scale, zero, sizes, goes_on, *kept, room, y)


@inner
def _claim_panels(  # type: ignore[no-untyped-def]
    counter, rows, planes, scale, zero, sizes, goes_on, others, outliers, columns, room, y
):
    """Do it with what `_share_panels` has made."""
    flat, totals, _ = rows
    block, limit, bits, _ = sizes
    codes, sums, made, ragged, extra, stripes = room
    tokens, groups = totals.shape
    quads, wide, panels = len(flat) // tokens, len(y) // tokens, len(scale)
    width = quads // groups
    one, other = planes
    ahead = one.reshape(-1)
    size = one.shape[1]
    low = size // quads  # bytes of a quad in the plane that is asked for ahead
    between = sums, made, extra
    blocks = -(-tokens // block)
    task = claim(counter)
    while task < blocks * panels:
        following = claim(counter)
        panel, start = task % panels, task // panels * block
        count = min(block, tokens - start)
        row = panel * PANEL
        full = row + PANEL <= wide
        if others is not None:
            _weights_of(outliers, columns, one, scale, zero, panel, stripes)
            _kept_products(others, stripes, start, count, extra)
        made[:count] = _NOTHING
        tiles = -(-count // HEIGHTS[0])
        first = 0
        while first < quads:
            deep = part_of(first, quads, width, limit)
            if bits == 8:
                w, base = ahead, panel * size + first * QUAD_BYTES
            else:
                unpack(one, other, bits, panel, first, deep, codes.reshape(-1, PANEL, BYTES))
                w, base = codes, 0
            if goes_on and first % width == 0:
                _owed(sums, totals, start, count, panel, first // width, zero)
            # Meanwhile the next part, as long as this one, is asked for, a share by every tile.
            after = first + deep
            wanted = panel * size + after * low
            if after == quads:
                wanted = following % panels * size
            lines = -(-deep * low // (LINE * tiles))
            part = panel, first, deep, width, base
            token = 0
            while token < count:
                height = height_of(count - token)
                some_tiles = (count - token) // height
                x_from = start * quads + count * first + token * deep
                target, y_from, y_row = ragged, token * PANEL, PANEL
                if full:
                    target, y_from, y_row = y, (start + token) * wide + row, wide
                place = start + token, token, some_tiles, x_from, y_from, y_row
                how = goes_on, wanted + token // HEIGHTS[0] * lines * LINE, lines
                multiply_part(
                    height,
                    rows,
                    w,
                    scale,
                    zero,
                    between,
                    others,
                    target,
                    ahead,
                    part,
                    place,
                    how,
                )
                token += some_tiles * height
            first = after
        if not full:
            for token in range(count):
                for lane in range(wide - row):
                    y[(start + token) * wide + row + lane] = ragged[token * PANEL + lane]
        task = following
