"""Attention of one query per sequence over keys and values in codes: `attention_kv`.

Source: Liu et al., KIVI, ICML 2024, arXiv:2402.02750 (the cache); Milakov and Gimelshein, Online
        normalizer calculation for softmax, 2018, arXiv:1805.02867; Dao et al., Flash-Decoding, 2023
        (pieces of the text, merged).
Method: a block takes a head and a piece of the text, 128 tokens at a time: logits, then weights,
        with the largest logit so far taken off, then the sums of values. Codes are decoded where
        they are used, and lanes stand side by side where codes do: over channels where a row is a
        token's, over tokens where it is a channel's. A second kernel merges the pieces.
Error:  docs/bounds.md, B7.e and B7.i; a weight is rescaled once for each 128 tokens of its piece,
        and once for the piece.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numba import cuda, float32, uint32

from qframe_plugins.kernels.cuda.attention_steps import (
    PIECE,
    THREADS,
    WARPS,
    hold_query,
    keep_piece,
    merge_pieces,
    weigh,
)
from qframe_plugins.kernels.cuda.cache import TYPES, arguments, number_at
from qframe_plugins.kernels.cuda.compile import source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.int8_layout import sum_of_lanes

if TYPE_CHECKING:
    import torch

    from qframe import KVScheme

    Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, KVScheme]


def attend(
    on: Launcher, q: torch.Tensor, keys: Part, values: Part, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (softmax(q K^T / sqrt(head_dim)) V, the logarithm of its denominator).

    q              [batch, heads, head_dim]
    keys, values   (words [batch, kv heads, rows, words], scale, offset, scheme)

    Returns [batch, heads, head_dim] and [batch, heads], float32.
    """
    import torch

    batch, heads, width = q.shape
    kv_heads = keys[0].shape[1]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    out, lse = empty(batch, heads, width), empty(batch, heads)
    if not lse.numel():
        return out, lse
    lanes, pieces = batch * heads, -(-tokens // PIECE)
    sums = empty(lanes, pieces, width)
    state = empty(lanes, pieces, 2)
    splits = max(THREADS // width, 1)
    given = (
        *(dense(q), *arguments(*keys, width), *arguments(*values, width)),
        *(Fresh(sums), Fresh(state), heads // kv_heads, width, tokens, splits),
        1 / math.sqrt(width),
    )
    shared = 4 * (width + splits * width)
    on.launch(attend_piece, (lanes, pieces), THREADS, *given, shared=shared)
    on.launch(merge_pieces, lanes, THREADS, sums, state, Fresh(out), Fresh(lse), width, pieces)
    return out, lse


@source(f"float32*, {TYPES}, {TYPES}, float32*, float32*, uint32, uint32, uint32, uint32, float32")
def attend_piece(  # type: ignore[no-untyped-def]
    q, k_words, k_scale, k_offset, k_bits, k_lowest, k_rows, k_row, k_step, k_span, k_groups,
    k_above, v_words, v_scale, v_offset, v_bits, v_lowest, v_rows, v_row, v_step, v_span, v_groups,
    v_above, sums, state, sharing, width, tokens, splits, factor,
):  # fmt: skip
    """Attend to a piece of the text: the sums of values, the largest logit, the denominator.

    sharing   query heads that read the same head of the cache
    splits    threads that share a channel, where there are fewer channels than threads
    """
    held = cuda.shared.array(0, float32)  # the query, then `splits` sums for each channel
    weight = cuda.shared.array(THREADS, float32)
    found = cuda.shared.array(WARPS, float32)
    thread, lane = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.x & uint32(31))
    warp = uint32(thread >> uint32(5))
    query = uint32(cuda.blockIdx.x)
    head = uint32(query // sharing)
    first = uint32(cuda.blockIdx.y * uint32(PIECE))
    last = min(uint32(first + uint32(PIECE)), tokens)
    hold_query(held, q, query, width, splits, factor)

    largest, total = float32(-math.inf), float32(0)
    while first < last:
        count = min(uint32(last - first), uint32(THREADS))
        if k_step != uint32(0):  # neighbouring codes are of neighbouring tokens
            logit = float32(0)
            if thread < count:
                c = uint32(0)
                while c < width:
                    key = number_at(
                        head, uint32(first + thread), c, width, k_words, k_scale, k_offset, k_bits,
                        k_lowest, k_rows, k_row, k_step, k_span, k_groups, k_above,
                    )  # fmt: skip
                    logit = cuda.fma(held[c], key, logit)
                    c = uint32(c + uint32(1))
            weight[thread] = logit
        else:
            token = warp
            while token < count:
                logit = float32(0)
                c = lane
                while c < width:
                    key = number_at(
                        head, uint32(first + token), c, width, k_words, k_scale, k_offset, k_bits,
                        k_lowest, k_rows, k_row, k_step, k_span, k_groups, k_above,
                    )  # fmt: skip
                    logit = cuda.fma(held[c], key, logit)
                    c = uint32(c + uint32(32))
                logit = sum_of_lanes(logit, uint32(32))
                if lane == uint32(0):
                    weight[token] = logit
                token = uint32(token + uint32(WARPS))
        cuda.syncthreads()

        largest, shrunk, total = weigh(weight, found, count, largest, total)

        if v_step != uint32(0):
            c = warp
            while c < width:
                part = float32(0)
                token = lane
                while token < count:
                    number = number_at(
                        head, uint32(first + token), c, width, v_words, v_scale, v_offset, v_bits,
                        v_lowest, v_rows, v_row, v_step, v_span, v_groups, v_above,
                    )  # fmt: skip
                    part = cuda.fma(weight[token], number, part)
                    token = uint32(token + uint32(32))
                part = sum_of_lanes(part, uint32(32))
                if lane == uint32(0):
                    place = uint32(width + c)
                    held[place] = cuda.fma(held[place], shrunk, part)
                c = uint32(c + uint32(WARPS))
        else:
            slot = thread
            while slot < uint32(splits * width):
                split = uint32(slot // width)
                c = uint32(slot - uint32(split * width))
                part = float32(0)
                token = split
                while token < count:
                    number = number_at(
                        head, uint32(first + token), c, width, v_words, v_scale, v_offset, v_bits,
                        v_lowest, v_rows, v_row, v_step, v_span, v_groups, v_above,
                    )  # fmt: skip
                    part = cuda.fma(weight[token], number, part)
                    token = uint32(token + splits)
                place = uint32(width + slot)
                held[place] = cuda.fma(held[place], shrunk, part)
                slot = uint32(slot + uint32(THREADS))
        cuda.syncthreads()
        first = uint32(first + uint32(THREADS))

    keep_piece(held, sums, state, query, width, splits, largest, total)
