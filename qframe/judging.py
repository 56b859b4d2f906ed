"""Measuring and certifying layers while the network already runs on.

What a layer's report says is needed only when its block is written. So it is worked out on a
thread of its own, beside the pass through the network, which leaves cores idle whenever its chunks
wait for one another. Layers are judged one after another in the order in which they came, so
neither the numbers nor the order of events depend on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from qframe.contracts import Event

Verdict = Callable[[], list[Event]]
"""Works something out, and returns what should be told."""


class Court:
    """Hears verdicts in order; use as a context manager.

    threads   with 1 nothing runs beside anything: a verdict is heard when it is asked for

    A verdict should use no other threads: the other cores are busy.
    """

    def __init__(self, threads: int) -> None:
        self._pool = (
            ThreadPoolExecutor(1, "qframe-judge", torch.set_num_threads, (1,))
            if threads > 1
            else None
        )
        self._waiting: deque[Future[list[Event]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def hear(self, verdict: Verdict) -> None:
        """Begin to work a verdict out. Raises what it raises, here or in `settle`."""
        if self._pool is not None:
            self._waiting.append(self._pool.submit(verdict))
            return
        heard: Future[list[Event]] = Future()
        heard.set_result(verdict())
        self._waiting.append(heard)

    def settle(self, still_waiting: int = 0) -> list[Event]:
        """Wait for all verdicts but the last few, and return their events in order."""
        events: list[Event] = []
        while len(self._waiting) > still_waiting:
            events += self._waiting.popleft().result()
        return events
