"""Weight-only products of many tokens: tiles of float32 in shared memory.

Method: a block takes 32 tokens and 64 rows, and 32 columns at a time. Codes are brought by loads of
        128 bits and become numbers in shared memory, once for all tokens of the tile; a thread has
        16 sums, four tokens times four rows. Matrix units would round activations to fewer bits, so
        these are ordinary fused multiply-adds.
Error:  docs/bounds.md, B9.b, value by value: scale * (code - zero) is rounded once.
"""

from __future__ import annotations

from typing import Any

from numba import cuda, float32, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Source, inlined
from qframe_plugins.kernels.cuda.few_tokens import BRING, TYPES
from qframe_plugins.kernels.cuda.intrinsics import load4, read4
from qframe_plugins.kernels.cuda.packed import steps_of
from qframe_plugins.kernels.cuda.places import STEP
from qframe_plugins.kernels.cuda.short_floats import WRITE, WRITE4, for_activations

THREADS = 128
TOKENS, ROWS = 32, 64
X_PITCH = STEP + 4  # numbers from one token to the next
W_PITCH = ROWS + 4  # numbers from one column of the weight to the next
X_HELD, W_HELD = TOKENS * X_PITCH, STEP * W_PITCH


@inlined
def add_column(sums, a, b, c, d, weights):  # type: ignore[no-untyped-def]
    """Return the sums, four for each token, with the products of one column."""
    return (
        added(sums[0], a, weights),
        added(sums[1], b, weights),
        added(sums[2], c, weights),
        added(sums[3], d, weights),
    )


@inlined
def added(sums, number, weights):  # type: ignore[no-untyped-def]
    """Return the sums of a token with its number times four weights."""
    return (
        cuda.fma(number, weights[0], sums[0]),
        cuda.fma(number, weights[1], sums[1]),
        cuda.fma(number, weights[2], sums[2]),
        cuda.fma(number, weights[3], sums[3]),
    )


def _store(dtype: str) -> Any:
    write, write4 = WRITE[dtype], WRITE4[dtype]

    @inlined
    def store(y, sums, token, row, tokens, rows):  # type: ignore[no-untyped-def]
        """Set the outputs of a token for four rows."""
        if token < tokens and row < rows:
            place = uint32(uint32(token * rows) + row)
            if rows & uint32(3) == uint32(0):
                write4(y, place, sums[0], sums[1], sums[2], sums[3])
            else:
                write(y, place, sums[0])
                if uint32(row + uint32(1)) < rows:
                    write(y, uint32(place + uint32(1)), sums[1])
                if uint32(row + uint32(2)) < rows:
                    write(y, uint32(place + uint32(2)), sums[2])
                if uint32(row + uint32(3)) < rows:
                    write(y, uint32(place + uint32(3)), sums[3])

    return store


def _tile(dtype: str, bits: int) -> Source:
    """Return the kernel for codes of so many bits."""
    bring, store = BRING[dtype], _store(dtype)
    loads, codes, mask = bits // 4, 32 // bits, (1 << bits) - 1

    @inlined
    def decode(held, at, word, zero, factor):  # type: ignore[no-untyped-def]
        """Set the weights of a row, from the codes of a word, in held[at], a column apart."""
        for k in range(codes):
            steps = steps_of(word, uint32(k * bits), mask, zero)
            held[uint32(at + uint32(k * W_PITCH))] = steps * factor

    def tile(  # type: ignore[no-untyped-def]
        x, w, scale, zero, column, group, y, tokens, columns, rows, pitch, step, in_order
    ):
        left = cuda.shared.array(X_HELD, float32, alignment=16)
        right = cuda.shared.array(W_HELD, float32, alignment=16)
        thread = uint32(cuda.threadIdx.x)
        token, row = (
            uint32(cuda.blockIdx.y * uint32(TOKENS)),
            uint32(cuda.blockIdx.x * uint32(ROWS)),
        )
        down = uint32(uint32(thread >> uint32(4)) * uint32(4))  # the thread's first token
        across = uint32(uint32(thread & uint32(15)) * uint32(4))  # its first row
        half = uint32(thread & uint32(63))
        mine = min(uint32(row + half), uint32(rows - uint32(1)))
        none = (float32(0), float32(0), float32(0), float32(0))
        sums = (none, none, none, none)
        start = uint32(0)
        while start < pitch:
            if thread < uint32(64):
                of_group = uint32(group[uint32(start // uint32(STEP))])
                other = uint32(uint32(mine * step) + of_group)
                offset, factor = zero[other], scale[other]
                for load in range(loads):
                    word = uint32(uint32(uint32(mine * pitch) + start) // uint32(codes))
                    four = load4(w, uint32(word + uint32(4 * load)))
                    at = uint32(half + uint32(4 * load * codes * W_PITCH))
                    decode(right, at, four[0], offset, factor)
                    decode(right, uint32(at + uint32(codes * W_PITCH)), four[1], offset, factor)
                    decode(right, uint32(at + uint32(2 * codes * W_PITCH)), four[2], offset, factor)
                    decode(right, uint32(at + uint32(3 * codes * W_PITCH)), four[3], offset, factor)
            else:
                for more in range(TOKENS // 8):
                    m = uint32(uint32(half >> uint32(3)) + uint32(8 * more))
                    inside = uint32(uint32(half & uint32(7)) * uint32(4))
                    line = uint32(min(uint32(token + m), uint32(tokens - uint32(1))) * columns)
                    at = uint32(uint32(m * uint32(X_PITCH)) + inside)
                    bring(left, at, x, line, uint32(start + inside), pitch, column, in_order)
            cuda.syncthreads()
            k = uint32(0)
            while k < uint32(STEP):
                at = uint32(uint32(down * uint32(X_PITCH)) + k)
                a, b = read4(left, at), read4(left, uint32(at + uint32(X_PITCH)))
                c = read4(left, uint32(at + uint32(2 * X_PITCH)))
                d = read4(left, uint32(at + uint32(3 * X_PITCH)))
                at = uint32(uint32(k * uint32(W_PITCH)) + across)
                weights = read4(right, at)
                sums = add_column(sums, a[0], b[0], c[0], d[0], weights)
                weights = read4(right, uint32(at + uint32(W_PITCH)))
                sums = add_column(sums, a[1], b[1], c[1], d[1], weights)
                weights = read4(right, uint32(at + uint32(2 * W_PITCH)))
                sums = add_column(sums, a[2], b[2], c[2], d[2], weights)
                weights = read4(right, uint32(at + uint32(3 * W_PITCH)))
                sums = add_column(sums, a[3], b[3], c[3], d[3], weights)
                k = uint32(k + uint32(4))
            cuda.syncthreads()
            start = uint32(start + uint32(STEP))
        token, row = uint32(token + down), uint32(row + across)
        store(y, sums[0], token, row, tokens, rows)
        store(y, sums[1], uint32(token + uint32(1)), row, tokens, rows)
        store(y, sums[2], uint32(token + uint32(2)), row, tokens, rows)
        store(y, sums[3], uint32(token + uint32(3)), row, tokens, rows)

    tile.__name__ = f"tile_{bits}_bits"
    return for_activations(tile, TYPES, dtype)


TILES = {(dtype, bits): _tile(dtype, bits) for dtype in ACTIVATIONS for bits in (4, 8)}
"""(dtype, bits) -> the kernel."""
