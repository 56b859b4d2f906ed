"""Products of a few tokens with a weight in codes: it is decoded in registers and not kept.

Where tokens are few, what a weight's codes stand for is used so seldom that to write it to the
cache and to read it back would take longer than all the products. Here a register of codes gives
the weights of one column of several rows, which meet all the tokens at once.

Method: every code is looked up in a register that holds what sixteen codes stand for, or four
        times four, where the processor can (Intel's vpermps); elsewhere it is converted.
Error:  the bits are those of `weight_only` for many tokens: each weight is rounded once, and the
        sum of a row is recursive, in the order of the groups (docs/bounds.md, B9.b).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES, tokens_at
from qframe_plugins.kernels.numba_cpu.packed import planes_at
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import kernel
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

FEW = 4  # tokens at most
_TABLE = 16  # entries of a register that is looked up
_AHEAD = 16  # steps of the weight that are asked for before they are read


def _make_row(height: int) -> Callable[..., Any]:
    """Return the intrinsic for so many tokens. Code is made for what the types of operands say."""

    @intrinsic
    def row(
        typing: Any,
        sums: Any,
        x: Any,
        planes: Any,
        widths: Any,
        scale: Any,
        zero: Any,
        place: Any,
        tokens: Any,
    ) -> Any:
        bits = tuple(each.count for each in widths)
        signature = types.void(sums, x, planes, widths, scale, zero, place, tokens)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            kinds = signature.args
            panel, group = cgutils.unpack_tuple(builder, values[6], 2)
            token, first, quads = cgutils.unpack_tuple(builder, values[7], 3)
            sums_at, _ = v.array(kinds[0], values[0])
            x_at, (_, columns) = v.array(kinds[1], values[1])
            sums_at = v.at(sums_at, builder.mul(token, INT64(BYTES * PANEL)))
            column = builder.mul(first, INT64(BYTES))
            x_at = tokens_at(v, x_at, columns, token, column, height)
            sources = planes_at(v, kinds[2], values[2], bits, panel, first)
            scale_at, (_, groups, _) = v.array(kinds[4], values[4])
            taken = builder.add(builder.mul(panel, groups), group)
            taken = builder.mul(taken, INT64(4 * PANEL))
            lanes = v.register_bytes // BYTES
            one_for_all = not isinstance(kinds[5], types.Array)
            if one_for_all:
                zero = v.splat(builder.trunc(values[5], INT32), lanes)
            else:
                zero = v.at(v.array(kinds[5], values[5])[0], taken)
            together = max(8 // width for width in bits)
            steps = builder.sdiv(quads, INT64(together))
            where = sums_at, x_at, v.at(scale_at, taken)
            _emit_row(v, height, sources, where, zero, steps, one_for_all=one_for_all)
            return context.get_dummy_value()

        return signature, emit

    return row


def _emit_row(
    v: Vectors,
    height: int,
    sources: list[Any],
    at: tuple[Any, ...],
    zero: Any,
    steps: Any,
    *,
    one_for_all: bool,
) -> None:
    """Emit sums[m, :] += scale * (code - zero) x[m], for all columns of some steps.

    at      where sums, tokens and scales are
    zero    of all, a register, if it is one for all; else where they are
    """
    b = v.builder
    sums_at, x_at, scale_at = at
    together = max(8 // width for width, _ in sources)
    lanes = v.register_bytes // BYTES
    floats, ints = (ir.VectorType(kind, lanes) for kind in (FLOAT32, INT32))
    across = min(v.registers // 8, PANEL // lanes)
    stretch = across * lanes * BYTES
    bits = sum(each for each, _ in sources)
    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = b.mul(part.index, INT64(stretch))
        spots = [b.add(left, INT64(BYTES * lanes * r)) for r in range(across)]
        scales = [v.load(v.at(scale_at, spot), floats) for spot in spots]
        zeros = [zero if one_for_all else v.load(v.at(zero, spot), ints) for spot in spots]
        stand_for = _values(v, bits, ints, floats, zeros, one_for_all=one_for_all)
        rows = [v.at(sums_at, BYTES * PANEL * m) for m in range(height)]
        first = [v.load(v.at(row, spot), floats) for row in rows for spot in spots]
        with v.loop(steps, first) as loop:
            totals = list(loop.values)
            raws: dict[tuple[int, int, int], Any] = {}
            for i, (width, source) in enumerate(sources):
                fields = 8 // width
                size = QUAD_BYTES * (together // fields)
                here = v.at(source, b.mul(loop.index, INT64(size)))
                for piece in range(together // fields):
                    for r, spot in enumerate(spots):
                        word = v.at(v.at(here, spot), QUAD_BYTES * piece)
                        raws[i, piece, r] = v.load(word, ints)
                for line in range(0, size, LINE):
                    v.prefetch(v.at(here, _AHEAD * size + line), 1)
            there = v.at(x_at, b.mul(loop.index, INT64(BYTES * BYTES * together * height)))
            for quad in range(together):
                for byte in range(BYTES):
                    step = (BYTES * quad + byte) * height
                    numbers = [
                        v.splat(v.load(v.at(there, BYTES * (step + m)), FLOAT32), lanes)
                        for m in range(height)
                    ]
                    for r in range(across):
                        parts = []
                        for i, (width, _) in enumerate(sources):
                            each = 8 // width
                            move = 8 * byte + width * (quad % each)
                            parts.append((raws[i, quad // each, r], move, width))
                        weight = b.fmul(stand_for(parts, r), scales[r])
                        for m in range(height):
                            place = m * across + r
                            totals[place] = v.muladd(weight, numbers[m], totals[place])
            loop.hand_on(totals)
        for place, total in enumerate(loop.values):
            v.store(total, v.at(rows[place // across], spots[place % across]))


def _values(
    v: Vectors, bits: int, ints: Any, floats: Any, zeros: list[Any], *, one_for_all: bool
) -> Callable[[list[tuple[Any, int, int]], int], Any]:
    """Return what gives code - zero, of fields [(register, bits to its right, width)].

    one_for_all   all zero points are the same
    """
    b = v.builder
    looked_up = v.has("avx512f") and bits < 8

    def code(fields: list[tuple[Any, int, int]]) -> Any:
        """Return the code in the low bits; what is above them is only cleared without a table."""
        found, shift = None, 0
        for raw, move, width in fields:
            moved = raw
            if move - shift > 0:
                moved = b.lshr(raw, v.const(ints, move - shift))
            elif move < shift:
                moved = b.shl(raw, v.const(ints, shift - move))
            if len(fields) > 1 or not looked_up:
                moved = b.and_(moved, v.const(ints, ((1 << width) - 1) << shift))
            found = moved if found is None else b.or_(found, moved)
            shift += width
        return found

    if not looked_up:
        return lambda fields, r: b.sitofp(b.sub(code(fields), zeros[r]), floats)
    numbers = ir.Constant(ints, [i % (1 << bits) for i in range(_TABLE)])
    name = "vpermilvar.ps.512" if bits == 2 else "permvar.sf.512"

    def entry(table: Any, fields: list[tuple[Any, int, int]]) -> Any:
        return v.call(f"llvm.x86.avx512.{name}", floats, table, code(fields))

    if one_for_all:
        known = b.sitofp(b.sub(numbers, zeros[0]), floats)
        return lambda fields, r: entry(known, fields)
    table = b.sitofp(numbers, floats)
    lows = [b.sitofp(each, floats) for each in zeros]
    return lambda fields, r: b.fsub(entry(table, fields), lows[r])  # exact


# sums[token + m, :] += scale * (code - zero) x[token + m] over the quads first ... first + quads of
# a panel, which are all of one group, m < 4 (2, 1).
# sums     float32 [any, PANEL]
# x        float32 [tokens, columns], as `share_arrange` lays it out
# planes   of `PackedPanels`, as scale; those that are empty are left out
# widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
#          no matter, but code is made for how many they are
# zero     of `PackedPanels`, or a number
# place    (panel, group)
# tokens   (token, first, quads)
_row_4, _row_2, _row_1 = (_make_row(height) for height in (4, 2, 1))


@kernel
def multiply_few(sums, x, planes, widths, scale, zero, place, tokens, height):  # type: ignore[no-untyped-def]
    """Add products of 4, 2 or 1 tokens with codes of a panel and a group; see above."""
    if height == 4:
        _row_4(sums, x, planes, widths, scale, zero, place, tokens)
    elif height == 2:
        _row_2(sums, x, planes, widths, scale, zero, place, tokens)
    else:
        _row_1(sums, x, planes, widths, scale, zero, place, tokens)
