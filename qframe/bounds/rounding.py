"""B1: round to nearest: codes, scales, values, and how far they reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qframe.bounds.arithmetic import ETA, UNIT, Array, Numbers, as_array, gamma
from qframe.contracts import Grid


def half_step(
    weight: Numbers, scale: Numbers, zero_point: Numbers, grid: Grid, roundings: int = 1
) -> Array:
    """B1.a: the error |w - s (c - z)| of c = clip(rint(fl(w / s)) + z, qmin, qmax), in float32.

    roundings   of the quotient: 1 for a division, 2 for a multiplication with fl(1 / s)

    Inside the range it is s / 2 + u |w|: the quotient is (w / s) (1 + d), rounding moves it by at
    most 1/2, times s. Beyond the range it is the distance to the nearest end, where that is more.
    """
    w, s, z = (as_array(a) for a in (weight, scale, zero_point))
    beyond = np.maximum(s * (grid.qmin - z) - w, w - s * (grid.qmax - z))
    return as_array(np.maximum(s / 2 + gamma(roundings) * np.abs(w), beyond))


def nearest_code(
    weight: Numbers, scale: Numbers, zero_point: Numbers, grid: Grid, roundings: int = 1
) -> Array:
    """B1.b: the same error, as the distance to the nearest code plus 2 u |w|.

    Complete: an encoder that keeps it is round-to-nearest, up to ties; clipping is no excuse.
    All arguments broadcast to [rows, columns].
    """
    w, s, z = (as_array(a) for a in (weight, scale, zero_point))
    codes = np.clip(np.rint(w / s) + z, grid.qmin, grid.qmax)
    neighbours = (np.clip(codes + k, grid.qmin, grid.qmax) for k in (-1, 0, 1))
    best = np.minimum.reduce([np.abs(w - s * (code - z)) for code in neighbours])
    return as_array(best + 2 * gamma(roundings) * np.abs(w))


def nearest(
    delta: Numbers, codes: Numbers, scale: Numbers, grid: Grid, allowance: Numbers = 0.0
) -> tuple[Array, Array]:
    """B1.b: (each error that needs and has no excuse, what is allowed). Complete.

    A code is the nearest to its weight if and only if the error is at most half a step, or the
    code is an end of the grid and the weight lies beyond it: an error counts as 0 there. This is
    `nearest_code` without the search, for a grid of equal steps. B2.d: on a grid with values it is
    half of the gap on the side of the weight.

    delta       s (c - z) - w, or s v - w
    allowance   the rounding of the quotient, `roundings` u |w|; and `zero_point_added`
    """
    d, c = as_array(delta), np.asarray(codes)
    half = as_array(scale) * _half_gaps(d, c, grid)
    error = np.where(beyond_ends(d, c, grid), 0.0, np.abs(d))
    return error, as_array(half + as_array(allowance))


def beyond_ends(delta: Array, codes: npt.NDArray[Any], grid: Grid) -> npt.NDArray[np.bool_]:
    """B1.b: which codes are ends of the grid whose weights lie beyond them, at a finite distance.

    delta   what the codes stand for minus the weights
    """
    beyond = np.asarray(((codes == grid.qmin) & (delta > 0)) | ((codes == grid.qmax) & (delta < 0)))
    if beyond.any():
        beyond &= np.isfinite(delta)
    return beyond


def _half_gaps(delta: Array, codes: npt.NDArray[np.integer], grid: Grid) -> Array:
    """Return half of the gap between the value of each code and the next one towards the weight.

    At an end, where no value is next, it is half of the last gap.
    """
    if grid.values is None:
        return np.full((), 1 / 2)
    half = np.diff(as_array(grid.values)) / 2
    above = codes.astype(np.int64) - grid.qmin - (delta > 0)
    return as_array(half[np.clip(above, 0, len(half) - 1)])


def zero_point_added(scale: Numbers, grid: Grid) -> Array:
    """B1.b: what it may cost to add the zero point to w / s before rounding, and not after.

    Their sum lies in the range, or half a step beyond, and is rounded to float32 once. Codes may
    have been shifted to any range of that length that holds 0.
    """
    return UNIT["float32"] * (grid.qmax - grid.qmin + 1 / 2) * as_array(scale)


def stored_apart(numbers: Numbers, dtype: str) -> Array:
    """B1.h: how far a number may be from the one that was rounded to nearest to store it.

    numbers   as they are stored, in `dtype`
    """
    return as_array(np.maximum(np.abs(as_array(numbers)) * UNIT[dtype], ETA[dtype]))


def chosen_before(
    value: Numbers, half_gap: Numbers, scale_moved: Numbers, offset_moved: Numbers
) -> Array:
    """B1.h: what more than half a gap a code may be off by that was chosen before scales moved.

    value      what the code stands for at scale 1
    half_gap   half of the gap on the side of the weight, at scale 1
    """
    reach = np.abs(as_array(value)) + as_array(half_gap)
    return as_array(reach * as_array(scale_moved) + as_array(offset_moved))


def ideal_scale(lo: Numbers, hi: Numbers, grid: Grid, *, symmetric: bool) -> Array:
    """Return the scale that spans [lo, hi] in real arithmetic, 0 for a group of zeros.

    lo, hi   smallest and largest weight of each group
    """
    low, high = as_array(lo), as_array(hi)
    if symmetric:
        return as_array(np.maximum(np.abs(low), np.abs(high)) / grid.reach)
    return as_array((np.maximum(high, 0) - np.minimum(low, 0)) / (grid.qmax - grid.qmin))


def scale_rule(ideal: Numbers, scale_dtype: str, unit: float = 1.0) -> tuple[Array, Array]:
    """B1.c: the interval in which the stored scale lies, (lowest, highest).

    ideal   `ideal_scale` of the group, > 0
    unit    B2.e: the scale of the tensor, of which scales "e4m3" are multiples

    At most two float32 roundings make the scale, and the division by `unit` a third; then storage
    rounds it *up*, to the next number of the dtype and no further.
    """
    d, roundings = as_array(ideal), 3 if scale_dtype == "e4m3" else 2
    lowest = d * (1 - gamma(roundings)) - ETA["float32"]
    highest = d * (1 + gamma(roundings)) + ETA["float32"]
    if scale_dtype == "e4m3":
        return lowest, unit * _next_stored(highest / unit, scale_dtype)
    if scale_dtype == "float32":
        return lowest, highest + 2 * ETA["float32"]
    return lowest, _next_stored(highest, scale_dtype)


def ocp_scale(lo: Numbers, hi: Numbers, grid: Grid) -> Array:
    """B2.f: the scale of the OCP rule, exactly; 0 for a group of zeros."""
    extent = np.maximum(np.abs(as_array(lo)), np.abs(as_array(hi)))
    exponent = np.maximum(np.frexp(extent)[1] - np.frexp(grid.reach)[1], -127)
    return as_array(np.where(extent > 0, np.ldexp(1.0, exponent), 0))


def tensor_scale(ideal: Numbers) -> tuple[Array, Array]:
    """B2.e: the interval in which the scale of a tensor lies, (lowest, highest).

    ideal   `ideal_scale` of the group with the largest one, > 0
    """
    d = as_array(ideal) / 448
    highest = _next_stored(d * (1 + gamma(3)) + ETA["float32"], "tensor")
    return d * (1 - gamma(3)) - ETA["float32"], as_array(np.maximum(highest, 2.0**-117))


# Significant bits, least normal exponent.
_STORED = {
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "e8m0": (1, -127),
    "e4m3": (4, -6),
    "tensor": (1, -126),
}


def _next_stored(x: Array, dtype: str) -> Array:
    """Return the least numbers of a dtype that are >= x > 0, as if it had no largest."""
    bits, least = _STORED[dtype]
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    spacing = np.ldexp(1.0, exponent - (bits - 1))
    return as_array(np.ceil(x / spacing) * spacing)


def coverage(
    lo: Numbers,
    hi: Numbers,
    scale: Numbers,
    grid: Grid,
    *,
    symmetric: bool,
    rule: str = "full",
    two_level: bool = False,
) -> Array:
    """B1.f: how far a group may reach beyond [s (qmin - z), s (qmax - z)] with minmax scales.

    A symmetric full grid is half a step short on the positive side; a rounded zero point shifts
    the range by half a step. Beyond that a scale lacks no more than its two float32 roundings
    take, three in a two-level scheme, because storage rounds up: levels times gamma_2 d, with d the
    ideal scale. B2.d, B2.f: on
    a grid with values nothing else is short, but for what the `rule` "ocp" leaves out.
    """
    s, low = as_array(scale), as_array(lo)
    levels = grid.qmax - grid.qmin
    ideal = ideal_scale(lo, hi, grid, symmetric=symmetric)
    roundings = 3 if two_level else 2
    lacking = gamma(roundings + 1) * ideal + ETA["float32"]  # one more for the check's own
    if rule == "ocp":
        return as_array(s * (2.0 ** np.frexp(grid.reach)[1] - grid.reach))
    if grid.values is not None:
        return as_array(lacking * grid.reach)
    if symmetric:
        return as_array(s * abs(grid.qmax + grid.qmin) / 2 + lacking * levels / 2)
    moved = gamma(2) * (np.abs(np.minimum(low, 0)) + s * abs(grid.qmin))
    return as_array(s / 2 + lacking * levels + moved)


def decode(scale: Numbers, steps: Numbers) -> Array:
    """B1.d: the error of the float32 product s (c - z); zero where the product is a float32.

    steps   c - z, integers

    With scales of 16 bits and codes of at most 8 it always is. Otherwise it is u |s (c - z)|, or
    eta below the normal range. The product itself is exact in float64.
    """
    product = as_array(scale) * as_array(steps)
    representable = product == product.astype(np.float32)
    rounding = np.maximum(UNIT["float32"] * np.abs(product), ETA["float32"])
    return np.where(representable, 0, rounding)
