"""Attention of one query per sequence over keys and values in codes: `attention_kv`.

Source: Liu et al., KIVI, ICML 2024, arXiv:2402.02750 (the cache: a row of codes is a token's, or a
        channel's of some tokens); Dao et al., Flash-Decoding, 2023 (pieces of the text, merged).
Method: a few rows at a time are decoded into the fastest cache, and meet the queries of all heads
        that share them there; for one or two heads they are decoded in registers. A piece of the
        text is read twice: its keys for all logits, then, with the largest known, its values. So
        nothing is as large as the decoded cache.
Error:  docs/bounds.md, B7.e and B7.i, a logit being rescaled once for its piece.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qframe import KVScheme
from qframe_plugins.kernels.numba_cpu.attention_steps import (
    LANES,
    dots,
    largest_of,
    mix_rows,
    powers,
)
from qframe_plugins.kernels.numba_cpu.rows import CHUNK, are_whole, decode, in_order, mix, rows_of
from qframe_plugins.kernels.numba_cpu.simd import claim, inner, kernel, zeros
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

PIECE = 1024  # tokens of a piece, at least
_AT_ONCE = 2  # heads for which it is cheaper to decode again than to store what was decoded

Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]


def attend(
    q: Float32,
    keys: tuple[Words, Float32, Float32, KVScheme],
    values: tuple[Words, Float32, Float32, KVScheme],
    tokens: int,
) -> tuple[Float32, Float32]:
    """Return (softmax(q K^T / sqrt(head_dim)) V, the logarithm of its denominator).

    q             [batch, heads, head_dim]
    keys, values  (words [batch, kv heads, rows, words], scale, offset, scheme)

    Returns [batch, heads, head_dim] and [batch, heads], float32. Raises ValueError for operands
    that do not fit.
    """
    batch, heads, width = q.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    queries = np.ascontiguousarray(q) * np.float32(1 / math.sqrt(width))
    queries = queries.reshape(batch * kv_heads, group, width)
    k, v = (rows_of(*each, tokens, width) for each in (keys, values))
    unit = math.lcm(keys[3].step, values[3].step)
    piece = unit * -(-PIECE // unit)
    pieces = -(-tokens // piece)
    lanes = batch * kv_heads
    sums = np.empty((lanes * pieces, group, width), np.float32)
    state = np.empty((lanes * pieces, group, 2), np.float32)
    out = np.empty((lanes, group, width), np.float32)
    lse = np.empty((lanes, group), np.float32)
    read = sum(part.nbytes for each in (k, v) for part in each[:3])
    tasks = worth_sharing(lanes * pieces, read, 2 * batch * heads * tokens * width)
    share(_share_pieces, tasks, queries, *k, *v, tokens, piece, sums, state)
    _merge(sums, state, out, lse)
    return out.reshape(batch, heads, width), lse.reshape(batch, heads)


# Pieces ---------------------------------------------------------------------------------------


@inner
def _mix_codes(words, scale, offset, layout, lane, row, count, weights, sums):  # type: ignore[no-untyped-def]
    """Add to sums[g] the sum of weights[g, r] times the row row + r, r < count."""
    width, length = sums.shape[1], weights.shape[1]
    some = CHUNK if layout[4] > 1 else count  # of rows in groups, those that the cache holds
    for first in range(0, count, some):
        rows = lane, row + first, min(some, count - first)
        for g in range(len(sums)):
            mix(words, scale, offset, layout, rows, weights, g * length + first, sums, g * width)


@inner
def _logits(queries, k, begin, end, taken, chunk, sums, out):  # type: ignore[no-untyped-def]
    """Set out[g, t - begin] to the logits of the tokens begin <= t < end.

    queries   [group, head_dim], scaled
    k         (lane, Rows of keys)
    taken     [group, width of a row] float32, zeros where no code of a row lies
    chunk     [CHUNK, width] float32
    sums      [group, width] float32
    """
    lane, words, scale, offset, place, layout = k
    group, width = queries.shape
    step = layout[1]
    if step == 0:  # rows are tokens
        for g in range(group):
            for c in range(width):
                taken[g, place[c]] = queries[g, c]
        for first in range(begin, end, CHUNK):
            count = min(CHUNK, end - first)
            decode(words, scale, offset, layout, lane, first, count, chunk)
            for g in range(group):
                dots(taken, g, chunk, count, out, first - begin)
        return
    at_once = group <= _AT_ONCE and are_whole(layout)
    for unit in range(begin // step, -(-end // step)):
        sums[:, :] = 0
        row = unit * width
        if at_once:
            _mix_codes(words, scale, offset, layout, lane, row, width, queries, sums)
        else:
            for first in range(0, width, CHUNK):
                count = min(CHUNK, width - first)
                decode(words, scale, offset, layout, lane, row + first, count, chunk)
                for g in range(group):
                    mix_rows(sums, g, queries, first, chunk, count)
        for g in range(group):
            in_order(sums, g, place, min(step, end - unit * step), out, unit * step - begin)


@inner
def _output(weights, v, begin, end, taken, chunk, sums, found, out):  # type: ignore[no-untyped-def]
    """Set out[g] to the sum of weights[g, t - begin] times value t, begin <= t < end."""
    lane, words, scale, offset, place, layout = v
    group, width = out.shape
    step = layout[1]
    if step == 0:
        sums[:, :] = 0
        if group <= _AT_ONCE and are_whole(layout):
            _mix_codes(words, scale, offset, layout, lane, begin, end - begin, weights, sums)
        else:
            for first in range(begin, end, CHUNK):
                count = min(CHUNK, end - first)
                decode(words, scale, offset, layout, lane, first, count, chunk)
                for g in range(group):
                    mix_rows(sums, g, weights, first - begin, chunk, count)
        for g in range(group):
            in_order(sums, g, place, width, out, 0)
        return
    out[:, :] = 0
    for unit in range(begin // step, -(-end // step)):
        taken[:, :] = 0
        for g in range(group):
            for t in range(min(step, end - unit * step)):
                taken[g, place[t]] = weights[g, unit * step + t - begin]
        for first in range(0, width, CHUNK):
            count = min(CHUNK, width - first)
            decode(words, scale, offset, layout, lane, unit * width + first, count, chunk)
            for g in range(group):
                dots(taken, g, chunk, count, found, 0)
                for c in range(count):
                    out[g, first + c] += found[g, c]


@kernel
def _share_pieces(  # type: ignore[no-untyped-def]
    counter,
    queries,
    k_words,
    k_scale,
    k_offset,
    k_place,
    k_layout,
    v_words,
    v_scale,
    v_offset,
    v_place,
    v_layout,
    tokens,
    piece,
    sums,
    state,
):
    """Claim pieces of lanes.

    sums    [lanes and pieces, group, head_dim], the sum of e^(logit - largest) times the value
    state   [lanes and pieces, group, 2], the largest logit, and the sum of e^(logit - largest)
    """
    group = queries.shape[1]
    pieces = -(-tokens // piece)
    wide = -(-min(piece, tokens) // LANES) * LANES
    logits = zeros(group, wide)
    k_chunk, k_sums, k_taken = _room(k_layout[0], group)
    v_chunk, v_sums, v_taken = _room(v_layout[0], group)
    found = zeros(group, CHUNK)
    task = claim(counter)
    while task < len(sums):
        lane, begin = task // pieces, task % pieces * piece
        end = min(begin + piece, tokens)
        keys = (lane, k_words, k_scale, k_offset, k_place, k_layout)
        _logits(queries[lane], keys, begin, end, k_taken, k_chunk, k_sums, logits)
        filled = -(-(end - begin) // LANES) * LANES
        for g in range(group):
            logits[g, end - begin : filled] = -np.inf
            largest = largest_of(logits, g, filled)
            state[task, g, 0] = largest
            state[task, g, 1] = powers(logits, g, filled, largest)
        values = (lane, v_words, v_scale, v_offset, v_place, v_layout)
        _output(logits, values, begin, end, v_taken, v_chunk, v_sums, found, sums[task])
        task = claim(counter)


@kernel
def _room(width, group):  # type: ignore[no-untyped-def]
    """Return memory for rows of so many numbers."""
    return zeros(CHUNK, width), zeros(group, width), zeros(group, width)


@kernel
def _merge(sums, state, out, lse):  # type: ignore[no-untyped-def]
    """Put pieces together."""
    lanes, group, width = out.shape
    pieces = len(sums) // lanes
    for lane in range(lanes):
        first = lane * pieces
        for g in range(group):
            largest = state[first, g, 0]
            for piece in range(1, pieces):
                largest = max(largest, state[first + piece, g, 0])
            total = np.float32(0)
            out[lane, g, :] = 0
            for piece in range(pieces):
                weight = np.exp(state[first + piece, g, 0] - largest)
                total += weight * state[first + piece, g, 1]
                for c in range(width):
                    out[lane, g, c] += weight * sums[first + piece, g, c]
            for c in range(width):
                out[lane, g, c] /= total
            lse[lane, g] = largest + np.log(total)
