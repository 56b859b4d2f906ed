"""Products of codes with a weight in groups, of any number of bits: `linear_int8_groups` (W4A8).

Method: a part of a panel, some groups or a piece of one, is unpacked to bytes in the fastest cache,
        and all tokens meet it there in the register tile of eight bits. The codes of a weight have
        no sign: sum x (c - z) = sum x u - (z - lowest) sum x, per group, all of it in integers.
Error:  docs/bounds.md, B5.f: sums of groups are exact, and added in float32 in their order. The
        bits are the same on every processor, for any number of threads and of tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    PANEL,
    QUAD_BYTES,
    dot_tokens,
    height_of,
    share_arrange,
)
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels, unpack
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

_PART = 64  # quads, 16 KiB of bytes, that are unpacked at a time: they stay in L1

Int8 = npt.NDArray[np.int8]
Float32 = npt.NDArray[np.float32]


def multiply(x_codes: Int8, x_scale: Float32, weight: PackedPanels) -> Float32:
    """Return x W^T, [tokens, rows] float32.

    x_codes   [tokens, columns] int8
    x_scale   [tokens] float32
    """
    tokens = len(x_codes)
    y = np.empty((tokens, weight.rows), np.float32)
    if not y.size:
        return y
    x = weight.taken(x_codes).view(np.int32)
    arranged, totals = np.empty(x.shape, np.int32), np.empty((tokens, weight.groups), np.int32)
    share(share_arrange, -(-tokens // BLOCK), x, arranged, totals)
    read = sum(plane.nbytes for plane in weight.planes)
    panels = worth_sharing(len(weight.scale), read, tokens * weight.rows * weight.columns)
    share(
        _share_panels,
        panels,
        arranged,
        totals,
        np.ascontiguousarray(x_scale),
        *weight.planes,
        weight.bits,
        weight.scale,
        weight.zero,
        y,
    )
    return y


@kernel
def _begin(sums, row, height, totals, token, group, zero):  # type: ignore[no-untyped-def]
    """Set sums to what makes up for codes without sign."""
    for m in range(height):
        total = totals[token + m, group]
        for lane in range(PANEL):
            sums[row + m, lane] = -zero[group, lane] * total


@kernel
def _finish(y, token, height, sums, row, scale, group):  # type: ignore[no-untyped-def]
    """Add a group's sums to y [tokens, PANEL] float32; the first group begins it."""
    for m in range(height):
        for lane in range(PANEL):
            term = np.float32(sums[row + m, lane]) * scale[group, lane]
            y[token + m, lane] = term if group == 0 else y[token + m, lane] + term


@kernel
def _share_panels(counter, x, totals, x_scale, one, other, bits, scale, zero, y):  # type: ignore[no-untyped-def]
    """Claim panels, and compute their columns of y."""
    tokens, quads = x.shape
    groups = scale.shape[1]
    width = quads // groups  # quads of a group
    part = min(_PART, width)
    whole = max(1, _PART // width)  # groups of a part
    codes = np.empty((part * whole, PANEL, BYTES), np.uint8)
    flat = codes.reshape(-1)
    single = width <= _PART
    sums = np.empty((6 if single else tokens, PANEL), np.int32)
    total = np.empty((tokens, PANEL), np.float32)
    panel = claim(counter)
    while panel * PANEL < y.shape[1]:
        first = 0
        while first < quads:
            count = (
                min(width * whole, quads - first) if single else min(_PART, width - first % width)
            )
            if bits == 8:
                w, at = one[panel], first * QUAD_BYTES
            else:
                unpack(one, other, bits, panel, first, count, codes)
                w, at = flat, 0
            token = 0
            while token < tokens:
                height = height_of(tokens - token)
                row = 0 if single else token
                for group in range(first // width, (first + count - 1) // width + 1):
                    begin = max(first, group * width)
                    end = min(first + count, (group + 1) * width)
                    if begin == group * width:
                        _begin(sums, row, height, totals, token, group, zero[panel])
                    start = at + (begin - first) * QUAD_BYTES
                    dot_tokens(sums, row, x, token, height, begin, end - begin, w, start, 0)
                    if end == (group + 1) * width:
                        _finish(total, token, height, sums, row, scale[panel], group)
                token += height
            first += count
        for token in range(tokens):
            for lane in range(min(PANEL, y.shape[1] - panel * PANEL)):
                y[token, panel * PANEL + lane] = total[token, lane] * x_scale[token]
        panel = claim(counter)
