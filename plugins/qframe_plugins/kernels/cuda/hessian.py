"""Second moments of activations: `hessian_update`.

The sum behind the Hessian of GPTQ, H = (2/n) X^T X (arXiv:2210.17323, eq. (1)).

Method: a block takes 64 x 64 numbers of H on or below the diagonal, a thread 4 x 4 of them, 16 to a
        side apart, so that neighbours store side by side. 16 tokens at a time lie in shared memory.
Error:  docs/bounds.md, B9.d: runs of at most RUN tokens are summed in float32 and added to H in
        float64, run after run. That sum is the only thing here that is computed in float64: one of
        RUN fused multiply-adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import cuda, float32, float64, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Source, inlined
from qframe_plugins.kernels.cuda.device import Launcher, dense
from qframe_plugins.kernels.cuda.float_tile import added
from qframe_plugins.kernels.cuda.intrinsics import read4
from qframe_plugins.kernels.cuda.short_floats import READ, as_words, dtype_of, for_activations

if TYPE_CHECKING:
    import torch

THREADS = 256
SIDE = 64  # of a block of H
DEPTH = 16  # tokens in shared memory
RUN = 256  # tokens that are summed in float32
HELD = DEPTH * SIDE


def accumulate(on: Launcher, hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to the lower triangle of `hessian`; the upper one is left as it is.

    hessian   [columns, columns] float64, C-contiguous, changed in place
    x         [tokens, columns] of activations
    """
    tokens, columns = x.shape
    if tokens and columns:
        blocks = -(-columns // SIDE)
        given = as_words(dense(x)), hessian, tokens, columns
        on.launch(MOMENTS[dtype_of(x)], (blocks, blocks), THREADS, *given)


def _bring(dtype: str) -> Any:
    read = READ[dtype]

    @inlined
    def bring(held, x, first, token, last, columns, thread):  # type: ignore[no-untyped-def]
        """Copy DEPTH tokens' numbers in SIDE columns, with zeros where there are none."""
        place = thread
        while place < uint32(HELD):
            own, column = (
                uint32(token + uint32(place // uint32(SIDE))),
                uint32(place % uint32(SIDE)),
            )
            column = uint32(first + column)
            number = float32(0)
            if own < last and column < columns:
                number = read(x, uint32(uint32(own * columns) + column))
            held[place] = number
            place = uint32(place + uint32(THREADS))

    return bring


@inlined
def add_to(hessian, total, row, column, columns):  # type: ignore[no-untyped-def]
    """Add a total to a number of H, if it is on or below the diagonal."""
    if row < columns and column <= row:
        place = uint32(uint32(row * columns) + column)
        hessian[place] = hessian[place] + float64(total)


@inlined
def add_row(hessian, sums, row, column, columns):  # type: ignore[no-untyped-def]
    """Add four sums to a row of H, 16 columns apart."""
    add_to(hessian, sums[0], row, column, columns)
    add_to(hessian, sums[1], row, uint32(column + uint32(16)), columns)
    add_to(hessian, sums[2], row, uint32(column + uint32(32)), columns)
    add_to(hessian, sums[3], row, uint32(column + uint32(48)), columns)


def _add_moments(dtype: str) -> Source:
    bring = _bring(dtype)

    def add_moments(x, hessian, tokens, columns):  # type: ignore[no-untyped-def]
        """Add the products of all tokens to SIDE x SIDE numbers of H."""
        left = cuda.shared.array(HELD, float32, alignment=16)
        right = cuda.shared.array(HELD, float32, alignment=16)
        if cuda.blockIdx.x > cuda.blockIdx.y:  # above the diagonal
            return
        thread = uint32(cuda.threadIdx.x)
        first_row = uint32(cuda.blockIdx.y * uint32(SIDE))
        first_column = uint32(cuda.blockIdx.x * uint32(SIDE))
        down, across = uint32(uint32(thread >> uint32(4)) * uint32(4)), uint32(thread & uint32(15))
        row, column = uint32(first_row + down), uint32(first_column + across)
        none = (float32(0), float32(0), float32(0), float32(0))
        start = uint32(0)
        while start < tokens:
            last = min(uint32(start + uint32(RUN)), tokens)
            one, two, three, four = none, none, none, none
            token = start
            while token < last:
                bring(left, x, first_row, token, last, columns, thread)
                bring(right, x, first_column, token, last, columns, thread)
                cuda.syncthreads()
                k = uint32(0)
                while k < uint32(HELD):
                    rows = read4(left, uint32(k + down))
                    a, b = right[uint32(k + across)], right[uint32(uint32(k + across) + uint32(16))]
                    c = right[uint32(uint32(k + across) + uint32(32))]
                    d = right[uint32(uint32(k + across) + uint32(48))]
                    others = (a, b, c, d)
                    one, two = added(one, rows[0], others), added(two, rows[1], others)
                    three, four = added(three, rows[2], others), added(four, rows[3], others)
                    k = uint32(k + uint32(SIDE))
                cuda.syncthreads()
                token = uint32(token + uint32(DEPTH))
            add_row(hessian, one, row, column, columns)
            add_row(hessian, two, uint32(row + uint32(1)), column, columns)
            add_row(hessian, three, uint32(row + uint32(2)), column, columns)
            add_row(hessian, four, uint32(row + uint32(3)), column, columns)
            start = last

    return for_activations(add_moments, "x, float64*, uint32, uint32", dtype, fp64=True)


MOMENTS = {dtype: _add_moments(dtype) for dtype in ACTIVATIONS}
