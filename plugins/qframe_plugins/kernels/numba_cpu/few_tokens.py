"""Products of a few tokens with a weight in codes: it is decoded in registers and not kept.

Where tokens are few, what a weight's codes stand for is used so seldom that to write it to the
cache and to read it back would take longer than all the products. Here a register of codes gives
the weights of one column of several rows, which meet all the tokens at once.

Error:  the bits are those of `weight_only` for many tokens: the sum of a group is recursive, and
        begins with zero; it is scaled when it is added to those of the groups before, once for
        each group in their order (docs/bounds.md, B9.b).
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
from qframe_plugins.kernels.numba_cpu.values import Values, load_step
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
        planes: Any,
        widths: Any,
        scale: Any,
        zero: Any,
        place: Any,
        tokens: Any,
    ) -> Any:
        bits = tuple(each.count for each in widths)
        signature = types.void(made, x, planes, widths, scale, zero, place, tokens)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v = Vectors(context, builder)
            kinds = signature.args
            panel, group = cgutils.unpack_tuple(builder, values[6], 2)
            token, first, quads = cgutils.unpack_tuple(builder, values[7], 3)
            made_at, _ = v.array(kinds[0], values[0])
            x_at, (_, columns) = v.array(kinds[1], values[1])
            made_at = v.at(made_at, builder.mul(token, INT64(BYTES * PANEL)))
            column = builder.mul(first, INT64(BYTES))
            x_at = tokens_at(v, x_at, columns, token, column, height)
            sources = planes_at(v, kinds[2], values[2], bits, panel, first)
            scale_at, (_, groups, _) = v.array(kinds[4], values[4])
            taken = builder.add(builder.mul(panel, groups), group)
            taken = builder.mul(taken, INT64(4 * PANEL))
            ints = ir.VectorType(INT32, v.register_bytes // BYTES)
            if isinstance(kinds[5], types.Array):
                zero_at = v.at(v.array(kinds[5], values[5])[0], taken)

                def zeros(spots: list[Any]) -> Any:
                    return [v.load(v.at(zero_at, spot), ints) for spot in spots]

            else:
                known = v.splat(builder.trunc(values[5], INT32), ints.count)

                def zeros(spots: list[Any]) -> Any:
                    return known

            steps = builder.sdiv(quads, INT64(max(8 // width for width in bits)))
            where = made_at, x_at, v.at(scale_at, taken)
            _emit_row(v, height, sources, where, zeros, steps)
            return context.get_dummy_value()

        return signature, emit

    return row


def _emit_row(
    v: Vectors,
    height: int,
    sources: list[tuple[int, Any]],
    at: tuple[Any, Any, Any],
    zeros: Callable[[list[Any]], Any],
    steps: Any,
) -> None:
    """Emit made[m, :] += scale * sum of (code - zero) x[m], for all columns of some steps.

    sources   (bits, where they are) of the planes of codes
    at        where products, tokens and scales are
    zeros     takes where registers of rows begin, and gives what `Values` takes
    """
    b = v.builder
    made_at, x_at, scale_at = at
    bits = tuple(width for width, _ in sources)
    together = max(8 // width for width in bits)
    lanes = v.register_bytes // BYTES
    floats = ir.VectorType(FLOAT32, lanes)
    across = min(v.registers // 8, PANEL // lanes)
    stretch = across * lanes * BYTES
    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = b.mul(part.index, INT64(stretch))
        spots = [b.add(left, INT64(BYTES * lanes * r)) for r in range(across)]
        places = [(m, r) for m in range(height) for r in range(across)]
        stand_for = Values(v, bits, zeros(spots))
        with v.loop(steps, [v.const(floats, 0.0) for _ in places]) as loop:
            totals = list(loop.values)
            raws = load_step(v, sources, loop.index, spots)
            for width, source in sources:
                size = together * width // 8 * QUAD_BYTES
                ahead = b.add(b.mul(loop.index, INT64(size)), INT64(_AHEAD))
                for line in range(0, size, LINE):
                    v.prefetch(v.at(v.at(source, ahead), line), 2)
            values = [stand_for.of_step(raws[r], r) for r in range(across)]
            there = v.at(x_at, b.mul(loop.index, INT64(BYTES * BYTES * together * height)))
            for quad in range(together):
                for byte in range(BYTES):
                    step = (BYTES * quad + byte) * height
                    numbers = [
                        v.splat(v.load(v.at(there, BYTES * (step + m)), FLOAT32), lanes)
                        for m in range(height)
                    ]
                    for r in range(across):
                        weight = values[r](quad, byte)
                        for m in range(height):
                            place = m * across + r
                            totals[place] = v.muladd(weight, numbers[m], totals[place])
            loop.hand_on(totals)
        scales = [v.load(v.at(scale_at, spot), floats) for spot in spots]
        for (m, r), total in zip(places, loop.values, strict=True):
            spot = v.at(v.at(made_at, BYTES * PANEL * m), spots[r])
            v.store(v.muladd(total, scales[r], v.load(spot, floats)), spot)


# made[token + m, :] += scale * (the sum of (code - zero) x[token + m]) over the quads first ...
# first + quads of a panel, which are all of one group, m < 4 (2, 1).
# made     float32 [any, PANEL]
# x        float32 [tokens, columns], laid out by `float_tile.lay_out`
# planes   of `PackedPanels`, as scale; those that are empty are left out
# widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
#          no matter, but code is made for how many they are
# zero     of `PackedPanels`, or a number
# place    (panel, group)
# tokens   (token, first, quads)
_row_4, _row_2, _row_1 = (_make_row(height) for height in (4, 2, 1))


@kernel
def multiply_few(made, x, planes, widths, scale, zero, place, tokens, height):  # type: ignore[no-untyped-def]
    """Add products of 4, 2 or 1 tokens with codes of a panel and a group; see above."""
    if height == 4:
        _row_4(made, x, planes, widths, scale, zero, place, tokens)
    elif height == 2:
        _row_2(made, x, planes, widths, scale, zero, place, tokens)
    else:
        _row_1(made, x, planes, widths, scale, zero, place, tokens)
