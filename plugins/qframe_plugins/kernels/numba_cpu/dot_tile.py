"""The register tile of products of bytes: sums that are integers, the same bits on every processor.

Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication, TOMS 2008 (the
        tile in registers); Intel's vpdpbusd, which multiplies unsigned bytes with signed ones.
Error:  none. Sums are taken modulo 2^32; docs/bounds.md, B5.c, says when they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.vectors import INT32, INT64, Vectors

PANEL = 64  # rows of a weight that are laid out together: lanes of the tile
BYTES = 4  # neighbouring columns of a weight whose products are added at once
QUAD_BYTES = PANEL * BYTES  # of a panel's column quad
HEIGHTS = (6, 4, 2, 1)  # how many tokens tiles take
BLOCK = 48  # tokens of a task, a multiple of the greatest height

_DEPTH = 512  # quads of a panel, 128 KiB, that all tokens meet before the next: they stay in L2


def emit_tile(
    v: Vectors,
    element: Any,
    height: int,
    sums_at: Any,
    x_at: Any,
    w_at: Any,
    steps: Any,
    product: Callable[[Any, Any, Any], Any],
    meanwhile: Callable[[Any], None] = lambda step: None,
    begin: Callable[[int, Any, Any], Any] | None = None,
    end: Callable[[int, Any, Any], None] | None = None,
) -> None:
    """Emit sums[m, :] = product(w[step, :], x[step, m], sums[m, :]) for all steps, m < height.

    element     int32 or float32, of all three; sums and w have PANEL in a row, x `height`
    steps       how many, int64
    product     takes (a register of w, one number of x in all lanes, the sum so far)
    meanwhile   called with the number of the step, once in each
    begin, end  load and store the sums of a register, if not in `sums`: called with (m, the byte
                of its first lane in a row of PANEL lanes, the type of a register or its sums)
    """
    builder = v.builder
    lanes = v.register_bytes // BYTES
    vector = ir.VectorType(element, lanes)
    across = min(v.registers // 8, PANEL // lanes)  # registers of a panel at once
    down = min(height, (v.registers - across - 2) // across)  # tokens at once
    stretch = across * lanes * BYTES
    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = builder.mul(part.index, INT64(stretch))
        for top in range(0, height, down):
            rows = range(top, min(top + down, height))
            places = [
                (m, builder.add(left, INT64(BYTES * i * lanes)))
                for m in rows
                for i in range(across)
            ]

            def place(m: int, byte: Any) -> Any:
                return v.at(v.at(sums_at, BYTES * m * PANEL), byte)

            first = [
                v.load(place(m, byte), vector) if begin is None else begin(m, byte, vector)
                for m, byte in places
            ]
            with v.loop(steps, first) as loop:
                here = builder.add(left, builder.mul(loop.index, INT64(BYTES * PANEL)))
                weights = [
                    v.load(v.at(v.at(w_at, here), BYTES * i * lanes), vector) for i in range(across)
                ]
                meanwhile(loop.index)
                there = v.at(x_at, builder.mul(loop.index, INT64(BYTES * height)))
                news: list[Any] = []
                for m in rows:
                    number = v.splat(v.load(v.at(there, BYTES * m), element), lanes)
                    for weight in weights:
                        news.append(product(weight, number, loop.values[len(news)]))
                loop.hand_on(news)
            for (m, byte), total in zip(places, loop.values, strict=True):
                if end is None:
                    v.store(total, place(m, byte))
                else:
                    end(m, byte, total)


def tokens_at(v: Vectors, x_at: Any, columns: Any, token: Any, first: Any, height: int) -> Any:
    """Return where the numbers of a tile's tokens begin, in the step `first`.

    x_at      of tokens as `share_arrange` lays them out, `columns` numbers of four bytes for each
    """
    b = v.builder
    place = b.add(b.mul(token, columns), b.mul(first, INT64(height)))
    return v.at(x_at, b.mul(place, INT64(BYTES)))


def _make_tile(height: int) -> Callable[..., Any]:
    """Return the intrinsic that takes so many tokens at once."""

    @intrinsic
    def tile(
        typing: Any,
        sums: Any,
        row: Any,
        x: Any,
        token: Any,
        first: Any,
        quads: Any,
        w: Any,
        start: Any,
        ahead: Any,
    ) -> Any:
        index = types.int64
        signature = types.void(sums, index, x, index, index, index, w, index, index)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            sums_at, _ = v.array(signature.args[0], values[0])
            x_at, (_, all_quads) = v.array(signature.args[2], values[2])
            w_at, _ = v.array(signature.args[6], values[6])
            row, token, first, quads, start, ahead = (values[i] for i in (1, 3, 4, 5, 7, 8))
            sums_at = v.at(sums_at, builder.mul(row, INT64(BYTES * PANEL)))
            x_at = tokens_at(v, x_at, all_quads, token, first, height)
            w_at = v.at(w_at, start)
            next_at = v.at(w_at, ahead)

            def meanwhile(quad: Any) -> None:
                v.prefetch(v.at(next_at, builder.mul(quad, INT64(LINE))), 2)

            def product(weight: Any, four: Any, total: Any) -> Any:
                return v.dot4(total, weight, four)

            emit_tile(v, INT32, height, sums_at, x_at, w_at, quads, product, meanwhile)
            return context.get_dummy_value()

        return signature, emit

    return tile


# sums[row + m, :] += sum over the columns of `quads` quads, from the quad `first` on, of
# x[token + m, column] w[:, column], m < 6 (4, 2, 1).
# sums   int32 [any, PANEL]
# x      int32 [tokens, all quads], four codes in each, as `share_arrange` lays them out
# w      uint8, from byte `start` on [quads, PANEL, BYTES]
# All are C-contiguous. Meanwhile a line of w is asked for in every quad, from `ahead` bytes on.
dot_6, dot_4, dot_2, dot_1 = (_make_tile(height) for height in HEIGHTS)


@kernel
def height_of(left):  # type: ignore[no-untyped-def]
    """Return how many of the tokens that are left the next tile takes."""
    return 6 if left >= 6 else 4 if left >= 4 else 2 if left >= 2 else 1


@kernel
def share_arrange(counter, x, arranged, totals):  # type: ignore[no-untyped-def]
    """Claim blocks of BLOCK tokens; sum their codes, and lay them out as tiles read them.

    x, arranged   [tokens, quads] int32, four codes in each
    totals        [tokens, groups] int32, the sums over as many columns each
    """
    tokens, quads = x.shape
    groups = totals.shape[1]
    width = quads // groups * BYTES
    flat = arranged.reshape(-1)
    codes = x.view(np.int8)
    block = claim(counter)
    while block * BLOCK < tokens:
        token = block * BLOCK
        while token < min((block + 1) * BLOCK, tokens):
            height = height_of(tokens - token)
            for m in range(height):
                for group in range(groups):
                    total = np.int32(0)
                    for code in codes[token + m, group * width : (group + 1) * width]:
                        total += np.int32(code)
                    totals[token + m, group] = total
                for quad in range(quads):
                    flat[token * quads + quad * height + m] = x[token + m, quad]
            token += height
        block = claim(counter)


@kernel
def dot_tokens(sums, row, x, token, height, first, quads, w, start, ahead):  # type: ignore[no-untyped-def]
    """Run the tile for `height` tokens; see above."""
    if height == 6:
        dot_6(sums, row, x, token, first, quads, w, start, ahead)
    elif height == 4:
        dot_4(sums, row, x, token, first, quads, w, start, ahead)
    elif height == 2:
        dot_2(sums, row, x, token, first, quads, w, start, ahead)
    else:
        dot_1(sums, row, x, token, first, quads, w, start, ahead)


@kernel
def dot_panel(sums, x, w, start, size):  # type: ignore[no-untyped-def]
    """Add the products of all tokens with one panel to sums [tokens, PANEL].

    start, size   of the panel in w, in bytes
    """
    tokens, quads = x.shape
    for first in range(0, quads, _DEPTH):
        depth = min(_DEPTH, quads - first)
        at = start + first * QUAD_BYTES
        token = 0
        while token < tokens:
            height = height_of(tokens - token)
            # The first tiles ask for this part of the next panel, a quarter each.
            ahead = size + token // height * depth * LINE if token < 4 * height else 0
            dot_tokens(sums, token, x, token, height, first, depth, w, at, ahead)
            token += height
