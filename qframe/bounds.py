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


_NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126}  # below it an exp may give 0


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


def worst(error: Numbers, allowed: Numbers) -> tuple[float, int]:
    """Return `ratio`, and the flat index of the place where it is; (0.0, 0) of nothing."""
    errors, limits = np.broadcast_arrays(*(_array(a) for a in (error, allowed)))
    if errors.size == 0:
        return 0.0, 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = errors / limits
    if errors.min() < 0:
        np.abs(ratios, out=ratios)
    place = int(ratios.argmax())  # the first NaN, where there is one
    if not ratios.flat[place] < np.inf or limits.min() < 0:
        ratios = np.where(errors == 0, 0, ratios)
        good = np.isfinite(errors) & (limits >= 0)
        ratios = np.where(good, ratios, np.inf)
        place = int(ratios.argmax())
    return float(ratios.flat[place] / CHECKER), place


def accumulate(magnitude: Numbers, length: int, unit: float = UNIT["float32"]) -> Array:
    """B9.a: the error of a sum of `length` products, in any order, with or without FMA.

    magnitude   sum of |x| |y| over the products
    """
    return gamma(length, unit) * _array(magnitude)


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
    return relative * _array(magnitude) + lost * (1 + relative)


def weight_only(
    magnitude: Numbers, columns: int, unit: float = UNIT["float32"], inputs: float = 0.0
) -> Array:
    """B9.b: the error of sum x s (c - z), summed in any order, the zero point factored out or not.

    magnitude   sum of |x| s (|c| + |z|), [tokens, rows]
    columns     products of a sum
    unit        unit roundoff of the sums
    inputs      relative error of an operand that is rounded before it is multiplied (TF32, ...)
    """
    relative = _compound(gamma(columns + 2, unit), gamma(3), inputs, inputs)
    return relative * _array(magnitude)


def exact_sum(magnitude: Numbers, quantum: Numbers) -> npt.NDArray[np.bool_]:
    """B9.c: where a float32 sum has no error, whatever the order.

    magnitude   sum of the magnitudes of the products
    quantum     a number of which every product is a multiple
    """
    return np.asarray(_array(magnitude) <= 2.0**24 * _array(quantum))


def second_moments(
    magnitude: Numbers,
    before: Numbers,
    tokens: int,
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
) -> Array:
    """B9.d: the error of H += x^T x, summed over the tokens, then added to a float64 H.

    magnitude   |x|^T |x|, [columns, columns]
    before      H before, [columns, columns]
    """
    size = _array(magnitude)
    inner = _compound(gamma(tokens, unit), inputs, inputs)
    outer = gamma(tokens + 1, UNIT["float64"])
    lost = 2 * tokens * ETA["float32"]  # products that underflow
    return inner * size + outer * (np.abs(_array(before)) + (1 + inner) * size) + lost


def _compound(*relative: float) -> float:
    """Return (1 + a)(1 + b)... - 1: relative errors one after another."""
    return float(np.prod([1 + r for r in relative])) - 1


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


