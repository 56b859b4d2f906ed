"""Codes of tokens: `quantize_activations`.

Source: the vector-wise quantization of LLM.int8() (Dettmers et al., NeurIPS 2022,
        arXiv:2208.07339, section 3.1): a scale for each token, absmax / 127.
Method: a block of threads for each token. The largest magnitude is found as an integer: the bits of
        magnitudes are in the order of the numbers, NaN above infinity. Rows whose length is a
        multiple of four are read by 128 bits, and their codes written by 32.
Error:  docs/bounds.md, B6.a and B6.b, with one rounding each: quotients, so the bits are those of
        the kernel for CPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import cuda, float32, int8, int32, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Source, inlined
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.intrinsics import bits_of, float_of, nearest, store_word
from qframe_plugins.kernels.cuda.short_floats import (
    READ,
    READ4,
    as_words,
    dtype_of,
    for_activations,
)

if TYPE_CHECKING:
    import torch

THREADS = 128
WARPS = THREADS // 32
LARGEST = 127  # the largest code
FULL = 0xFFFFFFFF  # all lanes of a warp
_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
_INFINITY = 0x7F800000
_SMALLEST = 2.0**-149  # a scale that would vanish is this


def quantize(on: Launcher, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [tokens, columns] int8, scale [tokens] float32) of x [tokens, columns].

    A token with a NaN or an infinity has codes 0 and a scale that is not finite.
    """
    import torch

    tokens, columns = x.shape
    codes = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        whole = columns if columns % 4 == 0 else 0
        given = as_words(dense(x)), Fresh(codes), Fresh(scale), columns, whole
        on.launch(QUANTIZE[dtype_of(x)], tokens, THREADS, *given)
    return codes, scale


@inlined
def magnitude(number):  # type: ignore[no-untyped-def]
    """Return the bits of a number without its sign, an int32."""
    return int32(bits_of(number) & uint32(_MAGNITUDE))


@inlined
def largest_of_block(bits, found):  # type: ignore[no-untyped-def]
    """Return the largest of the threads' numbers, int32; `found` has a place for each warp."""
    for distance in (16, 8, 4, 2, 1):
        bits = max(bits, cuda.shfl_xor_sync(FULL, bits, distance))
    thread = uint32(cuda.threadIdx.x)
    if thread & uint32(31) == uint32(0):
        found[uint32(thread >> uint32(5))] = bits
    cuda.syncthreads()
    for warp in range(WARPS):
        bits = max(bits, found[uint32(warp)])
    return bits


@inlined
def scale_of(bits):  # type: ignore[no-untyped-def]
    """Return the scale of a token whose largest magnitude has these bits."""
    if bits >= int32(_INFINITY):
        return float_of(uint32(bits))
    if bits > int32(0):
        return max(float_of(uint32(bits)) / float32(LARGEST), float32(_SMALLEST))
    return float32(1)


@inlined
def code_of(number, bits, scale):  # type: ignore[no-untyped-def]
    """Return the nearest code, int32; 0 in a token that is not finite."""
    if bits >= int32(_INFINITY):
        return int32(0)
    return max(min(nearest(number / scale), int32(LARGEST)), int32(-LARGEST))


def _quantize_tokens(dtype: str) -> Source:
    read, read4 = READ[dtype], READ4[dtype]

    def quantize_tokens(x, codes, scale, columns, whole):  # type: ignore[no-untyped-def]
        """Set the codes and the scale of a token, by a block of THREADS threads.

        whole   columns that are taken four at a time: all, where a row begins at a multiple of four
        """
        found = cuda.shared.array(WARPS, int32)
        token, thread = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x)
        row = uint32(token * columns)
        bits = int32(0)
        column = uint32(thread * uint32(4))
        while column < whole:
            for number in read4(x, uint32(row + column)):
                bits = max(bits, magnitude(number))
            column = uint32(column + uint32(4 * THREADS))
        column = uint32(whole + thread)
        while column < columns:
            bits = max(bits, magnitude(read(x, uint32(row + column))))
            column = uint32(column + uint32(THREADS))
        bits = largest_of_block(bits, found)
        step = scale_of(bits)
        if thread == uint32(0):
            scale[token] = step

        column = uint32(thread * uint32(4))
        while column < whole:
            word, shift = uint32(0), uint32(0)
            for number in read4(x, uint32(row + column)):
                code = uint32(code_of(number, bits, step) & int32(255))
                word, shift = uint32(word | uint32(code << shift)), uint32(shift + uint32(8))
            store_word(codes, uint32(row + column), word)
            column = uint32(column + uint32(4 * THREADS))
        column = uint32(whole + thread)
        while column < columns:
            codes[uint32(row + column)] = int8(code_of(read(x, uint32(row + column)), bits, step))
            column = uint32(column + uint32(THREADS))

    return for_activations(quantize_tokens, "x, int8*, float32*, uint32, uint32", dtype)


QUANTIZE = {dtype: _quantize_tokens(dtype) for dtype in ACTIVATIONS}
