"""B9 and B12: sums of products, in kernels and in statistics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe.bounds.arithmetic import (
    ETA,
    OVERFLOW,
    UNIT,
    Array,
    Numbers,
    as_array,
    compound,
    gamma,
)


def hessian_sum(magnitude: Numbers, tokens: int, tile: int, parts: int = 1) -> Array:
    """B12.a: the error of (2/n) sum x x^T, in float32 over tiles of tokens, then in float64.

    magnitude   (2/n) |X|^T |X|, [columns, columns]
    tile        the most tokens in a tile; 0: no tiles, all is summed in float64
    parts       in which the tokens came: updates and merges; each may end with a short tile

    B9.a twice: a tile of t products is within gamma_t (float32), and the at most n/t + parts sums
    of tiles, the factor 2/n (two roundings), and a mean that is rescaled with every part (two more
    each) within their gamma (float64) of what they are given. A product that underflows adds eta,
    n of them 2 eta in all; products in float64 are exact.
    """
    inner = gamma(min(tile, tokens))
    sums = tokens // tile if tile else tokens
    outer = gamma(sums + 3 * parts + 2, UNIT["float64"])
    relative = inner + outer * (1 + inner)
    lost = 2 * ETA["float32"] if tile else 0.0
    return relative * as_array(magnitude) + lost * (1 + relative)


def cross_sum(magnitude: Numbers, tokens: int, tile: int, parts: int = 1) -> Array:
    """B12.h: the error of (2/n) sum (y - x) x^T, summed as for `hessian_sum`.

    magnitude   (2/n) |Y - X|^T |X|, [columns, columns]

    Every difference is rounded once, which moves a product by the share u of itself; a subtraction
    does not underflow.
    """
    unit = UNIT["float32"]
    whole = (1 + unit) * as_array(magnitude)
    return hessian_sum(whole, tokens, tile, parts) + unit * as_array(magnitude)


def weight_only(
    magnitude: Numbers,
    columns: int,
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
    depth: int | None = None,
) -> Array:
    """B9.b: the error of sum x s (c - z), summed in any order, the zero point factored out or not.

    magnitude   sum of |x| s (|c| + |z|), [tokens, rows]
    columns     products of a sum
    unit        unit roundoff of the sums
    inputs      relative error of an operand that is rounded before it is multiplied (TF32, ...)
    depth       roundings of the sums that a product passes at most; None: whatever the order
    """
    most = columns + 2
    roundings = most if depth is None else min(depth, most)
    relative = compound(gamma(roundings, unit), gamma(3), inputs, inputs)
    return relative * as_array(magnitude)


def exact_sum(magnitude: Numbers, quantum: Numbers) -> npt.NDArray[np.bool_]:
    """B9.c: where a float32 sum has no error, whatever the order.

    magnitude   sum of the magnitudes of the products
    quantum     a number of which every product is a multiple
    """
    return np.asarray(as_array(magnitude) <= 2.0**24 * as_array(quantum))


def second_moments(
    magnitude: Numbers,
    before: Numbers,
    tokens: int,
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
    depth: int | None = None,
) -> Array:
    """B9.d: the error of H += x^T x, summed over the tokens, then added to a float64 H.

    magnitude   |x|^T |x|, [columns, columns]
    before      H before, [columns, columns]
    depth       roundings to `unit` that a product passes at most; None: one for each token
    """
    size = as_array(magnitude)
    roundings = tokens if depth is None else min(depth, tokens)
    inner = compound(gamma(roundings, unit), inputs, inputs)
    outer = gamma(tokens + 1, UNIT["float64"])
    lost = 2 * tokens * ETA["float32"]  # products that underflow
    return inner * size + outer * (np.abs(as_array(before)) + (1 + inner) * size) + lost


def short_output(size: Numbers, allowed: Numbers, dtype: str, count: int = 1) -> Array:
    """B9.e: the error of a number that is `allowed` off, and then rounded to 16 bits.

    size    what it should be, without sign; or the length of a vector
    dtype   "float16" or "bfloat16"
    count   numbers of the vector
    """
    before = as_array(allowed)
    lost = ETA[dtype] * float(np.sqrt(count))
    return before + UNIT[dtype] * (np.abs(as_array(size)) + before) + lost


def overflows(
    expected: Numbers, allowed: Numbers, dtype: str
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """B9.e: where a number that is `allowed` off may be an infinity of 16 bits, and where it is."""
    size, off = np.abs(as_array(expected)), as_array(allowed)
    return np.asarray(size + off >= OVERFLOW[dtype]), np.asarray(size - off >= OVERFLOW[dtype])
