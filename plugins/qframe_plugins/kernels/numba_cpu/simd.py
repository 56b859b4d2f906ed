"""The SIMD layer of the CPU kernels: a register tile written as LLVM vector code, and `kernel`.

numba alone keeps no block of an array in registers over a loop, which costs half to nine tenths
of the speed of a matrix product. The tile here is therefore emitted whole, loop included, as
portable vector IR: LLVM lowers it to AVX-512, AVX2, SSE2, NEON or anything else. Only how many
registers it may use depends on the processor, never the order of the operations.

Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication, TOMS 2008
        (the tile in registers, one operand in L1).
Error:  an element is a recursive sum in ascending k, so n terms added to c have an error of at
        most gamma_{n+1} (|c| + sum |a b|), with and without fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qframe.compiling import fingerprint, kept

STRIPE_BYTES = 256  # a stripe is one row of a panel: 64 float32 or 32 float64 lanes
LANES = STRIPE_BYTES // 4  # lanes of a float32 stripe
_TURNS = 8  # of each thread, so that the last ones end together
QUAD = 4  # stripes that a tile updates at once

KERNEL_ABI = fingerprint(__file__)  # part of the name of each kernel in numba's cache

Function = Callable[..., Any]


def kernel(function: Function) -> Function:
    """Compile `function` for one thread, without the GIL, cached under KERNEL_ABI."""
    function.__qualname__ += f"_{KERNEL_ABI}"
    return kept(function, nogil=True, error_model="numpy")


def inner(function: Function) -> Function:
    """Compile `function` for kernels to call on arrays that they hold, and that it makes none of.

    References are not counted there: a count is an instruction that waits for all others, and many
    of them took as long as a tenth of attention.
    """
    function.__qualname__ += f"_{KERNEL_ABI}"
    return kept(function, nogil=True, error_model="numpy", _nrt=False)


def _vector_bytes(context: Any) -> tuple[int, int]:
    """Return the bytes of a register, and how many of them a row of the tile takes at once.

    Asks for the processor compiled for, which honours NUMBA_CPU_NAME and is in numba's cache key.
    """
    triple, _, features = context.codegen().magic_tuple()
    if "+avx512f" in features:
        return 64, 4  # 32 registers: 16 sums, 4 stripes, broadcasts from memory
    if "+avx" in features:
        return 32, 2  # 16 registers: 8 sums, 2 stripes
    return (16, 2) if "x86" in triple else (16, 4)


class _BFloat16(ir.Type):  # type: ignore[misc]
    """llvmlite has no bfloat16, but its IR is text: a type is what it prints."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _multiplies_bfloat16(context: Any) -> bool:
    """Return whether the processor compiled for has an instruction for pairs of bfloat16."""
    _, _, features = context.codegen().magic_tuple()
    return "+avx512bf16" in features


def _pair_product(context: Any, builder: Any, width: int) -> Function:
    """Return emit(a, b, sum) = sum + a0 b0 + a1 b1 for vectors of pairs of bfloat16 in int32.

    The products are exact. The two sums are rounded one after the other, in either order.
    """
    floats, ints = ir.VectorType(ir.FloatType(), width), ir.VectorType(ir.IntType(32), width)
    if _multiplies_bfloat16(context):
        pairs = ir.VectorType(_BFloat16(), 2 * width)
        product = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(floats, [floats, pairs, pairs]),
            f"llvm.x86.avx512bf16.dpbf16ps.{32 * width}",
        )
        return lambda a, b, total: builder.call(
            product, [total, builder.bitcast(a, pairs), builder.bitcast(b, pairs)]
        )
    muladd = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{width}f32"
    )
    sixteen, upper = (ir.Constant(ints, [value] * width) for value in (16, -(1 << 16)))

    def emit(a: Any, b: Any, total: Any) -> Any:
        low = [builder.bitcast(builder.shl(x, sixteen), floats) for x in (a, b)]
        high = [builder.bitcast(builder.and_(x, upper), floats) for x in (a, b)]
        return builder.call(muladd, [*high, builder.call(muladd, [*low, total])])

    return emit


