"""Weight-only products of few tokens: a matrix times a vector, or times four.

Method: a warp takes four rows of one token, or one row of four; a lane takes every 32nd step of
        each: a load of 128 bits brings 32 codes of four bits, and each byte of the weight is read
        once. Tokens are brought to shared memory, 1,024 columns at a time, for all rows of a block;
        what a lane reads there lies 36 numbers from what the next one does, so that no bank is
        asked twice. A lane sums the products of a step, then total = fma(sum, scale, total); lanes
        are added in a tree of depth 5. So one token and four get the same bits.
Error:  docs/bounds.md, B9.b, group by group.
"""

from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Source, inlined
from qframe_plugins.kernels.cuda.int8_layout import sum_of_lanes
from qframe_plugins.kernels.cuda.intrinsics import load4, read4, write4
from qframe_plugins.kernels.cuda.packed import steps_of
from qframe_plugins.kernels.cuda.places import STEP
from qframe_plugins.kernels.cuda.short_floats import READ, READ4, WRITE, for_activations

THREADS = 256
WARPS = THREADS // 32
SUMS = 4  # of a warp: rows times tokens
CHUNK = 32 * STEP  # columns in shared memory
APART = STEP + 4  # numbers from what one lane reads to what the next one does
HELD = 32 * APART  # numbers in shared memory, of a token
TYPES = (
    "x, int32*, float32*, float32*, int32*, int32*, x, "
    "uint32, uint32, uint32, uint32, uint32, uint32"
)


def _bring(dtype: str) -> Any:
    read, read_four = READ[dtype], READ4[dtype]

    @inlined
    def bring(held, at, x, row, place, pitch, column, in_order):  # type: ignore[no-untyped-def]
        if place >= pitch:
            write4(held, at, float32(0), float32(0), float32(0), float32(0))
        elif in_order != uint32(0):
            a, b, c, d = read_four(x, uint32(row + place))
            write4(held, at, a, b, c, d)
        else:
            for k in range(4):
                chosen, number = column[uint32(place + uint32(k))], float32(0)
                if chosen >= int32(0):
                    number = read(x, uint32(row + uint32(chosen)))
                held[uint32(at + uint32(k))] = number

    return bring


BRING = {dtype: _bring(dtype) for dtype in ACTIVATIONS}
"""dtype -> what copies four numbers of a token, at places `place` and after, to held[at] .."""


@inlined
def dot4(total, four, word, shift, bits, zero):  # type: ignore[no-untyped-def]
    """Return the total with four products, of numbers with the codes of a word from a shift on."""
    mask = uint32(uint32(uint32(1) << uint32(bits)) - uint32(1))
    total = cuda.fma(four[0], steps_of(word, shift, mask, zero), total)
    total = cuda.fma(four[1], steps_of(word, uint32(shift + uint32(bits)), mask, zero), total)
    total = cuda.fma(four[2], steps_of(word, uint32(shift + uint32(2 * bits)), mask, zero), total)
    return cuda.fma(four[3], steps_of(word, uint32(shift + uint32(3 * bits)), mask, zero), total)


