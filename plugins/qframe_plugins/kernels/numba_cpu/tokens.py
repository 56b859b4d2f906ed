"""Codes of tokens: `quantize_activations`.

Source: the vector-wise quantization of LLM.int8() (Dettmers et al., NeurIPS 2022,
        arXiv:2208.07339, section 3.1): a scale for each token, absmax / 127.
Method: a product with 1 / scale is ten times as fast as a quotient, and rounds to the same integer
        but near a half. Sixteen codes at a time are made by products, and made again by quotients
        if one of them came near a half: so the codes are those of the quotients.
Error:  docs/bounds.md, B6.a and B6.b, with one rounding each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT8, INT32, INT64, Vectors

LARGEST = 127  # the largest code
BLOCK = 8  # tokens of a task
_LANES = 16
_STRIDE = 64  # numbers that one pass of the search for the largest takes
_SMALLEST = np.float32(2.0**-149)  # a scale that would vanish is this
_FAINT = np.float32(2.0**-120)  # scales below it have a reciprocal that overflows
_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
_INFINITY = 0x7F800000

# |x / s - fl(x fl(1 / s))| < 3 u |x / s| <= 3 * 2^-24 * 128 < 2^-15
_NEAR = 0.5 - 2.0**-15

Float32 = npt.NDArray[np.float32]


def quantize(x: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Return (codes [tokens, columns] int8, scale [tokens] float32) of x [tokens, columns].

    A token with a NaN or an infinity has codes 0 and a scale that is not finite.
    """
    return quantize_kept(np.ascontiguousarray(x), None)


