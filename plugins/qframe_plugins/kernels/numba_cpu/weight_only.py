"""Products of float32 activations with a weight in codes: `linear_weight_only`.

Method: a part of a panel, some groups or a piece of one, is decoded to float32 in the fastest
        cache, and all tokens of a block meet it there; where they are few, in registers. Numbers
        of tokens lie in the order in which tiles read them: as one stream.
Error:  docs/bounds.md, B9.b, group by group: the sum of x (c - z) over the columns of a group is
        recursive, is scaled once, and the groups are added up in their order. The bits depend
        neither on the number of threads nor on that of the tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    PANEL,
    height_of,
    part_of,
)
from qframe_plugins.kernels.numba_cpu.few_tokens import FEW, multiply_few
from qframe_plugins.kernels.numba_cpu.float_tile import lay_out, multiply_part, share_arrange
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel, zeros
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.values import decode

_DECODED = 128  # columns of a panel that are decoded at a time, 32 KiB: they stay in L1
# Of a block of tokens, 8 MiB, which need not stay in L2: that a weight is decoded for fewer tokens
# costs more than to read two bytes in a cycle from L3.
_WORDS = 1 << 21

Float32 = npt.NDArray[np.float32]


def multiply(x: Float32, weight: PackedPanels) -> Float32:
    """Return x W^T, [tokens, rows] float32; x is [tokens, columns] float32."""
    tokens = len(x)
    y = np.empty((tokens, weight.rows), np.float32)
    if not y.size:
        return y
    panels = len(weight.scale)
    tasks = worth_sharing(panels, weight.nbytes, tokens * weight.rows * weight.columns)
    operands = *weight.filled, weight.scale, weight.points
    if tokens <= FEW:
        columns = weight.groups * weight.quads * BYTES
        share(_share_few, tasks, np.ascontiguousarray(x), weight.spread, columns, *operands, y)
        return y
    taken = weight.taken(x)
    width = weight.quads * BYTES
    limit = min(_DECODED, taken.shape[1])
    blocks = -(-taken.size // _WORDS)
    block = -(-tokens // blocks // BLOCK) * BLOCK
    blocks = -(-tokens // block)
    flat = np.empty(taken.size, np.float32)
    share(share_arrange, -(-tokens // BLOCK), taken, block, width, limit, flat)
    share(_share_panels, tasks * blocks, flat, *operands, (block, limit), y)
    return y


@kernel
def _share_few(counter, given, spread, columns, planes, widths, scale, zero, y):  # type: ignore[no-untyped-def]
    """Claim panels, and compute their columns of y, for a few tokens, which every thread lays out.

    given     [tokens, all columns] float32
    spread    where each column lies among `columns`; None: where it is
    """
    tokens = len(y)
    x = np.zeros((tokens, columns), np.float32)
    lay_out(given, spread, x.reshape(-1))
    made = zeros(tokens, PANEL)
    panel = claim(counter)
    while panel * PANEL < y.shape[1]:
        made[:] = 0
        multiply_few(made, x, planes, widths, scale, zero, panel)
        for token in range(tokens):
            for lane in range(min(PANEL, y.shape[1] - panel * PANEL)):
                y[token, panel * PANEL + lane] = made[token, lane]
        panel = claim(counter)


@kernel
def _share_panels(counter, x, planes, widths, scale, zero, sizes, y):  # type: ignore[no-untyped-def]
    """Claim panels for a block of tokens, and compute their columns of y."""
    block, limit = sizes  # tokens, and columns of a part
    tokens = len(y)
    panels, groups = scale.shape[:2]
    columns = len(x) // tokens
    width = columns // groups
    w = zeros(limit, PANEL)
    sums, made = zeros(block if width > limit else 0, PANEL), zeros(block, PANEL)
    plain = zeros(2, PANEL)
    for lane in range(PANEL):
        plain[1, lane] = 1
    between = sums, made, plain
    blocks = -(-tokens // block)
    task = claim(counter)
    while task < blocks * panels:
        panel, start = task % panels, task // panels * block
        count = min(block, tokens - start)
        made[:count] = 0
        first = 0
        while first < columns:
            deep = part_of(first, columns, width, limit)
            piece = min(deep, width)
            for passed in range(0, deep, piece):
                here = panel, (first + passed) // width, groups
                quads = (first + passed) // BYTES, piece // BYTES, deep // BYTES
                decode(planes, widths, zero, here, quads, w, passed)
            part = panel, first, deep, width
            token = 0
            while token < count:
                height = height_of(count - token)
                tiles = (count - token) // height
                rows = token, start * columns + count * first + token * deep, tiles
                multiply_part(height, between, x, w, scale, part, rows)
                token += tiles * height
            first += deep
        for token in range(count):
            for lane in range(min(PANEL, y.shape[1] - panel * PANEL)):
                y[start + token, panel * PANEL + lane] = made[token, lane]
        task = claim(counter)
