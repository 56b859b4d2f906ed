"""The oracle: every algorithm once more, slow and obvious, in NumPy float64 and int64.

Tests compare the fast code with this one. It shares no code with it, and imports neither torch
nor numba: where the fast code has a trick, this has a loop. Only the scale rule and the quotients
of round-to-nearest are float32, operation by operation as in qframe.rounding, so that scales and
codes can be compared bit by bit.

Sources: Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323 (algorithm 1, with the published code
for what the paper leaves open); Chee et al., QuIP, NeurIPS 2023, arXiv:2307.13304 (the LDL form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qframe.contracts import Grid
from qframe.errors import NonFiniteError
from qframe.scheme import Scheme

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]

# Significand bits (the leading one included), exponent of the smallest normal, largest finite.
_STORAGE = {
    "float16": (11, -14, 65504.0),
    "bfloat16": (8, -126, (2 - 2.0**-7) * 2.0**127),
    "e8m0": (1, -127, 2.0**127),
    "e4m3": (4, -6, 448.0),
    "tensor": (1, -117, math.inf),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Codes, what they mean, and what they were rounded from.

    codes         [rows, columns] int64
    scale         [rows or 1, groups] float32
    zero_point    [rows or 1, groups] int64
    group_index   [columns] int64
    order         [columns] int64: the columns in the order in which they were rounded
    target        [rows, columns] float64: the number that each code is nearest to. The weight
                  itself for round-to-nearest, the compensated weight for GPTQ.
    grid          what codes stand for
    global_scale  what scales are multiples of in a two-level scheme, else 1
    """

    codes: Int64
    scale: Float32
    zero_point: Int64
    group_index: Int64
    order: Int64
    target: Float64
    grid: Grid | None = None
    global_scale: float = 1.0

    def values(self) -> Float32:
        """Return scale * (code - zero_point), [rows, columns], rounded once to float32."""
        return dequantize(self.codes, self.scale, self.zero_point, self.group_index, self.grid)


def dequantize(
    codes: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike,
    group_index: npt.ArrayLike,
    grid: Grid | None = None,
) -> Float32:
    """Return scale * (code - zero_point), or scale * value, [rows, columns] float32.

    scale, zero_point   [rows or 1, groups]
    grid                what codes stand for; None for themselves
    """
    c, index = np.asarray(codes, np.int64), np.asarray(group_index, np.int64)
    s, z = np.asarray(scale, np.float32), np.asarray(zero_point, np.int64)
    out = np.empty(c.shape, np.float32)
    for i in range(c.shape[0]):
        k = i if len(s) > 1 else 0  # one row of scales serves all rows
        for j in range(c.shape[1]):
            step = c[i, j] - z[k, index[j]]
            if grid is not None and grid.values is not None:
                step = grid.values[step - grid.qmin]
            out[i, j] = s[k, index[j]] * np.float32(step)
    return out


# Scales ---------------------------------------------------------------------------------------


def round_up(scale: float, dtype: str) -> float:
    """Return the least number of `dtype` that is >= scale, inf where there is none.

    0 becomes the least number of e8m0, which has no 0.

    >>> round_up(1.0001, "float16"), round_up(1e-30, "float16") == 2.0**-24
    (1.0009765625, True)
    """
    if dtype == "e8m0":
        scale = max(scale, 2.0**-127)
    if dtype == "float32" or scale == 0 or math.isinf(scale):
        return scale
    digits, smallest_exponent, largest = _STORAGE[dtype]
    exponent = max(math.frexp(scale)[1] - 1, smallest_exponent)
    spacing = 2.0 ** (exponent - (digits - 1))
    up = math.ceil(scale / spacing) * spacing
    return up if up <= largest else math.inf


