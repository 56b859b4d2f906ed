"""Wrong searches for the reach with the least squared error, and right ones that do it otherwise.

The reference is a small one, in float64 NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qframe import Grid
from qframe.claims import LeastError
from tests.mutants.mutant import Mutant, Twin
from tests.mutants.observers import outputs
from tests.mutants.observers_percentile import STEP, Binned
from tests.mutants.observers_reach import EXACT

__all__ = ["MUTANTS", "TWINS", "outputs"]

EIGHT_BITS = Grid(-127, 127)


# The right one --------------------------------------------------------------------------------


class Searched(Binned):
    """The best of a hundred reaches: the largest input, 99 % of it, ... 1 %."""

    shares = tuple(1 - k / 100 for k in range(100))

    def __init__(self, columns, grid=EIGHT_BITS):
        super().__init__(columns)
        self.grid = grid

    def reach(self):
        if not self.top:
            return 0.0
        reaches = [self.top * np.float32(share) for share in self.shares]
        x, counts = self.numbers()
        losses = [(counts * self.missed(x, reach) ** 2).sum() for reach in reaches]
        return reaches[self.best(losses)]

    def best(self, losses):
        return int(np.argmin(losses))

    def numbers(self):
        """Return the middles of bins that hold something, and how many lie there."""
        seen = np.flatnonzero(self.counts)
        middles = (seen << 16 | 0x8000).astype(np.uint32).view(np.float32)
        return np.minimum(middles, self.top).astype(np.float64), self.counts[seen]

    def missed(self, x, reach):
        scale = max(float(reach) / self.grid.reach, 2.0**-149) if reach else 1.0
        return x - scale * self.nearest(x / scale)

    def nearest(self, x):
        if self.grid.values is None:
            return np.clip(np.rint(x), self.grid.qmin, self.grid.qmax)
        values = np.array(self.grid.values)
        return values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]


@dataclass(frozen=True)
class Searcher:
    """An observer of the reach with the least squared error, for the codes that the host gives."""

    statistic: type = Searched
    shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    step: float = STEP
    grid: Grid = EIGHT_BITS
    name: str = "searcher"
    finds_reach: bool = True

    @property
    def claims(self):
        return (LeastError(self.grid, self.step, self.shares), *EXACT)

    def start(self, group):
        return self.statistic(group.columns, self.grid)


# Mutants of the search ------------------------------------------------------------------------


class NoCounts(Searched):
    """All bins weigh the same, however many inputs they hold."""

    def numbers(self):
        x, counts = super().numbers()
        return x, np.ones_like(counts)


class Maximizes(Searched):
    def best(self, losses):
        return int(np.argmax(losses))


class NeverClips(Searched):
    def best(self, losses):
        return 0


class ClippingIsFree(Searched):
    """What lies beyond the reach is rounded, but not clipped, while candidates are compared."""

    def nearest(self, x):
        return np.rint(x) if self.grid.values is None else super().nearest(x)


class ClippedDoNotCount(Searched):
    def missed(self, x, reach):
        return np.where(x > reach, 0, super().missed(x, reach))


class StopsTooEarly(Searched):
    """Tries no reach below 80 % of the largest input, as weights are searched."""

    shares = tuple(1 - k / 100 for k in range(21))


class IgnoresTheGrid(Searched):
    """Always searches for int8, whatever the codes are."""

    def __init__(self, columns, grid):
        super().__init__(columns)


class ReturnsTheScale(Searched):
    def reach(self):
        return super().reach() / self.grid.reach


class LastBatchIsSearched(Searched):
    def update(self, x):
        if x.numel():
            self.counts, self.top = np.zeros_like(self.counts), np.float32(0)
            super().update(x)


class BestOfEachBatch(Searched):
    """Searches in every batch, and keeps the largest of the reaches that were found."""

    found = np.float32(0)

    def update(self, x):
        self.counts, self.top = np.zeros_like(self.counts), self.top * 0
        super().update(x)
        if np.isfinite(self.top):
            self.found = np.maximum(self.found, super().reach())

    def merge(self, other):
        self.found = np.maximum(self.found, other.found)
        self.top = np.maximum(self.top, other.top)

    def reach(self):
        return self.found


class RelativeError(Searched):
    """Compares the error of each input with its size: the small ones decide."""

    def missed(self, x, reach):
        return super().missed(x, reach) / np.maximum(x, 2.0**-149)


class Overflows(Searched):
    kind = np.int32


class LeavesInfinityOut(Searched):
    def sizes(self, x):
        return np.abs(x[np.isfinite(x)])


# Twins ----------------------------------------------------------------------------------------


class FinerSearch(Searched):
    """More candidates, from the smallest on."""

    shares = tuple((k + 1) / 128 for k in range(128))


class LowerEdges(Searched):
    """Every input counts as the lower edge of its bin: twice as far off, as is claimed."""

    def numbers(self):
        seen = np.flatnonzero(self.counts)
        edges = (seen << 16).astype(np.uint32).view(np.float32)
        return edges.astype(np.float64), self.counts[seen]


class Exhaustive(Searched):
    """Keeps all inputs; nothing is said about bins."""

    shares = (1.0, 0.9, 0.75, 0.5, 0.3, 0.25, 0.1)

    def __init__(self, columns, grid):
        super().__init__(columns, grid)
        self.parts = []

    def count(self, size):
        self.parts.append(size.astype(np.float64))
        self.top = np.maximum(self.top, size.max(initial=0))

    def merge(self, other):
        self.parts = other.parts + self.parts
        self.top = np.maximum(self.top, other.top)

    def numbers(self):
        size, counts = np.unique(np.concatenate(self.parts), return_counts=True)
        return size, counts


# All of them ----------------------------------------------------------------------------------


def right():
    return Searcher()


def _wrong(name, statistic, killed_by, bug):
    return Mutant(
        name=name,
        kind="observer",
        bug=bug,
        make=lambda: Searcher(statistic),
        correct=right,
        killed_by=killed_by,
    )


MUTANTS = (
    _wrong(
        "search_without_counts",
        NoCounts,
        "statistic_value",
        "All bins weigh the same, however many inputs they hold.",
    ),
    _wrong("search_maximizes", Maximizes, "statistic_value", "argmax in place of argmin."),
    _wrong(
        "search_never_clips",
        NeverClips,
        "statistic_value",
        "No candidate is ever better than the largest input, so nothing is gained.",
    ),
    _wrong(
        "clipping_is_free",
        ClippingIsFree,
        "statistic_value",
        "While candidates are compared, codes have no end: the smallest step is the best.",
    ),
    _wrong(
        "clipped_do_not_count",
        ClippedDoNotCount,
        "statistic_value",
        "The error is summed only over what is not clipped.",
    ),
    _wrong(
        "search_stops_too_early",
        StopsTooEarly,
        "statistic_value",
        "No reach below 80 % of the largest input is tried, as is done for weights.",
    ),
    _wrong(
        "search_ignores_the_grid",
        IgnoresTheGrid,
        "statistic_value",
        "Searches for int8, whatever codes the scheme has.",
    ),
    _wrong("search_returns_the_scale", ReturnsTheScale, "statistic_value", "A step, not a reach."),
    _wrong(
        "search_in_last_batch",
        LastBatchIsSearched,
        "statistic_value",
        "The counts start anew with every batch.",
    ),
    _wrong(
        "best_of_each_batch",
        BestOfEachBatch,
        "order_of_tokens",
        "Each batch is searched by itself, so it counts how tokens are cut into batches.",
    ),
    _wrong(
        "relative_error",
        RelativeError,
        "statistic_value",
        "The error relative to each input: the small ones, most of which are noise, decide.",
    ),
    _wrong("search_in_32_bits", Overflows, "many_tokens", "Counters overflow at 2^31."),
    _wrong(
        "search_without_infinity",
        LeavesInfinityOut,
        "non_finite_shows",
        "What is not finite is left out, and nobody is told.",
    ),
)


def _right(name, make, why):
    return Twin(name=name, kind="observer", why=why, make=make)


TWINS = (
    _right("searched", right, "The same search, with scales in float64."),
    _right(
        "finer_search",
        lambda: Searcher(FinerSearch),
        "More candidates, in another order; those that are claimed are among them.",
    ),
    _right(
        "lower_edges",
        lambda: Searcher(LowerEdges, step=2 * STEP),
        "Inputs count as the edges of their bins, and bins of twice the width are claimed.",
    ),
    _right(
        "exhaustive",
        lambda: Searcher(Exhaustive, step=0.0),
        "Keeps every input, in no bin, and tries seven reaches.",
    ),
)