def _make_tile(sign: int) -> Function:
    """Return the intrinsic that adds (sign = 1) or subtracts (sign = -1) a product."""

    @intrinsic
    def tile(
        typing: Any,
        c: Any,
        c_row: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_row: Any,
        n: Any,
    ) -> Any:
        index = types.int64
        signature = types.void(c, index, a, index, index, b, index, index)
        item = c.dtype.bitwidth // 8
        lanes = STRIPE_BYTES // item
        pairs = isinstance(a.dtype, types.Integer)
        if pairs and sign < 0:
            return None  # nobody subtracts pairs
        element = ir.FloatType() if item == 4 else ir.DoubleType()

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            c, c_row, a, a_row, a_column, b, b_row, n = values
            int64, int32 = ir.IntType(64), ir.IntType(32)
            register, columns = _vector_bytes(context)
            width = register // item
            vector = ir.VectorType(element, width)
            factors = ir.IntType(32) if pairs else element
            factor_vector = ir.VectorType(factors, width)
            unknown = ir.Constant(factor_vector, ir.Undefined)
            first = ir.Constant(ir.VectorType(int32, width), [0] * width)
            if pairs:
                muladd = _pair_product(context, builder, width)
            else:
                function = cgutils.get_or_insert_function(
                    builder.module,
                    ir.FunctionType(vector, [vector] * 3),
                    f"llvm.fmuladd.v{width}f{8 * item}",
                )

                def muladd(a: Any, b: Any, total: Any) -> Any:
                    return builder.call(function, [a, b, total])

            def array(position: int, value: Any) -> Any:
                return context.make_array(signature.args[position])(context, builder, value)

            def at(pointer: Any, offset: Any) -> Any:
                if isinstance(offset, int):
                    offset = int64(offset)
                return builder.gep(pointer, [offset], source_etype=element)

            def load(pointer: Any, kind: Any = vector) -> Any:
                return builder.load(
                    builder.bitcast(pointer, kind.as_pointer()), align=item, typ=kind
                )

            def splat(scalar: Any) -> Any:
                lane = builder.insert_element(unknown, scalar, int32(0))
                return builder.shuffle_vector(lane, unknown, first)

            a_width = cgutils.unpack_tuple(builder, array(2, a).shape, 2)[1]
            c_at = at(array(0, c).data, builder.mul(c_row, int64(lanes)))
            a_at = at(array(2, a).data, builder.add(builder.mul(a_row, a_width), a_column))
            b_at = at(array(5, b).data, builder.mul(b_row, int64(lanes)))
            with builder.if_then(builder.icmp_signed(">", n, int64(0))):
                for left in range(0, lanes, columns * width):
                    places = [
                        at(c_at, m * lanes + left + v * width)
                        for m in range(QUAD)
                        for v in range(columns)
                    ]
                    start = [load(place) for place in places]
                    before = builder.block
                    body = builder.append_basic_block("tile")
                    after = builder.append_basic_block("tile.end")
                    builder.branch(body)
                    builder.position_at_end(body)
                    k = builder.phi(int64)
                    k.add_incoming(int64(0), before)
                    sums = [builder.phi(vector) for _ in start]
                    b_k = at(b_at, builder.mul(k, int64(lanes)))
                    stripe = [
                        load(at(b_k, left + v * width), factor_vector) for v in range(columns)
                    ]
                    a_k = at(a_at, builder.mul(k, a_width))
                    news = []
                    for m in range(QUAD):
                        a_m = builder.bitcast(at(a_k, m), factors.as_pointer())
                        scalar = builder.load(a_m, align=item, typ=factors)
                        factor = splat(builder.fneg(scalar) if sign < 0 else scalar)
                        for v in range(columns):
                            old = sums[m * columns + v]
                            news.append(muladd(factor, stripe[v], old))
                    k_next = builder.add(k, int64(1))
                    k.add_incoming(k_next, body)
                    for old, initial, new in zip(sums, start, news, strict=True):
                        old.add_incoming(initial, before)
                        old.add_incoming(new, body)
                    builder.cbranch(builder.icmp_signed("<", k_next, n), body, after)
                    builder.position_at_end(after)
                    for place, new in zip(places, news, strict=True):
                        builder.store(new, builder.bitcast(place, vector.as_pointer()), align=item)
            return context.get_dummy_value()

        return signature, emit

    return tile


