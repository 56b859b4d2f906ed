"""The register tile of products of bytes: sums that are integers, the same bits on every processor.

Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication, TOMS 2008 (the
        tile in registers); Intel's vpdpbusd, which multiplies unsigned bytes with signed ones.
Error:  none. Sums are taken modulo 2^32; docs/bounds.md, B5.c, says when they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.simd import claim, inner, kernel
from qframe_plugins.kernels.numba_cpu.vectors import INT32, INT64, Vectors

PANEL = 64  # rows of a weight that are laid out together: lanes of the tile
BYTES = 4  # neighbouring columns of a weight whose products are added at once
QUAD_BYTES = PANEL * BYTES  # of a panel's column quad
HEIGHTS = (6, 4, 2, 1)  # how many tokens tiles take
BLOCK = 48  # tokens of a task, a multiple of the greatest height

_LANES = 16  # quads that are laid out at once
_SUMMED = 8  # quads that are summed at once

Places = list[tuple[int, Any]]


def emit_tile(
    v: Vectors,
    element: Any,
    height: int,
    sums_at: Any,
    x_at: Any,
    w_at: Any,
    steps: Any,
    product: Callable[[Any, Any, Any], Any],
    meanwhile: Callable[[Any], None] = lambda step: None,
    begin: Callable[[Places, Any], list[Any]] | None = None,
    end: Callable[[Places, list[Any]], None] | None = None,
) -> None:
    """Emit sums[m, :] = product(w[step, :], x[step, m], sums[m, :]) for all steps, m < height.

    element     int32 or float32, of all three; sums and w have PANEL in a row, x `height`
    steps       how many, int64
    product     takes (a register of w, one number of x in all lanes, the sum so far)
    meanwhile   called with the number of the step, once in each
    begin, end  load and store the sums of registers, if not in `sums`: called with where they are,
                (m, the byte of the first lane in a row of PANEL lanes), and the type of a register,
                or all sums
    """
    builder = v.builder
    lanes = v.register_bytes // BYTES
    vector = ir.VectorType(element, lanes)
    across = min(v.registers // 8, PANEL // lanes)  # registers of a panel at once
    down = min(height, (v.registers - across - 2) // across)  # tokens at once
    stretch = across * lanes * BYTES

    def address(m: int, byte: Any) -> Any:
        return v.at(v.at(sums_at, BYTES * m * PANEL), byte)

    def load(places: Places, kind: Any) -> list[Any]:
        return [v.load(address(m, byte), kind) for m, byte in places]

    def store(places: Places, totals: list[Any]) -> None:
        for (m, byte), total in zip(places, totals, strict=True):
            v.store(total, address(m, byte))

    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = builder.mul(part.index, INT64(stretch))
        for top in range(0, height, down):
            rows = range(top, min(top + down, height))
            places = [
                (m, builder.add(left, INT64(BYTES * i * lanes)))
                for m in rows
                for i in range(across)
            ]
            with v.loop(steps, (begin or load)(places, vector)) as loop:
                here = builder.add(left, builder.mul(loop.index, INT64(BYTES * PANEL)))
                weights = [
                    v.load(v.at(v.at(w_at, here), BYTES * i * lanes), vector) for i in range(across)
                ]
                meanwhile(loop.index)
                there = v.at(x_at, builder.mul(loop.index, INT64(BYTES * height)))
                news: list[Any] = []
                for m in rows:
                    number = v.splat(v.load(v.at(there, BYTES * m), element), lanes)
                    for weight in weights:
                        news.append(product(weight, number, loop.values[len(news)]))
                loop.hand_on(news)
            (end or store)(places, loop.values)


def tokens_at(v: Vectors, x_at: Any, columns: Any, token: Any, first: Any, height: int) -> Any:
    """Return where the numbers of a tile's tokens begin, in the step `first`.

    x_at      of tokens that are laid out for tiles, `columns` numbers of four bytes for each
    """
    b = v.builder
    place = b.add(b.mul(token, columns), b.mul(first, INT64(height)))
    return v.at(x_at, b.mul(place, INT64(BYTES)))


@inner
def height_of(left):  # type: ignore[no-untyped-def]
    """Return how many of the tokens that are left the next tile takes."""
    return 6 if left >= 6 else 4 if left >= 4 else 2 if left >= 2 else 1


# Laying tokens out ------------------------------------------------------------------------------


def _make_interleave(height: int) -> Callable[..., Any]:
    """Return the intrinsic that lays out so many tokens."""

    @intrinsic
    def interleave(
        typing: Any, x: Any, token: Any, first: Any, passes: Any, flat: Any, start: Any
    ) -> Any:
        index = types.int64
        signature = types.void(x, index, index, index, flat, index)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            x_at, (_, width) = v.array(signature.args[0], values[0])
            flat_at, _ = v.array(signature.args[4], values[4])
            token, first, passes, start = (values[i] for i in (1, 2, 3, 5))
            vector = ir.VectorType(INT32, _LANES)
            rows = []
            for m in range(height):
                place = builder.add(builder.mul(builder.add(token, INT64(m)), width), first)
                rows.append(v.at(x_at, builder.mul(place, INT64(BYTES))))
            flat_at = v.at(flat_at, builder.mul(start, INT64(BYTES)))
            with v.loop(passes) as loop:
                here = builder.mul(loop.index, INT64(BYTES * _LANES))
                given = [v.load(v.at(row, here), vector) for row in rows]
                there = v.at(flat_at, builder.mul(loop.index, INT64(BYTES * _LANES * height)))
                for part in range(height):
                    places = range(part * _LANES, (part + 1) * _LANES)
                    made = given[0]
                    for m in range(height):
                        lanes = [
                            _LANES + place // height if place % height == m else lane
                            for lane, place in enumerate(places)
                        ]
                        made = v.pick(made, lanes, given[m])
                    v.store(made, v.at(there, BYTES * _LANES * part))
            return context.get_dummy_value()

        return signature, emit

    return interleave


# flat[start + q height + m] = x[token + m, first + q] for q < 16 passes, m < 6 (4, 2, 1).
_interleave_6, _interleave_4, _interleave_2, _interleave_1 = map(_make_interleave, HEIGHTS)


@intrinsic
def _sum_codes(typing: Any, x: Any, token: Any, first: Any, passes: Any) -> Any:
    """Return the sum of the codes in x[token, first : first + _SUMMED passes]."""
    index = types.int64

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        x_at, (_, width) = v.array(signature.args[0], values[0])
        place = builder.add(builder.mul(values[1], width), values[2])
        at = v.at(x_at, builder.mul(place, INT64(BYTES)))
        vector = ir.VectorType(INT32, _SUMMED)
        ones = v.const(vector, 0x01010101)
        with v.loop(values[3], [v.const(vector, 0)]) as loop:
            here = v.at(at, builder.mul(loop.index, INT64(BYTES * _SUMMED)))
            loop.hand_on([v.dot4(loop.values[0], ones, v.load(here, vector))])
        return v.call(f"llvm.vector.reduce.add.v{_SUMMED}i32", INT32, loop.values[0])

    return types.int32(x, index, index, index), emit


@inner
def _total_of(x, codes, token, first, quads):  # type: ignore[no-untyped-def]
    """Return the sum of the codes of a token in some quads."""
    passes = quads // _SUMMED
    total = _sum_codes(x, token, first, passes)
    for code in codes[token, (first + passes * _SUMMED) * BYTES : (first + quads) * BYTES]:
        total += np.int32(code)
    return total


@inner
def sum_up(x, token, height, totals):  # type: ignore[no-untyped-def]
    """Set the sums of some tokens' codes, group by group."""
    groups = totals.shape[1]
    width = x.shape[1] // groups
    codes = x.view(np.int8)
    for m in range(height):
        for group in range(groups):
            totals[token + m, group] = _total_of(x, codes, token + m, group * width, width)