def nearest(
    delta: Numbers, codes: Numbers, scale: Numbers, grid: Grid, allowance: Numbers = 0.0
) -> tuple[Array, Array]:
    """B1.b: (each error that needs and has no excuse, what is allowed). Complete.

    A code is the nearest to its weight if and only if the error is at most half a step, or the
    code is an end of the grid and the weight lies beyond it: such an error counts as 0. This is
    `nearest_code` without the search, for a grid of equal steps.

    delta       s (c - z) - w
    allowance   the rounding of the quotient, `roundings` u |w|
    """
    d, c = _array(delta), np.asarray(codes)
    error, allowed = np.asarray(np.abs(d)), _array(_array(scale) / 2 + _array(allowance))
    over = np.flatnonzero(error > allowed)  # few: only these need an excuse
    if len(over):
        beyond, code = d.reshape(-1)[over], np.broadcast_to(c, d.shape).reshape(-1)[over]
        excused = ((code == grid.qmin) & (beyond > 0)) | ((code == grid.qmax) & (beyond < 0))
        np.put(error, over[excused & np.isfinite(beyond)], 0)
    return error, allowed


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

    At most two float32 roundings make the scale, then storage rounds it *up*, to the next number of
    the dtype and no further.
    """
    d = _array(ideal)
    lowest = d * (1 - gamma(2)) - ETA["float32"]
    highest = d * (1 + gamma(2)) + ETA["float32"]
    if scale_dtype == "float32":
        return lowest, highest + 2 * ETA["float32"]
    return lowest, _next_stored(highest, scale_dtype)


_STORED = {"float16": (11, -14), "bfloat16": (8, -126)}  # significant bits, least normal exponent


def _next_stored(x: Array, dtype: str) -> Array:
    """Return the least numbers of a 16-bit dtype that are >= x > 0, as if it had no largest."""
    bits, least = _STORED[dtype]
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    spacing = np.ldexp(1.0, exponent - (bits - 1))
    return _array(np.ceil(x / spacing) * spacing)


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


# B2: number formats ---------------------------------------------------------------------------


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
    return _array(np.concatenate([-positive[:0:-1], positive]))


def float_element(x: Numbers, significand: int, min_exponent: int, largest: float) -> Array:
    """B2.a: the error of rounding x to the nearest of `representable`, at most `largest`."""
    size = np.abs(_array(x))
    unit = 2.0**-significand
    inside = np.maximum(unit / (1 + unit) * size, 2.0 ** (min_exponent - significand))
    return _array(np.maximum(inside, size - largest))


def nearest_value(x: Numbers, values: Numbers) -> Array:
    """B2.b: the nearest of some values, ascending; of two that are as near, the lower one."""
    levels = _array(values)
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[np.searchsorted(middles, _array(x))]


def half_cell(x: Numbers, values: Numbers) -> Array:
    """B2.b: the error of rounding x to the nearest of some values, ascending.

    Half of the gap that x lies in; beyond the ends, the distance to the end.
    """
    levels, numbers = _array(values), _array(x)
    place = np.clip(np.searchsorted(levels, numbers), 1, len(levels) - 1)
    gap = (levels[place] - levels[place - 1]) / 2
    beyond = np.maximum(levels[0] - numbers, numbers - levels[-1])
    return _array(np.maximum(gap, beyond))


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
    gamma_{n+2} of float64. All is measured on what the solver did, nothing is assumed of H; that F
    is close to U is for another check.
    """
    w, d = _array(weight), np.abs(_array(delta))
    used = np.triu(_array(feedback), 1)
    exact = np.triu(_array(exact_feedback), 1)
    n, value = len(used), np.broadcast_to(_array(value_error), w.shape)
    sums = gamma(n + 3, UNIT[dtype])
    solver = sums * (np.abs(w) + d @ np.abs(used)) + (n + 1) * ETA[dtype]
    checker = gamma(n + 2, UNIT["float64"]) * (d + d @ np.abs(exact))
    values = value + (1 + sums) * (value @ np.abs(used))
    return _array(solver + checker + d @ np.abs(used - exact) + values)


def gptq_factorization(
    feedback: Numbers, diagonal: Numbers, loss: Numbers, dtype: str = "float64"
) -> Array:
    """B3.g: what factorizing H in `dtype` may move the residuals; inf where it may do anything.

    feedback, diagonal   U [n, n] and D [n] of the damped Hessian, in float64
    loss                 delta H delta^T of each row, [rows]

    2 ||E|| sqrt(loss / D_j), see `gptq_moved`. The published way, to invert H and to factorize the
    inverse, may do worse: that it does not is not proved.
    """
    d = _array(diagonal)
    upper = _array(feedback) * np.sqrt(d)
    reach = np.abs(np.linalg.inv(upper)) @ np.linalg.norm(upper, axis=1)
    moved = gptq_moved(float(reach @ reach), len(d), dtype)
    return _array(moved * np.sqrt(_array(loss)[:, None] / d))


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
    u, d = _array(above), _array(diagonal)
    trace = (d * (1 + u**2)).sum()
    return _array(u + moved * np.sqrt(trace / d))


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
    w, d, r = (np.abs(_array(a)) for a in (weight, delta, residual))
    lengths, weights, value = _array(norms), _array(diagonal), _array(value_error)
    n, size = len(lengths), np.linalg.norm(d, axis=-1, keepdims=True)
    fed = size * lengths
    checker = gamma(n + 2, UNIT["float64"]) * (d + fed)
    loss = np.sqrt(((r + checker) ** 2 * weights).sum(-1, keepdims=True))
    sums = gamma(n + 5, UNIT[dtype])
    allowed = sums * (w + fed) + (n + 1 + np.sqrt(n) * size) * ETA[dtype] + checker
    allowed += moved * loss / np.sqrt(weights)
    if value.any():
        allowed += value + (1 + sums) * np.linalg.norm(value, axis=-1, keepdims=True) * lengths
    return _array(allowed)


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
    w, y, c = np.abs(_array(weight)), _array(change), _array(reach)
    delta, value, loss = (_array(each)[:, None] for each in before)
    lengths, root = _array(norms), np.sqrt(_array(diagonal))
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
    return _array((moved * np.sqrt(loss) + (1 + 2 * moved) * first) / left * c)


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
    reach = _array(scale) / 2 + _array(allowance)
    if residual is not None:
        reach = _array(np.maximum(reach, np.abs(_array(residual))))
    return _array((reach**2 * _array(diagonal)).sum(-1))


