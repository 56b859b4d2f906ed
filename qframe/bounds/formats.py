"""B2: number formats: which values exist, and how far the nearest one may be."""

from __future__ import annotations

import numpy as np

from qframe.bounds.arithmetic import Array, Numbers, as_array


def representable(significand: int, min_exponent: int, largest: float) -> Array:
    """B2.a: the floating-point numbers of a format, ascending; 0 once.

    significand    bits of the significand, the implicit one included
    min_exponent   2^min_exponent is the smallest normal number
    largest        the largest finite number
    """
    top = int(np.frexp(largest)[1]) - 1
    half = 1 << (significand - 1)
    subnormal = np.ldexp(np.arange(half, dtype=np.float64), min_exponent - significand + 1)
    mantissas = np.arange(half, 2 * half, dtype=np.float64)
    exponents = np.arange(min_exponent, top + 1)[:, None]
    normal = np.ldexp(mantissas, exponents - significand + 1).reshape(-1)
    positive = np.concatenate([subnormal, normal])
    positive = positive[positive <= largest]
    return as_array(np.concatenate([-positive[:0:-1], positive]))


def float_element(x: Numbers, significand: int, min_exponent: int, largest: float) -> Array:
    """B2.a: the error of rounding x to the nearest of `representable`, at most `largest`."""
    size = np.abs(as_array(x))
    unit = 2.0**-significand
    inside = np.maximum(unit / (1 + unit) * size, 2.0 ** (min_exponent - significand))
    return as_array(np.maximum(inside, size - largest))


def nearest_value(x: Numbers, values: Numbers) -> Array:
    """B2.b: the nearest of some values, ascending; of two that are as near, the lower one."""
    levels = as_array(values)
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[np.searchsorted(middles, as_array(x))]


def half_cell(x: Numbers, values: Numbers) -> Array:
    """B2.b: the error of rounding x to the nearest of some values, ascending.

    Half of the gap that x lies in; beyond the ends, the distance to the end.
    """
    levels, numbers = as_array(values), as_array(x)
    place = np.clip(np.searchsorted(levels, numbers), 1, len(levels) - 1)
    gap = (levels[place] - levels[place - 1]) / 2
    beyond = np.maximum(levels[0] - numbers, numbers - levels[-1])
    return as_array(np.maximum(gap, beyond))
