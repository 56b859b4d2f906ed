"""What numba lacks: memory by its address, and calls of machine code by its address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe.compiling import fingerprint, kept

FINGERPRINT = fingerprint(__file__)  # part of each function's name in numba's cache


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, and keep it in numba's cache."""
    function.__qualname__ += f"_{FINGERPRINT}"
    return kept(function, nogil=True)


@intrinsic
def at(typing: Any, address: Any) -> Any:
    """Return the 64 bits at an address."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(builder.inttoptr(given[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), emit


@intrinsic
def put(typing: Any, address: Any, value: Any) -> Any:
    """Store 64 bits at an address."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store(given[1], builder.inttoptr(given[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def run_thread(typing: Any, code: Any, thread: Any, block: Any, params: Any, resume: Any) -> Any:
    """Call a kernel's code: what `machine` builds."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        long, word = ir.IntType(64), ir.IntType(32)
        kind = ir.FunctionType(word, [long, long, long, word])
        resumed = builder.trunc(given[4], word)
        made = builder.call(builder.inttoptr(given[0], kind.as_pointer()), [*given[1:4], resumed])
        return builder.sext(made, long)

    return types.int64(*[types.int64] * 5), emit


@intrinsic
def run_warp(typing: Any, code: Any, first: Any, stride: Any, lanes: Any, mask: Any) -> Any:
    """Call a warp's operation: what `warp.Warp` builds."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        long = ir.IntType(64)
        kind = ir.FunctionType(long, [long] * 4)
        return builder.call(builder.inttoptr(given[0], kind.as_pointer()), list(given[1:]))

    return types.int64(*[types.int64] * 5), emit