# c[c_row + m, :] +-= sum over k < n of a[a_row + k, a_column + m] * b[b_row + k, :],  m < QUAD.
# c and b [any, stripe], a [any, >= QUAD], all C-contiguous and of one dtype; c overlaps neither.
# To add, a and b may be int32, each a pair of bfloat16 with product a0 b0 + a1 b1; c is float32.
tile_add = _make_tile(+1)
tile_sub = _make_tile(-1)


@intrinsic
def claim(typing: Any, counter: Any) -> Any:
    """Return counter[0] and add 1 to it, atomically: threads that claim tasks share no task."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", data, ir.IntType(64)(1), "monotonic")

    return types.int64(counter), emit


@inner
def run_of(counter, tasks):  # type: ignore[no-untyped-def]
    """Return how many tasks in a row a thread claims at once, each having some turns.

    What tasks in a row read is one stream: where it goes on, it has been asked for.
    """
    return max(1, tasks // (_TURNS * counter[1]))


@intrinsic
def transpose16(
    typing: Any, c: Any, c_row: Any, c_column: Any, a: Any, a_row: Any, a_column: Any
) -> Any:
    """Set c[c_row + j, c_column + i] = a[a_row + i, a_column + j] for i, j < 16.

    c, a   [any, any], C-contiguous, of one dtype
    """
    index = types.int64
    signature = types.void(c, index, index, a, index, index)
    bits, size = c.dtype.bitwidth, 16

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        c, c_row, c_column, a, a_row, a_column = values
        int64, int32 = ir.IntType(64), ir.IntType(32)
        element = ir.IntType(bits)
        vector = ir.VectorType(element, size)

        def rows(position: int, value: Any, row: Any, column: Any) -> list[Any]:
            array = context.make_array(signature.args[position])(context, builder, value)
            width = cgutils.unpack_tuple(builder, array.shape, 2)[1]
            places = []
            for i in range(size):
                offset = builder.add(builder.mul(builder.add(row, int64(i)), width), column)
                place = builder.gep(array.data, [offset], source_etype=element)
                places.append(builder.bitcast(place, vector.as_pointer()))
            return places

        block = [
            builder.load(place, align=bits // 8, typ=vector)
            for place in rows(3, a, a_row, a_column)
        ]
        # Swap off-diagonal squares of side 8, 4, 2, 1 within squares of twice that side.
        for side in (8, 4, 2, 1):
            upper = [j if not j & side else size + j - side for j in range(size)]
            lower = [j + side if not j & side else size + j for j in range(size)]
            masks = [ir.Constant(ir.VectorType(int32, size), mask) for mask in (upper, lower)]
            for i in range(size):
                if not i & side:
                    pair = block[i], block[i + side]
                    block[i], block[i + side] = (
                        builder.shuffle_vector(*pair, mask) for mask in masks
                    )
        for row, place in zip(block, rows(0, c, c_row, c_column), strict=True):
            builder.store(row, place, align=bits // 8)
        return context.get_dummy_value()

    return signature, emit


@kernel
def zeros(rows, columns):  # type: ignore[no-untyped-def]
    """Return float32 zeros that start where a cache line does, so that no register lies across two.

    Rows lie so, too, if `columns` is a multiple of 16.
    """
    memory = np.zeros(rows * columns + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + rows * columns].reshape(rows, columns)
