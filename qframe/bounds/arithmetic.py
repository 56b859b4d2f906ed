"""The arithmetic behind every bound: unit roundoffs, gamma_k, and how a bound is used.

Notation of all docstrings here: u the unit roundoff of round-to-nearest, gamma_k = k u / (1 - k u)
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1), eta the absolute
error of an operation that underflows, s a scale, z a zero point, c a code, w a weight.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.ArrayLike

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""u: the relative error of rounding to nearest."""

ETA = {"float64": 2.0**-1074, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
"""Half of the smallest positive number; for float64, which cannot hold that, the number itself."""

OVERFLOW = {"float16": (2 - 2.0**-11) * 2.0**15, "bfloat16": (2 - 2.0**-8) * 2.0**127}
"""From where on rounding to nearest gives an infinity: half a step above the largest number."""

NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126}
"""The smallest normal number; below it an exp may give 0."""


def gamma(k: int, unit: float = UNIT["float32"]) -> float:
    """Return gamma_k = k u / (1 - k u), the relative error that k roundings can add up to.

    Raises ValueError for k u >= 1, where nothing is known about the result.
    """
    if k * unit >= 1:
        raise ValueError(f"gamma_k says nothing for k={k} operations with unit roundoff {unit:g}")
    return k * unit / (1 - k * unit)


def as_array(numbers: Numbers) -> Array:
    """Return numbers as a float64 array, without a copy where they are one."""
    return np.asarray(numbers, np.float64)


CHECKER = 1 + gamma(1 << 12, UNIT["float64"])
"""Covers the float64 arithmetic of a check itself: up to 4096 operations on float32 data."""


def ratio(error: Numbers, allowed: Numbers) -> float:
    """Return the largest |error| / allowed; a bound holds if and only if this is at most 1.

    0 / 0 counts as 0. A NaN, an infinite error or a negative bound is inf: it never passes.
    """
    errors, limits = np.broadcast_arrays(*(as_array(a) for a in (error, allowed)))
    if not np.isfinite(errors).all() or not (limits >= 0).all():
        return float("inf")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.where(errors == 0, 0, np.abs(errors) / (limits * CHECKER))
    return float(ratios.max(initial=0))


def worst(error: Numbers, allowed: Numbers) -> tuple[float, int]:
    """Return `ratio`, and the flat index of the place where it is; (0.0, 0) of nothing."""
    errors, limits = np.broadcast_arrays(*(as_array(a) for a in (error, allowed)))
    if errors.size == 0:
        return 0.0, 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = errors / limits
    if errors.min() < 0:
        np.abs(ratios, out=ratios)
    place = int(ratios.argmax())  # the first NaN, where there is one
    if not ratios.flat[place] < np.inf or limits.min() < 0:
        ratios = np.where(errors == 0, 0, ratios)
        good = np.isfinite(errors) & (limits >= 0)
        ratios = np.where(good, ratios, np.inf)
        place = int(ratios.argmax())
    return float(ratios.flat[place] / CHECKER), place


def accumulate(magnitude: Numbers, length: int, unit: float = UNIT["float32"]) -> Array:
    """B9.a: the error of a sum of `length` products, in any order, with or without FMA.

    magnitude   sum of |x| |y| over the products
    """
    return gamma(length, unit) * as_array(magnitude)


def compound(*relative: float) -> float:
    """Return (1 + a)(1 + b)... - 1: relative errors one after another."""
    return float(np.prod([1 + r for r in relative])) - 1
