"""Products of float32 activations with a weight in codes: `linear_weight_only`.

Method: a part of a panel is decoded to float32 in the fastest cache, and all tokens meet it there;
        where they are few, in registers.
Error:  docs/bounds.md, B9.b, value by value: one rounding of a weight, then a recursive sum in the
        order of the groups. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.dot_tile import BLOCK, BYTES, PANEL, height_of
from qframe_plugins.kernels.numba_cpu.few_tokens import FEW, multiply_few
from qframe_plugins.kernels.numba_cpu.float_tile import lay_out, multiply_tokens, share_arrange
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels, decode
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

_PART = 16  # quads, 16 KiB of float32, that are decoded at a time: they stay in L1

Float32 = npt.NDArray[np.float32]


def multiply(x: Float32, weight: PackedPanels) -> Float32:
    """Return x W^T, [tokens, rows] float32; x is [tokens, columns] float32."""
    tokens = len(x)
    y = np.empty((tokens, weight.rows), np.float32)
    if not y.size:
        return y
    panels = worth_sharing(len(weight.scale), weight.nbytes, tokens * weight.rows * weight.columns)
    if tokens <= FEW:
        columns = weight.groups * weight.quads * BYTES
        operands = *weight.filled, weight.scale, weight.points
        share(_share_few, panels, np.ascontiguousarray(x), weight.spread, columns, *operands, y)
        return y
    taken = weight.taken(x)
    arranged = np.empty(taken.shape, np.float32)
    share(share_arrange, -(-tokens // BLOCK), taken, arranged)
    share(
        _share_panels,
        panels,
        arranged,
        *weight.planes,
        weight.bits,
        weight.scale,
        weight.zero,
        y,
    )
    return y


@kernel
def _share_few(counter, given, spread, columns, planes, widths, scale, zero, y):  # type: ignore[no-untyped-def]
    """Claim panels, and compute their columns of y, for a few tokens, which every thread lays out.

    given     [tokens, all columns] float32
    spread    where each column lies among `columns`; None: where it is
    """
    tokens, groups = len(y), scale.shape[1]
    x = np.zeros((tokens, columns), np.float32)
    lay_out(given, spread, x)
    quads = columns // BYTES // groups  # of a group
    sums = np.empty((tokens, PANEL), np.float32)
    panel = claim(counter)
    while panel * PANEL < y.shape[1]:
        for token in range(tokens):
            for lane in range(PANEL):
                sums[token, lane] = 0
        for group in range(groups):
            place = (panel, group)
            token = 0
            while token < tokens:
                height = height_of(tokens - token)
                part = (token, group * quads, quads)
                multiply_few(sums, x, planes, widths, scale, zero, place, part, height)
                token += height
        for token in range(tokens):
            for lane in range(min(PANEL, y.shape[1] - panel * PANEL)):
                y[token, panel * PANEL + lane] = sums[token, lane]
        panel = claim(counter)


@kernel
def _share_panels(counter, x, one, other, bits, scale, zero, y):  # type: ignore[no-untyped-def]
    """Claim panels, and compute their columns of y."""
    tokens, columns = x.shape
    quads = columns // BYTES
    width = quads // scale.shape[1]  # quads of a group
    w = np.empty((_PART * BYTES, PANEL), np.float32)
    sums = np.empty((tokens, PANEL), np.float32)
    panel = claim(counter)
    while panel * PANEL < y.shape[1]:
        for token in range(tokens):
            for lane in range(PANEL):
                sums[token, lane] = 0
        first = 0
        while first < quads:
            count = 0
            while count < _PART and first + count < quads:  # of one group or of several
                group = (first + count) // width
                piece = min(_PART - count, (group + 1) * width - first - count)
                row = count * BYTES
                decode(one, other, bits, panel, first + count, piece, scale, zero, group, w, row)
                count += piece
            token = 0
            while token < tokens:
                height = height_of(tokens - token)
                multiply_tokens(sums, token, x, token, height, first * BYTES, count * BYTES, w)
                token += height
            first += count
        for token in range(tokens):
            for lane in range(min(PANEL, y.shape[1] - panel * PANEL)):
                y[token, panel * PANEL + lane] = sums[token, lane]
        panel = claim(counter)
