"""Memory that a thread keeps for its next call.

Pages fresh from the system have to be zeroed, which can cost a third of a factorization.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

LINE = 64  # bytes of a cache line, and of the widest register

_kept = threading.local()


def scratch(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an uninitialized array, which the thread's next call of `scratch` takes away again."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if getattr(_kept, "memory", np.empty(0, np.uint8)).nbytes < size:
        _kept.memory = np.empty(size, np.uint8)
    kept: npt.NDArray[np.uint8] = _kept.memory
    return kept[:size].view(dtype).reshape(shape)


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array of zeros that starts where a cache line does, so that no register straddles.

    Registers that lie across two lines cost two reads each.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(dtype).reshape(shape)
