"""The feedback matrix of GPTQ: one Cholesky factorization, from the last column to the first.

With H = U U^T, U upper triangular, the target of column i in GPTQ is

    t_i = w_i + sum_{j<i} (w_j - q_j) F_ij,      F_ij = U_ji / U_ii.

GPTQ itself takes two factorizations and an inverse (arXiv:2210.17323, algorithm 1) to arrive at
the same numbers: its upper factor of H^-1 = R^T R is R = U^-1. F is the feedback of LDLQ (QuIP,
arXiv:2307.13304, section 3), and D_j = U_jj^2, the variance of input j given all later ones,
weighs the squared error of column j: loss = sum_j D_j (q_j - t_j)^2.

Method: V = U^T is lower triangular with H = V^T V; its rows follow from the last to the first,
in blocks, each from the rows below it, with the register tile of simd.py:

    V_ij = (H_ij - sum_{k>i} V_ki V_kj) / V_ii,  j <= i.

Error:  |H - V^T V| <= gamma_{n+1} |V|^T |V| elementwise (Higham, Accuracy and Stability of
        Numerical Algorithms, theorem 10.3), with the unit roundoff of `precision`; rounding F to
        float32 adds half an ulp to each element. Results do not depend on the thread count.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.feedback import BLOCK, Feedback, feedback_row
from qframe_plugins.kernels.numba_cpu.scratch import scratch
from qframe_plugins.kernels.numba_cpu.simd import (
    QUAD,
    STRIPE_BYTES,
    claim,
    kernel,
    tile_sub,
)
from qframe_plugins.kernels.numba_cpu.threads import share

_STEP = 2 * BLOCK  # rows of V that are computed together
_DEPTH = 64  # rows of V whose part of a panel stays in L1

__all__ = ["Feedback", "NotPositiveDefiniteError", "feedback"]

Float64 = npt.NDArray[np.float64]


class NotPositiveDefiniteError(ValueError):
    """The matrix has no Cholesky factorization: column `pivot` met a pivot that is not > 0."""

    def __init__(self, pivot: int) -> None:
        super().__init__(f"the pivot of column {pivot} is not positive and finite; damp more")
        self.pivot = pivot


def feedback(
    hessian: Float64,
    precision: Literal["float32", "float64"] = "float64",
    *,
    damp: float = 0.0,
    order: npt.NDArray[np.integer[Any]] | None = None,
) -> Feedback:
    """Return the feedback of hessian + damp * identity, with columns taken in `order`.

    hessian     [columns, columns] float64, symmetric; without `order` only its lower triangle is
                read
    precision   of the factorization; float64 leaves the rounding of F as the only error that
                matters, float32 takes half the time
    order       [columns], a permutation: column order[i] is processed as the i-th, which
                `NotPositiveDefiniteError.pivot` and the result refer to; None: as stored

    Raises NotPositiveDefiniteError when a pivot is not positive and finite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] == 0:
        raise ValueError(f"hessian has shape {hessian.shape}; give a square matrix")
    if hessian.dtype != np.float64:
        raise ValueError(f"hessian is {hessian.dtype}; give float64")
    if precision not in ("float32", "float64"):
        raise ValueError(f"precision={precision!r}; use 'float32' or 'float64'")
    columns = hessian.shape[0]
    places = np.arange(columns) if order is None else np.array(order, np.int64)
    if not np.array_equal(np.sort(places), np.arange(columns)):
        raise ValueError(f"order is not a permutation of {columns} columns")
    rows = -(-columns // QUAD) * QUAD
    lanes = STRIPE_BYTES // np.dtype(precision).itemsize
    panels, blocks = -(-rows // lanes), -(-rows // BLOCK)
    factor = scratch((_place(panels * lanes, panels, rows, lanes), lanes), precision)
    packed = np.empty((feedback_row(blocks * BLOCK, 0), QUAD), np.float32)
    pivots = np.empty(rows, np.float64)
    hessian = np.require(hessian, requirements=("C", "W"))
    damp = float(damp)
    for top in range((rows - 1) // _STEP * _STEP, -1, -_STEP):
        bottom = min(top + _STEP, rows)
        panels = -(-bottom // lanes)  # that reach this far down
        share(_share_known, panels, hessian, damp, places, factor, top, bottom, rows)
        failed = _factorize_diagonal(factor, pivots, top, bottom, rows)
        if failed >= 0:
            raise NotPositiveDefiniteError(failed)
        share(_share_solve, panels, factor, packed, top, bottom, rows)
    return Feedback(columns, packed, pivots[:columns])


@kernel
def _place(row: int, panel: int, rows: int, lanes: int) -> int:
    """Return the stripe of `factor` that holds V[row, panel].

    V is stored in panels of `lanes` columns, each with the rows from its diagonal down.
    """
    return panel * rows - lanes * (panel * (panel - 1) // 2) + row - panel * lanes


@kernel
def _subtract_known(hessian, damp, order, factor, panel, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Set V[i, panel] = H_ij - sum_{k>=bottom} V_ki V_kj for the rows top <= i < bottom."""
    columns, lanes = hessian.shape[0], factor.shape[1]
    first = panel * lanes
    top = max(top, first)
    for i in range(top, bottom):
        place = _place(i, panel, rows, lanes)
        width = min(lanes, i + 1 - first) if i < columns else 0
        for lane in range(width):
            factor[place, lane] = hessian[order[i], order[first + lane]]
        for lane in range(width, lanes):
            factor[place, lane] = 0
        if i < first + lanes:  # the diagonal; padding has rows of the identity
            factor[place, i - first] = hessian[order[i], order[i]] + damp if i < columns else 1
    for k in range(bottom, rows, _DEPTH):
        depth = min(_DEPTH, rows - k)
        stripe = _place(k, panel, rows, lanes)
        for i in range(top, bottom, QUAD):
            left = _place(k, i // lanes, rows, lanes)
            place = _place(i, panel, rows, lanes)
            tile_sub(factor, place, factor, left, i % lanes, factor, stripe, depth)


@kernel
def _eliminate(factor, panel, i, bottom, rows):  # type: ignore[no-untyped-def]
    """Subtract from V[i..i + QUAD, panel] what the rows below them in the block contribute."""
    lanes = factor.shape[1]
    below = i + QUAD
    if below < bottom:
        left = _place(below, i // lanes, rows, lanes)
        place = _place(i, panel, rows, lanes)
        tile_sub(factor, place, factor, left, i % lanes, factor, place + QUAD, bottom - below)


@kernel
def _finish_row(factor, panel, i, rows):  # type: ignore[no-untyped-def]
    """Divide V[i, panel] by V_ii and subtract it from the rows above it in its quad."""
    lanes = factor.shape[1]
    place, diagonal = _place(i, panel, rows, lanes), _place(i, i // lanes, rows, lanes)
    pivot = factor[diagonal, i % lanes]
    for lane in range(lanes):
        factor[place, lane] /= pivot
    for up in range(1, i % QUAD + 1):
        weight = factor[diagonal, i % lanes - up]
        for lane in range(lanes):
            factor[place - up, lane] -= weight * factor[place, lane]


@kernel
def _factorize_diagonal(factor, pivots, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Factorize the block of rows and columns top..bottom; return a bad pivot, or -1."""
    lanes = factor.shape[1]
    for i in range(bottom - QUAD, top - 1, -QUAD):
        last = i // lanes
        for panel in range(top // lanes, last + 1):
            _eliminate(factor, panel, i, bottom, rows)
        for row in range(i + QUAD - 1, i - 1, -1):
            diagonal = _place(row, last, rows, lanes)
            pivot = factor[diagonal, row % lanes]
            pivots[row] = pivot
            if not (pivot > 0 and pivot < np.inf):
                return row
            # The diagonal panel first: it holds the weights for the others. It divides V_ii by
            # itself, so the root is written again.
            root = np.sqrt(pivot)
            factor[diagonal, row % lanes] = root
            _finish_row(factor, last, row, rows)
            factor[diagonal, row % lanes] = root
            for panel in range(top // lanes, last):
                _finish_row(factor, panel, row, rows)
    return -1


@kernel
def _pack(factor, packed, panel, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Write F_ij = V_ij / V_ii of the rows top..bottom and the panel's columns j, 0 for j >= i."""
    lanes = factor.shape[1]
    for i in range(top, bottom, QUAD):
        for m in range(QUAD):
            row = i + m
            pivot = factor[_place(row, row // lanes, rows, lanes), row % lanes]
            # A row of F is stored up to the end of the block that its diagonal is in.
            end = min((panel + 1) * lanes, (i // BLOCK + 1) * BLOCK)
            for start in range(panel * lanes, end, 32):
                width = min(32, max(0, row - start))
                to = feedback_row(i, start)
                if width:
                    place, lane = _place(row, panel, rows, lanes), start - panel * lanes
                    for j in range(width):
                        packed[to + j, m] = factor[place, lane + j] / pivot
                for j in range(width, 32):
                    packed[to + j, m] = 0


@kernel
def _share_known(counter, hessian, damp, order, factor, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Claim panels, and subtract from their rows top..bottom what the rows below contribute."""
    lanes = factor.shape[1]
    panel = claim(counter)
    while panel * lanes < bottom:
        _subtract_known(hessian, damp, order, factor, panel, top, bottom, rows)
        panel = claim(counter)


@kernel
def _share_solve(counter, factor, packed, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Claim panels, and finish and pack their rows top..bottom."""
    lanes = factor.shape[1]
    panel = claim(counter)
    while panel * lanes < top + _STEP:
        if panel * lanes < top:
            for i in range(bottom - QUAD, top - 1, -QUAD):
                _eliminate(factor, panel, i, bottom, rows)
                for row in range(i + QUAD - 1, i - 1, -1):
                    _finish_row(factor, panel, row, rows)
        _pack(factor, packed, panel, top, bottom, rows)
        panel = claim(counter)
