"""Measuring and certifying layers while the network already runs on.

What a layer's report says is needed only when its block is written. So it is worked out on a
thread of its own, beside the pass through the network, which leaves cores idle whenever its chunks
wait for one another; and whoever has to wait for a report works on the others meanwhile. What one
verdict finds never depends on another, and events are told in the order in which layers came, so
neither depends on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from types import TracebackType
from typing import Self

from qframe.contracts import Event
from qframe.parallel import one_torch_thread

Verdict = Callable[[], list[Event]]
"""Works something out, and returns what should be told."""


class _Case:
    """A verdict, which is worked out once, by whoever comes first, and then let go."""

    def __init__(self, verdict: Verdict) -> None:
        self._todo = [verdict]
        self.heard: Future[list[Event]] = Future()

    def hear(self) -> None:
        try:
            verdict = self._todo.pop()
        except IndexError:  # another thread has begun
            return
        try:
            with one_torch_thread():
                found = verdict()
        except BaseException as error:  # is raised when its turn comes, after earlier layers'
            self.heard.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            del verdict  # what it holds is free before those go on that wait for what it found
            self.heard.set_result(found)


class Court:
    """Hears verdicts, and tells what they found in order; use as a context manager.

    threads   with 1 nothing runs beside anything: a verdict is heard when it is asked for

    A verdict should use no other threads: the other cores are busy.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(1, "qframe-judge") if threads > 1 else None
        self._waiting: deque[_Case] = deque()

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
        """Begin to work a verdict out."""
        case = _Case(verdict)
        if self._pool is not None:
            self._pool.submit(case.hear)
        else:
            case.hear()
        self._waiting.append(case)

    def catch_up(self, behind: int) -> None:
        """Work out all verdicts but the last few, so that what they hold is let go.

        What they found, or raised, is told when they are settled.
        """
        due = list(self._waiting)[: len(self._waiting) - behind]
        for case in reversed(due):
            case.hear()
        wait([case.heard for case in due])

    def known(self, count: int) -> list[Event] | None:
        """Return the events of the first verdicts that wait; None unless all are worked out."""
        first = [case.heard for case in islice(self._waiting, count)]
        if not all(heard.done() and heard.exception() is None for heard in first):
            return None
        return [event for heard in first for event in heard.result()]

    def settle(self, still_waiting: int = 0) -> list[Event]:
        """Complete all verdicts but the last few, and return their events in order.

        Raises what the first of them raised.
        """
        due = [self._waiting.popleft() for _ in range(len(self._waiting) - still_waiting)]
        for case in reversed(due):  # the other thread is at the first ones
            case.hear()
        return [event for case in due for event in case.heard.result()]
