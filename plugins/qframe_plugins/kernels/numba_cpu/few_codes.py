"""Products of a few tokens' codes with a weight in codes, which is unpacked in registers.

Where tokens are few, all time goes into reading the weight: what is read once is unpacked and used
at once, and not written to the cache.

Error:  the bits are those of many tokens: sums are exact (docs/bounds.md, B5.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES, tokens_at
from qframe_plugins.kernels.numba_cpu.packed import field_of, planes_at
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import kernel
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

FEW = 4  # tokens at most
_AHEAD = 8192  # bytes of the weight that are asked for before they are read


def _make_row(height: int) -> Callable[..., Any]:
    """Return the intrinsic for so many tokens. Code is made for what the types of operands say."""

    @intrinsic
    def row(
        typing: Any,
        made: Any,
        x: Any,
        totals: Any,
        planes: Any,
        widths: Any,
        scale: Any,
        zero: Any,
        place: Any,
    ) -> Any:
        bits = tuple(each.count for each in widths)
        signature = types.void(made, x, totals, planes, widths, scale, zero, place)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v, b, kinds = Vectors(context, builder), builder, signature.args
            panel, group, token, first, quads = cgutils.unpack_tuple(builder, values[7], 5)
            made_at, _ = v.array(kinds[0], values[0])
            totals_at, (_, groups) = v.array(kinds[2], values[2])
            x_at, (_, all_quads) = v.array(kinds[1], values[1])
            made_at = v.at(made_at, b.mul(token, INT64(BYTES * PANEL)))
            x_at = tokens_at(v, x_at, all_quads, token, first, height)
            sources = planes_at(v, kinds[3], values[3], bits, panel, first)
            taken = b.add(b.mul(panel, groups), group)
            taken = b.mul(taken, INT64(BYTES * PANEL))
            scale_at = v.at(v.array(kinds[5], values[5])[0], taken)

            def total(m: int) -> Any:
                at = b.add(b.mul(b.add(token, INT64(m)), groups), group)
                return v.load(v.at(totals_at, b.mul(at, INT64(BYTES))), INT32)

            sums = [b.neg(total(m)) for m in range(height)]
            lanes = v.register_bytes // BYTES
            if isinstance(kinds[6], types.Array):
                zero_at = v.at(v.array(kinds[6], values[6])[0], taken)

                def begin(m: int, spot: Any) -> Any:
                    zeros = v.load(v.at(zero_at, spot), ir.VectorType(INT32, lanes))
                    return b.mul(zeros, v.splat(sums[m], lanes))

            else:
                zero = b.trunc(values[6], INT32)
                known = [v.splat(b.mul(zero, each), lanes) for each in sums]

                def begin(m: int, spot: Any) -> Any:
                    del spot
                    return known[m]

            steps = b.sdiv(quads, INT64(max(8 // width for width in bits)))
            _emit_row(v, height, sources, (made_at, x_at, scale_at), begin, steps)
            return context.get_dummy_value()

        return signature, emit

    return row


def _emit_row(
    v: Vectors,
    height: int,
    sources: list[tuple[int, Any]],
    at: tuple[Any, Any, Any],
    begin: Callable[[int, Any], Any],
    steps: Any,
) -> None:
    """Emit made[m, :] += scale * (sums of x[m] code, that begin with begin(m, :)).

    sources   (bits, where they are) of the planes of codes
    at        where products, tokens and scales are
    begin     takes m and the byte of the first of a register's lanes
    """
    b = v.builder
    made_at, x_at, scale_at = at
    together = max(8 // width for width, _ in sources)
    lanes = v.register_bytes // BYTES
    floats, ints = (ir.VectorType(kind, lanes) for kind in (FLOAT32, INT32))
    across = min(v.registers // 8, PANEL // lanes)
    stretch = across * lanes * BYTES
    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = b.mul(part.index, INT64(stretch))
        spots = [b.add(left, INT64(BYTES * lanes * r)) for r in range(across)]
        places = [(m, r) for m in range(height) for r in range(across)]
        with v.loop(steps, [begin(m, spots[r]) for m, r in places]) as loop:
            totals = list(loop.values)
            raws: dict[tuple[int, int, int], Any] = {}
            for i, (width, source) in enumerate(sources):
                fields = 8 // width
                size = QUAD_BYTES * (together // fields)
                here = v.at(source, b.mul(loop.index, INT64(size)))
                for piece in range(together // fields):
                    for r, spot in enumerate(spots):
                        raws[i, piece, r] = v.load(v.at(v.at(here, spot), QUAD_BYTES * piece), ints)
                for line in range(0, size, LINE):
                    v.prefetch(v.at(here, _AHEAD + line), 2)
            there = v.at(x_at, b.mul(loop.index, INT64(BYTES * together * height)))
            for quad in range(together):
                numbers = [
                    v.splat(v.load(v.at(there, BYTES * (quad * height + m)), INT32), lanes)
                    for m in range(height)
                ]
                for r in range(across):
                    code, shift = None, 0
                    for i, (width, _) in enumerate(sources):
                        fields = 8 // width
                        part_ = field_of(v, raws[i, quad // fields, r], width, quad % fields, shift)
                        code = part_ if code is None else b.or_(code, part_)
                        shift += width
                    for m in range(height):
                        place = m * across + r
                        totals[place] = v.dot4(totals[place], code, numbers[m])
            loop.hand_on(totals)
        for (m, r), total in zip(places, loop.values, strict=True):
            spot = v.at(v.at(made_at, BYTES * PANEL * m), spots[r])
            # Two roundings on every processor: nothing is fused.
            term = b.fmul(b.sitofp(total, floats), v.load(v.at(scale_at, spots[r]), floats))
            v.store(b.fadd(v.load(spot, floats), term), spot)


# made[token + m, :] += scale * (the sum of x[token + m] (code - zero)) over the quads first ...
# first + quads of a panel, which are all of one group, m < 4 (2, 1).
# made     float32 [tokens, PANEL]
# x        int32 [tokens, quads], laid out by `dot_tile.arrange` as one part
# totals   int32 [tokens, groups], from there
# planes   of `PackedPanels`, as scale; those that are empty are left out
# widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
#          no matter, but code is made for how many they are
# zero     of `PackedPanels`, or a number
# place    (panel, group, token, first, quads)
_row_4, _row_2, _row_1 = (_make_row(height) for height in (4, 2, 1))


@kernel
def multiply_few(made, x, totals, planes, widths, scale, zero, place, height):  # type: ignore[no-untyped-def]
    """Add products of 4, 2 or 1 tokens with codes of a panel and a group; see above."""
    if height == 4:
        _row_4(made, x, totals, planes, widths, scale, zero, place)
    elif height == 2:
        _row_2(made, x, totals, planes, widths, scale, zero, place)
    else:
        _row_1(made, x, totals, planes, widths, scale, zero, place)