# B4: outlier handlers -------------------------------------------------------------------------


def rewrite_element(weight: Numbers, input_scale: Numbers, roundings: int = 2) -> Array:
    """B4.a: the error |W - W' / s| of a weight that was multiplied by the input scale, in float32.

    weight       [rows, columns]
    input_scale  s, [columns]
    roundings    of W' as a multiple of W, and of s as it is returned
    """
    w, s = np.abs(_array(weight)), _array(input_scale)
    own = gamma(2, UNIT["float64"])
    return _array((gamma(roundings) + own) * w + ETA["float32"] / s)


def rewrite_output(x: Numbers, weight: Numbers, input_scale: Numbers, roundings: int = 2) -> Array:
    """B4.a: the error |W x - W' fl(x / s)| of a token, the quotient in float32, [tokens, rows].

    x            [tokens, columns]
    weight, input_scale, roundings   as for `rewrite_element`
    """
    tokens, w, s = np.abs(_array(x)), np.abs(_array(weight)), _array(input_scale)
    element = rewrite_element(w, s, roundings)
    reached = w + element
    unit = UNIT["float32"] + gamma(2 * w.shape[1] + 4, UNIT["float64"])
    return _array(tokens @ (element + unit * reached).T + ETA["float32"] * (reached * s).sum(-1))


def search_slack(weighed: Numbers, missed: Numbers, length: int, dtype: str = "float32") -> Array:
    """B4.c: how far the computed root of an output error may lie from the root itself.

    weighed   sum of v A v^T over rows, v = |W| + |Q|, A = (2/n) |X|^T |X| >= |H|
    missed    the same for v = |W - Q|
    length    operations behind a sum: two of as many products as columns, and one over rows
    dtype     of those sums
    """
    return _array(
        gamma(4) * np.sqrt(_array(weighed)) + np.sqrt(gamma(length, UNIT[dtype]) * _array(missed))
    )


# B5 and B6: eight-bit products ------------------------------------------------------------------


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
    a, sx, sw = (np.abs(_array(n)) for n in (accumulated, x_scale, w_scale))
    return _array(gamma(3) * (a * sx * sw) + ETA["float32"] * (1 + a + sx + sw))


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
    relative = _compound(gamma(outliers + 2, unit), gamma(6), inputs, inputs)
    return _array(
        relative * _array(magnitude) + (1 + relative) * _array(doubt) + 2 * ETA["float32"]
    )


def doubtful(quotient: Numbers) -> npt.NDArray[np.bool_]:
    """B5.e: where x / s is so near to a half that roundings of s and of the quotient decide.

    quotient   x / s in real numbers
    """
    t = np.abs(_array(quotient))
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
    size, w, kept = np.abs(_array(x)), _array(weight), ~outlier
    codes_for = np.abs(_array(weight_values))
    moved_x = _array(x_scale)[:, None] / 2 + gamma(4) * size
    rounding = size[:, kept] @ np.abs(w - _array(weight_values)).T[kept]
    rounding += moved_x[:, kept] @ codes_for.T[kept]
    magnitude = (size + moved_x)[:, kept] @ codes_for.T[kept]
    magnitude += size[:, outlier] @ np.abs(w).T[outlier]
    return _array(rounding + int8_mixed(magnitude, 0.0, int(outlier.sum()), unit, inputs))


def token_scale(absmax: Numbers) -> tuple[Array, Array]:
    """B6.a: the interval in which the scale of a token lies, (lowest, highest); absmax > 0.

    Two roundings of absmax / 127; below the normal range the smallest positive number is right.
    """
    d = _array(absmax) / 127
    lowest = d * (1 - gamma(2)) - ETA["float32"]
    highest = d * (1 + gamma(2)) + ETA["float32"]
    return _array(np.maximum(lowest, ETA["float32"])), _array(
        np.maximum(highest, 2 * ETA["float32"])
    )


