"""What a processor can do at most: products of codes in registers, and bytes read from memory.

Method: the innermost instruction alone, on registers that never leave the processor; and loads of
        neighbouring registers that are only or-ed together. Kernels are compared with what these
        reach in the same run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.scratch import aligned
from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share
from qframe_plugins.kernels.numba_cpu.vectors import INT32, INT64, Vectors

_SUMS = 12  # registers of sums: more than an instruction's latency needs, fewer than there are
_PASSES = 1 << 16  # of a task
_TASK = 1 << 18  # bytes that a task reads
_LINE = 64


@intrinsic
def _multiply(typing: Any, passes: Any, operands: Any) -> Any:
    """Add products of four bytes to registers of sums, over and over; return one of the sums."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        kind = ir.VectorType(INT32, v.register_bytes // 4)
        at, _ = v.array(signature.args[1], values[1])
        unsigned, signed = (v.load(v.at(at, i * v.register_bytes), kind) for i in (0, 1))
        with v.loop(values[0], [v.const(kind, i) for i in range(_SUMS)]) as loop:
            loop.hand_on([v.dot4(total, unsigned, signed) for total in loop.values])
        whole = loop.values[0]
        for total in loop.values[1:]:
            whole = builder.xor(whole, total)
        return builder.extract_element(whole, INT32(0))

    return types.int32(types.int64, operands), emit


@intrinsic
def _lanes(typing: Any) -> Any:
    """Return how many products one instruction adds; 0 where it takes several."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        one = v.has("avx512vnni" if v.register_bytes == _LINE else "avxvnni")
        return INT64(v.register_bytes if one else 0)

    return types.int64(), emit


@intrinsic
def _read(typing: Any, array: Any, first: Any, lines: Any) -> Any:
    """Return the or of so many cache lines, from the byte `first` on."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at = v.at(v.array(signature.args[0], values[0])[0], values[1])
        kind = ir.VectorType(INT32, _LINE // 4)
        several = 8
        passes = builder.sdiv(values[2], INT64(several))
        with v.loop(passes, [v.const(kind, 0)] * several) as loop:
            here = v.at(at, builder.mul(loop.index, INT64(several * _LINE)))
            loop.hand_on(
                [
                    builder.or_(total, v.load(v.at(here, i * _LINE), kind))
                    for i, total in enumerate(loop.values)
                ]
            )
        whole = loop.values[0]
        for total in loop.values[1:]:
            whole = builder.or_(whole, total)
        return v.call("llvm.vector.reduce.or.v16i32", INT32, whole)

    return types.int32(array, types.int64, types.int64), emit


@kernel
def _share_products(counter, tasks, operands, out):  # type: ignore[no-untyped-def]
    """Claim tasks of _PASSES passes."""
    task = claim(counter)
    while task < tasks:
        out[task] = _multiply(_PASSES, operands)
        task = claim(counter)


@kernel
def _share_reads(counter, data, out):  # type: ignore[no-untyped-def]
    """Claim pieces of _TASK bytes."""
    task = claim(counter)
    while task < len(out):
        out[task] = _read(data, task * _TASK, _TASK // _LINE)
        task = claim(counter)


@kernel
def _width():  # type: ignore[no-untyped-def]
    """Return `_lanes()`."""
    return _lanes()


def products(tasks: int) -> int:
    """Multiply bytes in registers, on all threads; return how many products that was.

    0 where no one instruction adds products of bytes: then there is no such limit to compare with.
    """
    lanes = int(_width())
    if not lanes:
        return 0
    operands = np.arange(2 * _LINE, dtype=np.uint8)
    share(_share_products, tasks, tasks, operands, np.zeros(tasks, np.int32))
    return tasks * _PASSES * _SUMS * lanes


def memory(size: int) -> npt.NDArray[np.int32]:
    """Return memory of at least so many bytes for `read`, with a page of its own for each."""
    made = aligned((-(-size // _TASK) * _TASK // 4,), np.int32)
    made.fill(1)  # pages of zeros that were never written are all the same one, in the cache
    return made


def read(data: npt.NDArray[np.int32]) -> int:
    """Read what `memory` returned, on all threads; return how many bytes that was."""
    share(_share_reads, data.nbytes // _TASK, data, np.zeros(data.nbytes // _TASK, np.int32))
    return data.nbytes
