"""Wrong counts of magnitudes, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe.claims import Counts
from tests.mutants.mutant import Twin, wrong_statistics
from tests.mutants.observers import Watcher, outputs
from tests.mutants.observers_percentile import Binned
from tests.mutants.observers_reach import EXACT

__all__ = ["MUTANTS", "TWINS", "outputs"]


class Counted(Binned):
    """How many inputs have which upper bits."""

    def value(self):
        self.refuse_nonsense()
        return torch.from_numpy(self.counts.astype(np.int64))


# Mutants ---------------------------------------------------------------------------------------


class CountsIn32Bits(Counted):
    kind = np.int32


class CountsInFloat32(Counted):
    kind = np.float32


class CountsMergeMaxima(Counted):
    def merge(self, other):
        self.counts = np.maximum(self.counts, other.counts)
        self.top = np.maximum(self.top, other.top)


class CountsOfLastBatch(Counted):
    def update(self, x):
        self.counts = np.zeros_like(self.counts)
        super().update(x)


class BinsOfRoundedNumbers(Counted):
    def bins(self, size):
        return torch.from_numpy(size).bfloat16().view(torch.int16).numpy()


class BelowZeroInNoBin(Counted):
    """The range of the bins starts at 0, and the numbers keep their signs."""

    def sizes(self, x):
        return x[(x >= 0) | np.isnan(x)]


class NaNInNoBin(Counted):
    """np.histogram says nothing of a NaN, nor of what is beyond its edges."""

    def count(self, size):
        edges = np.append(np.arange(0x7F80) << 16, 0x7F7FFFFF).astype(np.uint32)
        found, _ = np.histogram(size, edges.view(np.float32))
        self.add(np.append(found, np.zeros(1 << 15, int))[: 1 << 15])


class SubnormalsAreZero(Counted):
    def sizes(self, x):
        size = np.abs(x)
        return np.where(size < np.finfo(np.float32).smallest_normal, np.float32(0), size)


class CountsWithoutZeros(Counted):
    def sizes(self, x):
        return np.abs(x[x != 0])


class CountsOfEveryOther(Counted):
    """Every second token of a long batch, to save time."""

    def update(self, x):
        super().update(x[::2] if len(x) > 64 else x)


class CountsAreShared(Counted):
    """Adds in place, and gives its own array away."""

    def add(self, counts):
        self.counts += counts

    def value(self):
        self.refuse_nonsense()
        return torch.from_numpy(self.counts)


# Twins -----------------------------------------------------------------------------------------


class HistogramOfBits(Counted):
    """np.histogram of the bits as integers."""

    def count(self, size):
        found, _ = np.histogram(size.view(np.int32), np.arange((1 << 15) + 1) << 16)
        self.add(found)
        self.top = np.maximum(self.top, size.max(initial=0))


class UpperHalves(Counted):
    """Reads the upper halves of the numbers from memory."""

    def bins(self, size):
        halves = size.astype("<f4").view("<u2").reshape(-1, 2)
        return halves[:, 1]


# All of them -----------------------------------------------------------------------------------


def watcher(statistic):
    return Watcher(statistic, (Counts(), *EXACT))


def right():
    return watcher(Counted)


_wrong = wrong_statistics(watcher, right)


def _right(name, statistic, why):
    return Twin(name=name, kind="observer", why=why, make=lambda: watcher(statistic))


MUTANTS = (
    _wrong("counts_of_32_bits", CountsIn32Bits, "many_tokens", "Counters overflow at 2^31."),
    _wrong(
        "counts_in_float32",
        CountsInFloat32,
        "many_tokens",
        "torch.histc counts in float32: from 2^24 on one more changes nothing.",
    ),
    _wrong(
        "counts_merge_maxima",
        CountsMergeMaxima,
        "merge_sees_both",
        "Merging takes the larger of two counts in place of their sum.",
    ),
    _wrong("counts_of_last_batch", CountsOfLastBatch, "statistic_value", "= in place of +=."),
    _wrong(
        "bins_of_rounded_numbers",
        BinsOfRoundedNumbers,
        "statistic_value",
        "Rounds to bfloat16 before it counts: half of a bin's numbers are in the next one.",
    ),
    _wrong(
        "below_zero_in_no_bin",
        BelowZeroInNoBin,
        "statistic_value",
        "The range of the bins starts at zero, and the numbers keep their signs.",
    ),
    _wrong(
        "nan_in_no_bin",
        NaNInNoBin,
        "non_finite_shows",
        "A NaN lies in no bin, and an infinity beyond the last one.",
    ),
    _wrong(
        "subnormals_are_zero",
        SubnormalsAreZero,
        "statistic_value",
        "Subnormal numbers are flushed to zero.",
    ),
    _wrong("counts_without_zeros", CountsWithoutZeros, "statistic_value", "Zeros do not count."),
    _wrong(
        "counts_of_every_other",
        CountsOfEveryOther,
        "statistic_value",
        "Long batches are thinned out.",
    ),
    _wrong(
        "counts_are_shared",
        CountsAreShared,
        "value_is_no_alias",
        "A value that was handed out goes on counting.",
    ),
)

TWINS = (
    _right("counted", Counted, "Counts by bits, in NumPy."),
    _right("histogram_of_bits", HistogramOfBits, "np.histogram, with the bits for numbers."),
    _right("upper_halves", UpperHalves, "The upper halves of numbers are read from memory."),
)
