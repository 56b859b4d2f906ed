"""Every error that qframe allows, each with the theorem that allows it.

The theorems (B1, B3, ...) are stated and proved in docs/bounds.md. Nothing here is a tolerance:
a bound follows from the step of the grid, the unit roundoff of the arithmetic, the length of the
sums, and the data. Everything is NumPy float64, so that a checker needs neither torch nor numba,
and every bound is *a posteriori* in the stored scale: whether that scale is the right one is a
question of its own (`scale_rule`, `coverage`), or an over-large scale would pass everything.

Notation of the docstrings: u the unit roundoff of round-to-nearest, gamma_k = k u / (1 - k u)
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1), eta the absolute
error of an operation that underflows, s a scale, z a zero point, c a code, w a weight.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qframe.contracts import Grid

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.ArrayLike

# Arithmetic -----------------------------------------------------------------------------------

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""u: the relative error of rounding to nearest."""

ETA = {"float64": 2.0**-1074, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
"""Half of the smallest positive number; for float64, which cannot hold that, the number itself."""


def gamma(k: int, unit: float = UNIT["float32"]) -> float:
    """Return gamma_k = k u / (1 - k u), the relative error that k roundings can add up to.

    Raises ValueError for k u >= 1, where nothing is known about the result.
    """
    if k * unit >= 1:
        raise ValueError(f"gamma_k says nothing for k={k} operations with unit roundoff {unit:g}")
    return k * unit / (1 - k * unit)


def _array(numbers: Numbers) -> Array:
    return np.asarray(numbers, np.float64)


CHECKER = 1 + gamma(1 << 12, UNIT["float64"])
"""Covers the float64 arithmetic of a check itself: up to 4096 operations on float32 data."""


def ratio(error: Numbers, allowed: Numbers) -> float:
    """Return the largest |error| / allowed; a bound holds if and only if this is at most 1.

    0 / 0 counts as 0. A NaN, an infinite error or a negative bound is inf: it never passes.
    """
    errors, limits = np.broadcast_arrays(*(_array(a) for a in (error, allowed)))
    if not np.isfinite(errors).all() or not (limits >= 0).all():
        return float("inf")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.where(errors == 0, 0, np.abs(errors) / (limits * CHECKER))
    return float(ratios.max(initial=0))


def accumulate(magnitude: Numbers, length: int, unit: float = UNIT["float32"]) -> Array:
    """B9.a: the error of a sum of `length` products, in any order, with or without FMA.

    magnitude   sum of |x| |y| over the products
    """
    return gamma(length, unit) * _array(magnitude)


def hessian_sum(magnitude: Numbers, tokens: int, tile: int, parts: int = 1) -> Array:
    """The error of (2/n) sum x x^T, summed in float32 over tiles of tokens, then in float64.

    magnitude   (2/n) |X|^T |X|, [columns, columns]
    tile        the most tokens in a tile
    parts       in which the tokens came: updates and merges; each may end with a short tile

    B9.a twice: a tile of t products is within gamma_t (float32), and the at most n/t + parts sums
    of tiles and the factor 2/n (two roundings) within their gamma (float64) of what they are given.
    A product that underflows adds eta, n of them 2 eta in all.
    """
    inner = gamma(min(tile, tokens))
    outer = gamma(tokens // tile + parts + 2, UNIT["float64"])
    relative = inner + outer * (1 + inner)
    return relative * _array(magnitude) + 2 * ETA["float32"] * (1 + relative)


# B1: round to nearest -------------------------------------------------------------------------


def half_step(
    weight: Numbers, scale: Numbers, zero_point: Numbers, grid: Grid, roundings: int = 1
) -> Array:
    """B1.a: the error |w - s (c - z)| of c = clip(rint(fl(w / s)) + z, qmin, qmax), in float32.

    roundings   of the quotient: 1 for a division, 2 for a multiplication with fl(1 / s)

    Inside the range it is s / 2 + u |w|: the quotient is (w / s) (1 + d), rounding moves it by at
    most 1/2, times s. Beyond the range it is the distance to the nearest end, where that is more.
    """
    w, s, z = (_array(a) for a in (weight, scale, zero_point))
    beyond = np.maximum(s * (grid.qmin - z) - w, w - s * (grid.qmax - z))
    return _array(np.maximum(s / 2 + gamma(roundings) * np.abs(w), beyond))


def nearest_code(
    weight: Numbers, scale: Numbers, zero_point: Numbers, grid: Grid, roundings: int = 1
) -> Array:
    """B1.b: the same error, as the distance to the nearest code plus 2 u |w|.

    Complete: an encoder that keeps it is round-to-nearest, up to ties; clipping is no excuse.
    All arguments broadcast to [rows, columns].
    """
    w, s, z = (_array(a) for a in (weight, scale, zero_point))
    codes = np.clip(np.rint(w / s) + z, grid.qmin, grid.qmax)
    neighbours = (np.clip(codes + k, grid.qmin, grid.qmax) for k in (-1, 0, 1))
    best = np.minimum.reduce([np.abs(w - s * (code - z)) for code in neighbours])
    return _array(best + 2 * gamma(roundings) * np.abs(w))


def ideal_scale(lo: Numbers, hi: Numbers, grid: Grid, *, symmetric: bool) -> Array:
    """Return the scale that spans [lo, hi] in real arithmetic, 0 for a group of zeros.

    lo, hi   smallest and largest weight of each group
    """
    low, high = _array(lo), _array(hi)
    if symmetric:
        extent = 2 * np.maximum(np.abs(low), np.abs(high))
    else:
        extent = np.maximum(high, 0) - np.minimum(low, 0)
    return _array(extent / (grid.qmax - grid.qmin))


def scale_rule(ideal: Numbers, scale_dtype: str) -> tuple[Array, Array]:
    """B1.c: the interval in which the stored scale lies, (lowest, highest).

    ideal   `ideal_scale` of the group, > 0

    At most two float32 roundings make the scale, then storage rounds it *up*: by less than 2 u_s
    of itself, or by one smallest positive number below the normal range.
    """
    d = _array(ideal)
    up = 0.0 if scale_dtype == "float32" else 2 * UNIT[scale_dtype]
    lowest = d * (1 - gamma(2)) - ETA["float32"]
    highest = (d * (1 + gamma(2)) + ETA["float32"]) * (1 + up) + 2 * ETA[scale_dtype]
    return lowest, highest


def coverage(lo: Numbers, hi: Numbers, scale: Numbers, grid: Grid, *, symmetric: bool) -> Array:
    """B1.f: how far a group may reach beyond [s (qmin - z), s (qmax - z)] with minmax scales.

    A symmetric full grid is half a step short on the positive side; a rounded zero point shifts
    the range by half a step. Beyond that a scale lacks no more than its two float32 roundings
    take, because storage rounds up: levels times gamma_2 d, with d the ideal scale.
    """
    s, low = _array(scale), _array(lo)
    levels = grid.qmax - grid.qmin
    ideal = ideal_scale(lo, hi, grid, symmetric=symmetric)
    lacking = gamma(3) * ideal + ETA["float32"]  # one more than 2, for the check's own rounding
    if symmetric:
        return _array(s * abs(grid.qmax + grid.qmin) / 2 + lacking * levels / 2)
    moved = gamma(2) * (np.abs(np.minimum(low, 0)) + s * abs(grid.qmin))
    return _array(s / 2 + lacking * levels + moved)


def decode(scale: Numbers, steps: Numbers) -> Array:
    """B1.d: the error of the float32 product s (c - z); zero where the product is a float32.

    steps   c - z, integers

    With scales of 16 bits and codes of at most 8 it always is. Otherwise it is u |s (c - z)|, or
    eta below the normal range. The product itself is exact in float64.
    """
    product = _array(scale) * _array(steps)
    representable = product == product.astype(np.float32)
    rounding = np.maximum(UNIT["float32"] * np.abs(product), ETA["float32"])
    return np.where(representable, 0, rounding)


# B3: GPTQ -------------------------------------------------------------------------------------
#
# Columns in processing order; H the damped Hessian = U diag(D) U^T with U unit upper triangular;
# delta = (values of the codes) - w; residual r = delta U, which is value minus compensated weight.


def gptq_residual(
    weight: Numbers,
    delta: Numbers,
    feedback: Numbers,
    exact_feedback: Numbers,
    dtype: str = "float32",
    value_error: Numbers = 0.0,
) -> Array:
    """B3.g: how far the residual may lie from where exact arithmetic would put it.

    weight           w, [rows, n], in processing order
    delta            values of the codes minus w, [rows, n]
    feedback         F, [n, n]: the U that the solver used; only what is above the diagonal counts
    exact_feedback   U of the damped Hessian in float64
    dtype            of the solver's sums
    value_error      `decode` of the codes where `delta` has exact values, but the solver may have
                     rounded them; [rows, n]

    The solver rounds w_j - sum_{k<j} delta_k F_kj: fewer than n products and sums, one rounding
    of each delta, one of the quotient by s and one of the value, gamma_{n+3} in all, and no more
    than n + 1 underflows. To use F for U costs |delta| |F - U|, and the check's own sum is within
    gamma_n of float64. All is measured on what the solver did, nothing is assumed of H; that F is
    close to U is for another check.
    """
    w, d = _array(weight), np.abs(_array(delta))
    used = np.triu(_array(feedback), 1)
    exact = np.triu(_array(exact_feedback), 1)
    n, value = len(used), np.broadcast_to(_array(value_error), w.shape)
    solver = gamma(n + 3, UNIT[dtype]) * (np.abs(w) + d @ np.abs(used)) + (n + 1) * ETA[dtype]
    checker = gamma(n, UNIT["float64"]) * (d + d @ np.abs(exact))
    return _array(solver + checker + d @ np.abs(used - exact) + value + value @ np.abs(used))


def gptq_factorization(
    feedback: Numbers, diagonal: Numbers, loss: Numbers, dtype: str = "float64"
) -> Array:
    """B3.g: what factorizing H in `dtype` may move the residuals, where F itself is not at hand.

    feedback, diagonal   U [n, n] and D [n] of the damped Hessian
    loss                 delta H delta^T of each row, [rows]

    A factor of H + dH moves r_j by up to 2 ||E||_F sqrt(loss / D_j), E = R^-1 dH R^-T with
    R = U D^(1/2); Cholesky's is ||E||_F <= gamma_{n+2} || |R^-1||R||R^T||R^-T| ||_F (Higham,
    theorem 10.3). Three times that for the published invert-then-factorize, which is not proved.
    """
    d = _array(diagonal)
    upper = _array(feedback) * np.sqrt(d)
    spread = np.abs(np.linalg.inv(upper)) @ np.abs(upper)
    moved = 3 * gamma(len(d) + 2, UNIT[dtype]) * np.linalg.norm(spread @ spread.T)
    return _array(2 * moved * np.sqrt(_array(loss)[:, None] / d))


def gptq_certificate(
    residual: Numbers, codes: Numbers, scale: Numbers, grid: Grid, allowance: Numbers = 0.0
) -> tuple[Array, Array]:
    """B3.b: (what the grid does not excuse of each residual, what is allowed). Complete.

    Codes are GPTQ's for these scales, this order and this Hessian if and only if |r| <= s / 2
    everywhere, up to ties; but the lowest code may lie any distance above a compensated weight
    that has left the range, and the highest any distance below. Check with
    `ratio(*gptq_certificate(...))`.

    residual, codes, scale   [rows, n], in processing order
    allowance                `gptq_residual`; 0 in exact arithmetic
    """
    r, c = _array(residual), np.asarray(codes)
    excused = ((c == grid.qmin) & (r > 0)) | ((c == grid.qmax) & (r < 0))
    allowed = _array(scale) / 2 + _array(allowance)
    return np.where(excused & np.isfinite(r), 0, np.abs(r)), allowed


def gptq_loss(
    diagonal: Numbers, scale: Numbers, residual: Numbers | None = None, allowance: Numbers = 0.0
) -> Array:
    """B3.c: the loss delta H delta^T of each row, [rows]: at most sum_j D_j (s_j / 2)^2.

    diagonal    D, [n]
    scale       [rows, n], in processing order
    residual    r; where codes were clipped its magnitude takes the place of s / 2. Without it
                the bound holds for rows in which nothing was clipped.
    allowance   `gptq_residual`
    """
    reach = _array(scale) / 2 + _array(allowance)
    if residual is not None:
        reach = _array(np.maximum(reach, np.abs(_array(residual))))
    return _array((reach**2 * _array(diagonal)).sum(-1))
