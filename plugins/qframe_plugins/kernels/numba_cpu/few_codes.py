"""Products of a few tokens' codes with a weight in codes, which is unpacked in registers.

Where tokens are few, all time goes into reading the weight: what is read once is unpacked and used
at once, and not written to the cache.

Error:  the bits are those of many tokens: sums are exact (docs/bounds.md, B5.c).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES
from qframe_plugins.kernels.numba_cpu.packed import field_of, planes_at
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import kernel
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

FEW = 4  # tokens at most

Begin = Callable[[int, Any], Any]


def _make_panel(tokens: int) -> Callable[..., Any]:
    """Return the intrinsic for so many tokens. Code is made for what the types of operands say."""

    @intrinsic
    def multiply(
        typing: Any,
        made: Any,
        x: Any,
        totals: Any,
        planes: Any,
        widths: Any,
        scale: Any,
        zero: Any,
        panel: Any,
    ) -> Any:
        bits = tuple(each.count for each in widths)
        signature = types.void(made, x, totals, planes, widths, scale, zero, types.int64)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v, b, kinds = Vectors(context, builder), builder, signature.args
            made_at, _ = v.array(kinds[0], values[0])
            x_at, (_, quads) = v.array(kinds[1], values[1])
            totals_at, (_, groups) = v.array(kinds[2], values[2])
            sources = planes_at(v, kinds[3], values[3], bits, values[7], INT64(0))
            begins = b.mul(b.mul(values[7], groups), INT64(BYTES * PANEL))
            scale_at = v.array(kinds[5], values[5])[0]
            lanes = v.register_bytes // BYTES
            together = max(8 // width for width in bits)
            steps = b.sdiv(b.sdiv(quads, groups), INT64(together))  # of a group
            with v.loop(groups) as group:
                first = b.mul(group.index, steps)
                taken = b.add(begins, b.mul(group.index, INT64(BYTES * PANEL)))
                owed = []
                for m in range(tokens):
                    at = b.mul(b.add(b.mul(INT64(m), groups), group.index), INT64(BYTES))
                    owed.append(v.splat(b.neg(v.load(v.at(totals_at, at), INT32)), lanes))
                if isinstance(kinds[6], types.Array):
                    zero_at = v.at(v.array(kinds[6], values[6])[0], taken)
                    begin = _from_points(v, zero_at, owed)
                else:
                    begin = _from_one(v, v.splat(b.trunc(values[6], INT32), lanes), owed)
                here = [
                    (width, v.at(source, b.mul(first, INT64(QUAD_BYTES * width * together // 8))))
                    for width, source in sources
                ]
                there = v.at(x_at, b.mul(first, INT64(BYTES * together * tokens)))
                where = made_at, there, v.at(scale_at, taken)
                _emit_group(v, tokens, here, where, begin, steps)
            return context.get_dummy_value()

        return signature, emit

    return multiply


def _from_points(v: Vectors, at: Any, owed: list[Any]) -> Begin:
    """Return what takes m and a register of rows, and gives owed[m] times their zero points."""

    def begin(m: int, spot: Any) -> Any:
        return v.builder.mul(v.load(v.at(at, spot), owed[m].type), owed[m])

    return begin


def _from_one(v: Vectors, zero: Any, owed: list[Any]) -> Begin:
    """Return the same where one zero point is that of all rows."""
    known = [v.builder.mul(zero, each) for each in owed]
    return lambda m, spot: known[m]


def _emit_group(
    v: Vectors,
    tokens: int,
    sources: list[tuple[int, Any]],
    at: tuple[Any, Any, Any],
    begin: Begin,
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
    ahead, level = v.stream
    lanes = v.register_bytes // BYTES
    floats, ints = (ir.VectorType(kind, lanes) for kind in (FLOAT32, INT32))
    across = min(v.registers // 8, PANEL // lanes)
    stretch = across * lanes * BYTES
    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = b.mul(part.index, INT64(stretch))
        spots = [b.add(left, INT64(BYTES * lanes * r)) for r in range(across)]
        places = [(m, r) for m in range(tokens) for r in range(across)]
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
                for line in itertools.product(range(0, size, QUAD_BYTES), range(0, stretch, LINE)):
                    v.prefetch(v.at(v.at(here, left), ahead + sum(line)), level)
            there = v.at(x_at, b.mul(loop.index, INT64(BYTES * together * tokens)))
            for quad in range(together):
                numbers = [
                    v.splat(v.load(v.at(there, BYTES * (quad * tokens + m)), INT32), lanes)
                    for m in range(tokens)
                ]
                for r in range(across):
                    code, shift = None, 0
                    for i, (width, _) in enumerate(sources):
                        fields = 8 // width
                        part_ = field_of(v, raws[i, quad // fields, r], width, quad % fields, shift)
                        code = part_ if code is None else b.or_(code, part_)
                        shift += width
                    for m in range(tokens):
                        place = m * across + r
                        totals[place] = v.dot4(totals[place], code, numbers[m])
            loop.hand_on(totals)
        for (m, r), total in zip(places, loop.values, strict=True):
            spot = v.at(v.at(made_at, BYTES * PANEL * m), spots[r])
            # Two roundings on every processor: nothing is fused.
            term = b.fmul(b.sitofp(total, floats), v.load(v.at(scale_at, spots[r]), floats))
            v.store(b.fadd(v.load(spot, floats), term), spot)


# made[m, :] += scale * (the sum of x[m] (code - zero) over the columns of a group), for all groups
# of a panel in their order, m < 1 (2, 3, 4).
# made     float32 [tokens, PANEL]
# x        int32 [tokens, quads], in the memory of which the quad q of the token m is q tokens + m
# totals   int32 [tokens, groups], the sums of the codes
# planes   of `PackedPanels`, as scale; those that are empty are left out
# widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
#          no matter, but code is made for how many they are
# zero     of `PackedPanels`, or a number
_multiply_1, _multiply_2, _multiply_3, _multiply_4 = (_make_panel(m + 1) for m in range(FEW))


@kernel
def multiply_few(made, x, totals, planes, widths, scale, zero, panel):  # type: ignore[no-untyped-def]
    """Add products of 1 to 4 tokens with codes of a panel; see above.

    All groups in one call: a call of a kernel waits for all that is being read.
    """
    if len(made) == 4:
        _multiply_4(made, x, totals, planes, widths, scale, zero, panel)
    elif len(made) == 3:
        _multiply_3(made, x, totals, planes, widths, scale, zero, panel)
    elif len(made) == 2:
        _multiply_2(made, x, totals, planes, widths, scale, zero, panel)
    else:
        _multiply_1(made, x, totals, planes, widths, scale, zero, panel)
