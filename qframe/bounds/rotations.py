"""B8: rotations."""

from __future__ import annotations

import numpy as np

from qframe.bounds.arithmetic import UNIT, Array, Numbers, as_array, compound, gamma


def hadamard(
    norm: Numbers,
    block: int,
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
    *,
    dense: bool = False,
) -> Array:
    """B8.a: the error of x diag(signs) H / sqrt(block), as a Euclidean norm.

    norm    of each block of x
    block   a power of two
    dense   as a product with the matrix, and not by butterflies
    """
    if dense:
        relative = compound(gamma(block, unit), gamma(3), inputs, inputs) * block**0.5
    else:
        relative = compound(gamma(block.bit_length() - 1, unit), gamma(2), inputs)
    return as_array(relative * as_array(norm))


def rotated_product(x_norm: Numbers, w_norm: Numbers, x_error: Numbers, w_error: Numbers) -> Array:
    """B8.b: how far (x Q)(w Q)^T may lie from x w^T, when both were rotated in float32.

    x_norm, w_norm     Euclidean norms;  x_error, w_error   `hadamard` of them
    """
    x, w, dx, dw = (as_array(n) for n in (x_norm, w_norm, x_error, w_error))
    return as_array(dx * w + dw * x + dx * dw)


def incoherence(norm: Numbers, block: int, coordinates: int, probability: float) -> Array:
    """B8.c: how large a coordinate of x diag(signs) H / sqrt(block) is, for random signs.

    norm          of the block of x, which must not depend on the signs
    coordinates   how many are looked at
    probability   that one of them is larger after all
    """
    return as_array(as_array(norm) * np.sqrt(2 * np.log(2 * coordinates / probability) / block))
