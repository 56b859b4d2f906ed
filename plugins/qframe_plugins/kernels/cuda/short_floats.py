"""Activations as kernels read and write them: float32, or 16 bits that become float32 in registers.

A pointer to 16 bits is one to uint16. A bfloat16 is the upper half of a float32; a float16 is
converted, exactly. What is written is rounded to nearest, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from numba import uint16, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.compile import Function, Source, inlined, source
from qframe_plugins.kernels.cuda.intrinsics import (
    float_of,
    float_of_half,
    half_of,
    load2,
    load4,
    store2,
    store4,
    upper_half_of,
)

if TYPE_CHECKING:
    import torch

POINTER: Final = {"float32": "float32*", "bfloat16": "uint16*", "float16": "uint16*"}


def for_activations(function: Function, types: str, dtype: str, *, fp64: bool = False) -> Source:
    """Return a kernel for a dtype of activations, named after it; "x" in types is their pointer."""
    if dtype != ACTIVATIONS[0]:
        function.__name__ += f"_{dtype}"
    parts = [each.strip() for each in types.split(",")]
    made = [POINTER[dtype] if each == "x" else each for each in parts]
    return source(", ".join(made), fp64=fp64)(function)


def dtype_of(tensor: torch.Tensor) -> str:
    """Return the dtype of activations, by its name."""
    return str(tensor.dtype).removeprefix("torch.")


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """Return activations as launchers take them: those of 16 bits as integers."""
    import torch

    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)


# Reading --------------------------------------------------------------------------------------


@inlined
def _read_float32(x, place):  # type: ignore[no-untyped-def]
    return x[place]


@inlined
def _read_bfloat16(x, place):  # type: ignore[no-untyped-def]
    return float_of(uint32(uint32(x[place]) << uint32(16)))


@inlined
def _read_float16(x, place):  # type: ignore[no-untyped-def]
    return float_of_half(x[place])


@inlined
def _read4_bfloat16(x, place):  # type: ignore[no-untyped-def]
    one, two = load2(x, place)
    high = uint32(0xFFFF0000)
    return (
        float_of(uint32(one << uint32(16))),
        float_of(uint32(one & high)),
        float_of(uint32(two << uint32(16))),
        float_of(uint32(two & high)),
    )


@inlined
def _read4_float16(x, place):  # type: ignore[no-untyped-def]
    one, two = load2(x, place)
    return (
        float_of_half(uint16(one)),
        float_of_half(uint16(one >> uint32(16))),
        float_of_half(uint16(two)),
        float_of_half(uint16(two >> uint32(16))),
    )


READ: Final[dict[str, Any]] = {
    "float32": _read_float32,
    "bfloat16": _read_bfloat16,
    "float16": _read_float16,
}
"""dtype -> read(x, place): a number, float32."""

READ4: Final[dict[str, Any]] = {
    "float32": load4,
    "bfloat16": _read4_bfloat16,
    "float16": _read4_float16,
}
"""dtype -> read4(x, place): four numbers in one load; place is a multiple of 4."""


# Writing --------------------------------------------------------------------------------------


@inlined
def _write_float32(y, place, number):  # type: ignore[no-untyped-def]
    y[place] = number


@inlined
def _write_bfloat16(y, place, number):  # type: ignore[no-untyped-def]
    y[place] = upper_half_of(number)


@inlined
def _write_float16(y, place, number):  # type: ignore[no-untyped-def]
    y[place] = half_of(number)


@inlined
def _pair(low, high):  # type: ignore[no-untyped-def]
    return uint32(uint32(low) | uint32(uint32(high) << uint32(16)))


@inlined
def _write4_bfloat16(y, place, a, b, c, d):  # type: ignore[no-untyped-def]
    one = _pair(upper_half_of(a), upper_half_of(b))
    store2(y, place, one, _pair(upper_half_of(c), upper_half_of(d)))


@inlined
def _write4_float16(y, place, a, b, c, d):  # type: ignore[no-untyped-def]
    store2(y, place, _pair(half_of(a), half_of(b)), _pair(half_of(c), half_of(d)))


WRITE: Final[dict[str, Any]] = {
    "float32": _write_float32,
    "bfloat16": _write_bfloat16,
    "float16": _write_float16,
}
"""dtype -> write(y, place, number)."""

WRITE4: Final[dict[str, Any]] = {
    "float32": store4,
    "bfloat16": _write4_bfloat16,
    "float16": _write4_float16,
}
"""dtype -> write4(y, place, a, b, c, d), in one store; place is a multiple of 4."""
