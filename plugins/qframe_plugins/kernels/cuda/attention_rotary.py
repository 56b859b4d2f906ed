"""Attention of the newest token, its position turned in, over numbers: `attention_rotary`.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, with the pairs of transformers: the columns i
        and i + head_dim / 2; softmax and pieces as in attention_steps.py.
Method: queries and keys are turned first. Then a block takes a head and a piece of the text, 128
        tokens at a time: a warp has the logit of a token, neighbouring lanes neighbouring columns.
Error:  docs/bounds.md, B13.b and B7.e; a weight is rescaled once for each 128 tokens of its piece,
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
from qframe_plugins.kernels.cuda.compile import source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.int8_layout import sum_of_lanes

if TYPE_CHECKING:
    import torch


def attend(
    on: Launcher,
    newest: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    past: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the output [batch, heads, head_dim], the key, turned), float32.

    newest   q [batch, heads, head_dim], k and v [batch, kv heads, head_dim]
    angles   cosines and sines, [batch, head_dim]
    past     keys and values, [batch, kv heads, tokens, head_dim]
    """
    import torch

    q, k, v = newest
    (batch, heads, width), kv_heads, tokens = q.shape, k.shape[1], past[0].shape[2]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    out, key, query = empty(*q.shape), empty(*k.shape), empty(*q.shape)
    if not out.numel():
        return out, key
    cos, sin = (dense(each) for each in angles)
    for given, made in ((q, query), (k, key)):
        count = given.shape[1]
        halves = count, width // 2
        on.launch(turn_heads, batch * count, 32, dense(given), cos, sin, Fresh(made), *halves)
    lanes, pieces = batch * heads, -(-(tokens + 1) // PIECE)
    sums, state, lse = empty(lanes, pieces, width), empty(lanes, pieces, 2), empty(lanes)
    splits = max(THREADS // width, 1)
    rows = query, key, dense(v), *(dense(each) for each in past)
    others = Fresh(sums), Fresh(state), heads // kv_heads, width, tokens, splits, scaling
    shared = 4 * (width + splits * width)
    on.launch(attend_newest, (lanes, pieces), THREADS, *rows, *others, shared=shared)
    on.launch(merge_pieces, lanes, THREADS, sums, state, Fresh(out), Fresh(lse), width, pieces)
    return out, key


@source("float32*, float32*, float32*, float32*, uint32, uint32")
def turn_heads(x, cos, sin, y, heads, half):  # type: ignore[no-untyped-def]
    """Turn the pairs of a head by the angles of its sequence, by a warp."""
    head = uint32(cuda.blockIdx.x)
    row = uint32(uint32(head * half) << uint32(1))
    angle = uint32(uint32(uint32(head // heads) * half) << uint32(1))
    i = uint32(cuda.threadIdx.x)
    while i < half:
        left, right = uint32(row + i), uint32(uint32(row + half) + i)
        one, other = uint32(angle + i), uint32(uint32(angle + half) + i)
        y[left] = x[left] * cos[one] - x[right] * sin[one]
        y[right] = x[right] * cos[other] + x[left] * sin[other]
        i = uint32(i + uint32(32))


@source(
    "float32*, float32*, float32*, float32*, float32*, float32*, float32*, "
    "uint32, uint32, uint32, uint32, float32"
)
def attend_newest(  # type: ignore[no-untyped-def]
    q, k, v, keys, values, sums, state, sharing, width, tokens, splits, scaling
):
    """Attend to a piece of the text, of which the newest token is the last.

    q, k      turned
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
    newest, start = uint32(head * width), uint32(uint32(head * tokens) * width)
    first = uint32(cuda.blockIdx.y * uint32(PIECE))
    last = min(uint32(first + uint32(PIECE)), uint32(tokens + uint32(1)))
    hold_query(held, q, query, width, splits, scaling)

    largest, total = float32(-math.inf), float32(0)
    while first < last:
        count = min(uint32(last - first), uint32(THREADS))
        token = warp
        while token < count:
            logit = float32(0)
            is_newest = uint32(first + token) == tokens
            row = uint32(start + uint32(uint32(first + token) * width))
            c = lane
            while c < width:
                key = k[uint32(newest + c)] if is_newest else keys[uint32(row + c)]
                logit = cuda.fma(held[c], key, logit)
                c = uint32(c + uint32(32))
            logit = sum_of_lanes(logit, uint32(32))
            if lane == uint32(0):
                weight[token] = logit
            token = uint32(token + uint32(WARPS))
        cuda.syncthreads()

        largest, shrunk, total = weigh(weight, found, count, largest, total)

        slot = thread
        while slot < uint32(splits * width):
            split = uint32(slot // width)
            c = uint32(slot - uint32(split * width))
            part = float32(0)
            token = split
            while token < count:
                is_newest = uint32(first + token) == tokens
                row = uint32(start + uint32(uint32(first + token) * width))
                number = v[uint32(newest + c)] if is_newest else values[uint32(row + c)]
                part = cuda.fma(weight[token], number, part)
                token = uint32(token + splits)
            place = uint32(width + slot)
            held[place] = cuda.fma(held[place], shrunk, part)
            slot = uint32(slot + uint32(THREADS))
        cuda.syncthreads()
        first = uint32(first + uint32(THREADS))

    keep_piece(held, sums, state, query, width, splits, largest, total)