def scale_of_range(
    lo: np.float32, hi: np.float32, scheme: Scheme, grid: Grid, unit: float | None = None
) -> tuple[np.float32, int]:
    """Return (scale, zero_point) that cover [lo, hi].

    unit   what scales are multiples of in a two-level scheme

    The operations are float32, in the order of qframe.rounding.scale_of_range.
    """
    zero = np.float32(0)
    with np.errstate(over="ignore", under="ignore"):
        if scheme.symmetric:
            extent = max(abs(lo), abs(hi))
            quotient = extent / np.float32(reach(grid))
        else:
            lo, hi = min(lo, zero), max(hi, zero)
            extent = hi - lo
            quotient = extent / np.float32(grid.qmax - grid.qmin)
        if unit is not None:
            quotient = min(quotient / np.float32(unit), np.float32(448))
        if scheme.scale_rule == "ocp" and extent > 0:
            power = math.floor(math.log2(extent)) - math.floor(math.log2(reach(grid)))
            scale = np.float32(2.0 ** max(power, -127))
        else:
            scale = np.float32(round_up(float(quotient), scheme.scale_dtype))
        if extent == 0:
            return np.float32(unit or 1), 0 if scheme.symmetric else grid.qmin
        if scale == 0:
            scale = np.float32(smallest_positive(scheme.scale_dtype))
        scale = scale * np.float32(unit or 1)
        if scheme.symmetric:
            return scale, 0
        zero_point = np.rint(np.float32(grid.qmin) - lo / scale)
    return scale, int(min(max(zero_point, grid.qmin), grid.qmax))


def reach(grid: Grid) -> float:
    """Return how many scales the largest weight of a symmetric group is."""
    if grid.values is None:
        return (grid.qmax - grid.qmin) / 2
    return min(max(grid.values), -min(grid.values))


def scale_of_tensor(weight: Float32, index: Int64, scheme: Scheme, grid: Grid) -> float:
    """Return what the scales of a two-level scheme are multiples of."""
    plain = scheme.replace(scale_dtype="float32", observer="minmax")
    largest, _ = _fit_all(weight, index, plain, grid)
    if not weight.any():
        return 1.0
    with np.errstate(under="ignore"):
        whole = float(largest[_used(weight, index, scheme)].max() / np.float32(448))
    return max(round_up(whole, "tensor"), 2.0**-117)


def _used(weight: Float32, index: Int64, scheme: Scheme) -> npt.NDArray[np.bool_]:
    """Return which groups have a weight other than 0, [rows or 1, groups]."""
    if scheme.strategy == "tensor":
        return np.array([[bool(weight.any())]])
    groups = int(index.max(initial=-1)) + 1
    return np.array([[bool(row[index == g].any()) for g in range(groups)] for row in weight])


def smallest_positive(dtype: str) -> float:
    """Return the smallest positive number of a scale dtype."""
    if dtype == "float32":
        return 2.0**-149
    digits, smallest_exponent, _ = _STORAGE[dtype]
    return 2.0 ** (smallest_exponent - (digits - 1))


def candidates(
    values: npt.ArrayLike, scheme: Scheme, grid: Grid, unit: float | None = None
) -> list[tuple[np.float32, int, float]]:
    """Return (scale, zero_point, squared error) of the mse observer's 80 clippings of a group.

    The clippings leave 100 %, 99 %, ... 21 % of the range; the first is minmax. Errors are
    float32, their squares summed exactly.
    """
    group = np.asarray(values, np.float32).ravel()
    out = []
    for k in range(80):
        kept = np.float32(1 - k / 100)
        scale, zero = scale_of_range(group.min() * kept, group.max() * kept, scheme, grid, unit)
        codes = nearest(group, scale, zero, grid)
        if grid.values is None:
            steps = (codes - zero).astype(np.float32)
        else:
            steps = np.array(grid.values, np.float32)[codes - grid.qmin]
        error = group - scale * steps
        out.append((scale, zero, math.fsum(float(e) for e in error * error)))
    return out


def fit(
    values: npt.ArrayLike, scheme: Scheme, grid: Grid, unit: float | None = None
) -> tuple[np.float32, int]:
    """Return (scale, zero_point) of one group of weights, by the scheme's observer.

    For mse the winner of a float64 sum may be another one where two sums are that close.
    Raises NonFiniteError where the scale does not fit its storage dtype.
    """
    group = np.asarray(values, np.float32).ravel()
    if group.size == 0:
        group = np.zeros(1, np.float32)
    if scheme.observer == "mse":
        scale, zero, _ = min(candidates(group, scheme, grid, unit), key=lambda each: each[2])
    else:
        scale, zero = scale_of_range(group.min(), group.max(), scheme, grid, unit)
    if not np.isfinite(scale):
        raise NonFiniteError(f"a scale does not fit {scheme.scale_dtype}")
    return scale, zero


# Round to nearest -----------------------------------------------------------------------------


