"""Wrong observers of the largest magnitude, to which a stored scale has to reach; right ones, too.

Other reaches are in `observers_percentile` and `observers_search`, counts in `observers_counts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe.claims import Mergeable, Reach, Reproducible, SignBlind
from tests.mutants.mutant import Twin, wrong_statistics
from tests.mutants.observers import Watcher, outputs

__all__ = ["MUTANTS", "TWINS", "outputs"]

EXACT = (Mergeable(exact=True), SignBlind(), Reproducible())
LARGEST = (Reach(), *EXACT)


@dataclass(frozen=True)
class Finder(Watcher):
    """An observer of a reach, made of a class of statistics."""

    claims: tuple[Any, ...] = LARGEST
    name: str = "finder"
    finds_reach: bool = True


# The right one --------------------------------------------------------------------------------


class Top:
    """max |x| of all inputs."""

    def __init__(self, columns):
        self.top = torch.zeros(1)

    def update(self, x):
        if x.numel():
            self.top = torch.maximum(self.top, self.measured(x))

    def measured(self, x):
        return x.abs().amax()

    def merge(self, other):
        self.top = torch.maximum(self.top, other.top)

    def value(self):
        return self.top.clone()


# Mutants of the largest magnitude -------------------------------------------------------------


class TopNotMagnitude(Top):
    def measured(self, x):
        return x.amax()


class HalfTheRange(Top):
    def measured(self, x):
        return (x.amax() - x.amin()) / 2


class TopOfLastBatch(Top):
    def update(self, x):
        if x.numel():
            self.top = self.measured(x).reshape(1)


class MovingAverage(Top):
    def update(self, x):
        if x.numel():
            new = self.measured(x)
            self.top = self.top + (new - self.top) * (0.01 if bool(self.top) else 1)


class TopInBfloat16(Top):
    def measured(self, x):
        return super().measured(x.bfloat16()).float()


class TopOfMeans(Top):
    def measured(self, x):
        return x.abs().amax(1).mean()


class TopIgnoresNaN(Top):
    def measured(self, x):
        return x.abs().nan_to_num(nan=0.0, posinf=0.0).amax()


class TopFromMinusInfinity(Top):
    def __init__(self, columns):
        self.top = torch.full((1,), -torch.inf)


class TopIsAScalar(Top):
    def value(self):
        return self.top[0].clone()


class TopOfEachColumn(Top):
    def measured(self, x):
        return x.abs().amax(0)


class TopBelowZero(Top):
    """Asymmetric codes' range: its lower end is returned where it is the farther one."""

    def measured(self, x):
        return x.flatten()[x.abs().argmax()]

    def update(self, x):
        if x.numel():
            new = self.measured(x)
            self.top = new.reshape(1) if bool(new.abs() > self.top.abs()) else self.top

    def merge(self, other):
        self.top = other.top if bool(other.top.abs() > self.top.abs()) else self.top


# A twin ---------------------------------------------------------------------------------------


class Extremes:
    """The smallest and the largest input, each of them kept with its sign."""

    def __init__(self, columns):
        self.low = self.high = np.float32(0)

    def update(self, x):
        self.low = np.minimum(self.low, x.numpy().min(initial=0))
        self.high = np.maximum(self.high, x.numpy().max(initial=0))

    def merge(self, other):
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def value(self):
        return torch.from_numpy(np.array([np.maximum(-self.low, self.high)], np.float32))


def right():
    return Finder(Top)


_wrong = wrong_statistics(Finder, right)
MUTANTS = (
    _wrong(
        "reach_not_magnitude",
        TopNotMagnitude,
        "statistic_value",
        "max x in place of max |x|.",
    ),
    _wrong(
        "half_the_range",
        HalfTheRange,
        "statistic_value",
        "(max x - min x) / 2, as for codes with a zero point.",
    ),
    _wrong(
        "reach_below_zero",
        TopBelowZero,
        "reach_fits",
        "The input that is largest in magnitude, with its sign.",
    ),
    _wrong("reach_of_last_batch", TopOfLastBatch, "statistic_value", "The last batch decides."),
    _wrong(
        "moving_average",
        MovingAverage,
        "statistic_value",
        "A moving average of the batches' maxima, as in training; the last batches weigh most.",
    ),
    _wrong(
        "reach_in_bfloat16",
        TopInBfloat16,
        "statistic_value",
        "Rounds to the network's bfloat16: the largest input may be clipped.",
    ),
    _wrong(
        "mean_of_maxima",
        TopOfMeans,
        "statistic_value",
        "The mean over tokens of the largest magnitude of each.",
    ),
    _wrong(
        "reach_ignores_nan",
        TopIgnoresNaN,
        "non_finite_shows",
        "nan_to_num hides an overflow of the network.",
    ),
    _wrong(
        "reach_from_minus_infinity",
        TopFromMinusInfinity,
        "value_of_nothing",
        "The maximum starts from -inf, which stays for a layer that saw no token.",
    ),
    _wrong("reach_is_a_scalar", TopIsAScalar, "reach_fits", "A tensor without dimensions."),
    _wrong(
        "reach_of_each_column",
        TopOfEachColumn,
        "reach_fits",
        "One reach for each column, where a stored scale is one number.",
    ),
)

TWINS = (
    Twin(
        name="largest_magnitude",
        kind="observer",
        why="The plain maximum over everything.",
        make=right,
    ),
    Twin(
        name="extremes",
        kind="observer",
        why="The smallest and the largest input with their signs; the farther one is the reach.",
        make=lambda: Finder(Extremes),
    ),
)
