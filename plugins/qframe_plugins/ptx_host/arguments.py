"""A launch's arguments -> the bytes of the parameters and memory of the device.

Arrays are copied to memory of their own, 256-byte aligned and far from one another, as on a GPU;
what the kernel has written is copied back. So results do not depend on where NumPy puts an array,
and an access beside an array hits nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qframe_plugins.ptx_host.errors import KernelFaultError, LaunchError
from qframe_plugins.ptx_host.flow import Program
from qframe_plugins.ptx_host.syntax import BITS, Variable

ALIGN, GAP = 256, 256


@dataclass(frozen=True)
class Fresh:
    """An array that holds nothing yet: that a kernel reads it before writing is a finding.

    On the device its bytes are 0xA5, and so is after the launch what the kernel has not written.
    """

    array: np.ndarray[Any, Any]


def numba_arguments(*given: Any) -> list[Any]:
    """Return arguments as a kernel of numba.cuda takes them: an array's size and shape, too."""
    made: list[Any] = []
    for value in given:
        array = value.array if isinstance(value, Fresh) else value
        if isinstance(array, np.ndarray):
            made += [0, 0, array.size, array.itemsize, value, *array.shape, *array.strides]
        else:
            made.append(value)
    return made


@dataclass
class Buffer:
    """Memory of the device: of an argument, or of a variable of the module."""

    name: str
    array: np.ndarray[Any, Any]
    memory: np.ndarray[Any, Any]
    is_fresh: bool = False

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.memory.ctypes.data)

    @property
    def is_constant(self) -> bool:
        """Whether it must not be written."""
        return not self.array.flags.writeable

    def copy_back(self) -> None:
        """Give the caller's array what the kernel has written."""
        made = self.memory.view(self.array.dtype).reshape(self.array.shape)
        if not self.is_constant:
            self.array[...] = made
        elif self.memory.tobytes() != self.array.tobytes():
            raise KernelFaultError(
                f"{self.name}: the kernel has written to an array that is read-only; "
                "launch with check=True to see which instruction"
            )


def aligned(size: int) -> np.ndarray[Any, Any]:
    """Return that many bytes, aligned, with room around."""
    room = np.zeros(size + ALIGN + 2 * GAP, np.uint8)
    start = -(room.ctypes.data + GAP) % ALIGN + GAP
    return room[start : start + size]


def pack(program: Program, given: Sequence[Any]) -> tuple[np.ndarray[Any, Any], list[Buffer]]:
    """Return the parameters' bytes and the buffers. Raises LaunchError."""
    if len(given) != len(program.params):
        names = ", ".join(f"{p.name}: .{p.type}" for p in program.params)
        raise LaunchError(
            f"{program.name}: {len(given)} arguments, expected {len(program.params)}: {names}"
        )
    params = aligned(max(program.params_size, 8))
    buffers: list[Buffer] = []
    for variable, value in zip(program.params, given, strict=True):
        offset = program.offsets[variable.name]
        raw = _bytes_of(program, variable, value, buffers)
        params[offset : offset + variable.size] = np.frombuffer(raw, np.uint8)
    return params, buffers


def _bytes_of(program: Program, variable: Variable, value: Any, buffers: list[Buffer]) -> bytes:
    where = f"{program.name}: {variable.name}, .{variable.type}"
    is_fresh = isinstance(value, Fresh)
    value = value.array if isinstance(value, Fresh) else value
    if isinstance(value, np.ndarray) and value.ndim:
        if variable.size != 8:
            raise LaunchError(f"{where}: an array, expected a number of {variable.size} bytes")
        return struct.pack("<Q", _buffer(where, variable.name, value, is_fresh, buffers).address)
    if isinstance(value, bytes):
        if len(value) != variable.size:
            raise LaunchError(f"{where}: {len(value)} bytes, expected {variable.size}")
        return value
    if isinstance(value, np.generic):
        raw = value.tobytes()
        if len(raw) != variable.size:
            raise LaunchError(f"{where}: {value.dtype} has {len(raw)} bytes, "
                              f"expected {variable.size}")  # fmt: skip
        return raw
    bits = BITS[variable.type]
    if isinstance(value, float) and variable.type[0] in "fb" and variable.size in (4, 8):
        return struct.pack("<f" if variable.size == 4 else "<d", value)
    if isinstance(value, int) and variable.type[0] in "bus" and variable.count == 1:
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise LaunchError(f"{where}: {value} does not fit into {bits} bits")
        return (value % (1 << bits)).to_bytes(variable.size, "little")
    raise LaunchError(
        f"{where}: got {type(value).__name__}, expected an array, a number, a NumPy scalar of "
        f"{variable.size} bytes or bytes"
    )


def _buffer(
    where: str, name: str, array: np.ndarray[Any, Any], is_fresh: bool, buffers: list[Buffer]
) -> Buffer:
    if not array.flags.c_contiguous or array.dtype.hasobject:
        raise LaunchError(f"{where}: expected a C-contiguous array of numbers, got {array.dtype} "
                          f"with strides {array.strides}")  # fmt: skip
    for other in buffers:
        if np.may_share_memory(array, other.array):
            if array.ctypes.data == other.array.ctypes.data and array.nbytes == other.array.nbytes:
                return other
            raise LaunchError(f"{where}: overlaps {other.name}; pass the same whole array for both")
    memory = aligned(array.nbytes)
    memory[:] = 0xA5 if is_fresh else np.frombuffer(array.tobytes(), np.uint8)
    buffers.append(Buffer(name, array, memory, is_fresh))
    return buffers[-1]
