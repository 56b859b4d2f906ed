"""Work in parallel without letting the thread count into the numbers.

torch splits an operation by the number of threads, and a split sum may round differently. So
qframe splits the work itself, into pieces that do not depend on the machine, and lets every
piece run in torch with one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

RUN = 4  # pieces that are handed over at a time
T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """Return how many threads to use: QFRAME_THREADS, else the cores this process may use.

    Processes that a launcher has started on one machine share its cores.
    """
    asked = os.environ.get("QFRAME_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")  # as torchrun says it
    return max(1, _cores() // (int(beside) if beside.isdigit() and int(beside) else 1))


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has affinities
        return os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread in this thread, and restore its setting afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_here = threading.local()


@contextmanager
def sharing(threads: int) -> Iterator[None]:
    """Let `each` share the work of this thread with so many threads."""
    before = getattr(_here, "threads", 1)
    _here.threads = threads
    try:
        yield
    finally:
        _here.threads = before


def shared() -> int:
    """Return with how many threads this one shares its work."""
    threads: int = getattr(_here, "threads", 1)
    return threads


def each(work: Callable[[T], object], pieces: Iterable[T]) -> None:
    """Do some work for every piece, on as many threads as this thread shares its work with.

    Pieces come in runs, as some of them are too small to be handed over one by one.
    """
    every = list(pieces)
    runs = [every[first : first + RUN] for first in range(0, len(every), RUN)]

    def one(run: Sequence[T]) -> None:
        for piece in run:
            work(piece)

    spread(one, runs, shared())


_pools: dict[int, ThreadPoolExecutor] = {}  # threads -> a pool of so many, kept for the next call
_pools_lock = threading.Lock()
_worker = threading.local()
if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pools.clear)


def spread(work: Callable[[T], R], pieces: Sequence[T], threads: int) -> list[R]:
    """Return [work(p) for p in pieces], on several threads, each with single-threaded torch.

    Work that itself spreads does so in its own thread.
    """
    if threads == 1 or len(pieces) <= 1 or getattr(_worker, "busy", False):
        with one_torch_thread():
            return [work(piece) for piece in pieces]
    with _pools_lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, "qframe", initializer=_start_worker)
        pool = _pools[threads]
    return list(pool.map(work, pieces))


def _start_worker() -> None:
    _worker.busy = True
    # A thread that has not asked yet would take over, later, what another one has set by then.
    torch.get_num_threads()
    torch.set_num_threads(1)
