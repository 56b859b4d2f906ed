"""Randomized Hadamard transforms of blocks of columns: `hadamard`.

Source: QuaRot (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456); the fast Walsh-Hadamard transform.
Method: a block of threads takes a span of a token that is whole blocks of columns. Butterflies of
        distances below 32 are shuffles in a warp, the others go through shared memory, where
        neighbouring lanes then have neighbouring places.
Error:  docs/bounds.md, B8.a: log2(block) sums, each rounded once, and one product. The sums are
        those of the kernel for CPUs, so the bits are, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numba import cuda, float32, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.short_floats import (
    READ,
    WRITE,
    as_words,
    dtype_of,
    for_activations,
)
from qframe_plugins.kernels.cuda.tokens import FULL

if TYPE_CHECKING:
    import torch

THREADS = 128
SPAN = 1024  # columns of a block of threads, where blocks of columns are not larger
LARGEST = 8192  # columns of a block that fit into shared memory


def hadamard(on: Launcher, x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Return x diag(signs) H / sqrt(block), block by block, [tokens, columns], like x.

    x       [tokens, columns] of activations
    signs   [columns] float32, +1 or -1
    block   a power of two up to LARGEST that divides the columns
    """
    import torch

    tokens, columns = x.shape
    y = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    if y.numel():
        span = min(max(block, SPAN), columns)
        given = as_words(dense(x)), dense(signs), Fresh(as_words(y)), columns, block, span
        grid = tokens, -(-columns // span)
        factor, kernel = 1 / math.sqrt(block), TRANSFORM[dtype_of(x)]
        on.launch(kernel, grid, THREADS, *given, factor, shared=4 * span)
    return y


def _transform(dtype: str) -> Source:
    read, write = READ[dtype], WRITE[dtype]

    def transform(x, signs, y, columns, block, span, factor):  # type: ignore[no-untyped-def]
        """Transform a span of a token, in dynamic shared memory."""
        held = cuda.shared.array(0, float32)
        thread, lane = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.x & uint32(31))
        start = uint32(cuda.blockIdx.y * span)
        row = uint32(cuda.blockIdx.x * columns)
        count = min(span, uint32(columns - start))

        place = thread
        while uint32(place - thread) < count:  # all lanes of a warp go round as often
            number = float32(0)
            if place < count:
                column = uint32(start + place)
                number = read(x, uint32(row + column)) * signs[column]
            distance = uint32(1)
            while distance < min(block, uint32(32)):
                other = cuda.shfl_xor_sync(FULL, number, distance)
                number = other - number if lane & distance else number + other
                distance = uint32(distance << uint32(1))
            if place < count:
                held[place] = number
            place = uint32(place + uint32(THREADS))
        cuda.syncthreads()

        distance = uint32(32)
        while distance < block:
            pair = thread
            while pair < uint32(count >> uint32(1)):
                low = uint32(pair & uint32(distance - uint32(1)))
                left = uint32(uint32(uint32(pair - low) << uint32(1)) + low)
                one, other = held[left], held[uint32(left + distance)]
                held[left] = one + other
                held[uint32(left + distance)] = one - other
                pair = uint32(pair + uint32(THREADS))
            cuda.syncthreads()
            distance = uint32(distance << uint32(1))

        place = thread
        while place < count:
            write(y, uint32(row + uint32(start + place)), held[place] * factor)
            place = uint32(place + uint32(THREADS))

    return for_activations(transform, "x, float32*, x, uint32, uint32, uint32, float32", dtype)


TRANSFORM = {dtype: _transform(dtype) for dtype in ACTIVATIONS}
