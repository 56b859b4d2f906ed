"""The register tile of products of float32 numbers, for any number of tokens.

Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication, TOMS 2008.
Error:  an element is a recursive sum in ascending order, so n terms added to c have an error of at
        most gamma_{n+1} (|c| + sum |a b|), with and without fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    HEIGHTS,
    PANEL,
    emit_tile,
    height_of,
    tokens_at,
)
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT64, Vectors


def _make_tile(height: int) -> Callable[..., Any]:
    """Return the intrinsic that takes so many tokens at once."""

    @intrinsic
    def tile(
        typing: Any, sums: Any, row: Any, x: Any, token: Any, first: Any, count: Any, w: Any
    ) -> Any:
        index = types.int64
        signature = types.void(sums, index, x, index, index, index, w)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            sums_at, _ = v.array(signature.args[0], values[0])
            x_at, (_, columns) = v.array(signature.args[2], values[2])
            w_at, _ = v.array(signature.args[6], values[6])
            row, token, first, count = (values[i] for i in (1, 3, 4, 5))
            sums_at = v.at(sums_at, builder.mul(row, INT64(BYTES * PANEL)))
            x_at = tokens_at(v, x_at, columns, token, first, height)
            emit_tile(v, FLOAT32, height, sums_at, x_at, w_at, count, v.muladd)
            return context.get_dummy_value()

        return signature, emit

    return tile


# sums[row + m, :] += sum over k < count of x[token + m, first + k] w[k, :], m < 6 (4, 2, 1).
# sums   float32 [any, PANEL]
# x      float32 [tokens, columns], as `share_arrange` lays it out
# w      float32 [count, PANEL]
# All are C-contiguous.
_tile_6, _tile_4, _tile_2, _tile_1 = (_make_tile(height) for height in HEIGHTS)


@kernel
def multiply_tokens(sums, row, x, token, height, first, count, w):  # type: ignore[no-untyped-def]
    """Run the tile for `height` tokens; see above."""
    if height == 6:
        _tile_6(sums, row, x, token, first, count, w)
    elif height == 4:
        _tile_4(sums, row, x, token, first, count, w)
    elif height == 2:
        _tile_2(sums, row, x, token, first, count, w)
    else:
        _tile_1(sums, row, x, token, first, count, w)


@kernel
def lay_out(x, spread, arranged):  # type: ignore[no-untyped-def]
    """Lay tokens out as tiles read them.

    x          [tokens, columns] float32
    spread     [columns], where each lies among those of a token; None: where it is
    arranged   [tokens, as many columns or more] float32; what is beyond those of x stays
    """
    tokens, wide = arranged.shape
    flat = arranged.reshape(-1)
    token = 0
    while token < tokens:
        height = height_of(tokens - token)
        for m in range(height):
            for column in range(x.shape[1]):
                to = column if spread is None else spread[column]
                flat[token * wide + to * height + m] = x[token + m, column]
        token += height


@kernel
def share_arrange(counter, x, arranged):  # type: ignore[no-untyped-def]
    """Claim blocks of BLOCK tokens, and lay their numbers out as tiles read them.

    x, arranged   [tokens, columns] float32
    """
    tokens, columns = x.shape
    flat = arranged.reshape(-1)
    block = claim(counter)
    while block * BLOCK < tokens:
        token = block * BLOCK
        while token < min((block + 1) * BLOCK, tokens):
            height = height_of(tokens - token)
            for m in range(height):
                for column in range(columns):
                    flat[token * columns + column * height + m] = x[token + m, column]
            token += height
        block = claim(counter)
