"""Several plugins at a time, each in a process of its own, as `contain` has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from qframe.parallel import default_threads
from qframe_conformance.contain import check_contained
from qframe_conformance.process import Place
from qframe_conformance.report import Report
from qframe_conformance.target import Target

SECONDS = 300.0  # for one case: beside others, and first calls compile


def side_by_side(
    groups: Sequence[Sequence[Target]],
    *,
    processes: int,
    seconds: float = SECONDS,
    begins: Callable[[Target], None] | None = None,
    **options: Any,
) -> list[list[Report]]:
    """Return the reports of plugins, of which so many are checked at a time.

    groups      targets that have much in common, such as what they compile: those of a group are
                checked one after another in one process. Groups begin in the order in which they
                stand; long ones come first for the least time
    processes   how many there are; they share the cores of this one
    seconds     how long a plugin may be silent: one case of one scenario
    begins      called with each target before it begins, from any thread
    options     of `check_contained`

    A process that one plugin has taken along is replaced by a new one for the next. Raises what
    `check_contained` raises, after the other processes were ended.
    """
    count = max(1, min(processes, len(groups)))
    threads = max(1, default_threads() // count)
    free: SimpleQueue[Place] = SimpleQueue()

    def reports(group: Sequence[Target]) -> Iterator[Report]:
        place = free.get()
        try:
            for target in group:
                if begins is not None:
                    begins(target)
                yield check_contained(target, place=place, **options)
        finally:
            free.put(place)

    pool = ThreadPoolExecutor(count, "qframe-check")
    # Places are left before the pool is waited for: what a process does not finish nobody awaits.
    with ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        for _ in range(count):
            free.put(stack.enter_context(Place(seconds, threads)))
        futures = [pool.submit(lambda group: [*reports(group)], group) for group in groups]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
