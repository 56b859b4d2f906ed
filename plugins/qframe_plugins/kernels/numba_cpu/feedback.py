"""The feedback matrix F of GPTQ, in the order in which the solver reads it.

F is strictly lower triangular: F_ij = U_ji / U_ii with the damped Hessian H = U U^T (cholesky.py).
It is stored in blocks of BLOCK rows x DEPTH columns, a row of blocks after the other, each up to
the block of its diagonal. In a block: for each QUAD of rows, for each column, the QUAD values. So
a tile reads contiguous memory, and a task reads all of it once, from front to back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.simd import QUAD, kernel

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BLOCK = 128  # rows of F that are stored together
DEPTH = 64  # columns of F that are stored together: what a tile reads in one go
_BLOCK_ROWS = BLOCK // QUAD * DEPTH  # rows of `Feedback.packed` in one stored block


@dataclass(frozen=True, slots=True)
class Feedback:
    """The feedback F of `columns` columns as the solver reads it, and the variances.

    packed      [any, QUAD] float32, F in the order said above
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


@kernel
def feedback_row(row: int, column: int) -> int:
    """Return where `Feedback.packed` holds F[row..row + QUAD, column], row a multiple of QUAD."""
    block = row // BLOCK
    before = block * (block + 1) // 2 * (BLOCK // DEPTH) + column // DEPTH
    return before * _BLOCK_ROWS + row % BLOCK // QUAD * DEPTH + column % DEPTH
