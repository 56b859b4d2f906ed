"""Products of codes with a weight in groups, of any number of bits: `linear_int8_groups` (W4A8).

Method: a part of a panel, some groups or a piece of one, is unpacked to bytes in the fastest cache,
        and all tokens meet it there in the register tile of eight bits. The codes of a weight have
        no sign: sum x (c - z) = sum x u - (z - lowest) sum x, per group, all of it in integers.
Error:  docs/bounds.md, B5.f: sums of groups are exact, and added in float32 in their order. The
        bits are the same on every processor, for any number of threads and of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    HEIGHTS,
    PANEL,
    QUAD_BYTES,
    dot_tokens,
    emit_tile,
    height_of,
    share_arrange,
    tokens_at,
)
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels, unpack
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

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


def _make_group(height: int) -> Callable[..., Any]:
    """Return the intrinsic that takes so many tokens through a group."""

    @intrinsic
    def tile(
        typing: Any,
        y: Any,
        x: Any,
        token: Any,
        first: Any,
        quads: Any,
        w: Any,
        start: Any,
        totals: Any,
        zero: Any,
        scale: Any,
        group: Any,
    ) -> Any:
        index = types.int64
        signature = types.void(y, x, index, index, index, w, index, totals, zero, scale, index)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            (y_at, _), (x_at, (_, all_quads)), (w_at, _), (totals_at, (_, groups)) = (
                v.array(signature.args[i], values[i]) for i in (0, 1, 5, 7)
            )
            zero_at, scale_at = (v.array(signature.args[i], values[i])[0] for i in (8, 9))
            token, first, quads, start, group = (values[i] for i in (2, 3, 4, 6, 10))
            x_at = tokens_at(v, x_at, all_quads, token, first, height)
            row = INT64(BYTES * PANEL)
            y_at = v.at(y_at, builder.mul(token, row))
            zero_at, scale_at = (v.at(at, builder.mul(group, row)) for at in (zero_at, scale_at))
            is_first = builder.icmp_signed("==", group, INT64(0))

            def begin(m: int, byte: Any, kind: Any) -> Any:
                place = builder.add(builder.mul(builder.add(token, INT64(m)), groups), group)
                total = v.load(v.at(totals_at, builder.mul(place, INT64(BYTES))), INT32)
                total = v.splat(builder.neg(total), kind.count)
                return builder.mul(v.load(v.at(zero_at, byte), kind), total)

            def end(m: int, byte: Any, total: Any) -> None:
                kind = ir.VectorType(FLOAT32, total.type.count)
                place = v.at(v.at(y_at, BYTES * PANEL * m), byte)
                # Two roundings on every processor: nothing is fused.
                term = builder.fmul(builder.sitofp(total, kind), v.load(v.at(scale_at, byte), kind))
                more = builder.fadd(v.load(place, kind), term)
                v.store(builder.select(is_first, term, more), place)

            def product(weight: Any, four: Any, total: Any) -> Any:
                return v.dot4(total, weight, four)

            w_at = v.at(w_at, start)
            emit_tile(v, INT32, height, y_at, x_at, w_at, quads, product, begin=begin, end=end)
            return context.get_dummy_value()

        return signature, emit

    return tile


# y[token + m, :] += scale[group, :] * (the sum over the columns of `quads` quads, from the quad
# `first` on, of x[token + m, column] w[:, column] - zero[group, :] totals[token + m, group]), m < 6
# (4, 2, 1); for group 0 it is set. y is float32 [tokens, PANEL], w uint8, from byte `start` on
# [quads, PANEL, BYTES], totals int32 [tokens, groups], zero and scale int32 and float32 [groups,
# PANEL].
_group_6, _group_4, _group_2, _group_1 = (_make_group(height) for height in HEIGHTS)


@kernel
def _whole_group(y, x, token, height, first, quads, w, start, totals, zero, scale, group):  # type: ignore[no-untyped-def]
    """Run the tile for `height` tokens; see above."""
    if height == 6:
        _group_6(y, x, token, first, quads, w, start, totals, zero, scale, group)
    elif height == 4:
        _group_4(y, x, token, first, quads, w, start, totals, zero, scale, group)
    elif height == 2:
        _group_2(y, x, token, first, quads, w, start, totals, zero, scale, group)
    else:
        _group_1(y, x, token, first, quads, w, start, totals, zero, scale, group)


@kernel
def _begin(sums, height, totals, token, group, zero):  # type: ignore[no-untyped-def]
    """Set sums to what makes up for codes without sign."""
    for m in range(height):
        total = totals[token + m, group]
        for lane in range(PANEL):
            sums[token + m, lane] = -zero[group, lane] * total


@kernel
def _finish(y, token, height, sums, scale, group):  # type: ignore[no-untyped-def]
    """Add a group's sums to y [tokens, PANEL] float32; the first group begins it."""
    for m in range(height):
        for lane in range(PANEL):
            term = np.float32(sums[token + m, lane]) * scale[group, lane]
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
    single = width <= _PART  # groups are whole in a part
    sums = np.empty((0 if single else tokens, PANEL), np.int32)
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
                for group in range(first // width, (first + count - 1) // width + 1):
                    begin = max(first, group * width)
                    end = min(first + count, (group + 1) * width)
                    start = at + (begin - first) * QUAD_BYTES
                    if single:
                        z, s = zero[panel], scale[panel]
                        _whole_group(
                            total, x, token, height, begin, width, w, start, totals, z, s, group
                        )
                        continue
                    if begin == group * width:
                        _begin(sums, height, totals, token, group, zero[panel])
                    dot_tokens(sums, token, x, token, height, begin, end - begin, w, start, 0)
                    if end == (group + 1) * width:
                        _finish(total, token, height, sums, scale[panel], group)
                token += height
            first += count
        for token in range(tokens):
            for lane in range(min(PANEL, y.shape[1] - panel * PANEL)):
                y[token, panel * PANEL + lane] = total[token, lane] * x_scale[token]
        panel = claim(counter)
