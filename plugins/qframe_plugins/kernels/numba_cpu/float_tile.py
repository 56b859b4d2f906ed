"""The register tile of products of float32 numbers with a part of a weight in groups.

Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication, TOMS 2008.
Error:  the sum of a group is recursive in ascending order, and begins with zero; it is scaled when
        it is added to those of the groups before: docs/bounds.md, B9.b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    HEIGHTS,
    PANEL,
    Places,
    emit_tile,
    height_of,
    part_of,
)
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT64, Vectors


def _make_part(height: int) -> Callable[..., Any]:
    """Return the intrinsic that takes tokens, so many at a time, through a part of a panel."""

    @intrinsic
    def part(
        typing: Any, between: Any, x: Any, w: Any, scale: Any, columns: Any, tokens: Any
    ) -> Any:
        signature = types.void(between, x, w, scale, columns, tokens)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v, b, kinds = Vectors(context, builder), builder, signature.args
            panel, first, deep, width = cgutils.unpack_tuple(b, values[4], 4)
            row, x_from, tiles = cgutils.unpack_tuple(b, values[5], 3)
            sums, made, plain = (
                v.array(kinds[0][i], b.extract_value(values[0], i))[0] for i in (0, 1, 2)
            )
            x_start, w_start = v.array(kinds[1], values[1])[0], v.array(kinds[2], values[2])[0]
            scale_start, (_, groups, _) = v.array(kinds[3], values[3])
            piece = b.select(b.icmp_signed("<", deep, width), deep, width)
            group, count, after = b.sdiv(first, width), b.sdiv(deep, piece), b.add(first, deep)
            with v.loop(tiles) as tile, v.loop(count) as each:
                passed = b.mul(tile.index, INT64(height))
                stripe = b.mul(b.add(row, passed), INT64(BYTES * PANEL))
                group_ = b.add(group, each.index)
                taken = b.add(b.mul(panel, groups), group_)
                scale_at = v.at(scale_start, b.mul(taken, INT64(BYTES * PANEL)))
                skipped = b.mul(each.index, piece)
                place = b.add(b.mul(tile.index, deep), skipped)
                place = b.add(x_from, b.mul(place, INT64(height)))
                x_at = v.at(x_start, b.mul(place, INT64(BYTES)))
                w_at = v.at(w_start, b.mul(skipped, INT64(BYTES * PANEL)))
                # Places are chosen, not ways: LLVM would make code of its own for every case.
                begins = b.icmp_signed("<=", first, b.mul(group_, width))
                ends = b.icmp_signed("<=", b.mul(b.add(group_, INT64(1)), width), after)
                sums_at, made_at = v.at(sums, stripe), v.at(made, stripe)
                ones, apart = v.at(plain, BYTES * PANEL), INT64(BYTES * PANEL)
                first_ = b.select(begins, plain, sums_at), b.select(begins, INT64(0), apart)
                before = b.select(ends, made_at, plain), b.select(ends, apart, INT64(0))
                target, factor = b.select(ends, made_at, sums_at), b.select(ends, scale_at, ones)
                _emit_group(v, height, x_at, w_at, piece, first_, before, target, factor)
            return context.get_dummy_value()

        return signature, emit

    return part


def _emit_group(
    v: Vectors,
    height: int,
    x_at: Any,
    w_at: Any,
    steps: Any,
    first: tuple[Any, Any],
    before: tuple[Any, Any],
    target: Any,
    factor: Any,
) -> None:
    """Emit target[m, :] = before[m, :] + factor * (first[m, :] + the products of some steps).

    first, before   where they are, and how many bytes their rows lie apart
    target          where that is; rows of PANEL lanes
    factor          where PANEL of them are
    """

    def load(at: tuple[Any, Any], m: int, byte: Any, kind: Any) -> Any:
        start, row = at
        return v.load(v.at(v.at(start, v.builder.mul(row, INT64(m))), byte), kind)

    def begin(places: Places, kind: Any) -> list[Any]:
        return [load(first, m, byte, kind) for m, byte in places]

    def end(places: Places, totals: list[Any]) -> None:
        kind = totals[0].type
        factors = {byte: v.load(v.at(factor, byte), kind) for _, byte in places}
        for (m, byte), total in zip(places, totals, strict=True):
            made = v.muladd(total, factors[byte], load(before, m, byte, kind))
            v.store(made, v.at(v.at(target, BYTES * PANEL * m), byte))

    emit_tile(v, FLOAT32, height, target, x_at, w_at, steps, v.muladd, begin=begin, end=end)


# What is done with the sums over the columns of some groups, or of a piece of one, of x[column,
# token] w[column, :], for some tiles of 6 (4, 2, 1) tokens: of a piece they are kept in `sums`, of
# a group they are scaled and added to `made`.
# between   (sums, made, plain), float32: [any, PANEL] of the tokens of a block, twice; [2, PANEL],
#           zeros and ones
# x         float32, laid out by `share_arrange`
# w         float32 [any, PANEL]
# scale     of `PackedPanels`
# columns   (panel, first, deep, width): `deep` columns from the first on, groups or a piece of one;
#           `width` are a group
# tokens    (row, x_from, tiles): the rows from there on; where their numbers begin
# All are C-contiguous.
_part_6, _part_4, _part_2, _part_1 = map(_make_part, HEIGHTS)


@kernel
def multiply_part(height, between, x, w, scale, columns, tokens):  # type: ignore[no-untyped-def]
    """Run tiles of `height` tokens; see above."""
    if height == 6:
        _part_6(between, x, w, scale, columns, tokens)
    elif height == 4:
        _part_4(between, x, w, scale, columns, tokens)
    elif height == 2:
        _part_2(between, x, w, scale, columns, tokens)
    else:
        _part_1(between, x, w, scale, columns, tokens)


@kernel
def lay_out(given, spread, flat):  # type: ignore[no-untyped-def]
    """Lay out a few tokens so that those of a column are neighbours.

    given    [tokens, all columns] float32
    spread   where each column lies among those of `flat`; None: where it is
    flat     [tokens * columns] float32; what is beyond those of the tokens stays
    """
    tokens = len(given)
    for m in range(tokens):
        for column in range(given.shape[1]):
            to = column if spread is None else spread[column]
            flat[to * tokens + m] = given[m, column]


@kernel
def share_arrange(counter, x, block, width, limit, flat):  # type: ignore[no-untyped-def]
    """Claim BLOCK tokens at a time, and lay their numbers out as tiles read them.

    x       [tokens, columns] float32
    block   tokens that lie together, a multiple of BLOCK; the parts of a block follow one another,
            in each of them the tiles, in each of them the columns, in each of them the tokens
    width   columns of a group
    limit   of a part, see `part_of`
    flat    [tokens * columns] float32
    """
    tokens, columns = x.shape
    token = claim(counter) * BLOCK
    while token < tokens:
        last = min(token + BLOCK, tokens)
        start = token // block * block
        count = min(block, tokens - start)
        while token < last:
            height = height_of(last - token)
            first = 0
            while first < columns:
                deep = part_of(first, columns, width, limit)
                at = start * columns + count * first + (token - start) * deep
                for m in range(height):
                    for k in range(deep):
                        flat[at + k * height + m] = x[token + m, first + k]
                first += deep
            token += height
        token = claim(counter) * BLOCK
