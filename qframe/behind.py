"""What is written while the network already goes on: one piece of work after another.

Writing takes a while, and the processor little. What one piece of work raises is raised where the
next one is handed over, or waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from qframe.parallel import one_torch_thread


class Behind:
    """Does work in a thread of its own, a piece at a time; use as a context manager.

    On leaving all of it is done; after an error only what has begun is.

    threads   with 1 nothing runs beside anything: work is done where it is handed over
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(1, "qframe-write") if threads > 1 else None
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:  # what has begun still needs the files
                self._pool.shutdown(cancel_futures=True)

    def do(self, work: Callable[[], None]) -> None:
        """Begin some work, when what was handed over before is done."""
        self.wait()
        if self._pool is None:
            work()
        else:
            self._last = self._pool.submit(_alone, work)

    @property
    def idle(self) -> bool:
        """Whether all work is done; what it raised may still have to be told."""
        return self._last is None or self._last.done()

    def wait(self) -> None:
        """Wait until all work is done, and raise what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _alone(work: Callable[[], None]) -> None:
    with one_torch_thread():
        work()
