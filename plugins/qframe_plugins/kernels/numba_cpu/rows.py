"""Rows of a KV cache's codes, decoded into float32 a few at a time.

A row is a token's channels, or some tokens of one channel; its codes are a stream of `num_bits`
each in 32-bit words, the lowest bits first (`qframe.packing`), less the lowest code. Of codes of
2 and 4 bits every lane gets a whole word, shifts it to a code of its own, and looks up what that
stands for. So codes of 4 bits come out in another order, those of two words in turn; `place` tells
where each code lies.

Source: Liu et al., KIVI, ICML 2024, arXiv:2402.02750, eq. 1: x = scale * code + offset.
Error:  docs/bounds.md, B7.a: one product and one sum, or one rounding of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe import KVScheme
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import inner
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT8, INT32, INT64, Vectors

CHUNK = 32  # rows that are decoded at a time: what the fastest cache holds
_TILES = (8, 4, 1)  # registers of sums that rows are added to without being stored
_AHEAD = 8192  # bytes by which codes are asked for before they are used
_LANES = 16
_WORD = 32

Words = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Layout: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int]
Rows: TypeAlias = tuple[Words, Float32, Float32, npt.NDArray[np.int64], Layout]
"""(words [lanes, rows, words], scale and offset [lanes, rows, groups], all flat, place, layout).

place    [codes of a row] int64, where each lies in a decoded row
layout   (numbers of a decoded row, whole registers; tokens of a row, 0 where a row is one token;
         rows from lane to lane, words and groups of a row; codes of a row; bits; the lowest code;
         codes of a group; how they are unpacked)
