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
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe import KVScheme
from qframe_plugins.kernels.numba_cpu.rows import CHUNK, are_whole, decode, mix, rows_of
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel, zeros
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

PIECE = 1024  # tokens of a piece, at least
_LANES = 16
_TILE = 8  # registers of sums that a product with rows keeps
_AT_ONCE = 2  # heads for which it is cheaper to decode again than to store what was decoded
_LOWEST = -87.33  # of e to less than this nothing is left: no normal number

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


# Products with rows ---------------------------------------------------------------------------


@intrinsic
def _dots(typing: Any, x: Any, g: Any, rows: Any, count: Any, out: Any, first: Any) -> Any:
    """Set out[g, first + r] = x[g] . rows[r], r < count. Rows are whole registers long."""
    index = types.int64
    signature = types.void(x, index, rows, index, out, index)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        x_at, (_, width) = v.array(signature.args[0], values[0])
        rows_at, _ = v.array(signature.args[2], values[2])
        out_at, (_, length) = v.array(signature.args[4], values[4])
        stride = builder.mul(width, INT64(4))
        x_at = v.at(x_at, builder.mul(values[1], stride))
        place = builder.add(builder.mul(values[1], length), values[5])
        out_at = v.at(out_at, builder.mul(place, INT64(4)))
        vector = ir.VectorType(FLOAT32, _LANES)
        passes = builder.sdiv(width, INT64(_LANES))
        several = 4
        blocks = builder.sdiv(values[3], INT64(several))

        def products(first: Any, together: int) -> None:
            at = [
                v.at(rows_at, builder.mul(builder.add(first, INT64(r)), stride))
                for r in range(together)
            ]
            with v.loop(passes, [v.const(vector, 0.0)] * together) as loop:
                here = builder.mul(loop.index, INT64(4 * _LANES))
                taken = v.load(v.at(x_at, here), vector)
                loop.hand_on(
                    [
                        v.muladd(v.load(v.at(each, here), vector), taken, total)
                        for each, total in zip(at, loop.values, strict=True)
                    ]
                )
            for r, total in enumerate(loop.values):
                target = v.at(out_at, builder.mul(builder.add(first, INT64(r)), INT64(4)))
                v.store(v.total(total), target)

        with v.loop(blocks) as block:
            products(builder.mul(block.index, INT64(several)), several)
        done = builder.mul(blocks, INT64(several))
        with v.loop(builder.sub(values[3], done)) as rest:
            products(builder.add(done, rest.index), 1)
        return context.get_dummy_value()

    return signature, emit


@intrinsic
def _mix(typing: Any, sums: Any, g: Any, weights: Any, first: Any, rows: Any, count: Any) -> Any:
    """Add to sums[g] the sum of weights[g, first + r] rows[r], r < count."""
    index = types.int64
    signature = types.void(sums, index, weights, index, rows, index)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        sums_at, (_, width) = v.array(signature.args[0], values[0])
        weights_at, (_, length) = v.array(signature.args[2], values[2])
        rows_at, _ = v.array(signature.args[4], values[4])
        stride = builder.mul(width, INT64(4))
        sums_at = v.at(sums_at, builder.mul(values[1], stride))
        place = builder.add(builder.mul(values[1], length), values[3])
        weights_at = v.at(weights_at, builder.mul(place, INT64(4)))
        vector = ir.VectorType(FLOAT32, _LANES)

        def tile(start: Any, registers: int) -> None:
            """Take so many registers from the byte `start` of every row on."""
            at = [v.at(sums_at, builder.add(start, INT64(64 * i))) for i in range(registers)]
            with v.loop(values[5], [v.load(each, vector) for each in at]) as loop:
                weight = v.load(v.at(weights_at, builder.mul(loop.index, INT64(4))), FLOAT32)
                weight = v.splat(weight, _LANES)
                row = v.at(rows_at, builder.add(builder.mul(loop.index, stride), start))
                loop.hand_on(
                    [
                        v.muladd(v.load(v.at(row, 64 * i), vector), weight, total)
                        for i, total in enumerate(loop.values)
                    ]
                )
            for each, total in zip(at, loop.values, strict=True):
                v.store(total, each)

        registers = builder.sdiv(width, INT64(_LANES))
        tiles = builder.sdiv(registers, INT64(_TILE))
        with v.loop(tiles) as block:
            tile(builder.mul(block.index, INT64(64 * _TILE)), _TILE)
        done = builder.mul(tiles, INT64(_TILE))
        with v.loop(builder.sub(registers, done)) as rest:
            tile(builder.mul(builder.add(done, rest.index), INT64(64)), 1)
        return context.get_dummy_value()

    return signature, emit


# Softmax --------------------------------------------------------------------------------------

# e^r = 1 + r + r^2 P(r) for |r| <= log(2) / 2: Cephes' expf, within 1.5 units in the last place.
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LOG2 = (0.693359375, -2.12194440e-4)  # log(2) as a short number and the rest


@intrinsic
def _largest(typing: Any, logits: Any, g: Any, count: Any) -> Any:
    """Return the largest of logits[g, :count]. count is whole registers, at least one."""
    signature = types.float32(logits, types.int64, types.int64)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, length) = v.array(signature.args[0], values[0])
        at = v.at(at, builder.mul(builder.mul(values[1], length), INT64(4)))
        vector = ir.VectorType(FLOAT32, _LANES)
        passes = builder.sdiv(values[2], INT64(_LANES))
        with v.loop(passes, [v.load(at, vector)]) as loop:
            here = v.load(v.at(at, builder.mul(loop.index, INT64(4 * _LANES))), vector)
            loop.hand_on([v.call("llvm.maxnum.v16f32", vector, here, loop.values[0])])
        return v.call("llvm.vector.reduce.fmax.v16f32", FLOAT32, loop.values[0])

    return signature, emit