def _few(dtype: str, bits: int, many: int) -> Source:
    """Return the kernel for codes of so many bits, and so many tokens at once, 1 or 4."""
    bring, write = BRING[dtype], WRITE[dtype]
    loads, codes = bits // 4, 32 // bits  # loads of a step, codes of a word
    down, held_numbers = SUMS // many, many * HELD  # rows of a warp

    @inlined
    def add_word(sums, words, held, at, zeros):  # type: ignore[no-untyped-def]
        """Return the sums with the products of a word of each."""
        for quad in range(codes // 4):
            here, shift = uint32(at + uint32(4 * quad)), uint32(4 * bits * quad)
            first = read4(held, here)
            second, third, fourth = first, first, first
            if many > 1:
                second = read4(held, uint32(here + uint32(HELD)))
                third = read4(held, uint32(here + uint32(2 * HELD)))
                fourth = read4(held, uint32(here + uint32(3 * HELD)))
            sums = (
                dot4(sums[0], first, words[0], shift, bits, zeros[0]),
                dot4(sums[1], second, words[1], shift, bits, zeros[1]),
                dot4(sums[2], third, words[2], shift, bits, zeros[2]),
                dot4(sums[3], fourth, words[3], shift, bits, zeros[3]),
            )
        return sums

    @inlined
    def row_of(first, k, rows):  # type: ignore[no-untyped-def]
        """Return the row of a sum; lanes beyond the last row take it instead."""
        return min(uint32(first + uint32(k if many == 1 else 0)), uint32(rows - uint32(1)))

    @inlined
    def four_of(values, first, rows, step, group):  # type: ignore[no-untyped-def]
        """Return a group's scales, or zeros, of the row of each sum."""
        return (
            values[uint32(uint32(row_of(first, 0, rows) * step) + group)],
            values[uint32(uint32(row_of(first, 1, rows) * step) + group)],
            values[uint32(uint32(row_of(first, 2, rows) * step) + group)],
            values[uint32(uint32(row_of(first, 3, rows) * step) + group)],
        )

    @inlined
    def finish(y, total, k, first, token, rows, tokens):  # type: ignore[no-untyped-def]
        """Add the lanes of a sum, and store it."""
        whole = sum_of_lanes(total, uint32(32))
        row = uint32(first + uint32(k if many == 1 else 0))
        of_token = uint32(token + uint32(k if many > 1 else 0))
        if cuda.threadIdx.x & uint32(31) == uint32(0) and row < rows and of_token < tokens:
            write(y, uint32(uint32(of_token * rows) + row), whole)

    def few(  # type: ignore[no-untyped-def]
        x, w, scale, zero, column, group, y, tokens, columns, rows, pitch, step, in_order
    ):
        held = cuda.shared.array(held_numbers, float32, alignment=16)
        thread, lane = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.x & uint32(31))
        first = uint32(uint32(cuda.blockIdx.x * uint32(WARPS)) + uint32(thread >> uint32(5)))
        first = uint32(first * uint32(down))
        token = uint32(cuda.blockIdx.y * uint32(many))
        total = (float32(0), float32(0), float32(0), float32(0))
        start = uint32(0)
        while start < pitch:
            inside = uint32(thread * uint32(4))
            at = uint32(uint32(uint32(inside >> uint32(5)) * uint32(APART)) + inside % uint32(STEP))
            for m in range(many):
                row = uint32(min(uint32(token + uint32(m)), uint32(tokens - uint32(1))) * columns)
                place = uint32(start + inside)
                bring(held, uint32(at + uint32(m * HELD)), x, row, place, pitch, column, in_order)
            cuda.syncthreads()
            mine = uint32(start + uint32(lane * uint32(STEP)))
            if mine < pitch:
                of_group = uint32(group[uint32(mine // uint32(STEP))])
                zeros = four_of(zero, first, rows, step, of_group)
                part = (float32(0), float32(0), float32(0), float32(0))
                at = uint32(lane * uint32(APART))
                for load in range(loads):
                    offset = uint32(uint32(mine // uint32(codes)) + uint32(4 * load))
                    words = uint32(pitch // uint32(codes))
                    a = load4(w, uint32(uint32(row_of(first, 0, rows) * words) + offset))
                    b, c, d = a, a, a
                    if many == 1:
                        b = load4(w, uint32(uint32(row_of(first, 1, rows) * words) + offset))
                        c = load4(w, uint32(uint32(row_of(first, 2, rows) * words) + offset))
                        d = load4(w, uint32(uint32(row_of(first, 3, rows) * words) + offset))
                    part = add_word(part, (a[0], b[0], c[0], d[0]), held, at, zeros)
                    at = uint32(at + uint32(codes))
                    part = add_word(part, (a[1], b[1], c[1], d[1]), held, at, zeros)
                    at = uint32(at + uint32(codes))
                    part = add_word(part, (a[2], b[2], c[2], d[2]), held, at, zeros)
                    at = uint32(at + uint32(codes))
                    part = add_word(part, (a[3], b[3], c[3], d[3]), held, at, zeros)
                    at = uint32(at + uint32(codes))
                scales = four_of(scale, first, rows, step, of_group)
                total = (
                    cuda.fma(part[0], scales[0], total[0]),
                    cuda.fma(part[1], scales[1], total[1]),
                    cuda.fma(part[2], scales[2], total[2]),
                    cuda.fma(part[3], scales[3], total[3]),
                )
            cuda.syncthreads()
            start = uint32(start + uint32(CHUNK))
        finish(y, total[0], 0, first, token, rows, tokens)
        finish(y, total[1], 1, first, token, rows, tokens)
        finish(y, total[2], 2, first, token, rows, tokens)
        finish(y, total[3], 3, first, token, rows, tokens)

    few.__name__ = f"few_{bits}_bits_{many}"
    return for_activations(few, TYPES, dtype)


FEW = {
    (dtype, bits, many): _few(dtype, bits, many)
    for dtype in ACTIVATIONS
    for bits in (4, 8)
    for many in (1, 4)
}
"""(dtype, bits, tokens at once) -> the kernel."""