"""

_BYTE = 8
_NATURAL, _BYTES, _WORDS = range(3)


def rows_of(
    words: Words, scale: Float32, offset: Float32, scheme: KVScheme, tokens: int, width: int
) -> Rows:
    """Return the rows of operands of `attention_kv`; width is head_dim.

    Operands that leave out the first or the last tokens of larger ones are not copied. Raises
    ValueError for operands that do not fit, of which memory beside them would be read.
    """
    _check(words, scale, offset, scheme, tokens, width)
    _, _, rows, length = words.shape
    bits, channel = scheme.num_bits, scheme.axis == "channel"
    codes = scheme.step if channel else width
    group = codes if channel else min(scheme.group_size or codes, codes)
    way = _BYTES if bits == _BYTE else _NATURAL
    if bits in (2, 4) and (group == codes or group * bits % _WORD == 0):
        way = _WORDS
    filled = _WORD // bits * length if way == _WORDS else codes
    each = 0
    if way == _WORDS and bits == 4:
        each = length if group == codes else group * bits // _WORD
        filled += 8 * (each % 2)  # a last word alone is followed by eight more numbers
    place = _places(codes, length, each)
    groups = 1 if channel else scale.shape[3]
    flat, apart = _flat((words, scale, offset), (length, groups, groups), rows)
    layout = (
        -(-max(filled, 1) // _LANES) * _LANES,
        scheme.step if channel else 0,
        apart,
        length,
        groups,
        codes,
        bits,
        scheme.grid.qmin,
        group,
        way,
    )
    return flat[0], flat[1], flat[2], place, layout


def _flat(
    parts: tuple[Words, Float32, Float32], widths: tuple[int, int, int], rows: int
) -> tuple[list[Any], int]:
    """Return arrays [batch, heads, ...] as flat ones, and how many rows lie from lane to lane.

    widths   numbers of a row, in each of them
    """
    if all(part.flags.c_contiguous for part in parts):
        return [part.reshape(-1) for part in parts], rows
    batch, heads = parts[0].shape[:2]
    found = {_apart(part, width) for part, width in zip(parts, widths, strict=True)}
    apart = found.pop()
    if found or apart is None or apart < rows:
        return [np.ascontiguousarray(part).reshape(-1) for part in parts], rows
    flat = []
    for part, width in zip(parts, widths, strict=True):
        count = ((batch * heads - 1) * apart + rows) * width
        flat.append(np.lib.stride_tricks.as_strided(part, (count,), (part.itemsize,)))
    return flat, apart


def _apart(part: npt.NDArray[Any], width: int) -> int | None:
    """Return how many rows lie from one lane to the next; None where lanes lie otherwise."""
    (batch, heads), row = part.shape[:2], width * part.itemsize
    inner = np.cumprod((1, *part.shape[:1:-1]))[:-1][::-1] * part.itemsize
    if not part.size or part.strides[2:] != tuple(inner):
        return None
    if batch == heads == 1:  # nothing lies apart
        return part.size // width
    lane = part.strides[1 if heads > 1 else 0]
    if lane % row or (batch > 1 and part.strides[0] != heads * lane):
        return None
    return int(lane // row)


def _check(
    words: Words, scale: Float32, offset: Float32, scheme: KVScheme, tokens: int, width: int
) -> None:
    batch, heads = words.shape[:2]
    groups = scheme.scale_shape((batch, heads, tokens, width))
    channel = scheme.axis == "channel"
    rows, codes = (groups[2] * width, scheme.step) if channel else (tokens, width)
    fit = (batch, heads, rows, -(-codes * scheme.num_bits // _WORD))
    for name, got, expected in (
        ("words", words.shape, fit),
        ("scale", scale.shape, groups),
        ("offset", offset.shape, groups),
    ):
        if tuple(got) != expected:
            raise ValueError(
                f"{name} {list(got)} do not fit {tokens} tokens of {width} channels, "
                f"{scheme.describe()}: expected {list(expected)}"
            )


@cache
def _places(codes: int, length: int, each: int) -> npt.NDArray[np.int64]:
    """Return where the codes of a row lie; each is 0 where they lie one after the other."""
    place = np.arange(codes, dtype=np.int64)
    if each:
        place = _in_turn(place, length, each)
    place.flags.writeable = False
    return place


def _in_turn(codes: npt.NDArray[np.int64], length: int, each: int) -> npt.NDArray[np.int64]:
    """Return where codes of 4 bits lie: of two words of a group in turn, a last one alone.

    length, each   words of a row, and of a group
    """
    word, field = codes // 8, codes % 8
    inside = word % max(each, 1)
    last = np.minimum(word - inside + each, length) - 1
    alone = (word == last) & (inside % 2 == 0)
    first = codes - field - inside % 2 * 8  # of the pair
    return np.where(alone, codes, first + 2 * field + inside % 2)


def _make_unpack(bits: int) -> Callable[..., Any]:
    """Return the intrinsic that decodes codes of 2, 4 or 8 bits."""

    @intrinsic
    def unpack(
        typing: Any,
        words: Any,
        scale: Any,
        offset: Any,
        out: Any,
        rows: Any,
        group: Any,
        taken: Any,
        lowest: Any,
    ) -> Any:
        signature = types.void(words, scale, offset, out, rows, group, taken, types.int32)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            words_at, scale_at, offset_at, out_at = (
                v.array(signature.args[i], values[i])[0] for i in range(4)
            )
            width = v.array(signature.args[3], values[3])[1][1]
            first, count, length = cgutils.unpack_tuple(builder, values[4], 3)
            index, groups = cgutils.unpack_tuple(builder, values[5], 2)
            begin, units = cgutils.unpack_tuple(builder, values[6], 2)
            low = v.splat(values[7], _LANES)
            size = 1 if bits == _BYTE else 4
            start = builder.mul(begin, INT64(size))
            stride = builder.mul(length, INT64(4))
            lines = builder.add(builder.mul(units, INT64(size)), INT64(LINE - 1))
            lines = builder.sdiv(lines, INT64(LINE))
            with v.loop(count) as row:
                number = builder.add(first, row.index)
                place = builder.add(builder.mul(number, groups), index)
                place = builder.mul(place, INT64(4))
                s = v.splat(v.load(v.at(scale_at, place), FLOAT32), _LANES)
                m = v.splat(v.load(v.at(offset_at, place), FLOAT32), _LANES)
                source = v.at(words_at, builder.add(builder.mul(number, stride), start))
                target = builder.mul(begin, INT64(1 if bits == _BYTE else _WORD // bits))
                target = builder.add(builder.mul(row.index, width), target)
                target = v.at(out_at, builder.mul(target, INT64(4)))
                with v.loop(lines) as line:  # of what the next call will read
                    ahead = builder.add(
                        builder.mul(stride, INT64(CHUNK)), builder.mul(line.index, INT64(LINE))
                    )
                    v.prefetch(v.at(source, ahead), level=1)
                if bits == _BYTE:
                    _emit_bytes(v, source, target, units, (low, s, m))
                else:
                    _emit_words(v, bits, source, target, units, (low, s, m))
            return context.get_dummy_value()

        return signature, emit

    return unpack


def _emit_bytes(v: Vectors, source: Any, target: Any, units: Any, group: Any) -> None:
    """Decode whole registers of codes of 8 bits."""
    b = v.builder
    with v.loop(b.sdiv(units, INT64(_LANES))) as loop:
        number = _bytes_at(v, v.at(source, b.mul(loop.index, INT64(_LANES))), group)
        v.store(number, v.at(target, b.mul(loop.index, INT64(4 * _LANES))))


def _bytes_at(v: Vectors, here: Any, group: Any) -> Any:
    """Return what sixteen codes of 8 bits stand for."""
    raw = v.load(here, ir.VectorType(INT8, _LANES))
    return _stands_for(v, v.builder.zext(raw, group[0].type), *group)


def _emit_words(v: Vectors, bits: int, source: Any, target: Any, units: Any, group: Any) -> None:
    """Decode words of codes of 2 or 4 bits, sixteen codes at a time."""
    b, together = v.builder, _LANES * bits // _WORD
    table = _table(v, bits, *group)
    passes = b.sdiv(units, INT64(together))
    with v.loop(passes) as loop:
        here = v.at(source, b.mul(loop.index, INT64(4 * together)))
        to = v.at(target, b.mul(loop.index, INT64(4 * _LANES)))
        v.store(_words_at(v, bits, together, here, table, group), to)
    if together > 1:
        with v.loop(b.and_(units, INT64(1))):  # what lies behind its codes is overwritten
            here = v.at(source, b.mul(passes, INT64(4 * together)))
            to = v.at(target, b.mul(passes, INT64(4 * _LANES)))
            v.store(_words_at(v, bits, 1, here, table, group), to)


def _words_at(v: Vectors, bits: int, words: int, here: Any, table: Any, group: Any) -> Any:
    """Return what the codes of one or two words stand for."""
    b, ints = v.builder, ir.VectorType(INT32, _LANES)
    raw = v.splat(v.load(here, ir.IntType(_WORD * words)), _LANES // words)
    moves = [i // words * bits % _WORD for i in range(_LANES)]
    code = b.lshr(b.bitcast(raw, ints), ir.Constant(ints, moves))
    if table is None:
        return _stands_for(v, b.and_(code, v.const(ints, (1 << bits) - 1)), *group)
    return _looked_up(v, bits, table, code)


def _stands_for(v: Vectors, code: Any, low: Any, scale: Any, offset: Any) -> Any:
    """Return scale * (code + low) + offset."""
    number = v.builder.sitofp(v.builder.add(code, low), scale.type)  # exact
    return v.muladd(number, scale, offset)


def _table(v: Vectors, bits: int, low: Any, scale: Any, offset: Any) -> Any:
    """Return what sixteen codes stand for, or four times four; None where none are looked up."""
    if not v.has("avx512f"):
        return None
    codes = ir.Constant(low.type, [i % (1 << bits) for i in range(_LANES)])
    return _stands_for(v, codes, low, scale, offset)


def _looked_up(v: Vectors, bits: int, table: Any, code: Any) -> Any:
    """Return the entries of a table that the low bits of each lane choose."""
    if bits == 4:
        return v.call("llvm.x86.avx512.permvar.sf.512", table.type, table, code)
    # Two bits choose among the four of a quarter; all quarters are alike.
    return v.call("llvm.x86.avx512.vpermilvar.ps.512", table.type, table, code)


# Each sets out[r, ...] to scale * (code + lowest) + offset of the row first + r, r < count.
# words, scale, offset   [any], flat; out [CHUNK, width]
# rows     (first of all rows, count, words of a row)
# group    (the one whose scale is taken, groups of a row)
# taken    (first word of a row, words); for 8 bits in bytes, of which whole registers are taken
# lowest   int32
_unpack_2, _unpack_4, _unpack_8 = (_make_unpack(bits) for bits in (2, 4, _BYTE))


def _make_mix(bits: int) -> Callable[..., Any]:
    """Return the intrinsic that adds up decoded rows of 2, 4 or 8 bits, in registers."""
    nbytes = _LANES * bits // _BYTE  # of what a register of numbers is decoded from

    @intrinsic
    def mix(
        typing: Any,
        words: Any,
        scale: Any,
        offset: Any,
        weights: Any,
        sums: Any,
        rows: Any,
        group: Any,
        taken: Any,
        lowest: Any,
    ) -> Any:
        operands = words, scale, offset, weights, sums, rows, group, taken
        signature = types.void(*operands, types.int32)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            words_at, scale_at, offset_at, weights_at, sums_at = (
                v.array(signature.args[i], values[i])[0] for i in range(5)
            )
            first, count, length, weight_from, sums_from = cgutils.unpack_tuple(
                builder, values[5], 5
            )
            index, groups = cgutils.unpack_tuple(builder, values[6], 2)
            begin, registers = cgutils.unpack_tuple(builder, values[7], 2)
            low = v.splat(values[8], _LANES)
            start = builder.mul(begin, INT64(nbytes))
            stride = builder.mul(length, INT64(4))
            source = v.at(words_at, builder.add(builder.mul(first, stride), start))
            place = builder.mul(builder.add(builder.mul(first, groups), index), INT64(4))
            apart = builder.mul(groups, INT64(4))
            weights_at = v.at(weights_at, builder.mul(weight_from, INT64(4)))
            target = builder.add(sums_from, builder.mul(begin, INT64(_LANES)))
            target = v.at(sums_at, builder.mul(target, INT64(4)))

            def tile(at: Any, size: int) -> None:
                """Take so many registers of every row, from the given one on."""
                vector = ir.VectorType(FLOAT32, _LANES)
                to = v.at(target, builder.mul(at, INT64(4 * _LANES)))
                here = [v.at(to, 4 * _LANES * i) for i in range(size)]
                with v.loop(count, [v.load(each, vector) for each in here]) as row:
                    back = builder.add(place, builder.mul(row.index, apart))
                    s, m = (
                        v.splat(v.load(v.at(each, back), FLOAT32), _LANES)
                        for each in (scale_at, offset_at)
                    )
                    weight = v.at(weights_at, builder.mul(row.index, INT64(4)))
                    weight = v.splat(v.load(weight, FLOAT32), _LANES)
                    codes = builder.add(
                        builder.mul(row.index, stride), builder.mul(at, INT64(nbytes))
                    )
                    codes = v.at(source, codes)
                    for line in range(-(-size * nbytes // LINE)):
                        v.prefetch(v.at(codes, _AHEAD + LINE * line), level=1)
                    table = None if bits == _BYTE else _table(v, bits, low, s, m)
                    totals = []
                    for i, total in enumerate(row.values):
                        one = v.at(codes, nbytes * i)
                        if bits == _BYTE:
                            number = _bytes_at(v, one, (low, s, m))
                        else:
                            number = _words_at(v, bits, bits // 2, one, table, (low, s, m))
                        totals.append(v.muladd(number, weight, total))
                    row.hand_on(totals)
                for total, each in zip(row.values, here, strict=True):
                    v.store(total, each)

            done = INT64(0)
            for size in _TILES:
                times = builder.sdiv(builder.sub(registers, done), INT64(size))
                with v.loop(times) as block:
                    tile(builder.add(done, builder.mul(block.index, INT64(size))), size)
                done = builder.add(done, builder.mul(times, INT64(size)))
            return context.get_dummy_value()

        return signature, emit

    return mix


# Each adds weights[weight_from + r] times the row first + r to sums[sums_from ...], r < count.
# words, scale, offset   [any], flat; weights, sums any, of which numbers are counted
# rows     (first of all rows, count, words of a row, weight_from, sums_from)
# group    (the one whose scale is taken, groups of a row)
# taken    (first register of a decoded row, registers)
# lowest   int32
_mix_2, _mix_4, _mix_8 = (_make_mix(bits) for bits in (2, 4, _BYTE))


@inner
def _code(words, bit, bits):  # type: ignore[no-untyped-def]
    """Return the code whose lowest bit is the given one of all words, without sign."""
    word, move = bit // _WORD, bit % _WORD
    raw = np.uint64(words[word]) & np.uint64(0xFFFFFFFF)
    if move + bits > _WORD:
        raw |= np.uint64(words[word + 1]) << np.uint64(_WORD)
    return np.int64((raw >> np.uint64(move)) & np.uint64((1 << bits) - 1))


@inner
def _one_by_one(words, scale, offset, out, rows, group, begin, end, bits, lowest):  # type: ignore[no-untyped-def]
    """Decode the codes begin ... end of some rows; see above."""
    first, count, length = rows
    index, groups = group
    for r in range(count):
        place = (first + r) * groups + index
        s, m = scale[place], offset[place]
        for j in range(begin, end):
            code = _code(words, (first + r) * length * _WORD + j * bits, bits) + lowest
            out[r, j] = np.float32(code) * s + m


@inner
def decode(words, scale, offset, layout, lane, first, count, out):  # type: ignore[no-untyped-def]
    """Set out[r] to the row first + r of a lane, r < count; see `Rows`."""
    total, length, groups, codes, bits, lowest, size, way = layout[2:]
    rows = (lane * total + first, count, length)
    low = np.int32(lowest)
    for i in range(groups):
        group = (i, groups)
        if way == _WORDS:
            each = length if groups == 1 else size * bits // _WORD
            units = min(each, length - i * each)
            if bits == 4:
                _unpack_4(words, scale, offset, out, rows, group, (i * each, units), low)
            else:
                _unpack_2(words, scale, offset, out, rows, group, (i * each, units), low)
            continue
        start, stop = i * size, min((i + 1) * size, codes)
        if way == _BYTES and stop - start >= _LANES:
            whole = (stop - start) // _LANES * _LANES
            _unpack_8(words, scale, offset, out, rows, group, (start, whole), low)
            start += whole
        if start < stop:
            _one_by_one(words, scale, offset, out, rows, group, start, stop, bits, lowest)


@inner
def in_order(decoded, g, place, count, out, first):  # type: ignore[no-untyped-def]
    """Set out[g, first + i] to what the code i of a row has become, i < count; see `Rows`."""
    begin = np.uint64(first)  # of places without a sign it is clear that they count from the front
    for i in range(np.uint64(count)):
        out[g, begin + i] = decoded[g, np.uint64(place[i])]


@inner
def are_whole(layout):  # type: ignore[no-untyped-def]
    """Return whether every group of a row is decoded in whole registers: what `mix` takes."""
    _, length, groups, codes, bits, _, size, way = layout[2:]
    if way == _NATURAL:
        return False
    if groups > 1 and size % _LANES:
        return False
    return codes % _LANES == 0 and length * _WORD == codes * bits


@inner
def mix(words, scale, offset, layout, some, weights, weight_from, sums, sums_from):  # type: ignore[no-untyped-def]
    """Add weights[weight_from + r] times each of some rows to sums[sums_from ...].

    The same bits as if each were decoded, and then multiplied and added; see `Rows`.
    some            (lane, first row, how many)
    weights, sums   any, of which weight_from and sums_from count the numbers
    """
    total, length, groups, codes, bits, lowest, size, _ = layout[2:]
    lane, first, count = some
    rows = (lane * total + first, count, length, weight_from, sums_from)
    low = np.int32(lowest)
    for i in range(groups):
        group = (i, groups)
        start = i * size // _LANES
        taken = (start, min(size // _LANES, codes // _LANES - start))
        if bits == _BYTE:
            _mix_8(words, scale, offset, weights, sums, rows, group, taken, low)
        elif bits == 4:
            _mix_4(words, scale, offset, weights, sums, rows, group, taken, low)
        else:
            _mix_2(words, scale, offset, weights, sums, rows, group, taken, low)
