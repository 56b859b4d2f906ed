"""Run one kernel on several threads that share its tasks.

A kernel that takes tasks from a counter (`simd.claim`) until none is left may run on any number
of threads at once. These are plain Python threads, for the kernels release the GIL: unlike
numba's `prange` that costs no extra compilation, is safe to call from several threads and under
fork, never spins at a barrier, and a busy core delays one task and not half of them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# To wake a thread takes some twenty microseconds. A core reads half a megabyte from memory then,
# or multiplies some dozen bytes for each that it would have read.
_WAKING = 1 << 20
_PRODUCTS_FOR_A_BYTE = 16


class _Helper(threading.Thread):
    """A thread that runs one kernel after another, and sleeps in between.

    An executor does the same, and takes at least twenty microseconds longer.
    """

    def __init__(self) -> None:
        super().__init__(name="qframe-kernel", daemon=True)
        self._told, self._done = threading.Lock(), threading.Lock()
        self._told.acquire()
        self._done.acquire()
        self._work: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Wait for work, and do it."""
        while True:
            self._told.acquire()
            try:
                if self._work is not None:
                    kernel, operands = self._work
                    kernel(*operands)
            except BaseException as error:  # is raised where the work is waited for
                self._error = error
            kernel = operands = self._work = None  # type: ignore[assignment]
            self._done.release()

    def begin(self, kernel: Callable[..., Any], *operands: Any) -> None:
        """Begin some work; it has to be waited for."""
        self._work = kernel, operands
        self._told.release()

    def wait(self) -> BaseException | None:
        """Wait for the work, and return what it raised."""
        self._done.acquire()
        error, self._error = self._error, None
        return error


class _Helpers:
    """Those that there are, and those of them that have nothing to do."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget them all: a child of fork has the objects but not the threads."""
        self._free: list[_Helper] = []
        self._made = 0
        self._lock = threading.Lock()

    def take(self, most: int) -> list[_Helper]:
        """Return up to so many, for `wait_for`; new ones as long as there are fewer in all.

        Who finds none free, as where several threads share work at once, works alone.
        """
        with self._lock:
            for _ in range(most - self._made):
                self._free.append(_Helper())
                self._made += 1
            return [self._free.pop() for _ in range(min(most, len(self._free)))]

    def wait_for(self, taken: list[_Helper]) -> BaseException | None:
        """Wait for the work of all, give them back, and return what one of them raised."""
        found = None
        try:
            while taken:
                found = taken[-1].wait() or found
                with self._lock:
                    self._free.append(taken.pop())
        finally:  # whoever was interrupted leaves the others to what they do
            with self._lock:
                self._made -= len(taken)
        return found


_helpers = _Helpers()

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_helpers.clear)


def _allowed() -> int:
    """Return how many threads numba may use, and leave torch's own number as it is.

    The first time it is asked numba starts its threading layer, which resets that of OpenMP.
    """
    torch = sys.modules.get("torch")
    if torch is None or _started.is_set():
        return int(numba.get_num_threads())
    before = torch.get_num_threads()
    allowed = int(numba.get_num_threads())
    torch.set_num_threads(before)
    _started.set()
    return allowed


_started = threading.Event()


def worth_sharing(tasks: int, read: int, products: int) -> int:
    """Return how many tasks to share work in: one, where it would end too soon.

    tasks      how many there are
    read       bytes that are read and written, but for those of a product's tokens and sums
    products   of a token's number and a weight
    """
    return tasks if read + products // _PRODUCTS_FOR_A_BYTE >= _WAKING else 1


def share(kernel: Callable[..., Any], tasks: int, *operands: Any) -> None:
    """Call kernel(counter, *operands) on as many threads as numba may use, and wait for all.

    tasks     how many there are: no more threads than that are woken
    counter   [2] int64: zero, what the kernel claims its tasks from; and how many threads there are
    """
    helpers = 0 if tasks < 2 else min(_allowed(), tasks) - 1
    taken = _helpers.take(helpers) if helpers else []
    counter = np.array([0, 1 + len(taken)])
    if not taken:
        kernel(counter, *operands)
        return
    for helper in taken:
        helper.begin(kernel, counter, *operands)
    try:
        kernel(counter, *operands)
    finally:
        error = _helpers.wait_for(taken)
    if error is not None:
        raise error