# B8: rotations --------------------------------------------------------------------------------


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
        relative = _compound(gamma(block, unit), gamma(3), inputs, inputs) * block**0.5
    else:
        relative = _compound(gamma(block.bit_length() - 1, unit), gamma(2), inputs)
    return _array(relative * _array(norm))


def rotated_product(x_norm: Numbers, w_norm: Numbers, x_error: Numbers, w_error: Numbers) -> Array:
    """B8.b: how far (x Q)(w Q)^T may lie from x w^T, when both were rotated in float32.

    x_norm, w_norm     Euclidean norms;  x_error, w_error   `hadamard` of them
    """
    x, w, dx, dw = (_array(n) for n in (x_norm, w_norm, x_error, w_error))
    return _array(dx * w + dw * x + dx * dw)


def incoherence(norm: Numbers, block: int, coordinates: int, probability: float) -> Array:
    """B8.c: how large a coordinate of x diag(signs) H / sqrt(block) is, for random signs.

    norm          of the block of x, which must not depend on the signs
    coordinates   how many are looked at
    probability   that one of them is larger after all
    """
    return _array(_array(norm) * np.sqrt(2 * np.log(2 * coordinates / probability) / block))


# B7: KV caches --------------------------------------------------------------------------------
#
# A stored number is s c + m: s the scale, c the code, m the offset. Keys k and values v
# [tokens, head_dim], a query q [head_dim], logits z_t = sum_c q_c k_tc / sqrt(head_dim).


def softmax(oscillation: Numbers) -> Array:
    """B7.c: the distance sum |p' - p| of softmaxes whose logits differ by d.

    oscillation   max d - min d, at most twice max |d|
    """
    return _array(2 * np.tanh(_array(oscillation) / 4))


def kv_element(
    x: Numbers,
    scale: Numbers,
    offset: Numbers,
    grid: Grid,
    roundings: int = 1,
    dtype: str = "float32",
) -> Array:
    """B7.a: the error |x - (s c + m)| of c = clip(rint(fl(fl(x - m) / s)), qmin, qmax).

    roundings   of the quotient: 1 for a division, 2 for a multiplication with fl(1 / s)
    dtype       of the encoder's arithmetic

    Inside the range s / 2 + gamma |x - m|, the difference being rounded as well; beyond the range
    the distance to its nearer end, where that is more.
    """
    w, s = _array(x) - _array(offset), _array(scale)
    beyond = np.maximum(s * grid.qmin - w, w - s * grid.qmax)
    return _array(np.maximum(s / 2 + gamma(roundings + 1, UNIT[dtype]) * np.abs(w), beyond))


def kv_decode(scale: Numbers, codes: Numbers, offset: Numbers, dtype: str = "float32") -> Array:
    """B7.a: the error of s c + m in float32, with one more rounding if `dtype` is not float32.

    dtype   of what is read
    """
    product, shift = _array(scale) * _array(codes), _array(offset)
    own = gamma(2) * (np.abs(product) + np.abs(shift)) + ETA["float32"]
    if dtype == "float32":
        return _array(own)
    return _array(own + UNIT[dtype] * (np.abs(product + shift) + own) + ETA[dtype])


def kv_offset(lo: Numbers, scale_dtype: str) -> tuple[Array, Array]:
    """B7.f: the interval in which a stored offset lies, (lowest, highest).

    lo   the smallest number of each group

    Storage rounds it *down*: by less than 2 u_s of itself, or by one smallest positive number.
    """
    low = _array(lo)
    if scale_dtype == "float32":
        return low, low
    return low - 2 * UNIT[scale_dtype] * np.abs(low) - 2 * ETA[scale_dtype], low


def kv_logits(query: Numbers, element: Numbers) -> Array:
    """B7.b: how far logits move when keys do: sum_c |q_c| e_tc / sqrt(head_dim), [..., tokens].

    query     [..., head_dim]
    element   what each number of the keys may be off by, [..., tokens, head_dim]
    """
    q, e = np.abs(_array(query)), _array(element)
    return _array((e @ q[..., None])[..., 0] / np.sqrt(q.shape[-1]))


def kv_output(weights: Numbers, element: Numbers, moved: Numbers, values: Numbers) -> Array:
    """B7.d: how far the output moves: sum_t p_t e_tc + moved / 2 * (max_t v_tc - min_t v_tc).

    weights   p, softmax of the logits that moved, [..., tokens]
    element   what each number of the values may be off by, [..., tokens, head_dim]
    moved     how far the weights moved in the sum of magnitudes (`softmax`), [...]
    values    v, [..., tokens, head_dim]
    """
    p, v = _array(weights), _array(values)
    own = (p[..., None, :] @ _array(element))[..., 0, :]
    return _array(own + _array(moved)[..., None] / 2 * (v.max(-2) - v.min(-2)))


