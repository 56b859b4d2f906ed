"""Products of a few tokens' codes with a weight in codes, which is unpacked in registers.

Where tokens are few, all time goes into reading the weight, or what is read is used so seldom that
to write its codes to the cache and to read them back takes longer than to unpack them again for
every tile.

Error:  the bits are those of many tokens: sums are exact (docs/bounds.md, B5.c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES, sum_up, tokens_at
from qframe_plugins.kernels.numba_cpu.packed import field_of, planes_at
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import inner
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

_FEW, _FEW_OF_BYTES = 16, 8  # tokens at most; of codes of eight bits, which nothing unpacks
_HEIGHTS = (1, 2, 3, 4, 6)  # how many tokens tiles take
_LINES = QUAD_BYTES // LINE  # of a quad
_PIECE = 64  # quads of a group that are read again, from the fastest cache, before the next ones


def few(bits: int) -> int:
    """Return how many tokens a product with codes of so many bits has at most here."""
    return _FEW_OF_BYTES if bits == 8 else _FEW


def _across(v: Vectors) -> int:
    """Return how many registers of a panel's rows a pass of a tile takes at once."""
    return min(v.registers // 8, PANEL * BYTES // v.register_bytes)


@intrinsic
def _passes(typing: Any) -> Any:
    """Return in how many passes a tile takes a panel: in one, unless registers are short."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        return INT64(PANEL * BYTES // (_across(v) * v.register_bytes))

    return types.int64(), emit


def _make_tile(height: int) -> Callable[..., Any]:
    """Return the intrinsic for so many tokens. Code is made for what the types of operands say."""

    @intrinsic
    def tile(
        typing: Any,
        rows: Any,
        x: Any,
        totals: Any,
        planes: Any,
        widths: Any,
        scale: Any,
        zero: Any,
        place: Any,
        how: Any,
    ) -> Any:
        bits = tuple(each.count for each in widths)
        signature = types.void(rows, x, totals, planes, widths, scale, zero, place, how)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v, b, kinds = Vectors(context, builder), builder, signature.args
            panel, group, token, first, quads = cgutils.unpack_tuple(b, values[7], 5)
            begins, ends, asked_from, asked = cgutils.unpack_tuple(b, values[8], 4)
            skipped = b.mul(token, INT64(BYTES * PANEL))
            sums_at, made_at = (
                v.at(v.array(kinds[0][i], b.extract_value(values[0], i))[0], skipped)
                for i in (0, 1)
            )
            x_at, (_, all_quads) = v.array(kinds[1], values[1])
            totals_at, (_, groups) = v.array(kinds[2], values[2])
            taken = b.mul(b.add(b.mul(panel, groups), group), INT64(BYTES * PANEL))
            zero_at = None
            if isinstance(kinds[6], types.Array):
                zero_at = v.at(v.array(kinds[6], values[6])[0], taken)
            lanes = v.register_bytes // BYTES
            owed = []
            for m in range(height):
                at = b.mul(b.add(b.mul(b.add(token, INT64(m)), groups), group), INT64(BYTES))
                owed.append(v.splat(b.neg(v.load(v.at(totals_at, at), INT32)), lanes))
            if zero_at is None:
                points = v.splat(b.trunc(values[6], INT32), lanes)
                owed = [b.mul(points, each) for each in owed]

            tile_ = _Tile(
                v,
                height,
                planes_at(v, kinds[3], values[3], bits, panel, first),
                tokens_at(v, x_at, all_quads, token, first, height),
                (sums_at, made_at),
                v.at(v.array(kinds[5], values[5])[0], taken),
                zero_at,
                owed,
            )
            together = max(8 // width for width in bits)
            tile_.emit(b.sdiv(quads, INT64(together)), begins, ends, (asked_from, asked))
            return context.get_dummy_value()

        return signature, emit

    return tile


@dataclass(frozen=True)
class _Tile:
    """Emits what a tile does with a group, or a piece of one.

    sources   (bits, where they are) of the planes of codes
    x_at      where the tokens are
    between   where sums of pieces are, and sums of groups
    scale_at  where the scales of the group are; zero_at the same of zero points, None: one for all
    owed      registers: for each token its sum, negative; times the zero point, where that is one
    """

    v: Vectors
    height: int
    sources: list[tuple[int, Any]]
    x_at: Any
    between: tuple[Any, Any]
    scale_at: Any
    zero_at: Any
    owed: list[Any]

    def emit(self, steps: Any, begins: Any, ends: Any, asked: tuple[Any, Any]) -> None:
        """Emit so many steps; `asked` are the first line of each QUAD_BYTES, and how many."""
        v, b, height = self.v, self.v.builder, self.height
        together = max(8 // width for width, _ in self.sources)
        lanes = v.register_bytes // BYTES
        floats, ints = (ir.VectorType(kind, lanes) for kind in (FLOAT32, INT32))
        across = _across(v)
        stretch = across * v.register_bytes
        sums_at, made_at = self.between
        with v.loop(INT64(PANEL * BYTES // stretch)) as part:
            left = b.mul(part.index, INT64(stretch))
            spots = [b.add(left, INT64(BYTES * lanes * r)) for r in range(across)]
            places = [(m, r) for m in range(height) for r in range(across)]
            # The first of several passes asks for all.
            is_first = b.icmp_signed("==", part.index, INT64(0))
            to_ask = asked[0], b.select(is_first, asked[1], INT64(0))

            def at(base: Any, m: int, r: int) -> Any:
                return v.at(v.at(base, BYTES * PANEL * m), spots[r])

            def fresh() -> list[Any]:
                if self.zero_at is None:
                    return [self.owed[m] for m, _ in places]
                zeros = [v.load(v.at(self.zero_at, spot), ints) for spot in spots]
                return [b.mul(zeros[r], self.owed[m]) for m, r in places]

            def kept() -> list[Any]:
                return [v.load(at(sums_at, m, r), ints) for m, r in places]

            with v.loop(steps, v.either(begins, fresh, kept)) as loop:
                totals = list(loop.values)
                raws: dict[tuple[int, int, int], Any] = {}
                for i, (width, source) in enumerate(self.sources):
                    fields = 8 // width
                    size = QUAD_BYTES * (together // fields)
                    here = v.at(source, b.mul(loop.index, INT64(size)))
                    for piece in range(together // fields):
                        for r, spot in enumerate(spots):
                            raws[i, piece, r] = v.load(
                                v.at(v.at(here, spot), QUAD_BYTES * piece), ints
                            )
                    self._ask(here, size, to_ask)
                there = v.at(self.x_at, b.mul(loop.index, INT64(BYTES * together * height)))
                for quad in range(together):
                    codes = []
                    for r in range(across):
                        code, shift = None, 0
                        for i, (width, _) in enumerate(self.sources):
                            fields = 8 // width
                            raw = raws[i, quad // fields, r]
                            part_ = field_of(v, raw, width, quad % fields, shift)
                            code = part_ if code is None else b.or_(code, part_)
                            shift += width
                        codes.append(code)
                    for m in range(height):
                        number = v.load(v.at(there, BYTES * (quad * height + m)), INT32)
                        number = v.splat(number, lanes)
                        for r in range(across):
                            place = m * across + r
                            totals[place] = v.dot4(totals[place], codes[r], number)
                loop.hand_on(totals)
            with b.if_else(ends) as (done, more):
                with done:
                    scales = [v.load(v.at(self.scale_at, spot), floats) for spot in spots]
                    for (m, r), total in zip(places, loop.values, strict=True):
                        spot = at(made_at, m, r)
                        # Two roundings on every processor: nothing is fused.
                        term = b.fmul(b.sitofp(total, floats), scales[r])
                        v.store(b.fadd(v.load(spot, floats), term), spot)
                with more:
                    for (m, r), total in zip(places, loop.values, strict=True):
                        v.store(total, at(sums_at, m, r))

    def _ask(self, here: Any, size: int, asked: tuple[Any, Any]) -> None:
        """Ask for the lines of a step further on that are this tile's to ask for."""
        v, b = self.v, self.v.builder
        ahead, level = v.stream
        begin, count = asked
        first = v.at(here, b.add(b.mul(begin, INT64(LINE)), INT64(ahead)))
        with v.loop(count) as line:
            for quad in range(0, size, QUAD_BYTES):
                v.prefetch(v.at(v.at(first, b.mul(line.index, INT64(LINE))), quad), level)


# What tiles of 1 (2, 3, 4, 6) tokens do with the products of their codes and of quads of a group:
# rows     (sums of pieces of a group int32, sums of groups float32), [tokens, PANEL] each
# x        int32 [tokens, quads], in the memory of which tiles follow one another, in each of them
#          the quads, in each of them the tokens
# totals   int32 [tokens, groups], the sums of the codes
# planes   of `PackedPanels`, as scale; those that are empty are left out
# widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
#          no matter, but code is made for how many they are
# zero     of `PackedPanels`, or a number
# place    (panel, group, token, first, quads): `token` is the tile's first
# how      (begins, ends, asked_from, asked): with `begins` the sums of the group begin here, with
#          `ends` they are scaled and added to those of the groups before; of each quad's lines so
#          many are asked for ahead, from the given one on
_tile_1, _tile_2, _tile_3, _tile_4, _tile_6 = map(_make_tile, _HEIGHTS)


@inner
def height_of_few(left):  # type: ignore[no-untyped-def]
    """Return how many of the tokens that are left the next tile takes."""
    return 6 if left >= 6 else 3 if left == 5 else left


@inner
def arrange_few(x, laid, totals):  # type: ignore[no-untyped-def]
    """Lay out tokens [tokens, quads] as tiles read them, and sum their codes, group by group."""
    tokens, quads = x.shape
    sum_up(x, 0, tokens, totals)
    flat = laid.reshape(-1)
    token = 0
    while token < tokens:
        height = height_of_few(tokens - token)
        for m in range(height):
            for quad in range(quads):
                flat[token * quads + quad * height + m] = x[token + m, quad]
        token += height


@inner
def multiply_few(rows, x, totals, planes, widths, scale, zero, panel):  # type: ignore[no-untyped-def]
    """Add products of a few tokens with codes of a panel, group by group; see above.

    Every tile asks for its share of what comes: to ask for a line twice is dear.
    """
    tokens, quads = x.shape
    groups = totals.shape[1]
    width = quads // groups
    tiles, token = 0, 0
    while token < tokens:
        token += height_of_few(tokens - token)
        tiles += 1
    limit = width if tiles * _passes() == 1 else _PIECE
    each = _LINES // tiles
    more = _LINES - each * tiles
    for group in range(groups):
        done = 0
        while done < width:
            deep = min(limit, width - done)
            token, asked_from = 0, 0
            for number in range(tiles):
                height = height_of_few(tokens - token)
                asked = each + (1 if number < more else 0)
                place = (panel, group, token, group * width + done, deep)
                how = (done == 0, done + deep == width, asked_from, asked)
                if height == 6:
                    _tile_6(rows, x, totals, planes, widths, scale, zero, place, how)
                elif height == 4:
                    _tile_4(rows, x, totals, planes, widths, scale, zero, place, how)
                elif height == 3:
                    _tile_3(rows, x, totals, planes, widths, scale, zero, place, how)
                elif height == 2:
                    _tile_2(rows, x, totals, planes, widths, scale, zero, place, how)
                else:
                    _tile_1(rows, x, totals, planes, widths, scale, zero, place, how)
                token += height
                asked_from += asked
            done += deep
