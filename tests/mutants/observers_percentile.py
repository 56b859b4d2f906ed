"""Wrong observers of a percentile of magnitudes, and right ones that do it otherwise.

The reference counts magnitudes by the upper half of their bits, in NumPy; what else is read from
such counts is in `observers_counts` and `observers_search`.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import numpy as np
import torch

from qframe.claims import Reach
from qframe.errors import NonFiniteError
from tests.mutants.mutant import Mutant, Twin
from tests.mutants.observers import outputs
from tests.mutants.observers_reach import EXACT, Finder

__all__ = ["MUTANTS", "TWINS", "outputs"]

STEP = 2.0**-7  # the width of a bin
MOST = (Reach(0.9999, STEP), *EXACT)  # 99.99 %, as quantization tools have it
MEDIAN = (Reach(0.5, STEP), *EXACT)


# The right ones -------------------------------------------------------------------------------


class Binned:
    """Counts by the upper half of the bits, in NumPy; `value` is a percentile."""

    share = 0.9999
    kind = np.int64

    def __init__(self, columns):
        self.counts, self.top = np.zeros(1 << 15, self.kind), np.float32(0)

    def update(self, x):
        self.count(self.sizes(np.ascontiguousarray(x.numpy()).ravel()))

    def sizes(self, x):
        return np.abs(x)

    def count(self, size):
        self.add(np.bincount(self.bins(size), minlength=1 << 15))
        self.top = np.maximum(self.top, size.max(initial=0))

    def bins(self, size):
        return size.view(np.uint32) >> 16

    def add(self, counts):
        self.counts = self.counts + counts.astype(self.kind)

    def merge(self, other):
        self.add(other.counts)
        self.top = np.maximum(self.top, other.top)

    def value(self):
        self.refuse_nonsense()
        return torch.from_numpy(np.array([self.reach()], np.float32))

    def refuse_nonsense(self):
        if not np.isfinite(self.top):
            raise NonFiniteError("an input is not finite; look at the network")

    def reach(self):
        sums = self.counts.cumsum()
        if not sums[-1]:
            return np.float32(0)
        return np.minimum(self.edge(np.searchsorted(sums, self.rank(int(sums[-1])))), self.top)

    def rank(self, total):
        return min(max(ceil(Fraction(self.share) * total), 1), total)

    def edge(self, place):
        return np.uint32(int(place) << 16 | 0xFFFF).view(np.float32)


class BinnedMedian(Binned):
    share = 0.5


# Mutants of the percentile --------------------------------------------------------------------


class SignedPercentile(Binned):
    def sizes(self, x):
        return np.maximum(x, 0)


class OneRankLower(Binned):
    def rank(self, total):
        return max(super().rank(total) - 1, 1)


class RankRoundedDown(Binned):
    def rank(self, total):
        return max(floor(self.share * total), 1)


class OneRankHigher(BinnedMedian):
    """Counts from zero: number n p of the sorted ones is one too far."""

    def rank(self, total):
        return min(floor(self.share * total) + 1, total)


class LowerEdge(BinnedMedian):
    def edge(self, place):
        return np.uint32(int(place) << 16).view(np.float32)


class NextBinsEnd(BinnedMedian):
    def edge(self, place):
        return super().edge(int(place) + 1)


class LargestNeverClips(Binned):
    def reach(self):
        return self.top


class PercentileOfMaxima(Binned):
    """Of the largest of each token: a percentile of something else."""

    def update(self, x):
        if x.numel():
            super().update(x.abs().amax(1))


class PercentilesAveraged(Binned):
    """A percentile of every batch, and their mean: np.percentile in a loop."""

    seen, mean = 0, 0.0

    def update(self, x):
        if x.numel():
            size = np.abs(x.numpy()).ravel()
            self.add_mean(float(np.quantile(size, self.share, method="inverted_cdf")), 1)
            self.top = np.maximum(self.top, size.max())

    def add_mean(self, mean, count):
        self.seen += count
        self.mean += (mean - self.mean) * count / max(self.seen, 1)

    def merge(self, other):
        self.add_mean(other.mean, other.seen)
        self.top = np.maximum(self.top, other.top)

    def reach(self):
        return self.mean


class RangeOfFirstBatch(Binned):
    """2048 bins over the range of the first batch; what is larger later goes into the last one."""

    limit = None

    def update(self, x):
        if x.numel():
            size = np.abs(x.numpy()).ravel()
            self.limit = size.max() if self.limit is None else self.limit
            super().update(torch.from_numpy(np.minimum(size, self.limit)))


class ZerosDoNotCount(BinnedMedian):
    def sizes(self, x):
        return np.abs(x[x != 0])


class PercentileMergesMaxima(Binned):
    def merge(self, other):
        self.counts = np.maximum(self.counts, other.counts)
        self.top = np.maximum(self.top, other.top)


class CountsInInt32(BinnedMedian):
    kind = np.int32


class InfinityLeftOut(Binned):
    def sizes(self, x):
        return np.abs(x[np.isfinite(x)])


# Twins ----------------------------------------------------------------------------------------


class Sorted:
    """Keeps all magnitudes, and sorts them when asked: the percentile itself."""

    def __init__(self, columns):
        self.parts = []

    def update(self, x):
        self.parts.append(x.abs().flatten())

    def merge(self, other):
        self.parts = other.parts + self.parts

    def value(self):
        size = torch.cat([torch.zeros(0), *self.parts]).sort().values
        if not len(size):
            return torch.zeros(1)
        if not bool(size.isfinite().all()):
            raise NonFiniteError("an input is not finite; look at the network")
        return size[ceil(Fraction(Binned.share) * len(size)) - 1].reshape(1).clone()


class FinerBins(Binned):
    """Bins of 18 bits, of which only those are kept that hold something."""

    def __init__(self, columns):
        self.counts, self.top = {}, np.float32(0)

    def count(self, size):
        places, counts = np.unique(size.view(np.uint32) >> 13, return_counts=True)
        self.add(dict(zip(places.tolist(), counts.tolist(), strict=True)))
        self.top = np.maximum(self.top, size.max(initial=0))

    def add(self, counts):
        places = self.counts.keys() | counts.keys()
        self.counts = {p: self.counts.get(p, 0) + counts.get(p, 0) for p in places}

    def reach(self):
        left = self.rank(sum(self.counts.values()))
        for place in sorted(self.counts):
            left -= self.counts[place]
            if left <= 0:
                end = np.uint32(place << 13 | 0x1FFF).view(np.float32)
                return np.minimum(end, self.top)
        return np.float32(0)


# All of them ----------------------------------------------------------------------------------


def right():
    return Finder(Binned, MOST)


def right_median():
    return Finder(BinnedMedian, MEDIAN)


def _wrong(name, statistic, killed_by, bug):
    median = issubclass(statistic, BinnedMedian)
    return Mutant(
        name=name,
        kind="observer",
        bug=bug,
        make=lambda: Finder(statistic, MEDIAN if median else MOST),
        correct=right_median if median else right,
        killed_by=killed_by,
    )


MUTANTS = (
    _wrong(
        "signed_percentile",
        SignedPercentile,
        "statistic_value",
        "The percentile of x in place of |x|: what is below zero counts as small.",
    ),
    _wrong("rank_one_lower", OneRankLower, "statistic_value", "One number too many is clipped."),
    _wrong(
        "rank_rounded_down",
        RankRoundedDown,
        "statistic_value",
        "floor(p n) in place of ceil(p n): a smaller share than promised is not clipped.",
    ),
    _wrong(
        "rank_one_higher",
        OneRankHigher,
        "statistic_value",
        "sorted[int(p n)], which counts from zero: one too far where p n is an integer.",
    ),
    _wrong(
        "lower_edge_of_the_bin",
        LowerEdge,
        "statistic_value",
        "Where the bin begins, not where it ends: what lies in it is clipped.",
    ),
    _wrong(
        "end_of_the_next_bin",
        NextBinsEnd,
        "statistic_value",
        "The edges have one entry more than the counts, and are read one too far.",
    ),
    _wrong(
        "percentile_never_clips",
        LargestNeverClips,
        "statistic_value",
        "The largest input, whatever the percentile: no outlier is ever clipped.",
    ),
    _wrong(
        "percentile_of_maxima",
        PercentileOfMaxima,
        "statistic_value",
        "The percentile of each token's largest magnitude.",
    ),
    _wrong(
        "percentiles_averaged",
        PercentilesAveraged,
        "statistic_value",
        "The mean of the batches' percentiles, as calibrators do that keep no histogram.",
    ),
    _wrong(
        "range_of_first_batch",
        RangeOfFirstBatch,
        "statistic_value",
        "The first batch fixes the range; all that is larger later counts in the last bin.",
    ),
    _wrong(
        "percentile_without_zeros",
        ZerosDoNotCount,
        "statistic_value",
        "Zeros, as after a ReLU, do not count.",
    ),
    _wrong(
        "percentile_merges_maxima",
        PercentileMergesMaxima,
        "merge_sees_both",
        "Merging takes the larger of two counts in place of their sum.",
    ),
    _wrong(
        "percentile_of_32_bits",
        CountsInInt32,
        "many_tokens",
        "Counters of 32 bits overflow with long calibration.",
    ),
    _wrong(
        "percentile_without_infinity",
        InfinityLeftOut,
        "non_finite_shows",
        "What is not finite is left out, and nobody is told.",
    ),
)


def _right(name, statistic, why, claims=MOST):
    return Twin(name=name, kind="observer", why=why, make=lambda: Finder(statistic, claims))


TWINS = (
    _right("percentile", Binned, "Counts by bits, in NumPy."),
    _right("median", BinnedMedian, "The same for half of all inputs.", MEDIAN),
    _right(
        "sorted",
        Sorted,
        "Keeps every input and sorts: the percentile itself, without any bin.",
        (Reach(Binned.share), *EXACT),
    ),
    _right(
        "finer_bins",
        FinerBins,
        "Eight times as many bins, of which only those are stored that hold something.",
        (Reach(Binned.share, 2.0**-10), *EXACT),
    ),
)