@intrinsic
def _powers(typing: Any, logits: Any, g: Any, count: Any, largest: Any) -> Any:
    """Set logits[g, :count] to e^(logit - largest), return their sum. count is whole registers."""
    signature = types.float32(logits, types.int64, types.int64, types.float32)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, length) = v.array(signature.args[0], values[0])
        at = v.at(at, builder.mul(builder.mul(values[1], length), INT64(4)))
        vector, ints = ir.VectorType(FLOAT32, _LANES), ir.VectorType(INT32, _LANES)
        largest = v.splat(values[3], _LANES)
        low = v.const(vector, _LOWEST)
        passes = builder.sdiv(values[2], INT64(_LANES))
        with v.loop(passes, [v.const(vector, 0.0)]) as loop:
            here = v.at(at, builder.mul(loop.index, INT64(4 * _LANES)))
            z = builder.fsub(v.load(here, vector), largest)
            number = v.call("llvm.maxnum.v16f32", vector, z, low)
            number = v.call("llvm.minnum.v16f32", vector, number, v.const(vector, 0.0))
            scaled = builder.fmul(number, v.const(vector, 1 / math.log(2)))
            whole = v.call("llvm.rint.v16f32", vector, scaled)
            rest = v.muladd(whole, v.const(vector, -_LOG2[0]), number)
            rest = v.muladd(whole, v.const(vector, -_LOG2[1]), rest)
            power = v.const(vector, _EXP[0])
            for coefficient in _EXP[1:]:
                power = v.muladd(power, rest, v.const(vector, coefficient))
            power = v.muladd(builder.fmul(power, rest), rest, rest)
            power = builder.fadd(power, v.const(vector, 1.0))
            exponent = builder.add(builder.fptosi(whole, ints), v.const(ints, 127))
            two = builder.bitcast(builder.shl(exponent, v.const(ints, 23)), vector)
            gone = builder.fcmp_ordered("<", z, low)
            power = builder.select(gone, v.const(vector, 0.0), builder.fmul(power, two))
            v.store(power, here)
            loop.hand_on([builder.fadd(loop.values[0], power)])
        return v.total(loop.values[0])

    return signature, emit


# Pieces ---------------------------------------------------------------------------------------


@kernel
def _mix_codes(words, scale, offset, layout, lane, row, count, weights, sums):  # type: ignore[no-untyped-def]
    """Add to sums[g] the sum of weights[g, r] times the row row + r, r < count."""
    width, length = sums.shape[1], weights.shape[1]
    flat, to = weights.reshape(-1), sums.reshape(-1)
    some = CHUNK if layout[4] > 1 else count  # of rows in groups, those that the cache holds
    for first in range(0, count, some):
        rows = lane, row + first, min(some, count - first)
        for g in range(len(sums)):
            mix(words, scale, offset, layout, rows, flat, g * length + first, to, g * width)


@kernel
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
                _dots(taken, g, chunk, count, out, first - begin)
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
                    _mix(sums, g, queries, first, chunk, count)
        for g in range(group):
            for t in range(min(step, end - unit * step)):
                out[g, unit * step + t - begin] = sums[g, place[t]]


@kernel
def _output(weights, v, begin, end, taken, chunk, sums, out):  # type: ignore[no-untyped-def]
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
                    _mix(sums, g, weights, first - begin, chunk, count)
        for g in range(group):
            for c in range(width):
                out[g, c] = sums[g, place[c]]
        return
    out[:, :] = 0
    dots = np.empty((group, CHUNK), np.float32)
    for unit in range(begin // step, -(-end // step)):
        taken[:, :] = 0
        for g in range(group):
            for t in range(min(step, end - unit * step)):
                taken[g, place[t]] = weights[g, unit * step + t - begin]
        for first in range(0, width, CHUNK):
            count = min(CHUNK, width - first)
            decode(words, scale, offset, layout, lane, unit * width + first, count, chunk)
            for g in range(group):
                _dots(taken, g, chunk, count, dots, 0)
                for c in range(count):
                    out[g, first + c] += dots[g, c]


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
    wide = -(-min(piece, tokens) // _LANES) * _LANES
    logits = zeros(group, wide)
    k_chunk, k_sums, k_taken = _room(k_layout[0], group)
    v_chunk, v_sums, v_taken = _room(v_layout[0], group)
    task = claim(counter)
    while task < len(sums):
        lane, begin = task // pieces, task % pieces * piece
        end = min(begin + piece, tokens)
        keys = (lane, k_words, k_scale, k_offset, k_place, k_layout)
        _logits(queries[lane], keys, begin, end, k_taken, k_chunk, k_sums, logits)
        filled = -(-(end - begin) // _LANES) * _LANES
        for g in range(group):
            logits[g, end - begin : filled] = -np.inf
            largest = _largest(logits, g, filled)
            state[task, g, 0] = largest
            state[task, g, 1] = _powers(logits, g, filled, largest)
        values = (lane, v_words, v_scale, v_offset, v_place, v_layout)
        _output(logits, values, begin, end, v_taken, v_chunk, v_sums, sums[task])
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
