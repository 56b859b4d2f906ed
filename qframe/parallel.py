"""Work in parallel without letting the thread count into the numbers.

torch splits an operation by the number of threads, and a split sum may round differently. So
qframe splits the work itself, into pieces that do not depend on the machine, and lets every
piece run in torch with one thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """Return how many threads to use: QFRAME_THREADS, else the cores this process may use."""
    asked = os.environ.get("QFRAME_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
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


def spread(work: Callable[[T], R], pieces: Sequence[T], threads: int) -> list[R]:
    """Return [work(p) for p in pieces], on several threads, each with single-threaded torch."""
    if threads == 1 or len(pieces) <= 1:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, pieces))
