"""Randomized Hadamard transforms of blocks of columns: `hadamard`.

Source: QuaRot (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456); the fast Walsh-Hadamard transform.
Method: butterflies in place, block by block. Sixteen tokens are transformed at once, lane by lane,
        so that every butterfly is one of whole registers, whatever its distance.
Error:  docs/bounds.md, B8.a: log2(block) sums, each rounded once, and one product.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

_LANES = 16  # tokens at once

Float32 = npt.NDArray[np.float32]


def hadamard(x: Float32, signs: Float32, block: int) -> Float32:
    """Return x diag(signs) H / sqrt(block), block by block, [tokens, columns] float32.

    x       [tokens, columns] float32
    signs   [columns] float32, +1 or -1
    block   a power of two that divides the columns
    """
    y = np.empty(x.shape, np.float32)
    factor = np.float32(1 / math.sqrt(block))
    operands = np.ascontiguousarray(x), np.ascontiguousarray(signs), np.int64(block), factor
    tasks = worth_sharing(-(-len(x) // _LANES), x.nbytes + y.nbytes, 0)
    share(_share_tokens, tasks, *operands, y)
    return y


@kernel
def _share_tokens(counter, x, signs, block, factor, y):  # type: ignore[no-untyped-def]
    """Claim tokens, sixteen at a time."""
    tokens, columns = x.shape
    lanes = np.zeros((block, _LANES), np.float32)
    first = claim(counter) * _LANES
    while first < tokens:
        count = min(_LANES, tokens - first)
        for start in range(0, columns, block):
            for m in range(count):
                for k in range(block):
                    lanes[k, m] = x[first + m, start + k] * signs[start + k]
            distance = 1
            while distance < block:
                for left in range(0, block, 2 * distance):
                    for k in range(left, left + distance):
                        for m in range(_LANES):
                            one, other = lanes[k, m], lanes[k + distance, m]
                            lanes[k, m] = one + other
                            lanes[k + distance, m] = one - other
                distance *= 2
            for m in range(count):
                for k in range(block):
                    y[first + m, start + k] = lanes[k, m] * factor
        first = claim(counter) * _LANES
