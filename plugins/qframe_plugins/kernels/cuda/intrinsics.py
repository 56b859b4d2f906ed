"""Instructions of a GPU that numba.cuda has no function for, as inline PTX.

Source: PTX ISA 8.5: dp4a 9.7.1.23, mma 9.7.14.5, cp.async 9.7.9.25, ld.global.nc 9.7.9.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_IR = {types.int32: _I32, types.uint32: _I32, types.float32: _F32, types.uint16: _I16}
_LETTER = {types.int32: "r", types.uint32: "r", types.float32: "f", types.uint16: "h"}
_SHARED = 3  # LLVM's number of shared memory


def _pure(text: str, returned: Any, *taken: Any) -> Callable[..., Any]:
    """Return the emitter of an instruction of registers alone."""
    letters = ",".join(_LETTER[each] for each in taken)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(_IR[returned], [_IR[each] for each in taken])
        constraint = f"={_LETTER[returned]},{letters}"
        return builder.call(ir.InlineAsm(kind, text, constraint, side_effect=False), values)

    return emit


@intrinsic
def dp4a(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return c + the four products of the signed bytes of a and b, modulo 2^32."""
    taken = (types.int32,) * 3
    emit = _pure("dp4a.s32.s32 $0, $1, $2, $3;", types.int32, *taken)
    return types.int32(*taken), emit


@intrinsic
def nearest(typing: Any, x: Any) -> Any:
    """Return x rounded to the nearest int32, to an even one between two."""
    return types.int32(types.float32), _pure("cvt.rni.s32.f32 $0, $1;", types.int32, types.float32)


@intrinsic
def float_of_half(typing: Any, bits: Any) -> Any:
    """Return the float32 that is the float16 of these bits, an uint16."""
    return types.float32(types.uint16), _pure("cvt.f32.f16 $0, $1;", types.float32, types.uint16)


@intrinsic
def half_of(typing: Any, x: Any) -> Any:
    """Return the bits of the nearest float16, an uint16."""
    return types.uint16(types.float32), _pure("cvt.rn.f16.f32 $0, $1;", types.uint16, types.float32)


@intrinsic
def upper_half_of(typing: Any, x: Any) -> Any:
    """Return the bits of the nearest bfloat16, an uint16."""
    emit = _pure("cvt.rn.bf16.f32 $0, $1;", types.uint16, types.float32)
    return types.uint16(types.float32), emit


@intrinsic
def bits_of(typing: Any, x: Any) -> Any:
    """Return the bits of a float32 as an uint32."""
    return types.uint32(types.float32), lambda context, builder, signature, values: builder.bitcast(
        values[0], _I32
    )


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """Return the float32 that has the bits of an uint32."""
    return types.float32(types.uint32), lambda context, builder, signature, values: builder.bitcast(
        values[0], _F32
    )


@intrinsic
def mma_s8(
    typing: Any, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any,
    c0: Any, c1: Any, c2: Any, c3: Any,
) -> Any:  # fmt: skip
    """Return a b + c of a warp: 16 x 32 bytes times 32 x 8, four sums for each lane.

    Lane l has rows l / 4 and l / 4 + 8 of a and the sum, columns 2 (l % 4) and the next of the sum,
    and bytes 4 (l % 4) .. and 16 + 4 (l % 4) .. of rows of a and of columns of b.
    """
    taken = (types.int32,) * 10

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        four = ir.LiteralStructType([_I32] * 4)
        text = (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        constraint = ",".join(["=r"] * 4 + ["r"] * 10)
        asm = ir.InlineAsm(ir.FunctionType(four, [_I32] * 10), text, constraint, side_effect=True)
        return _tuple(context, builder, signature, builder.call(asm, values))

    return types.UniTuple(types.int32, 4)(*taken), emit


def _tuple(context: Any, builder: Any, signature: Any, packed: Any) -> Any:
    kind = signature.return_type
    parts = [builder.extract_value(packed, k) for k in range(kind.count)]
    return context.make_tuple(builder, kind, parts)


@intrinsic
def load4(typing: Any, pointer: Any, index: Any) -> Any:
    """Return pointer[index : index + 4], in one load of 128 bits.

    pointer   to numbers of 32 bits that the kernel does not write; index is a multiple of 4
    """
    if pointer.dtype not in _IR or pointer.dtype is types.uint16:
        return None
    letter = _LETTER[pointer.dtype]

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        four = ir.LiteralStructType([_IR[pointer.dtype]] * 4)
        place = builder.gep(values[0], [values[1]])
        address = builder.ptrtoint(place, _I64)
        constraint = ",".join([f"={letter}"] * 4 + ["l"])
        text = "ld.global.nc.v4.b32 {$0,$1,$2,$3}, [$4];"
        asm = ir.InlineAsm(ir.FunctionType(four, [_I64]), text, constraint, side_effect=True)
        return _tuple(context, builder, signature, builder.call(asm, [address]))

    return types.UniTuple(pointer.dtype, 4)(pointer, types.uintp), emit


@intrinsic
def load2(typing: Any, pointer: Any, index: Any) -> Any:
    """Return the four numbers of 16 bits at pointer[index] .. as two words, in one load.

    pointer   to numbers that the kernel does not write; index is a multiple of 4
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        two = ir.LiteralStructType([_I32] * 2)
        address = builder.ptrtoint(builder.gep(values[0], [values[1]]), _I64)
        text = "ld.global.nc.v2.b32 {$0,$1}, [$2];"
        asm = ir.InlineAsm(ir.FunctionType(two, [_I64]), text, "=r,=r,l", side_effect=True)
        return _tuple(context, builder, signature, builder.call(asm, [address]))

    return types.UniTuple(types.uint32, 2)(pointer, types.uintp), emit


@intrinsic
def store2(typing: Any, pointer: Any, index: Any, one: Any, two: Any) -> Any:
    """Set the four numbers of 16 bits at pointer[index] .. to two words, in one store."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.ptrtoint(builder.gep(values[0], [values[1]]), _I64)
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I32, _I32])
        text = "st.global.v2.b32 [$0], {$1,$2};"
        asm = ir.InlineAsm(kind, text, "l,r,r,~{memory}", side_effect=True)
        builder.call(asm, [address, *values[2:]])
        return context.get_dummy_value()

    return types.void(pointer, types.uintp, types.uint32, types.uint32), emit


