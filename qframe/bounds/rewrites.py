"""B4: outlier handlers: a rewrite keeps the function, a search does not lose to scale 1."""

from __future__ import annotations

import numpy as np

from qframe.bounds.arithmetic import ETA, UNIT, Array, Numbers, as_array, compound, gamma
from qframe.bounds.rotations import hadamard, rotated_product


def rewrite_element(weight: Numbers, input_scale: Numbers, roundings: int = 2) -> Array:
    """B4.a: the error |W - W' / s| of a weight that was multiplied by the input scale, in float32.

    weight       [rows, columns]
    input_scale  s, [columns]
    roundings    of W' as a multiple of W, and of s as it is returned
    """
    w, s = np.abs(as_array(weight)), as_array(input_scale)
    own = gamma(2, UNIT["float64"])
    return as_array((gamma(roundings) + own) * w + ETA["float32"] / s)


def rewrite_output(x: Numbers, weight: Numbers, input_scale: Numbers, roundings: int = 2) -> Array:
    """B4.a: the error |W x - W' fl(x / s)| of a token, the quotient in float32, [tokens, rows].

    x            [tokens, columns]
    weight, input_scale, roundings   as for `rewrite_element`
    """
    tokens, w, s = np.abs(as_array(x)), np.abs(as_array(weight)), as_array(input_scale)
    element = rewrite_element(w, s, roundings)
    reached = w + element
    unit = UNIT["float32"] + gamma(2 * w.shape[1] + 4, UNIT["float64"])
    return as_array(tokens @ (element + unit * reached).T + ETA["float32"] * (reached * s).sum(-1))


def rotated_block(norm: Numbers, block: int, roundings: int = 2) -> Array:
    """B4.f: the error ||W' Q^T - W diag(s)|| of a block of a row, scaled and then rotated.

    norm        of the block of W diag(s)
    block       its size, a power of two
    roundings   of W diag(s)
    """
    lost = (roundings + 2) * block**0.5 * ETA["float32"]
    moved = hadamard(norm, block, inputs=gamma(roundings)) + lost
    undone = hadamard(norm + moved, block, UNIT["float64"])
    return as_array((1 + gamma(block + 2, UNIT["float64"])) * (moved + undone))


def rotated_output(
    x: Numbers, weight: Numbers, input_scale: Numbers, block: int, roundings: int = 2
) -> Array:
    """B4.f: the error |W x - W' fl((x / s) Q)| of a token, the quotient in float32, [tokens, rows].

    x                          [tokens, columns]
    weight, input_scale        W [rows, columns], and s [columns]
    block, roundings           as for `rotated_block`
    """
    tokens, w, s = as_array(x), as_array(weight), as_array(input_scale)
    blocks = w.shape[1] // block

    def norms(rows: Array) -> Array:
        return as_array(np.linalg.norm(rows.reshape(len(rows), blocks, block), axis=2))

    x_norm, w_norm = norms(tokens / s), norms(w * s)
    w_error = rotated_block(w_norm, block, roundings)
    x_error = rotated_block(x_norm, block, 1)
    total = rotated_product(x_norm[:, None], w_norm[None], x_error[:, None], w_error[None])
    own = gamma(2 * w.shape[1] + 4, UNIT["float64"]) * (x_norm @ w_norm.T + total.sum(-1))
    return as_array(total.sum(-1) + own)


def kept_weight(stored: Numbers) -> Array:
    """B4.g: the error |w - v| of a weight that is stored as v in float16, and does not overflow.

    stored   v
    """
    unit, tiny = UNIT["float16"], ETA["float16"]
    return as_array(gamma(1, unit) * (np.abs(as_array(stored)) + tiny) + tiny)


def folded_norm(
    output: Numbers,
    scale: Numbers,
    bias: Numbers = 0.0,
    roundings: int = 3,
    dtype: str = "float32",
) -> Array:
    """B4.i: how far what a folded norm returns may lie from n / s', n what it returned before.

    output      n, [..., columns]
    scale       s' = w / v in float32, [columns]
    bias        of the norm before, [columns]; it was divided by s' in float32
    roundings   in the norm, after the number that weight and bias are applied to
    dtype       of those roundings
    """
    lost = gamma(roundings, UNIT[dtype])
    apart = compound(gamma(1), lost) + lost
    size = (np.abs(as_array(output)) + 2 * np.abs(as_array(bias))) / (1 - lost)
    tiny = 2 * (1 + lost) * (ETA[dtype] + ETA["float32"])
    return as_array((apart * size + tiny) / as_array(scale) + tiny)


def sample_slack(size: float, columns: int, outputs: int) -> float:
    """B4.h: how far the root of a sample's loss, in float64, may lie from the root itself.

    size      the Frobenius norm of |X| |W|^T
    outputs   of all tokens and layers together
    """
    unit = UNIT["float64"]
    return 5 * (1 + 2.0**-16) * (gamma(columns + 3, unit) + gamma(outputs + 1, unit)) * size


def search_slack(
    weighed: Numbers,
    missed: Numbers,
    lengths: Numbers,
    columns: int,
    largest: float,
    dtype: str = "float32",
) -> Array:
    """B4.c: how far the computed root of an output error may lie from the root itself.

    weighed   sum of v A v^T over rows, v = |W| + |Q|, A = (2/n) |X|^T |X| >= |H|
    missed    the same for v = |W - Q|
    lengths   sum |W - Q| of each row
    columns   of a row
    largest   of the diagonal of H
    dtype     of the sums: two of as many products as columns, and one over rows

    Products that underflow add eta each, as does an H that is stored in the dtype. The sums may be
    those of e times a power of two that makes no |e| of less than 2^33 smaller, and of H over its
    largest number.
    """
    sums, n = as_array(lengths), columns
    lost = (n * (1 + 2 * sums) + (1 + n / 2**31) * sums**2).sum() * ETA[dtype] * max(1.0, largest)
    length = 2 * n + len(sums) + 4
    return as_array(
        gamma(4) * np.sqrt(as_array(weighed))
        + np.sqrt(gamma(length, UNIT[dtype]) * as_array(missed) + lost)
    )
