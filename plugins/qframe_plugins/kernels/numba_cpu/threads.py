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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

# To wake a thread takes some twenty microseconds. A core reads half a megabyte from memory then,
# or multiplies some dozen bytes for each that it would have read.
_WAKING = 1 << 20
_PRODUCTS_FOR_A_BYTE = 16

_pools: dict[int, ThreadPoolExecutor] = {}

if hasattr(os, "register_at_fork"):  # not on Windows
    # A child of fork has the executors but not their threads.
    os.register_at_fork(after_in_child=_pools.clear)


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
    counter   [1] int64, zero: what the kernel claims its tasks from
    """
    counter = np.zeros(1, np.int64)
    helpers = 0 if tasks < 2 else min(_allowed(), tasks) - 1
    if helpers < 1:
        kernel(counter, *operands)
        return
    if helpers not in _pools:
        _pools[helpers] = ThreadPoolExecutor(helpers, thread_name_prefix="qframe-kernel")
    futures = [_pools[helpers].submit(kernel, counter, *operands) for _ in range(helpers)]
    kernel(counter, *operands)
    for future in futures:
        future.result()
