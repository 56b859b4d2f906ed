"""The register tile of products of codes with a part of a weight in groups, from codes to outputs.

Method: sums of a group begin with what makes up for codes without sign, are counted in registers,
        and are scaled and added to those of the groups before while they are still there. Outputs
        are written by the tile of the last group, so that stores lie between products.
Error:  docs/bounds.md, B5.f: sums of groups are exact, and added in float32 in their order. Nothing
        is fused, so the bits are the same on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BYTES,
    HEIGHTS,
    PANEL,
    QUAD_BYTES,
    Places,
    emit_tile,
)
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import inner
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

_POINT = 16  # bits after the point of a number of lines


class _Group:
    """Emits what a tile begins a group with, and does with its sums.

    v        where it emits
    arrays   name -> the address of what this tile and this group have of an operand
    groups   of a row
    zero     a number, the zero point of all; None: they differ
    does     name -> a truth value, of what `_make_part` calls `how`, and ends and last
    """

    def __init__(
        self, v: Vectors, arrays: dict[str, Any], groups: Any, zero: Any, does: dict[str, Any]
    ) -> None:
        self.v, self.b, self.arrays, self.groups = v, v.builder, arrays, groups
        self.zero, self.does = zero, does

    def lines(self, name: str, places: Places, kind: Any) -> list[Any]:
        """Return the registers of rows of PANEL lanes."""
        return [self.v.load(self.line(name, m, byte), kind) for m, byte in places]

    def line(self, name: str, m: int, byte: Any) -> Any:
        return self.v.at(self.v.at(self.arrays[name], BYTES * PANEL * m), byte)

    def store(self, name: str, places: Places, values: list[Any]) -> None:
        for (m, byte), value in zip(places, values, strict=True):
            self.v.store(value, self.line(name, m, byte))

    def begin(self, places: Places, kind: Any) -> list[Any]:
        """Return the sums that a tile begins with."""
        return self.v.either(
            self.does["goes on"],
            lambda: self.lines("sums", places, kind),
            lambda: self.owed(places, kind),
        )

    def owed(self, places: Places, kind: Any) -> list[Any]:
        """Return what makes up for codes without sign: - zero * total, of each token."""
        v, b, totals = self.v, self.b, {}
        for m, _ in places:
            at = v.at(self.arrays["totals"], b.mul(self.groups, INT64(BYTES * m)))
            totals[m] = b.neg(v.load(at, INT32))
        if self.zero is not None:
            one = {m: v.splat(b.mul(self.zero, total), kind.count) for m, total in totals.items()}
            return [one[m] for m, _ in places]
        # In two digits, the lower one of 7 bits, for a processor multiplies pairs of 16 bits fast:
        # points are bytes, and a total of 2^22 would be that of 33,000 columns.
        pairs, points = {}, {}
        for m, total in totals.items():
            high = b.shl(b.ashr(total, INT32(7)), INT32(16))
            pairs[m] = v.splat(b.or_(high, b.and_(total, INT32(127))), kind.count)
        for _, byte in places:
            if byte not in points:
                point = v.load(v.at(self.arrays["zero"], byte), kind)
                points[byte] = b.or_(point, b.shl(point, v.const(kind, 16 + 7)))
        return [v.dot2(points[byte], pairs[m]) for m, byte in places]

    def end(self, places: Places, totals: list[Any]) -> None:
        """Keep the sums of a piece of a group; add those of a group to what there is."""
        kind = ir.VectorType(FLOAT32, totals[0].type.count)
        with self.b.if_else(self.does["ends"]) as (whole, piece):
            with piece:
                self.store("sums", places, totals)
            with whole:
                added = self.added(places, totals, kind)
                with self.b.if_else(self.does["last"]) as (done, more):
                    with more:
                        self.store("made", places, added)
                    with done:
                        self.write(places, added, kind)

    def added(self, places: Places, totals: list[Any], kind: Any) -> list[Any]:
        """Return made + scale * totals. Nothing is fused: the bits are the same everywhere."""
        v, b, values = self.v, self.b, []
        scales = {byte: v.load(v.at(self.arrays["scale"], byte), kind) for _, byte in places}
        for (_, byte), total, before in zip(
            places, totals, self.lines("made", places, kind), strict=True
        ):
            term = b.fmul(b.sitofp(total, kind), scales[byte])
            values.append(b.fadd(before, term))
        return values

    def write(self, places: Places, values: list[Any], kind: Any) -> None:
        """Write y = x_scale values + extra, or without extra."""
        v, b, arrays = self.v, self.b, self.arrays
        steps = {
            m: v.splat(v.load(v.at(arrays["x_scale"], BYTES * m), FLOAT32), kind.count)
            for m, _ in places
        }
        values = [b.fmul(value, steps[m]) for (m, _), value in zip(places, values, strict=True)]
        if arrays["extra"] is not None:
            extra = self.lines("extra", places, kind)
            values = [b.fadd(value, more) for value, more in zip(values, extra, strict=True)]
        for (m, byte), value in zip(places, values, strict=True):
            row_at = v.at(arrays["y"], b.mul(arrays["y row"], INT64(BYTES * m)))
            v.store(value, v.at(row_at, byte))


def _make_part(height: int) -> Callable[..., Any]:
    """Return the intrinsic that takes tokens, so many at a time, through a part of a panel."""

    @intrinsic
    def part(
        typing: Any,
        rows: Any,
        w: Any,
        scale: Any,
        zero: Any,
        between: Any,
        others: Any,
        y: Any,
        ahead: Any,
        columns: Any,
        tokens: Any,
        how: Any,
    ) -> Any:
        given = rows, w, scale, zero, between, others, y, ahead, columns, tokens, how
        signature = types.void(*given)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v, b, kinds = Vectors(context, builder), builder, signature.args

            def address(position: int, offset: Any, number: int | None = None) -> Any:
                kind, value = kinds[position], values[position]
                if number is not None:
                    kind, value = kind[number], b.extract_value(value, number)
                return v.at(v.array(kind, value)[0], b.mul(offset, INT64(BYTES)))

            panel, first, deep, width, start = cgutils.unpack_tuple(b, values[8], 5)
            token, row, tiles, x_from, y_from, y_row = cgutils.unpack_tuple(b, values[9], 6)
            goes_on, wanted, lines = cgutils.unpack_tuple(b, values[10], 3)
            groups = v.array(kinds[2], values[2])[1][1]
            one_for_all = not isinstance(kinds[3], types.Array)
            after = b.add(first, deep)
            group = b.sdiv(first, width)
            count = b.sub(b.sdiv(b.add(after, b.sub(width, INT64(1))), width), group)
            rate = b.sdiv(b.shl(lines, INT64(_POINT)), deep)

            def product(weight: Any, four: Any, total: Any) -> Any:
                return v.dot4(total, weight, four)

            with v.loop(tiles) as tile, v.loop(count) as each:
                passed = b.mul(tile.index, INT64(height))
                token_, row_ = b.add(token, passed), b.add(row, passed)
                group_ = b.add(group, each.index)
                left, right = b.mul(group_, width), b.mul(b.add(group_, INT64(1)), width)
                begin = _larger(b, b.sub(left, first), INT64(0))
                end = b.sub(deep, _larger(b, b.sub(after, right), INT64(0)))
                ends = b.icmp_signed("<=", right, after)
                is_last = b.icmp_signed("==", b.add(group_, INT64(1)), groups)
                taken = b.mul(b.add(b.mul(panel, groups), group_), INT64(PANEL))
                lane = b.mul(row_, INT64(PANEL))
                arrays = {
                    "totals": address(0, b.add(b.mul(token_, groups), group_), 1),
                    "x_scale": address(0, token_, 2),
                    "scale": address(2, taken),
                    "zero": None if one_for_all else address(3, taken),
                    "sums": address(4, lane, 0),
                    "made": address(4, lane, 1),
                    "extra": None if isinstance(kinds[5], types.NoneType) else address(4, lane, 2),
                    "y": address(6, b.add(y_from, b.mul(passed, y_row))),
                    "y row": y_row,
                }
                does = {
                    "goes on": goes_on,
                    "ends": ends,
                    "last": b.and_(ends, is_last),
                }
                of_all = b.trunc(values[3], INT32) if one_for_all else None
                sums = _Group(v, arrays, groups, of_all, does)
                place = b.add(b.mul(passed, deep), b.mul(begin, INT64(height)))
                x_at = address(0, b.add(x_from, place), 0)
                w_at = v.at(address(1, INT64(0)), b.add(start, b.mul(begin, INT64(QUAD_BYTES))))
                line = b.add(b.mul(tile.index, lines), b.lshr(b.mul(begin, rate), INT64(_POINT)))
                line = b.add(wanted, b.mul(line, INT64(LINE)))
                ahead_at = v.at(address(7, INT64(0)), line)

                def meanwhile(quad: Any) -> None:  # every line once: to ask twice is dear
                    line = b.lshr(b.mul(quad, rate), INT64(_POINT))
                    until = b.lshr(b.mul(b.add(quad, INT64(1)), rate), INT64(_POINT))
                    with v.loop(b.sub(until, line)) as more:
                        spot = b.mul(b.add(line, more.index), INT64(LINE))
                        v.prefetch(v.at(ahead_at, spot), 2)

                emit_tile(
                    v,
                    INT32,
                    height,
                    arrays["sums"],
                    x_at,
                    w_at,
                    b.sub(end, begin),
                    product,
                    meanwhile,
                    sums.begin,
                    sums.end,
                )
            return context.get_dummy_value()

        return signature, emit

    return part


def _larger(b: Any, one: Any, other: Any) -> Any:
    return b.select(b.icmp_signed(">", one, other), one, other)


# What is done with the sum over the columns of a group, or of a piece of one, of x[token, column]
# (w[:, column] - zero[panel, group, :]), for some tiles of 6 (4, 2, 1) tokens:
# rows      (tokens as `arrange` lays them out, flat; their totals; their scales)
# w         uint8, from byte `start` on [deep, PANEL, BYTES]
# scale     [panels, groups, PANEL] float32; zero the same in int32, or a number; unless they go on,
#           numbers that are bytes without sign
# between   of the tokens of a block, [block, PANEL]: int32, where sums of pieces are; float32,
#           where sums of groups are; float32, what is added at last
# others    None: nothing is added at last
# y         float32: where products go, from `y_from` on, rows being `y_row` apart
# ahead     uint8, of which each tile asks for some lines, the first from the byte `wanted` on
# columns   (panel, first, deep, width, start): `deep` quads from `first` on; `width` are a group
# tokens    (token, row, tiles, x_from, y_from, y_row): `token` of all is the first, and `row` of
#           the block; `x_from` is where their codes for these columns begin
# how       (goes_on, wanted, lines): they go on with sums that are there
_part_6, _part_4, _part_2, _part_1 = map(_make_part, HEIGHTS)


@inner
def multiply_part(height, rows, w, scale, zero, between, others, y, ahead, columns, tokens, how):  # type: ignore[no-untyped-def]
    """Run tiles of `height` tokens; see above."""
    if height == 6:
        _part_6(rows, w, scale, zero, between, others, y, ahead, columns, tokens, how)
    elif height == 4:
        _part_4(rows, w, scale, zero, between, others, y, ahead, columns, tokens, how)
    elif height == 2:
        _part_2(rows, w, scale, zero, between, others, y, ahead, columns, tokens, how)
    else:
        _part_1(rows, w, scale, zero, between, others, y, ahead, columns, tokens, how)
