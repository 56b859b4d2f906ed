"""Second moments of activations, X^T X, at about the speed of a matrix product half the size.

The sum behind the Hessian of GPTQ, H = (2/n) X^T X (arXiv:2210.17323, eq. (1)).

Method: tokens are laid out in panels of 64 columns; a task takes the blocks of 64 rows of H, left
of the diagonal, with the register tile of simd.py.
Error:  runs of at most RUN tokens are summed in float32, the runs in float64, in a fixed order:
        |error_ij| <= gamma_RUN sum_t |x_ti x_tj| with the unit roundoff of float32, plus float64
        roundoff. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.simd import LANES, QUAD, claim, kernel, tile_add
from qframe_plugins.kernels.numba_cpu.threads import share

RUN = 256  # tokens that are summed in float32
_CHUNK = 2048  # tokens between two updates of H: two panels of them stay in L2
_DEPTH = 32  # tokens whose panel stays in L1

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def accumulate(hessian: Float64, x: Float32) -> None:
    """Add x^T x to the lower triangle of `hessian`; the upper one is left as it is.

    hessian   [columns, columns] float64, C-contiguous, changed in place
    x         [tokens, columns] float32
    """
    _check_square(hessian)
    if x.ndim != 2 or x.shape[1] != hessian.shape[0] or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; give float32 [tokens, {hessian.shape[0]}]")
    panels = -(-hessian.shape[0] // LANES)
    for start in range(0, len(x), _CHUNK):
        tokens = np.require(x[start : start + _CHUNK], requirements=("C", "W"))
        stripes = np.empty((panels * len(tokens), LANES), np.float32)
        share(_share_layout, panels, tokens, stripes)
        share(_share_blocks, panels, stripes, len(tokens), hessian)


def symmetrize(hessian: Float64) -> None:
    """Copy the lower triangle of `hessian` [columns, columns] float64 to the upper one."""
    _check_square(hessian)
    share(_share_mirror, -(-hessian.shape[0] // LANES), hessian)


def _check_square(hessian: Float64) -> None:
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != np.float64:
        raise ValueError(f"hessian is {hessian.dtype} {hessian.shape}; give a square float64 one")
    if not (hessian.flags.c_contiguous and hessian.flags.writeable):
        raise ValueError("hessian is changed in place: give a writeable C-contiguous array")


@kernel
def _share_layout(counter, x, stripes):  # type: ignore[no-untyped-def]
    """Claim panels, and copy their columns of x to stripes[panel * tokens + token], 0-padded."""
    tokens, columns = x.shape
    panel = claim(counter)
    while panel * LANES < columns:
        first = panel * LANES
        width = min(LANES, columns - first)
        for token in range(tokens):
            for lane in range(width):
                stripes[panel * tokens + token, lane] = x[token, first + lane]
            for lane in range(width, LANES):
                stripes[panel * tokens + token, lane] = 0
        panel = claim(counter)


@kernel
def _share_blocks(counter, stripes, tokens, hessian):  # type: ignore[no-untyped-def]
    """Claim rows of blocks of H, the longest first, and add the sum over the tokens."""
    columns = hessian.shape[0]
    panels = (columns + LANES - 1) // LANES
    run = np.empty((LANES, LANES), np.float32)
    total = np.empty((LANES, LANES), np.float64)
    down = panels - 1 - claim(counter)
    while down >= 0:
        for right in range(down + 1):
            for i in range(LANES):
                for lane in range(LANES):
                    total[i, lane] = 0
            for start in range(0, tokens, RUN):
                end = min(start + RUN, tokens)
                for i in range(LANES):
                    for lane in range(LANES):
                        run[i, lane] = 0
                left, above = down * tokens + start, right * tokens + start
                for i in range(0, LANES, QUAD):
                    tile_add(run, i, stripes, left, i, stripes, above, end - start)
                for i in range(LANES):
                    for lane in range(LANES):
                        total[i, lane] += np.float64(run[i, lane])
            first = right * LANES
            for i in range(down * LANES, min((down + 1) * LANES, columns)):
                for column in range(first, min(first + LANES, i + 1)):
                    hessian[i, column] += total[i - down * LANES, column - first]
        down = panels - 1 - claim(counter)


@kernel
def _share_mirror(counter, hessian):  # type: ignore[no-untyped-def]
    """Claim blocks of rows of the upper triangle, and fill them square by square."""
    columns = hessian.shape[0]
    top = claim(counter) * LANES
    while top < columns:
        bottom = min(top + LANES, columns)
        for left in range(top, columns, 8):  # 8 float64 are a cache line
            for i in range(top, bottom):
                for column in range(max(left, i + 1), min(left + 8, columns)):
                    hessian[i, column] = hessian[column, i]
        top = claim(counter) * LANES
