"""B12: statistics of inputs: quantiles, and reaches that are searched for."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np

from qframe.bounds.arithmetic import UNIT, Array, Numbers, as_array, gamma

_SMALLEST_NORMAL = 2.0**-126  # below it numbers are as far apart as there


def quantile(size: Numbers, share: float, step: float = 0.0) -> tuple[float, float]:
    """B12.d: the least and the largest that a quantile may be said to be.

    size    magnitudes, ascending
    share   of them that are not above it, in (0, 1]
    step    how far above it may be said to lie, relative
    """
    numbers = as_array(size)
    if not len(numbers):
        return 0.0, 0.0
    rank = min(max(ceil(Fraction(share) * len(numbers)), 1), len(numbers))
    least = float(numbers[rank - 1])
    most = least + step * max(least, _SMALLEST_NORMAL)
    return least, max(min(most, float(numbers[-1])), least)


def binned_search(size: Numbers, step: float) -> float:
    """B12.f: how far the root of a squared error, summed over bins, may lie from the root itself.

    size   magnitudes
    step   the width of a bin, relative to its smallest number
    """
    numbers = as_array(size)
    width = step / 2 * np.maximum(np.abs(numbers), _SMALLEST_NORMAL)
    own = gamma(4, UNIT["float32"]) * np.abs(numbers)
    return float(np.sqrt((as_array(width + own) ** 2).sum()))


def magnitudes(size: Numbers, bins: int, shift: int) -> Array:
    """B12.e: how many float32 magnitudes have which upper bits, [bins]; exact.

    shift   how many lower bits do not count
    """
    bits = np.abs(np.asarray(size, np.float32)).ravel().view(np.uint32) >> np.uint32(shift)
    return as_array(np.bincount(bits, minlength=bins))
