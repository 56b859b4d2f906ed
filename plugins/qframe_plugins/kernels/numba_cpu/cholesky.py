"""The feedback matrix of GPTQ: one Cholesky factorization, from the last column to the first.

With H = U U^T, U upper triangular, the target of column i in GPTQ is

    t_i = w_i + sum_{j<i} (w_j - q_j) F_ij,      F_ij = U_ji / U_ii.

GPTQ itself takes two factorizations and an inverse (arXiv:2210.17323, algorithm 1) to arrive at
the same numbers: with R upper triangular, R^T R = H^-1, one has F_ij = -(R^-1)_ji R_ii. It is the
feedback of LDLQ (QuIP, arXiv:2307.13304, section 3), and D_j = U_jj^2, the variance of input j
given all later ones, weighs the squared error of column j: loss = sum_j D_j (q_j - t_j)^2.

Method: V = U^T is lower triangular with H = V^T V; its rows follow from the last to the first,
in blocks, each from the rows below it, with the register tile of simd.py:

    V_ij = (H_ij - sum_{k>i} V_ki V_kj) / V_ii,  j <= i.

Error:  |H - V^T V| <= gamma_{n+1} |V|^T |V| elementwise (Higham, Accuracy and Stability of
        Numerical Algorithms, theorem 10.3), with the unit roundoff of `precision`; rounding F to
        float32 adds half an ulp to each element. Results do not depend on the thread count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.simd import (
    QUAD,
    STRIPE_BYTES,
    claim,
    kernel,
    tile_sub,
)
from qframe_plugins.kernels.numba_cpu.threads import share

BLOCK = 128  # rows of F that are stored together
DEPTH = 64  # columns of F that are stored together: what a tile reads in one go
_BLOCK_ROWS = BLOCK // QUAD * DEPTH  # rows of `Feedback.packed` in one stored block
_STEP = 2 * BLOCK  # rows of V that are computed together

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class NotPositiveDefiniteError(ValueError):
    """The matrix has no Cholesky factorization: column `pivot` met a pivot that is not > 0."""

    def __init__(self, pivot: int) -> None:
        super().__init__(f"the pivot of column {pivot} is not positive and finite; damp more")
        self.pivot = pivot


@dataclass(frozen=True, slots=True)
class Feedback:
    """The feedback F of `columns` columns as the solver reads it, and the variances.

    packed      [any, QUAD] float32: blocks of BLOCK rows x DEPTH columns of F, block rows one
                after the other up to the diagonal; in a block, for each QUAD of rows, for each
                column, the QUAD values (see `feedback_row`)
    variances   [columns] float64: D_j = U_jj^2
    """

    columns: int
    packed: Float32
    variances: Float64

    def dense(self) -> Float32:
        """Return F, [columns, columns], strictly lower triangular."""
        blocks = -(-self.columns // BLOCK)
        dense = np.zeros((blocks * BLOCK, blocks * BLOCK), np.float32)
        start = 0
        for row in range(0, blocks * BLOCK, BLOCK):
            for column in range(0, row + BLOCK, DEPTH):
                block = self.packed[start : start + _BLOCK_ROWS]
                block = block.reshape(BLOCK // QUAD, DEPTH, QUAD).transpose(0, 2, 1)
                dense[row : row + BLOCK, column : column + DEPTH] = block.reshape(BLOCK, DEPTH)
                start += _BLOCK_ROWS
        return np.tril(dense[: self.columns, : self.columns], -1)


def feedback(
    hessian: Float64, precision: Literal["float32", "float64"] = "float64"
) -> Feedback:
    """Return the feedback of a damped Hessian, columns in processing order.

    hessian     [columns, columns] float64; only the lower triangle is read
    precision   of the factorization; float64 leaves the rounding of F as the only error that
                matters, float32 takes half the time

    Raises NotPositiveDefiniteError when a pivot is not positive and finite.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] == 0:
        raise ValueError(f"hessian has shape {hessian.shape}; give a square matrix")
    if hessian.dtype != np.float64:
        raise ValueError(f"hessian is {hessian.dtype}; give float64")
    if precision not in ("float32", "float64"):
        raise ValueError(f"precision={precision!r}; use 'float32' or 'float64'")
    columns = hessian.shape[0]
    rows = -(-columns // QUAD) * QUAD
    lanes = STRIPE_BYTES // np.dtype(precision).itemsize
    factor = np.empty((_panel_start(-(-rows // lanes), rows, lanes), lanes), precision)
    blocks = -(-rows // BLOCK)
    # Block row i holds (i + 1) BLOCK / DEPTH blocks.
    packed = np.empty((blocks * (blocks + 1) // 2 * (BLOCK // DEPTH) * _BLOCK_ROWS, QUAD), "f4")
    pivots = np.empty(rows, np.float64)
    hessian = np.require(hessian, requirements="CW")
    for top in range((rows - 1) // _STEP * _STEP, -1, -_STEP):
        bottom = min(top + _STEP, rows)
        panels = -(-bottom // lanes)
        share(_share_known, panels, hessian, factor, top, bottom, rows)
        failed = _factorize_diagonal(factor, pivots, top, bottom, rows)
        if failed >= 0:
            raise NotPositiveDefiniteError(failed)
        share(_share_solve, panels, factor, packed, top, bottom, rows)
    return Feedback(columns, packed, pivots[:columns])


@kernel
def feedback_row(row: int, column: int) -> int:
    """Return where `Feedback.packed` holds F[row..row + QUAD, column], row a multiple of QUAD."""
    block = row // BLOCK
    before = block * (block + 1) // 2 * (BLOCK // DEPTH) + column // DEPTH
    return before * _BLOCK_ROWS + row % BLOCK // QUAD * DEPTH + column % DEPTH


# V is stored in panels of `lanes` columns, each with the rows from its diagonal down.


def _panel_start(panel: int, rows: int, lanes: int) -> int:
    """Return the stripes of all panels before `panel`."""
    return panel * rows - lanes * (panel * (panel - 1) // 2)


@kernel
def _place(row: int, panel: int, rows: int, lanes: int) -> int:
    """Return the stripe of V[row, panel]."""
    return panel * rows - lanes * (panel * (panel - 1) // 2) + row - panel * lanes


@kernel
def _subtract_known(hessian, factor, panel, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Set V[i, panel] = H_ij - sum_{k>=bottom} V_ki V_kj for the rows top <= i < bottom."""
    columns, lanes = hessian.shape[0], factor.shape[1]
    first = panel * lanes
    top = max(top, first)
    for i in range(top, bottom):
        place = _place(i, panel, rows, lanes)
        width = min(lanes, i + 1 - first) if i < columns else 0
        for lane in range(width):
            factor[place, lane] = hessian[i, first + lane]
        for lane in range(width, lanes):
            factor[place, lane] = 0
        if i >= columns and i < first + lanes:
            factor[place, i - first] = 1  # padding: rows of the identity
    for k in range(bottom, rows, DEPTH):
        depth = min(DEPTH, rows - k)
        stripe = _place(k, panel, rows, lanes)
        for i in range(top, bottom, QUAD):
            left = _place(k, i // lanes, rows, lanes)
            tile_sub(
                factor, _place(i, panel, rows, lanes), factor, left, i % lanes, factor, stripe, depth
            )


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
def _share_known(counter, hessian, factor, top, bottom, rows):  # type: ignore[no-untyped-def]
    """Claim panels, and subtract from their rows top..bottom what the rows below contribute."""
    lanes = factor.shape[1]
    panel = claim(counter)
    while panel * lanes < bottom:
        _subtract_known(hessian, factor, panel, top, bottom, rows)
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
