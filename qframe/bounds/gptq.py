"""B3: GPTQ.

Columns in processing order; H the damped Hessian = U diag(D) U^T with U unit upper triangular;
delta = (values of the codes) - w; residual r = delta U, which is value minus compensated weight.
"""

from __future__ import annotations

import numpy as np

from qframe.bounds.arithmetic import ETA, UNIT, Array, Numbers, as_array, gamma
from qframe.bounds.rounding import nearest
from qframe.contracts import Grid


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
    gamma_{n+2} of float64. All is measured on what the solver did, nothing is assumed of H; that F
    is close to U is for another check.
    """
    w, d = as_array(weight), np.abs(as_array(delta))
    used = np.triu(as_array(feedback), 1)
    exact = np.triu(as_array(exact_feedback), 1)
    n, value = len(used), np.broadcast_to(as_array(value_error), w.shape)
    sums = gamma(n + 3, UNIT[dtype])
    solver = sums * (np.abs(w) + d @ np.abs(used)) + (n + 1) * ETA[dtype]
    checker = gamma(n + 2, UNIT["float64"]) * (d + d @ np.abs(exact))
    values = value + (1 + sums) * (value @ np.abs(used))
    return as_array(solver + checker + d @ np.abs(used - exact) + values)


def gptq_factorization(
    feedback: Numbers, diagonal: Numbers, loss: Numbers, dtype: str = "float64"
) -> Array:
    """B3.g: what factorizing H in `dtype` may move the residuals; inf where it may do anything.

    feedback, diagonal   U [n, n] and D [n] of the damped Hessian, in float64
    loss                 delta H delta^T of each row, [rows]

    2 ||E|| sqrt(loss / D_j), see `gptq_moved`. The published way, to invert H and to factorize the
    inverse, may do worse: that it does not is not proved.
    """
    d = as_array(diagonal)
    upper = as_array(feedback) * np.sqrt(d)
    reach = np.abs(np.linalg.inv(upper)) @ np.linalg.norm(upper, axis=1)
    moved = gptq_moved(float(reach @ reach), len(d), dtype)
    return as_array(moved * np.sqrt(as_array(loss)[:, None] / d))


def gptq_moved(spread: float, columns: int, dtype: str = "float64") -> float:
    """B3.g: 2 ||E||_F, how far a Cholesky factor in `dtype` lies from the checker's; or inf.

    spread   || |R^-1| d ||^2, with R the checker's factor and d_i the length of its row i

    Both factors are exact for matrices within gamma_{3n+7} d d^T of H: the damping, its mean, the
    storing of H and the factorization itself. Above 1/4 nothing is known of the other factor.
    """
    k = 3 * columns + 7
    error = (gamma(k, UNIT[dtype]) + gamma(k, UNIT["float64"])) * spread
    return 2 * error if error <= 1 / 4 else float("inf")


def gptq_norms(above: Numbers, diagonal: Numbers, moved: float) -> Array:
    """B3.g: the length of each column above the diagonal of any U that `gptq_moved` allows.

    above, diagonal   those lengths of the checker's U, and D, [n]
    """
    u, d = as_array(above), as_array(diagonal)
    trace = (d * (1 + u**2)).sum()
    return as_array(u + moved * np.sqrt(trace / d))


def gptq_allowance(
    weight: Numbers,
    delta: Numbers,
    residual: Numbers,
    norms: Numbers,
    diagonal: Numbers,
    moved: float,
    dtype: str = "float32",
    value_error: Numbers = 0.0,
) -> Array:
    """B3.g: how far residuals may lie from exact arithmetic, when only U is at hand.

    weight, delta, residual   [rows, n], in processing order
    norms         `gptq_norms`, [n]
    diagonal      D, [n]
    moved         `gptq_moved`
    dtype         of the solver's sums, and of its factor as it is stored
    value_error   `decode` of the codes, [rows, n], or 0 where values are exact

    `gptq_residual` with sum_k |delta_k| |U_kj| <= ||delta|| ||U_.j|| (Cauchy and Schwarz), which
    costs no product of matrices; two more roundings for the factor; and what the solver's
    factorization moves, 2 ||E|| sqrt(loss / D_j), the loss being sum D_j r_j^2.
    """
    w, d, r = (np.abs(as_array(a)) for a in (weight, delta, residual))
    lengths, weights, value = as_array(norms), as_array(diagonal), as_array(value_error)
    n, size = len(lengths), np.linalg.norm(d, axis=-1, keepdims=True)
    fed = size * lengths
    checker = gamma(n + 2, UNIT["float64"]) * (d + fed)
    loss = np.sqrt(((r + checker) ** 2 * weights).sum(-1, keepdims=True))
    sums = gamma(n + 5, UNIT[dtype])
    allowed = sums * (w + fed) + (n + 1 + np.sqrt(n) * size) * ETA[dtype] + checker
    allowed += moved * loss / np.sqrt(weights)
    if value.any():
        allowed += value + (1 + sums) * np.linalg.norm(value, axis=-1, keepdims=True) * lengths
    return as_array(allowed)


def gptq_aim(
    pull: Numbers, size: Numbers, mismatch: Numbers, feedback: tuple[Numbers, float, float]
) -> Array:
    """B3.h: how far residuals may lie because both parties compute W M H^-1, times D_j^(1/2).

    pull       the lengths of its rows in the norm of H, [rows]
    size       ||w||, [rows]
    mismatch   ||M_.j||, [n], in processing order
    feedback   (the roots l of diag(H), [n]; `spread` || |R^-1| l ||^2; `gptq_moved`)

    The Hessians that the two divide by lie within `moved` of one another in the norm of H, so the
    quotients within twice that; and W M is rounded, by gamma_n ||w|| ||M_.j|| <= b l_j for each.
    """
    lengths, spread, moved = as_array(feedback[0]), feedback[1], feedback[2]
    reach = (as_array(mismatch) / lengths).max(initial=0.0)
    product = gamma(2 * len(lengths) + 6, UNIT["float64"]) * np.sqrt(spread) * reach
    lost = product * as_array(size)
    return as_array(2 * moved * (as_array(pull) + lost) + 2 * lost)


def gptq_aim_rounded(weight: Numbers, aim: Numbers, dtype: str = "float32") -> Array:
    """B3.h: how far the aim may be rounded when it is stored, [rows, n].

    weight, aim   W and W + share W M H^-1
    dtype         that it is stored in
    """
    w, a = as_array(weight), as_array(aim)
    summed = gamma(4, UNIT["float64"]) * (np.abs(w) + np.abs(a - w))
    return as_array(gamma(2, UNIT[dtype]) * np.abs(a) + summed + ETA[dtype])


def gptq_compensated(
    weight: Numbers,
    change: Numbers,
    before: tuple[Numbers, Numbers, Numbers],
    norms: Numbers,
    diagonal: Numbers,
    reach: Numbers,
    moved: float,
    columns: int,
    dtype: str = "float32",
) -> Array:
    """B3.f: how far a group's compensated weights may lie from exact arithmetic, [rows, group].

    weight     w of the group, [rows, group]
    change     compensated weight minus weight, [rows, group]
    before     of the columns before the group, [rows] each: the length of delta, that of `decode`
               of the codes, and the loss sum D_j r_j^2
    norms      `gptq_norms` of the group
    diagonal   D of the group
    reach      [group]: the length of each column of (U_GG D^(1/2))^-1
    moved      `gptq_moved`
    columns    n, of the layer
    dtype      of the solver's sums; inf where the bound says nothing
    """
    w, y, c = np.abs(as_array(weight)), as_array(change), as_array(reach)
    delta, value, loss = (as_array(each)[:, None] for each in before)
    lengths, root = as_array(norms), np.sqrt(as_array(diagonal))
    sums = gamma(columns + 5, UNIT[dtype]) + gamma(columns + 5, UNIT["float64"])
    under = np.sqrt(columns) * ETA[dtype]
    size = delta + np.linalg.norm(y, axis=-1, keepdims=True)
    own = sums * (w + size * lengths) + (1 + sums) * value * lengths
    own += (columns + 1) * ETA[dtype] + under * size
    first = np.linalg.norm(own * root, axis=-1, keepdims=True)
    again = np.linalg.norm((sums * lengths + under) * root) * np.linalg.norm(c)
    left = 1 - (1 + 2 * moved) * again  # an error of one weight is fed back to the next
    if not left > 0:
        return np.full(w.shape, np.inf)
    return as_array((moved * np.sqrt(loss) + (1 + 2 * moved) * first) / left * c)


def gptq_certificate(
    residual: Numbers, codes: Numbers, scale: Numbers, grid: Grid, allowance: Numbers = 0.0
) -> tuple[Array, Array]:
    """B3.b: (what the grid does not excuse of each residual, what is allowed). Complete.

    Codes are GPTQ's for these scales, this order and this Hessian if and only if |r| <= s / 2
    everywhere, up to ties; but the lowest code may lie any distance above a compensated weight
    that has left the range, and the highest any distance below. Check with
    `ratio(*gptq_certificate(...))`.

    residual, codes, scale   [rows, n], in processing order
    allowance                `gptq_residual` or `gptq_allowance`; 0 in exact arithmetic
    """
    return nearest(residual, codes, scale, grid, allowance)


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
    reach = as_array(scale) / 2 + as_array(allowance)
    if residual is not None:
        reach = as_array(np.maximum(reach, np.abs(as_array(residual))))
    return as_array((reach**2 * as_array(diagonal)).sum(-1))