def nearest(weight: npt.NDArray[Any], scale: np.float32, zero_point: int, grid: Grid) -> Int64:
    """Return clip(rint(w / scale) + zero_point), ties to even, in the precision of the weight.

    On a grid with values: the code of the value nearest to w / scale, of two the even one.
    """
    with np.errstate(over="ignore", under="ignore"):
        quotient = weight / scale
    if grid.values is not None:
        codes = range(grid.qmin, grid.qmax + 1)

        def of_one(place: float) -> int:
            far = {c: abs(place - v) for c, v in zip(codes, grid.values or (), strict=True)}
            return min(codes, key=lambda c: (far[c], c % 2))

        # What float64 cannot tell apart lies beyond all values.
        ends = 2 * max(map(abs, grid.values))
        clipped = np.clip(np.float64(quotient), -ends, ends)
        return np.array([of_one(float(x)) for x in clipped.ravel()], np.int64).reshape(
            np.shape(weight)
        )
    with np.errstate(over="ignore", under="ignore"):
        steps = np.rint(quotient) + zero_point
    return np.asarray(np.clip(steps, grid.qmin, grid.qmax), np.int64)


def rtn(weight: npt.ArrayLike, scheme: Scheme, grid: Grid) -> Rounded:
    """Round every weight to the nearest code of its group.

    weight   [rows, columns] float32
    """
    w = np.asarray(weight, np.float32)
    rows, columns = w.shape
    index = group_index(columns, scheme)
    unit = scale_of_tensor(w, index, scheme, grid) if scheme.two_level else None
    scale, zero = _fit_all(w, index, scheme, grid, unit)
    codes = np.empty((rows, columns), np.int64)
    for i in range(rows):
        for j in range(columns):
            k = 0 if scheme.strategy == "tensor" else i
            codes[i, j] = nearest(w[i, j], scale[k, index[j]], int(zero[k, index[j]]), grid)
    return Rounded(
        codes=codes,
        scale=scale,
        zero_point=zero,
        group_index=index,
        order=np.arange(columns),
        target=w.astype(np.float64),
        grid=grid,
        global_scale=unit or 1.0,
    )


