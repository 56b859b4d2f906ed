"""Times of several things in one run, in turn, so that what slows the machine slows all of them.

A single time says little: what is reported is the median of the ratios of times that were taken
beside one another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Clock = Callable[[], float]


def in_turn(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Clock = time.perf_counter,
    repeats: int = 1,
    between: Callable[[], Any] | None = None,
    twins: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Return name -> seconds of each round, of all candidates one after the other in every round.

    repeats   calls that are timed together. Before the first round each is called once untimed
    between   called before each is timed, e.g. to fill the caches with something else
    twins     name -> the same with operands of its own, called after `between`: what is timed then
              finds its code in the caches, as in a network with many layers, and not its operands
    """
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            if between is not None:
                between()
            if twins is not None and name in twins:
                twins[name]()
            start = clock()
            for _ in range(repeats):
                call()
            times[name].append((clock() - start) / repeats)
    return times


def speedup(times: Sequence[float], base: Sequence[float]) -> float:
    """Return how many times as fast as the base: the median of the ratios of all rounds.

    >>> speedup([1.0, 2.0, 1.0], [2.0, 4.0, 9.0])
    2.0
    """
    return statistics.median(b / t for t, b in zip(times, base, strict=True))
