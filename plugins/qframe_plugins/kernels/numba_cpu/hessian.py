"""Second moments of activations, X^T X, at about the speed of a matrix product half the size.

The sum behind the Hessian of GPTQ, H = (2/n) X^T X (arXiv:2210.17323, eq. (1)).

Method: tokens are laid out in panels of 64 columns; a task takes the blocks of 64 rows of H, left
of the diagonal, with the register tile of simd.py. Activations that are bfloat16 numbers, as a
pass in bfloat16 makes many of them, are laid out as pairs of tokens: their products are exact,
and many processors take two at a time.
Error:  runs of at most RUN tokens are summed in float32, the runs in float64, in a fixed order:
        |error_ij| <= gamma_RUN sum_t |x_ti x_tj| with the unit roundoff of float32, plus float64
        roundoff. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.scratch import scratch
from qframe_plugins.kernels.numba_cpu.simd import LANES, QUAD, claim, kernel, tile_add
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

RUN = 256  # tokens that are summed in float32
_CHUNK = 2048  # tokens between two updates of H: two panels of them stay in L2
_DEPTH = 64  # stripes of a panel that stay in L1

_LOW = np.int32(0xFFFF)  # the bits of a float32 that a bfloat16 has not
_SMALLEST = (127 - 55) << 23  # 2^-55: sums of products of larger bfloat16 numbers do not underflow
_NOT_FINITE = 0x7F800000

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
        bits = tokens.view(np.int32)
        products = len(tokens) * hessian.size // 2
        copies = worth_sharing(panels, tokens.nbytes, 0)
        tasks = worth_sharing(panels, hessian.nbytes // 2, products)
        if not (bits[0] & _LOW).any():  # it pays to look at one token before copying all
            pairs = scratch((panels * -(-len(tokens) // 2), LANES), np.int32)
            alien = np.zeros(1, np.int64)
            share(_share_pairs, copies, bits, pairs, alien)
            if not alien[0]:
                share(_share_blocks, tasks, pairs, np.int64(RUN // 2), hessian)
                continue
        stripes = scratch((panels * len(tokens), LANES), np.float32)
        share(_share_layout, copies, tokens, stripes)
        share(_share_blocks, tasks, stripes, np.int64(RUN), hessian)


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
            stripe, row = stripes[panel * tokens + token], x[token]
            if width == LANES:  # a count that the compiler knows: whole registers
                for lane in range(LANES):
                    stripe[lane] = row[first + lane]
            else:
                for lane in range(width):
                    stripe[lane] = row[first + lane]
                for lane in range(width, LANES):
                    stripe[lane] = 0
        panel = claim(counter)


@kernel
def _alien(bits):  # type: ignore[no-untyped-def]
    """Return 0 for the bit pattern of a bfloat16 that is 0 or of ordinary size, else another."""
    size = np.int32(bits & np.int32(0x7FFFFFFF))
    small = np.int32((size != 0) & (size < np.int32(_SMALLEST)))
    return np.int32(np.int32(bits & _LOW) | small | np.int32(size >= np.int32(_NOT_FINITE)))


@kernel
def _share_pairs(counter, bits, pairs, alien):  # type: ignore[no-untyped-def]
    """Claim panels, and copy their columns as pairs of tokens; the first is in the low bits.

    bits    [tokens, columns] int32, the bit patterns of x
    alien   [1], set to 1 when a number is no bfloat16, not finite, or so small that the sums
            could underflow, which processors that multiply bfloat16 flush to zero
    """
    tokens, columns = bits.shape
    count = (tokens + 1) // 2
    panel = claim(counter)
    while panel * LANES < columns:
        first = panel * LANES
        width = min(LANES, columns - first)
        wrong = np.int32(0)
        for pair in range(count):
            stripe, row = pairs[panel * count + pair], bits[2 * pair]
            last = bits[min(2 * pair + 1, tokens - 1)]
            mask = np.int32(-1 if 2 * pair + 1 < tokens else 0)  # an odd last token has no partner
            for lane in range(width):
                low, high = np.int32(row[first + lane]), np.int32(last[first + lane] & mask)
                wrong |= _alien(low) | _alien(high)
                stripe[lane] = np.int32(high | ((low >> np.int32(16)) & _LOW))
            for lane in range(width, LANES):
                stripe[lane] = 0
        if wrong != 0:
            alien[0] = 1
        panel = claim(counter)


@kernel
def _share_blocks(counter, stripes, length, hessian):  # type: ignore[no-untyped-def]
    """Claim rows of blocks of H, the longest first, and add the sum over the tokens.

    stripes   [panels * count, LANES]: tokens, float32, or pairs of tokens, int32
    length    stripes of a panel that make a run of RUN tokens
    """
    columns = hessian.shape[0]
    panels = (columns + LANES - 1) // LANES
    count = len(stripes) // panels
    run = np.empty((LANES, LANES), np.float32)
    total = np.empty((LANES, LANES), np.float64)
    down = panels - 1 - claim(counter)
    while down >= 0:
        for right in range(down + 1):
            for i in range(LANES):
                for lane in range(LANES):
                    total[i, lane] = 0
            for start in range(0, count, length):
                end = min(start + length, count)
                for i in range(LANES):
                    for lane in range(LANES):
                        run[i, lane] = 0
                for k in range(start, end, _DEPTH):
                    depth = min(_DEPTH, end - k)
                    left, above = down * count + k, right * count + k
                    for i in range(0, LANES, QUAD):
                        tile_add(run, i, stripes, left, i, stripes, above, depth)
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