def group_index(columns: int, scheme: Scheme) -> Int64:
    """Return the group of each column, contiguous groups, the last one as long as it may be."""
    if scheme.group_size is None:
        return np.zeros(columns, np.int64)
    return np.array([j // scheme.group_size for j in range(columns)], np.int64)


def _fit_all(
    weight: Float32, index: Int64, scheme: Scheme, grid: Grid, unit: float | None = None
) -> tuple[Float32, Int64]:
    """Return (scale, zero_point), [rows or 1, groups], of a weight with the given groups."""
    if scheme.strategy == "tensor":
        one, zero = fit(weight, scheme, grid, unit)
        return np.full((1, 1), one, np.float32), np.full((1, 1), zero, np.int64)
    groups = int(index.max(initial=-1)) + 1
    scale, zeros = np.ones((len(weight), groups), np.float32), np.zeros((len(weight), groups))
    for i in range(len(weight)):
        for g in range(groups):
            scale[i, g], zeros[i, g] = fit(weight[i, index == g], scheme, grid, unit)
    return scale, zeros.astype(np.int64)


# GPTQ -----------------------------------------------------------------------------------------


def prepare(
    weight: npt.ArrayLike,
    hessian: npt.ArrayLike,
    dampening_frac: float,
    dead: Literal["zero", "keep"] = "zero",
) -> tuple[Float64, Float64, Int64]:
    """Return (weight, damped Hessian, columns by falling diagonal), what GPTQ starts from.

    dead   what becomes of a column that no token excited, H_jj = 0. "zero": H_jj = 1, w_j = 0,
           as the published code does. "keep": H_jj = mean of the other diagonals (1 if there is
           none), w_j stays, as in qframe; nothing couples it, so it is rounded to nearest.

    The damping, dampening_frac times the mean of the diagonal, is taken after that.
    """
    w, h = np.array(weight, np.float64), np.array(hessian, np.float64)
    diagonal = h.diagonal().copy()
    lives, dies = diagonal[diagonal != 0], diagonal == 0
    if dead == "zero":
        w[:, dies] = 0
        diagonal[dies] = 1
    else:
        diagonal[dies] = lives.mean() if len(lives) else 1
    np.fill_diagonal(h, diagonal + (dampening_frac * diagonal.mean() if len(h) else 0))
    return w, h, np.argsort(-diagonal, kind="stable")


def gptq(
    weight: npt.ArrayLike,
    hessian: npt.ArrayLike,
    scheme: Scheme,
    grid: Grid,
    *,
    dampening_frac: float = 0.01,
    actorder: Literal["static", "group"] | None = None,
    static_groups: bool = True,
    dead: Literal["zero", "keep"] = "zero",
) -> Rounded:
    """Round column by column; the columns still to come make up for each error.

    weight          [rows, columns] float32
    hessian         [columns, columns], undamped
    actorder        None: left to right. "static": by falling diag(H), groups are contiguous in
                    the original columns. "group": by falling diag(H), groups are contiguous in
                    that order.
    static_groups   scales from the original weight, or (False, not with "static") from the
                    weight as updated so far when a group begins
    """
    if actorder == "static" and not static_groups:
        raise ValueError("actorder='static' needs static_groups=True")
    w, h, falling = prepare(weight, hessian, dampening_frac, dead)
    rows, columns = w.shape
    order = np.arange(columns) if actorder is None else falling
    index = group_index(columns, scheme)
    if actorder == "group":
        index = index[np.argsort(order)]  # the group of a column is that of its place in the order
    scale, zero = _fit_all(w.astype(np.float32), index, scheme, grid)

    inverse = np.linalg.inv(h[np.ix_(order, order)])
    factor = np.linalg.cholesky(inverse).T  # upper: H^-1 = factor^T factor
    w = w[:, order]
    codes, target = np.empty((rows, columns), np.int64), np.empty((rows, columns))
    for place, column in enumerate(order):
        g = index[column]
        width = scheme.group_size
        if width is not None and not static_groups and place % width == 0:
            for i in range(rows):
                scale[i, g], zero[i, g] = fit(w[i, place : place + width], scheme, grid)
        for i in range(rows):
            k = 0 if scheme.strategy == "tensor" else i
            s, z = scale[k, g], int(zero[k, g])
            target[i, column] = w[i, place]
            codes[i, column] = code = nearest(w[i, place], s, z, grid)
            error = (w[i, place] - float(s) * (code - z)) / factor[place, place]
            w[i, place:] -= error * factor[place, place:]  # algorithm 1, line "W <- W - E H^-1"
    return Rounded(
        codes=codes,
        scale=scale,
        zero_point=zero,
        group_index=index,
        order=order,
        target=target,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """What the GPTQ certificate looks at. Columns are in processing order: place k is order[k].

    residual   r = delta U, [rows, n]: value minus compensated weight
    delta      value minus weight, [rows, n]
    diagonal   D, [n], and
    feedback   U, [n, n], unit upper triangular: damped Hessian = U diag(D) U^T
    """

    residual: Float64
    delta: Float64
    diagonal: Float64
    feedback: Float64


def gptq_residuals(
    weight: npt.ArrayLike, hessian_damped: npt.ArrayLike, values: npt.ArrayLike, order: Int64
) -> Residuals:
    """Return the residuals of any quantized weight, whoever made it (B3.a, B3.b).

    weight           [rows, n]; dead columns as the algorithm under test treats them
    hessian_damped   [n, n], positive definite
    values           [rows, n], what the codes stand for
    order            [n], the columns in the order in which they were rounded
    """
    delta = (np.asarray(values, np.float64) - np.asarray(weight, np.float64))[:, order]
    h = np.asarray(hessian_damped, np.float64)[np.ix_(order, order)]
    # The Cholesky factor of the reversed matrix, reversed, is the upper one: H = R R^T.
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    diagonal = np.asarray(upper.diagonal(), np.float64)
    feedback = upper / diagonal
    return Residuals(
        residual=delta @ feedback, delta=delta, diagonal=diagonal**2, feedback=feedback
    )


def output_error(weight: npt.ArrayLike, values: npt.ArrayLike, hessian: npt.ArrayLike) -> float:
    """Return tr(dW H dW^T) / 2: the mean squared change of the layer's output, summed over rows.

    hessian   (2/n) sum x x^T, undamped
    """
    delta = np.asarray(values, np.float64) - np.asarray(weight, np.float64)
    return float(((delta @ np.asarray(hessian, np.float64)) * delta).sum() / 2)
