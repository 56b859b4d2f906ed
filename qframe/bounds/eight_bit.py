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
    doubt       s_x s_w times the sum of |w codes| where the code of x is in `doubtful`
    outliers    how many outlier columns there are
    """
    relative = compound(gamma(outliers + 2, unit), gamma(6), inputs, inputs)
    return as_array(
        relative * as_array(magnitude) + (1 + relative) * as_array(doubt) + 2 * ETA["float32"]
    )


def doubtful(quotient: Numbers) -> npt.NDArray[np.bool_]:
    """B5.e: where x / s is so near to a half that roundings of s and of the quotient decide.

    quotient   x / s in real numbers
    """
    t = np.abs(as_array(quotient))
    return np.asarray(np.abs(t - np.floor(t) - 1 / 2) <= gamma(4) * t)


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
    moved_x = as_array(x_scale)[:, None] / 2 + gamma(4) * size
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
