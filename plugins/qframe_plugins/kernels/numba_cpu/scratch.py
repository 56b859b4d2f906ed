"""Memory that a thread keeps for its next call.

Pages fresh from the system have to be zeroed, which can cost a third of a factorization.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

LINE = 64  # bytes of a cache line, and of the widest register
_PAGE = 1 << 21  # bytes of a large page
_CHUNK = 1 << 24  # bytes that small arrays share
_SHARED = 1 << 22  # arrays of so many bytes have pages of their own

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

    A register that lies across two lines costs two reads. Small arrays share chunks of memory, in
    large pages where the system has them, for to find the many small pages of a weight can take as
    long as to read a good part of it. A chunk goes when the last of its arrays does.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size >= _SHARED:
        return _pages(size)[:size].view(dtype).reshape(shape)
    with _lock:
        free = _chunk.free
        if size > len(free):
            free = _pages(_CHUNK)
        _chunk.free = free[-(-size // LINE) * LINE :]
    return free[:size].view(dtype).reshape(shape)


class _Chunk:
    """What is left of the last chunk; it begins where a line does."""

    free = np.empty(0, np.uint8)


_chunk, _lock = _Chunk(), threading.Lock()


def _pages(size: int) -> npt.NDArray[np.uint8]:
    """Return at least so many bytes, all 0, that begin where a large page does."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        memory = np.zeros(size + LINE, np.uint8)
        return memory[-memory.ctypes.data % LINE :]
    mapped = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapped, np.uint8)
    return memory[-memory.ctypes.data % _PAGE :]