@intrinsic
def store_word(typing: Any, pointer: Any, index: Any, word: Any) -> Any:
    """Set the 32 bits at pointer[index], a multiple of 4 bytes, to a word."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[0], [values[1]])
        builder.store(values[2], builder.bitcast(place, ir.PointerType(_I32)), align=4)
        return context.get_dummy_value()

    return types.void(pointer, types.uintp, types.uint32), emit


@intrinsic
def store4(typing: Any, pointer: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Set pointer[index : index + 4] of float32, in one store; index is a multiple of 4."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.ptrtoint(builder.gep(values[0], [values[1]]), _I64)
        kind = ir.FunctionType(ir.VoidType(), [_I64] + [_F32] * 4)
        text = "st.global.v4.f32 [$0], {$1,$2,$3,$4};"
        asm = ir.InlineAsm(kind, text, "l,f,f,f,f,~{memory}", side_effect=True)
        builder.call(asm, [address, *values[2:]])
        return context.get_dummy_value()

    return types.void(pointer, types.uintp, *(types.float32,) * 4), emit


def _shared_address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Return the address of array[index] in shared memory, 32 bits."""
    whole = context.make_array(kind)(context, builder, array)
    place = cgutils.get_item_pointer(context, builder, kind, whole, [index], wraparound=False)
    inside = builder.addrspacecast(place, ir.PointerType(place.type.pointee, addrspace=_SHARED))
    return builder.ptrtoint(inside, _I32)


@intrinsic
def read4(typing: Any, shared: Any, index: Any) -> Any:
    """Return shared[index : index + 4] of float32, in one load; index is a multiple of 4."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = _shared_address(context, builder, shared, values[0], values[1])
        four = ir.LiteralStructType([_F32] * 4)
        text = "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];"
        # The compiler does not know what is read, so stores before stay before.
        asm = ir.InlineAsm(
            ir.FunctionType(four, [_I32]), text, "=f,=f,=f,=f,r,~{memory}", side_effect=True
        )
        return _tuple(context, builder, signature, builder.call(asm, [address]))

    return types.UniTuple(types.float32, 4)(shared, types.uintp), emit


@intrinsic
def write4(typing: Any, shared: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Set shared[index : index + 4] of float32, in one store; index is a multiple of 4."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = _shared_address(context, builder, shared, values[0], values[1])
        kind = ir.FunctionType(ir.VoidType(), [_I32] + [_F32] * 4)
        text = "st.shared.v4.f32 [$0], {$1,$2,$3,$4};"
        asm = ir.InlineAsm(kind, text, "r,f,f,f,f,~{memory}", side_effect=True)
        builder.call(asm, [address, *values[2:]])
        return context.get_dummy_value()

    return types.void(shared, types.uintp, *(types.float32,) * 4), emit


@intrinsic
def copy16(typing: Any, shared: Any, to: Any, pointer: Any, index: Any) -> Any:
    """Begin to copy 16 bytes of pointer[index] .. to shared[to] .., both on 16 bytes."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        inside = _shared_address(context, builder, shared, values[0], values[1])
        outside = builder.ptrtoint(builder.gep(values[2], [values[3]]), _I64)
        kind = ir.FunctionType(ir.VoidType(), [_I32, _I64])
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        asm = ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True)
        builder.call(asm, [inside, outside])
        return context.get_dummy_value()

    return types.void(shared, types.uintp, pointer, types.uintp), emit


def _plain(text: str) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, text, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def end_of_copies(typing: Any) -> Any:
    """Make one group of the copies that were begun."""
    return _plain("cp.async.commit_group;")


@intrinsic
def wait_for_all_but_one(typing: Any) -> Any:
    """Wait until every group of copies of this thread has come but the last."""
    return _plain("cp.async.wait_group 1;")