@inner
def _interleaved(x, token, height, first, quads, flat, start):  # type: ignore[no-untyped-def]
    """Set flat[start + q height + m] = x[token + m, first + q] for q < quads."""
    passes = quads // _LANES
    if height == 6:
        _interleave_6(x, token, first, passes, flat, start)
    elif height == 4:
        _interleave_4(x, token, first, passes, flat, start)
    elif height == 2:
        _interleave_2(x, token, first, passes, flat, start)
    else:
        _interleave_1(x, token, first, passes, flat, start)
    for quad in range(passes * _LANES, quads):
        for m in range(height):
            flat[start + quad * height + m] = x[token + m, first + quad]


@inner
def part_of(first, quads, width, limit):  # type: ignore[no-untyped-def]
    """Return how many quads from the quad `first` on are taken together.

    quads   of a row
    width   quads of a group
    limit   of what is taken: groups, if one is not more, else a piece of a group
    """
    if width <= limit:
        return min(limit // width * width, quads - first)
    return min(limit, width - first % width)


@inner
def arrange(x, token, last, start, count, limit, flat, totals):  # type: ignore[no-untyped-def]
    """Lay out the tokens from `token` to `last` as tiles read them, and sum their codes.

    x              [tokens, quads] int32, four codes in each
    start, count   of the block that they are in; its parts follow one another, in each of them the
                   tiles, in each of them the quads, in each of them the tokens
    limit          of a part, see `part_of`
    flat           [tokens * quads] int32
    totals         [tokens, groups] int32, the sums over as many columns each
    """
    quads = x.shape[1]
    width = quads // totals.shape[1]
    while token < last:
        height = height_of(last - token)
        sum_up(x, token, height, totals)
        first = 0
        while first < quads:
            deep = part_of(first, quads, width, limit)
            at = start * quads + count * first + (token - start) * deep
            _interleaved(x, token, height, first, deep, flat, at)
            first += deep
        token += height


@kernel
def share_arrange(counter, x, block, limit, flat, totals):  # type: ignore[no-untyped-def]
    """Claim BLOCK tokens at a time, and arrange them; `block` is a multiple of BLOCK."""
    tokens = len(x)
    token = claim(counter) * BLOCK
    while token < tokens:
        start = token // block * block
        count = min(block, tokens - start)
        arrange(x, token, min(token + BLOCK, tokens), start, count, limit, flat, totals)
        token = claim(counter) * BLOCK
