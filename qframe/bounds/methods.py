"""B10: methods of any kind: what they may move, and what they may lose."""

from __future__ import annotations

import numpy as np

from qframe.bounds.arithmetic import ETA, UNIT, Array, Numbers, as_array, gamma
from qframe.bounds.rounding import nearest
from qframe.contracts import Grid


def radius(
    weight: Numbers, delta: Numbers, codes: Numbers, scale: Numbers, grid: Grid, steps: float
) -> tuple[Array, Array]:
    """B10.a: (what the ends of the grid do not excuse of each error, what is allowed).

    The code of rint(fl(fl(w / s) + v)) with |v| <= steps - 1/2: two roundings, of the quotient and
    of the sum.

    delta   s (c - z) - w
    """
    s = as_array(scale)
    rounding = gamma(2) * (np.abs(as_array(weight)) + steps * s)
    return nearest(delta, codes, 2 * steps * s, grid, rounding)


def half_steps(scale: Numbers, grid: Grid) -> Array:
    """B10.b: the most that rounding to nearest moves a weight with a minmax scale, clipped or not.

    B1.a with B1.f: half a step, and for the rounding of scale, zero point and value
    gamma_9 of the range of the codes.
    """
    levels = grid.qmax - grid.qmin
    return as_array((1 / 2 + gamma(9) * levels) * as_array(scale) + levels * ETA["float32"])


def no_worse(
    baseline: Numbers,
    size: Numbers,
    columns: int,
    dtype: str = "float64",
    lengths: Numbers = 0.0,
    moved: Numbers = 0.0,
) -> Array:
    """B10.c: what an objective e H e^T may be when it was chosen not to exceed `baseline`.

    size      |e| |H| |e|^T of the method's error and of the baseline's, added: the rounding of
              either is within gamma of it
    dtype     in which the method compared the two
    lengths   sum |e_j| of both, for products that underflow
    moved     sqrt(d |H| d^T) of both, added, d what float32 takes off the values (`decode`): the
              method may have compared exact values. Where weights are an aim, twice what the
              method's may be from the check's in the norm of H (`gptq_aim`) besides
    """
    relative = 2 * gamma(2 * columns + 4, UNIT[dtype]) * as_array(size)
    lost = 2 * columns * (2 + as_array(lengths)) * ETA[dtype]
    compared, apart = as_array(baseline) + relative + lost, as_array(moved)
    return as_array(np.where(apart == 0, compared, (np.sqrt(compared) + apart) ** 2))


def output_bound(reach: Numbers, factor: float, size: Numbers, columns: int) -> Array:
    """B10.b: sqrt(e H e^T) of a row, when |e_j| is at most `factor` times `half_steps`.

    reach   sum_j sqrt(H_jj) `half_steps`
    size    |e| |H| |e|^T, for the rounding of the check itself
    """
    own = np.sqrt(gamma(2 * columns + 4, UNIT["float64"]) * as_array(size))
    return as_array(factor * as_array(reach) + own)


def fitted_scale(
    gap: Numbers, loss: Numbers, squares: Numbers, products: Numbers, terms: Numbers
) -> Array:
    """B10.d: how far a scale may be from sum w k / sum k^2 on the side where `gap` is.

    gap        to the next number of the scale's dtype; inf where there is none
    loss       sum (w - s k)^2 over the group's weights
    squares    sum k^2, not 0
    products   sum |w| |k|
    terms      how many weights
    """
    n, u = as_array(terms), UNIT["float64"]
    gaps, squared = as_array(gap), as_array(squares)
    rounding = (2 * n + 8) * u / (1 - (2 * n + 8) * u)
    compared = rounding * as_array(loss) / (2 * squared * gaps)
    return as_array(gaps / 2 + compared + rounding * as_array(products) / squared)


def no_worse_power(baseline: Numbers, moved: Numbers, columns: int) -> Array:
    """B10.e: what sum |e_j|^p may be when it was chosen not to exceed `baseline`.

    moved   sum d_j^p of both, d what float32 takes off the values (`decode`)
    """
    relative = gamma(4 * columns + 20, UNIT["float64"])
    return as_array((1 + relative) * as_array(baseline) + as_array(moved))