def kv_attention(
    query: Numbers,
    keys: Numbers,
    values: Numbers,
    weights: Numbers,
    elements: tuple[Numbers, Numbers] = (0.0, 0.0),
    dtype: str = "float32",
    rescalings: int = 0,
) -> tuple[Array, Array]:
    """B7.e: how far off attention may be: (weights, sum of magnitudes [...]; output [..., d]).

    query, keys, values   [..., d], [..., tokens, d], [..., tokens, d]
    weights      p of these in exact arithmetic, [..., tokens]
    elements     what each number of the keys, and of the values, may be off by in the computation
    dtype        of the arithmetic; its exp is within 8 u
    rescalings   how often a weight may be scaled down after it was made: 0 if the largest logit is
                 known before, up to the number of tokens for an online softmax

    Logits move by B7.b, by gamma_{d+3} of their magnitude, and by u |z_t - max z| for the
    subtraction; B7.c carries that on. Sums, products, exp, quotient: gamma_{2T + 18 (n + 1)}.
    """
    q, k, v, p = (_array(a) for a in (query, keys, values, weights))
    off_k, off_v = (np.broadcast_to(_array(e), k.shape) for e in elements)
    (tokens, d), unit, tiny = k.shape[-2:], UNIT[dtype], _NORMAL[dtype]
    magnitude = kv_logits(q, np.abs(k) + off_k)
    spread = 2 * magnitude.max(-1)[..., None]
    logits = kv_logits(q, off_k) + gamma(d + 3, unit) * magnitude + gamma(2, unit) * spread
    moved = softmax(2 * (logits.max(-1) + d * tiny))
    relative, lost = gamma(2 * tokens + 18 * (rescalings + 1), unit), 2 * tokens * tiny

    def mean(numbers: Array) -> Array:  # of what is >= 0, with weights that moved
        own: Array = (p[..., None, :] @ numbers)[..., 0, :]
        return _array(own + moved[..., None] * numbers.max(-2))

    size = np.abs(v) + off_v
    output = mean(off_v) + moved[..., None] / 2 * (v.max(-2) - v.min(-2)) + relative * mean(size)
    return _array(moved + relative + lost), _array(output + lost * (1 + size.max(-2)))


# B10: methods of any kind ----------------------------------------------------------------------


def radius(
    weight: Numbers, delta: Numbers, codes: Numbers, scale: Numbers, grid: Grid, steps: float
) -> tuple[Array, Array]:
    """B10.a: (what the ends of the grid do not excuse of each error, what is allowed).

    The code of rint(fl(fl(w / s) + v)) with |v| <= steps - 1/2: two roundings, of the quotient and
    of the sum.

    delta   s (c - z) - w
    """
    s = _array(scale)
    rounding = gamma(2) * (np.abs(_array(weight)) + steps * s)
    return nearest(delta, codes, 2 * steps * s, grid, rounding)


def half_steps(scale: Numbers, grid: Grid) -> Array:
    """B10.b: the most that rounding to nearest moves a weight with a minmax scale, clipped or not.

    B1.a with B1.f: half a step, and for the rounding of scale, zero point and value
    gamma_9 of the range of the codes.
    """
    levels = grid.qmax - grid.qmin
    return _array((1 / 2 + gamma(9) * levels) * _array(scale) + levels * ETA["float32"])


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
              method may have compared exact values
    """
    relative = 2 * gamma(2 * columns + 4, UNIT[dtype]) * _array(size)
    lost = 2 * columns * (2 + _array(lengths)) * ETA[dtype]
    compared, apart = _array(baseline) + relative + lost, _array(moved)
    return _array(np.where(apart == 0, compared, (np.sqrt(compared) + apart) ** 2))


def output_bound(reach: Numbers, factor: float, size: Numbers, columns: int) -> Array:
    """B10.b: sqrt(e H e^T) of a row, when |e_j| is at most `factor` times `half_steps`.

    reach   sum_j sqrt(H_jj) `half_steps`
    size    |e| |H| |e|^T, for the rounding of the check itself
    """
    own = np.sqrt(gamma(2 * columns + 4, UNIT["float64"]) * _array(size))
    return _array(factor * _array(reach) + own)
