"""The claim of scales that were searched for: none that can be stored is better for the codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qframe import bounds
from qframe.certificates import Certificate, Closest, Evidence
from qframe.claims.nearest import unequal_steps
from qframe.hessian import Float64
from qframe.scheme import Scheme


@dataclass(frozen=True, slots=True)
class FittedScale:
    """B10.d: each scale is the number of its dtype nearest to the least squares of its codes.

    What must be so where no scale and zero point has a smaller squared error of the weights. With
    `HalfStep` neither codes alone nor scales alone can be changed for the better.
    """

    name = "fitted scale"
    theorem = "B10.d"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """It is about integers, and scales of 16 bits or more."""
        if scheme.scale_dtype not in bounds.UNIT:
            return f"it is not claimed for scale_dtype {scheme.scale_dtype!r}"
        return unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare each scale with sum w k / sum k^2 of its group, in float64."""
        from qframe import parallel, rounding

        problem, made = evidence.problem, evidence.quantized
        index = made.group_index.numpy()
        order = np.argsort(index, kind="stable")
        groups, starts = np.unique(index[order], return_index=True)
        whole = problem.scheme.strategy == "tensor"

        def sums(each: Float64) -> Float64:
            total = np.add.reduceat(each[:, order], starts, axis=1)
            return total.sum(0, keepdims=True) if whole else total

        def work(rows: slice) -> Closest:
            w = problem.weight[rows].double().numpy()
            own = slice(None) if len(made.scale) == 1 else rows
            scale, zero = made.scale[own], made.zero_point[own]
            s = rounding.expand(scale, made.group_index, len(w)).double().numpy()
            k = made.codes[rows] - rounding.expand(zero, made.group_index, len(w))
            steps = k.double().numpy()
            judged = against_fit(
                scale[:, groups].double().numpy(),
                sums(w * steps),
                sums(steps**2),
                sums((w - s * steps) ** 2),
                sums(np.abs(w * steps)),
                sums(np.ones(w.shape)),
                problem.scheme.scale_dtype,
            )
            return Closest.of(*judged, rows.start)

        if not problem.weight.numel():
            return Closest().certificate(self)
        pieces = evidence.cut(len(problem.weight) if whole else None)
        return Closest.among(parallel.spread(work, pieces, evidence.threads)).certificate(self)


def against_fit(
    scale: Float64,
    fit: Float64,
    squares: Float64,
    loss: Float64,
    products: Float64,
    terms: Float64,
    dtype: str,
) -> tuple[Float64, Float64]:
    """Return (error, what is allowed on its side) of scales; arguments as of `fitted_scale`.

    fit   sum w k; the error is scale minus fit / squares, 0 where all k are 0
    """
    used = squares > 0
    squares = np.where(used, squares, 1.0)
    best = fit / squares
    gap = np.where(best > scale, _next(scale, dtype, 1) - scale, scale - _next(scale, dtype, -1))
    allowed = bounds.fitted_scale(gap, loss, squares, products, terms)
    return np.where(used, np.abs(scale - best), 0.0), np.where(used, allowed, 0.0)


def _next(scale: Float64, dtype: str, side: int) -> Float64:
    """Return the next numbers of a scale dtype above or below; +-inf where none is positive."""
    if dtype == "bfloat16":
        bits = scale.astype(np.float32).view(np.int32) + np.int32(side << 16)
        found = bits.view(np.float32).astype(np.float64)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = scale.astype(dtype)
            found = np.nextafter(stored, stored.dtype.type(side * np.inf)).astype(np.float64)
    return np.where(found > 0, found, -np.inf)
