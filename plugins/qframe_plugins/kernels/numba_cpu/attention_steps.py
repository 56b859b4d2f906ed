"""What attention is made of: products of queries and of weights with rows, and e to logits.

Rows are float32, one after another, and whole registers long.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT32, INT64, Vectors

LANES = 16  # of a register
_TILE = 8  # registers of sums that a product with rows keeps
_LOWEST = -87.33  # of e to less than this nothing is left: no normal number

# Products with rows ---------------------------------------------------------------------------


@intrinsic
def dots(typing: Any, x: Any, g: Any, rows: Any, count: Any, out: Any, first: Any) -> Any:
    """Set out[g, first + r] = x[g] . rows[r], r < count. Rows are whole registers long."""
    index = types.int64
    signature = types.void(x, index, rows, index, out, index)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        x_at, (_, width) = v.array(signature.args[0], values[0])
        rows_at, _ = v.array(signature.args[2], values[2])
        out_at, (_, length) = v.array(signature.args[4], values[4])
        stride = builder.mul(width, INT64(4))
        x_at = v.at(x_at, builder.mul(values[1], stride))
        place = builder.add(builder.mul(values[1], length), values[5])
        out_at = v.at(out_at, builder.mul(place, INT64(4)))
        vector = ir.VectorType(FLOAT32, LANES)
        passes = builder.sdiv(width, INT64(LANES))
        several = 4
        blocks = builder.sdiv(values[3], INT64(several))

        def products(first: Any, together: int) -> None:
            at = [
                v.at(rows_at, builder.mul(builder.add(first, INT64(r)), stride))
                for r in range(together)
            ]
            with v.loop(passes, [v.const(vector, 0.0)] * together) as loop:
                here = builder.mul(loop.index, INT64(4 * LANES))
                taken = v.load(v.at(x_at, here), vector)
                loop.hand_on(
                    [
                        v.muladd(v.load(v.at(each, here), vector), taken, total)
                        for each, total in zip(at, loop.values, strict=True)
                    ]
                )
            for r, total in enumerate(loop.values):
                target = v.at(out_at, builder.mul(builder.add(first, INT64(r)), INT64(4)))
                v.store(v.total(total), target)

        with v.loop(blocks) as block:
            products(builder.mul(block.index, INT64(several)), several)
        done = builder.mul(blocks, INT64(several))
        with v.loop(builder.sub(values[3], done)) as rest:
            products(builder.add(done, rest.index), 1)
        return context.get_dummy_value()

    return signature, emit


@intrinsic
def mix_rows(
    typing: Any, sums: Any, g: Any, weights: Any, first: Any, rows: Any, count: Any
) -> Any:
    """Add to sums[g] the sum of weights[g, first + r] rows[r], r < count."""
    index = types.int64
    signature = types.void(sums, index, weights, index, rows, index)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        sums_at, (_, width) = v.array(signature.args[0], values[0])
        weights_at, (_, length) = v.array(signature.args[2], values[2])
        rows_at, _ = v.array(signature.args[4], values[4])
        stride = builder.mul(width, INT64(4))
        sums_at = v.at(sums_at, builder.mul(values[1], stride))
        place = builder.add(builder.mul(values[1], length), values[3])
        weights_at = v.at(weights_at, builder.mul(place, INT64(4)))
        vector = ir.VectorType(FLOAT32, LANES)

        def tile(start: Any, registers: int) -> None:
            """Take so many registers from the byte `start` of every row on."""
            at = [v.at(sums_at, builder.add(start, INT64(64 * i))) for i in range(registers)]
            with v.loop(values[5], [v.load(each, vector) for each in at]) as loop:
                weight = v.load(v.at(weights_at, builder.mul(loop.index, INT64(4))), FLOAT32)
                weight = v.splat(weight, LANES)
                row = v.at(rows_at, builder.add(builder.mul(loop.index, stride), start))
                loop.hand_on(
                    [
                        v.muladd(v.load(v.at(row, 64 * i), vector), weight, total)
                        for i, total in enumerate(loop.values)
                    ]
                )
            for each, total in zip(at, loop.values, strict=True):
                v.store(total, each)

        registers = builder.sdiv(width, INT64(LANES))
        tiles = builder.sdiv(registers, INT64(_TILE))
        with v.loop(tiles) as block:
            tile(builder.mul(block.index, INT64(64 * _TILE)), _TILE)
        done = builder.mul(tiles, INT64(_TILE))
        with v.loop(builder.sub(registers, done)) as rest:
            tile(builder.mul(builder.add(done, rest.index), INT64(64)), 1)
        return context.get_dummy_value()

    return signature, emit


# Softmax --------------------------------------------------------------------------------------

# e^r = 1 + r + r^2 P(r) for |r| <= log(2) / 2: Cephes' expf, within 1.5 units in the last place.
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LOG2 = (0.693359375, -2.12194440e-4)  # log(2) as a short number and the rest


@intrinsic
def largest_of(typing: Any, logits: Any, g: Any, count: Any) -> Any:
    """Return the largest of logits[g, :count]. count is whole registers, at least one."""
    signature = types.float32(logits, types.int64, types.int64)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, length) = v.array(signature.args[0], values[0])
        at = v.at(at, builder.mul(builder.mul(values[1], length), INT64(4)))
        vector = ir.VectorType(FLOAT32, LANES)
        passes = builder.sdiv(values[2], INT64(LANES))
        with v.loop(passes, [v.load(at, vector)]) as loop:
            here = v.load(v.at(at, builder.mul(loop.index, INT64(4 * LANES))), vector)
            loop.hand_on([v.call("llvm.maxnum.v16f32", vector, here, loop.values[0])])
        return v.call("llvm.vector.reduce.fmax.v16f32", FLOAT32, loop.values[0])

    return signature, emit


@intrinsic
def powers(typing: Any, logits: Any, g: Any, count: Any, largest: Any) -> Any:
    """Set logits[g, :count] to e^(logit - largest), return their sum. count is whole registers."""
    signature = types.float32(logits, types.int64, types.int64, types.float32)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, length) = v.array(signature.args[0], values[0])
        at = v.at(at, builder.mul(builder.mul(values[1], length), INT64(4)))
        vector, ints = ir.VectorType(FLOAT32, LANES), ir.VectorType(INT32, LANES)
        largest = v.splat(values[3], LANES)
        low = v.const(vector, _LOWEST)
        passes = builder.sdiv(values[2], INT64(LANES))
        with v.loop(passes, [v.const(vector, 0.0)]) as loop:
            here = v.at(at, builder.mul(loop.index, INT64(4 * LANES)))
            z = builder.fsub(v.load(here, vector), largest)
            number = v.call("llvm.maxnum.v16f32", vector, z, low)
            number = v.call("llvm.minnum.v16f32", vector, number, v.const(vector, 0.0))
            scaled = builder.fmul(number, v.const(vector, 1 / math.log(2)))
            whole = v.call("llvm.rint.v16f32", vector, scaled)
            rest = v.muladd(whole, v.const(vector, -_LOG2[0]), number)
            rest = v.muladd(whole, v.const(vector, -_LOG2[1]), rest)
            power = v.const(vector, _EXP[0])
            for coefficient in _EXP[1:]:
                power = v.muladd(power, rest, v.const(vector, coefficient))
            power = v.muladd(builder.fmul(power, rest), rest, rest)
            power = builder.fadd(power, v.const(vector, 1.0))
            exponent = builder.add(builder.fptosi(whole, ints), v.const(ints, 127))
            two = builder.bitcast(builder.shl(exponent, v.const(ints, 23)), vector)
            gone = builder.fcmp_ordered("<", z, low)
            power = builder.select(gone, v.const(vector, 0.0), builder.fmul(power, two))
            v.store(power, here)
            loop.hand_on([builder.fadd(loop.values[0], power)])
        return v.total(loop.values[0])

    return signature, emit
