"""Large tensors in memory that the process has used before.

A page of memory that a process touches for the first time has to be found and cleared by the
system, which can take longer than all that is done to the numbers in it. Where layer after layer
comes and goes, what one leaves is given to the next: never more than was in use at one time.

What waits for a while has memory apart, of its own size. What passes takes any of its dtype that is
large enough: it is back before a layer comes that needs all of it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

LARGE = 1 << 20  # bytes of a tensor that is worth it
_WASTE = 2  # how many times as large memory may be as what is asked for, and waits in it


class Pages:
    """Memory that tensors leave, for others to come.

    waste   how many times as large memory may be as what is asked for
    """

    def __init__(self, waste: float = math.inf) -> None:
        self._waste = waste
        self._spare: list[mmap.mmap] = []
        self._lock = threading.Lock()
        self._total = 0  # bytes, used and spare
        self._most = 0  # bytes that were used at one time

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of any numbers, contiguous. Raises MemoryError."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            region = self._take(size) or self._make(size)
        numbers = np.frombuffer(region, np.uint8, size)
        # The tensor keeps the array; when no tensor does any more, the memory is spare again. That
        # may happen in any thread, in the middle of anything, so that no lock must be asked for.
        weakref.finalize(numbers, self._spare.append, region).atexit = False
        return torch.from_numpy(numbers).view(dtype).reshape(tuple(shape))

    @property
    def spare(self) -> int:
        """Bytes that no tensor uses."""
        return sum(map(len, self._spare))

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self._total

    def _take(self, size: int) -> mmap.mmap | None:
        """Return the smallest spare memory that is large enough, and not much too large."""
        fitting = [r for r in self._spare if size <= len(r) <= self._waste * size]
        found = min(fitting, key=len, default=None)
        if found is not None:
            self._forget(found)
            self._total += len(found)
        return found

    def _make(self, size: int) -> mmap.mmap:
        """Return more memory: the largest spare one that is too small grows, where it can.

        What is spare is let go where there would be more than ever before.
        """
        self._most = max(self._most, self._total - self.spare + size)
        part = max((r for r in self._spare if len(r) < size), key=len, default=None)
        if part is not None:
            self._forget(part)
        while self._spare and self._total + size > self._most:
            self._let_go()
        while True:
            try:
                region = _region(size, part)
            except MemoryError:
                if not self._spare:
                    raise
                self._let_go()
            else:
                self._total += size
                return region

    def _forget(self, region: mmap.mmap) -> None:
        """Take memory out of what is spare: not by `remove`, which looks for the same content."""
        del self._spare[next(i for i, each in enumerate(self._spare) if each is region)]
        self._total -= len(region)

    def _let_go(self) -> None:
        """Give the oldest spare memory back to the system."""
        self._total -= len(self._spare.pop(0))


def _region(size: int, part: mmap.mmap | None = None) -> mmap.mmap:
    """Return memory of the process's own, in as few pieces as the system can give.

    part   smaller memory that may become a part of it, with its pages; nobody else has it

    Raises MemoryError.
    """
    if part is not None:
        with contextlib.suppress(OSError, SystemError, ValueError):  # not every system moves pages
            part.resize(size)
            return part
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    try:  # Windows has no flags
        region = mmap.mmap(-1, size, flags=private) if private else mmap.mmap(-1, size)
    except OSError as error:
        raise MemoryError(f"{error.strerror}: tried to allocate {size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that has no large pages
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


Pools = dict[torch.dtype | None, Pages]  # of what passes, by dtype, and of what waits


_pages: Pools | None = None
_users = 0
_users_lock = threading.Lock()


@contextmanager
def kept_pages() -> Iterator[Pools]:
    """Let `empty` use memory again that its tensors leave; at the end it is the system's."""
    global _pages, _users
    with _users_lock:
        _users += 1
        if _pages is None:
            _pages = {None: Pages(_WASTE)}
        pages = _pages
    try:
        yield pages
    finally:
        with _users_lock:
            _users -= 1
            if not _users:
                _pages = None


def empty(shape: Sequence[int], dtype: torch.dtype, *, waits: bool = False) -> torch.Tensor:
    """Return a tensor of any numbers, contiguous, in memory that was used before where it can be.

    That is within `kept_pages`, and for large ones.

    waits   whether it stays while others come and go
    """
    pages = _pages
    if pages is None or math.prod(shape) * dtype.itemsize < LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    kind = None if waits else dtype
    pool = pages.get(kind) or pages.setdefault(kind, Pages())
    return pool.empty(shape, dtype)