def quantize_kept(
    x: Float32, keep: npt.NDArray[np.int32] | None
) -> tuple[npt.NDArray[np.int8], Float32]:
    """Return the same with some columns taken for zeros.

    x      C-contiguous
    keep   [columns] int32, -1 for a column that counts and 0 for one that does not; None: all count
    """
    codes, scale = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    tasks = worth_sharing(-(-len(x) // BLOCK), x.nbytes, 0)
    share(_share_tokens, tasks, x, keep, codes, scale)
    return codes, scale


# The bits of magnitudes are, as integers, in the order of the numbers, NaN above infinity.


@intrinsic
def _largest_bits(typing: Any, x: Any, keep: Any, token: Any, count: Any) -> Any:
    """Return the largest of |x[token, :count]| as the bits of a float32; count % _STRIDE is 0."""
    signature = types.int32(x, keep, types.int64, types.int64)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, width) = v.array(signature.args[0], values[0])
        row = v.at(at, builder.mul(builder.mul(values[2], width), INT64(4)))
        vector = ir.VectorType(INT32, _LANES)
        parts = range(_STRIDE // _LANES)
        passes = builder.sdiv(values[3], INT64(_STRIDE))
        with v.loop(passes, [v.const(vector, 0) for _ in parts]) as loop:
            offset = builder.mul(loop.index, INT64(4 * _STRIDE))
            found = []
            for i, largest in enumerate(loop.values):
                here = builder.add(offset, INT64(4 * _LANES * i))
                bits = builder.and_(v.load(v.at(row, here), vector), v.const(vector, _MAGNITUDE))
                bits = _counted(v, bits, signature.args[1], values[1], here)
                found.append(_larger(v, largest, bits))
            loop.hand_on(found)
        first, second, third, fourth = loop.values
        whole = _larger(v, _larger(v, first, second), _larger(v, third, fourth))
        return v.call("llvm.vector.reduce.smax.v16i32", INT32, whole)

    return signature, emit


def _larger(v: Vectors, one: Any, other: Any) -> Any:
    return v.builder.select(v.builder.icmp_signed(">", one, other), one, other)


def _counted(v: Vectors, bits: Any, kind: Any, keep: Any, offset: Any) -> Any:
    """Return bits, and zeros in the columns that do not count; offset is in bytes."""
    if isinstance(kind, types.NoneType):
        return bits
    return v.builder.and_(bits, v.load(v.at(v.array(kind, keep)[0], offset), bits.type))


@intrinsic
def _round(
    typing: Any, x: Any, keep: Any, codes: Any, token: Any, first: Any, scale: Any, reciprocal: Any
) -> Any:
    """Set 16 codes of a token from the column `first` on: the integers nearest to x / scale."""
    index = types.int64
    signature = types.void(x, keep, codes, index, index, types.float32, types.float32)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        x_at, (_, width) = v.array(signature.args[0], values[0])
        codes_at, _ = v.array(signature.args[2], values[2])
        token, first, scale, reciprocal = values[3:]
        vector = ir.VectorType(FLOAT32, _LANES)
        place = builder.add(builder.mul(token, width), first)
        bits = v.load(v.at(x_at, builder.mul(place, INT64(4))), ir.VectorType(INT32, _LANES))
        offset = builder.mul(first, INT64(4))
        bits = _counted(v, bits, signature.args[1], values[1], offset)
        numbers = builder.bitcast(bits, vector)
        product = builder.fmul(numbers, v.splat(reciprocal, _LANES))
        whole = v.call("llvm.rint.v16f32", vector, product)
        off = v.call("llvm.fabs.v16f32", vector, builder.fsub(product, whole))
        near = builder.fcmp_ordered(">", off, v.const(vector, _NEAR))
        any_near = v.call("llvm.vector.reduce.or.v16i1", ir.IntType(1), near)
        before = builder.block
        with builder.if_then(any_near, likely=False):
            quotient = builder.fdiv(numbers, v.splat(scale, _LANES))
            again = v.call("llvm.rint.v16f32", vector, quotient)
            inside = builder.block
        rounded = builder.phi(vector)
        rounded.add_incoming(whole, before)
        rounded.add_incoming(again, inside)
        integers = builder.fptosi(rounded, ir.VectorType(INT32, _LANES))
        bytes_ = builder.trunc(integers, ir.VectorType(INT8, _LANES))
        v.store(bytes_, v.at(codes_at, place))
        return context.get_dummy_value()

    return signature, emit


@intrinsic
def _bits(typing: Any, number: Any) -> Any:
    """Return the bits of a float32."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], INT32)

    return types.int32(types.float32), emit


@intrinsic
def _number(typing: Any, bits: Any) -> Any:
    """Return the float32 of some bits."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], FLOAT32)

    return types.float32(types.int32), emit


@kernel
def _counts(keep, column):  # type: ignore[no-untyped-def]
    """Return whether a column counts."""
    return True if keep is None else keep[column] != 0


@kernel
def _scale_of(x, keep, token):  # type: ignore[no-untyped-def]
    """Return the scale of a token; it is not finite if a number that counts is not."""
    columns = x.shape[1]
    whole = columns // _STRIDE * _STRIDE
    bits = _largest_bits(x, keep, token, whole)
    for column in range(whole, columns):
        if _counts(keep, column):
            bits = max(bits, np.int32(_bits(x[token, column]) & np.int32(_MAGNITUDE)))
    if bits == 0:
        return np.float32(1)
    largest = _number(bits)
    return max(largest / np.float32(LARGEST), _SMALLEST) if bits < _INFINITY else largest


@kernel
def _codes_of(x, keep, token, scale, codes):  # type: ignore[no-untyped-def]
    """Set the codes of a token."""
    columns = x.shape[1]
    first = 0
    if not np.isfinite(scale):
        codes[token, :] = 0
        return
    if scale >= _FAINT:
        while first + _LANES <= columns:
            _round(x, keep, codes, token, first, scale, np.float32(1) / scale)
            first += _LANES
    for column in range(first, columns):
        code = np.rint(x[token, column] / scale) if _counts(keep, column) else np.float32(0)
        codes[token, column] = np.int8(min(max(code, -LARGEST), LARGEST))


@kernel
def quantize_token(x, keep, token, codes, scale):  # type: ignore[no-untyped-def]
    """Set the codes and the scale of a token; `keep` as for `quantize_kept`."""
    scale[token] = _scale_of(x, keep, token)
    _codes_of(x, keep, token, scale[token], codes)


@kernel
def _share_tokens(counter, x, keep, codes, scale):  # type: ignore[no-untyped-def]
    """Claim blocks of tokens."""
    block = claim(counter)
    while block * BLOCK < len(x):
        for token in range(block * BLOCK, min((block + 1) * BLOCK, len(x))):
            quantize_token(x, keep, token, codes, scale)
        block = claim(counter)
