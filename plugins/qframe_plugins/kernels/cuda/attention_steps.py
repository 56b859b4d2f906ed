"""What kernels of attention share: an online softmax over 128 tokens at a time, pieces of a text.

A block has a query in `held`, dynamic shared memory, and after it `splits` sums for each channel,
which are added up at last: threads share a channel where there are fewer channels than threads.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, arXiv:1805.02867;
        Dao et al., Flash-Decoding, 2023 (pieces of the text, merged).
"""

from __future__ import annotations

import math

from numba import cuda, float32, uint32

from qframe_plugins.kernels.cuda.compile import inlined, source
from qframe_plugins.kernels.cuda.tokens import FULL

THREADS = 128  # tokens at a time, too
WARPS = THREADS // 32
PIECE = 4 * THREADS  # tokens of a block


@inlined
def of_block(number, found, largest):  # type: ignore[no-untyped-def]
    """Return the largest of the threads' numbers, or their sum; `found` has a place for a warp."""
    for distance in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(FULL, number, distance)
        number = max(number, other) if largest else number + other
    cuda.syncthreads()  # what was found before has been read
    thread = uint32(cuda.threadIdx.x)
    if thread & uint32(31) == uint32(0):
        found[uint32(thread >> uint32(5))] = number
    cuda.syncthreads()
    one = (
        max(found[uint32(0)], found[uint32(1)]) if largest else found[uint32(0)] + found[uint32(1)]
    )
    two = (
        max(found[uint32(2)], found[uint32(3)]) if largest else found[uint32(2)] + found[uint32(3)]
    )
    return max(one, two) if largest else one + two


@inlined
def hold_query(held, q, query, width, splits, factor):  # type: ignore[no-untyped-def]
    """Set `held` to a query times a factor, and to sums of nothing."""
    thread = uint32(cuda.threadIdx.x)
    place = thread
    while place < width:
        held[place] = q[uint32(uint32(query * width) + place)] * factor
        place = uint32(place + uint32(THREADS))
    place = thread
    while place < uint32(splits * width):
        held[uint32(width + place)] = float32(0)
        place = uint32(place + uint32(THREADS))
    cuda.syncthreads()


@inlined
def weigh(weight, found, count, largest, total):  # type: ignore[no-untyped-def]
    """Turn the logits of `count` tokens in `weight` into weights, relative to the largest so far.

    Returns that, what earlier sums are multiplied with, and the sum of all weights so far.
    """
    thread = uint32(cuda.threadIdx.x)
    logit = weight[thread] if thread < count else float32(-math.inf)
    above = max(largest, of_block(logit, found, True))
    power = math.exp(float32(logit - above)) if thread < count else float32(0)
    shrunk = math.exp(float32(largest - above))
    weight[thread] = power
    total = cuda.fma(total, shrunk, of_block(power, found, False))
    return above, shrunk, total


@inlined
def keep_piece(held, sums, state, query, width, splits, largest, total):  # type: ignore[no-untyped-def]
    """Write the sums of a piece, its largest logit and its denominator."""
    thread = uint32(cuda.threadIdx.x)
    part_of = uint32(uint32(query * cuda.gridDim.y) + cuda.blockIdx.y)
    place = thread
    while place < width:
        whole, split = float32(0), uint32(0)
        while split < splits:
            whole += held[uint32(uint32(width + place) + uint32(split * width))]
            split = uint32(split + uint32(1))
        sums[uint32(uint32(part_of * width) + place)] = whole
        place = uint32(place + uint32(THREADS))
    if thread == uint32(0):
        state[uint32(part_of * uint32(2))] = largest
        state[uint32(uint32(part_of * uint32(2)) + uint32(1))] = total


@source("float32*, float32*, float32*, float32*, uint32, uint32")
def merge_pieces(sums, state, out, lse, width, pieces):  # type: ignore[no-untyped-def]
    """Merge the pieces of a query: each is scaled to the largest logit of all."""
    query, thread = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x)
    start = uint32(query * pieces)
    largest, piece = float32(-math.inf), uint32(0)
    while piece < pieces:
        largest = max(largest, state[uint32(uint32(start + piece) * uint32(2))])
        piece = uint32(piece + uint32(1))
    total, piece = float32(0), uint32(0)
    while piece < pieces:
        at = uint32(uint32(start + piece) * uint32(2))
        shrunk = math.exp(float32(state[at] - largest))
        total = cuda.fma(state[uint32(at + uint32(1))], shrunk, total)
        piece = uint32(piece + uint32(1))
    place = thread
    while place < width:
        whole, piece = float32(0), uint32(0)
        while piece < pieces:
            of_piece = uint32(start + piece)
            shrunk = math.exp(float32(state[uint32(of_piece * uint32(2))] - largest))
            whole = cuda.fma(sums[uint32(uint32(of_piece * width) + place)], shrunk, whole)
            piece = uint32(piece + uint32(1))
        out[uint32(uint32(query * width) + place)] = whole / total
        place = uint32(place + uint32(THREADS))
    if thread == uint32(0):
        lse[query] = largest + math.log(total)
