"""Products of a few tokens with a weight in codes: it is decoded in registers and not kept.

Where tokens are few, what a weight's codes stand for is used so seldom that to write it to the
cache and to read it back would take longer than all the products. Here a register of codes gives
the weights of one column of several rows, which meet all the tokens at once.

Error:  the bits are those of `weight_only` for many tokens: the sum of a group is recursive, and
        begins with zero; it is scaled when it is added to those of the groups before, once for
        each group in their order (docs/bounds.md, B9.b).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL, QUAD_BYTES
from qframe_plugins.kernels.numba_cpu.packed import planes_at
from qframe_plugins.kernels.numba_cpu.scratch import LINE
from qframe_plugins.kernels.numba_cpu.simd import kernel
from qframe_plugins.kernels.numba_cpu.values import Values, load_step
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

FEW = 4  # tokens at most


def _make_panel(tokens: int) -> Callable[..., Any]:
    """Return the intrinsic for so many tokens. Code is made for what the types of operands say."""

    @intrinsic
    def multiply(
        typing: Any,
        made: Any,
        x: Any,
        planes: Any,
        widths: Any,
        scale: Any,
        zero: Any,
        panel: Any,
    ) -> Any:
        bits = tuple(each.count for each in widths)
        signature = types.void(made, x, planes, widths, scale, zero, types.int64)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            v, b, kinds = Vectors(context, builder), builder, signature.args
            made_at, _ = v.array(kinds[0], values[0])
            x_at, (_, columns) = v.array(kinds[1], values[1])
            sources = planes_at(v, kinds[2], values[2], bits, values[6], INT64(0))
            scale_at, (_, groups, _) = v.array(kinds[4], values[4])
            begins = b.mul(b.mul(values[6], groups), INT64(BYTES * PANEL))
            together = max(8 // width for width in bits)
            steps = b.sdiv(b.sdiv(columns, groups), INT64(BYTES * together))  # of a group
            ints = ir.VectorType(INT32, v.register_bytes // BYTES)
            with v.loop(groups) as group:
                first = b.mul(group.index, steps)
                taken = b.add(begins, b.mul(group.index, INT64(BYTES * PANEL)))
                here = [
                    (width, v.at(source, b.mul(first, INT64(QUAD_BYTES * width * together // 8))))
                    for width, source in sources
                ]
                there = v.at(x_at, b.mul(first, INT64(BYTES * BYTES * together * tokens)))
                if isinstance(kinds[5], types.Array):
                    zero_at = v.at(v.array(kinds[5], values[5])[0], taken)
                    zeros = _loaded(v, zero_at, ints)
                else:
                    zeros = _all_alike(v.splat(b.trunc(values[5], INT32), ints.count))
                where = made_at, there, v.at(scale_at, taken)
                _emit_group(v, tokens, here, where, zeros, steps)
            return context.get_dummy_value()

        return signature, emit

    return multiply


def _loaded(v: Vectors, at: Any, kind: Any) -> Callable[[list[Any]], list[Any]]:
    """Return what loads a register of zero points for each of some rows."""
    return lambda spots: [v.load(v.at(at, spot), kind) for spot in spots]


def _all_alike(zeros: Any) -> Callable[[list[Any]], Any]:
    """Return what gives one register for all rows."""
    return lambda spots: zeros


def _emit_group(
    v: Vectors,
    tokens: int,
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
    ahead, level = v.stream
    bits = tuple(width for width, _ in sources)
    together = max(8 // width for width in bits)
    lanes = v.register_bytes // BYTES
    floats = ir.VectorType(FLOAT32, lanes)
    across = min(v.registers // 8, PANEL // lanes)
    stretch = across * lanes * BYTES
    with v.loop(INT64(PANEL * BYTES // stretch)) as part:
        left = b.mul(part.index, INT64(stretch))
        spots = [b.add(left, INT64(BYTES * lanes * r)) for r in range(across)]
        places = [(m, r) for m in range(tokens) for r in range(across)]
        stand_for = Values(v, bits, zeros(spots))
        with v.loop(steps, [v.const(floats, 0.0) for _ in places]) as loop:
            totals = list(loop.values)
            raws = load_step(v, sources, loop.index, spots)
            for width, source in sources:
                size = together * width // 8 * QUAD_BYTES
                here = v.at(source, b.add(b.mul(loop.index, INT64(size)), left))
                for line in itertools.product(range(0, size, QUAD_BYTES), range(0, stretch, LINE)):
                    v.prefetch(v.at(here, ahead + sum(line)), level)
            values = [stand_for.of_step(raws[r], r) for r in range(across)]
            there = v.at(x_at, b.mul(loop.index, INT64(BYTES * BYTES * together * tokens)))
            for quad in range(together):
                for byte in range(BYTES):
                    step = (BYTES * quad + byte) * tokens
                    numbers = [
                        v.splat(v.load(v.at(there, BYTES * (step + m)), FLOAT32), lanes)
                        for m in range(tokens)
                    ]
                    for r in range(across):
                        weight = values[r](quad, byte)
                        for m in range(tokens):
                            place = m * across + r
                            totals[place] = v.muladd(weight, numbers[m], totals[place])
            loop.hand_on(totals)
        scales = [v.load(v.at(scale_at, spot), floats) for spot in spots]
        for (m, r), total in zip(places, loop.values, strict=True):
            spot = v.at(v.at(made_at, BYTES * PANEL * m), spots[r])
            v.store(v.muladd(total, scales[r], v.load(spot, floats)), spot)


# made[m, :] += scale * (the sum of (code - zero) x[m] over the columns of a group), for all groups
# of a panel in their order, m < 1 (2, 3, 4).
# made     float32 [tokens, PANEL]
# x        float32 [tokens, columns], in the memory of which the column c of the token m is
#          c tokens + m
# planes   of `PackedPanels`, as scale; those that are empty are left out
# widths   for each plane a tuple of as many numbers as a code has bits in it: what they are is
#          no matter, but code is made for how many they are
# zero     of `PackedPanels`, or a number
_multiply_1, _multiply_2, _multiply_3, _multiply_4 = (_make_panel(m + 1) for m in range(FEW))


@kernel
def multiply_few(made, x, planes, widths, scale, zero, panel):  # type: ignore[no-untyped-def]
    """Add products of 1 to 4 tokens with codes of a panel; see above.

    All groups in one call: a call of a kernel waits for all that is being read.
    """
    if len(made) == 4:
        _multiply_4(made, x, planes, widths, scale, zero, panel)
    elif len(made) == 3:
        _multiply_3(made, x, planes, widths, scale, zero, panel)
    elif len(made) == 2:
        _multiply_2(made, x, planes, widths, scale, zero, panel)
    else:
        _multiply_1(made, x, planes, widths, scale, zero, panel)
