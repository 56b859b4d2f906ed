"""B5 and B6: products of 8-bit codes, with and without outlier columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe.bounds.arithmetic import ETA, UNIT, Array, Numbers, as_array, compound, gamma


def int32_columns(largest: int) -> int:
    """B5.c: how many products of magnitude `largest` an int32 holds whatever their signs.

    >>> int32_columns(127 * 127), int32_columns(128 * 127)
    (133144, 132104)
    """
    return (2**31 - 1) // largest


def int8_decode(accumulated: Numbers, x_scale: Numbers, w_scale: Numbers) -> Array:
    """B5.b: the error of s_x s_w a, with the sum a of integer products exact.

    accumulated   a, [tokens, rows], integers
    x_scale, w_scale   broadcast to [tokens, rows]
    """
    a, sx, sw = (np.abs(as_array(n)) for n in (accumulated, x_scale, w_scale))
    return as_array(gamma(3) * (a * sx * sw) + ETA["float32"] * (1 + a + sx + sw))


def int8_groups(magnitude: Numbers, groups: int, x_scale: Numbers) -> Array:
    """B5.f: the error of s_x sum over groups of s_g a_g, with the integer sums a_g exact.

    magnitude   s_x sum over groups of |s_g a_g|, [tokens, rows]
    x_scale     broadcasts to [tokens, rows]
    """
    lost = ETA["float32"] * (1 + groups * (1 + np.abs(as_array(x_scale))))
    return as_array(gamma(groups + 2) * as_array(magnitude) + lost)


def int8_mixed(
    magnitude: Numbers,
    doubt: Numbers,
    outliers: int,
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
) -> Array:
    """B5.b: the error of s_x s_w a + sum over outlier columns x w, against what x and codes say.

    magnitude   |s_x s_w a| + sum over outlier columns of |x w|, [tokens, rows]
    doubt       what codes and scale of x may be off by: `doubtful_codes`
    outliers    how many outlier columns there are
    """
    relative = compound(gamma(outliers + 2, unit), gamma(6), inputs, inputs)
    return as_array(
        relative * as_array(magnitude) + (1 + relative) * as_array(doubt) + 2 * ETA["float32"]
    )


def doubtful(quotient: Numbers, moved: Numbers = 0.0) -> npt.NDArray[np.bool_]:
    """B5.e: where x / s is so near to a half that roundings of s and of the quotient decide.

    quotient   x / s in real numbers
    moved      `scale_moved`, for tokens so faint that it counts
    """
    t, m = np.abs(as_array(quotient)), as_array(moved)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 stays 0
        reach = np.where(m < 1, (gamma(4) + m) / (1 - m), np.inf) * t
    return np.asarray(np.abs(t - np.floor(t) - 1 / 2) <= reach)


def scale_moved(x_scale: Numbers) -> Array:
    """B6.a: what the scale of a token may be off by beyond its roundings, 2 eta, over the scale."""
    return as_array(2 * ETA["float32"] / as_array(x_scale))


def doubtful_codes(
    quotient: Numbers, w_codes: Numbers, x_scale: Numbers, w_scale: Numbers
) -> Array:
    """B5.e: what s_x s_w a may be off by for codes and a scale that a kernel made, [tokens, rows].

    quotient   x / s_x in real numbers, [tokens, columns]
    w_codes    [rows, columns]
    x_scale    [tokens], and w_scale, [rows]
    """
    scale, codes = as_array(x_scale)[:, None], as_array(w_codes)
    moved = scale_moved(scale)
    steps = (1 + moved) * (doubtful(quotient, moved) @ np.abs(codes).T)
    steps += moved * np.abs(np.rint(as_array(quotient)) @ codes.T)
    return as_array(steps * scale * as_array(w_scale))


def int8_output(
    x: Numbers,
    weight: Numbers,
    weight_values: Numbers,
    x_scale: Numbers,
    outlier: npt.NDArray[np.bool_],
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
) -> Array:
    """B5.a: the error of LLM.int8()'s output, the rounding of x and w to eight bits included.

    x               [tokens, columns]
    weight          w, [rows, columns], and `weight_values`, what its codes stand for
    x_scale         [tokens]
    outlier         [columns]: the columns that are not rounded
    """
    size, w, kept = np.abs(as_array(x)), as_array(weight), ~outlier
    codes_for = np.abs(as_array(weight_values))
    moved_x = as_array(x_scale)[:, None] / 2 + ETA["float32"] + gamma(4) * size
    rounding = size[:, kept] @ np.abs(w - as_array(weight_values)).T[kept]
    rounding += moved_x[:, kept] @ codes_for.T[kept]
    magnitude = (size + moved_x)[:, kept] @ codes_for.T[kept]
    magnitude += size[:, outlier] @ np.abs(w).T[outlier]
    return as_array(rounding + int8_mixed(magnitude, 0.0, int(outlier.sum()), unit, inputs))


def token_scale(absmax: Numbers) -> tuple[Array, Array]:
    """B6.a: the interval in which the scale of a token lies, (lowest, highest); absmax > 0.

    A quotient, a product with fl(1 / 127), or 1 / fl(127 / absmax), whose two roundings cannot both
    be at their worst. Below the normal range the smallest positive number is right.
    """
    d = as_array(absmax) / 127
    unit = 3 / 2 * UNIT["float32"] * (1 + 4 * UNIT["float32"])
    lowest = d * (1 - unit) - ETA["float32"]
    highest = d * (1 + unit) + ETA["float32"]
    return as_array(np.maximum(lowest, ETA["float32"])), as_array(
        np.maximum(highest, 2 * ETA["float32"])
    )
