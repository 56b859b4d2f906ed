"""LLM.int8(): products of codes, but for the columns of outliers: `linear_int8_outliers`.

Source: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339, section 3.2 and equation (8).
Method: one pass over the tokens finds the columns; a second makes codes and takes those columns for
        zeros. The few columns are multiplied panel by panel while the sums of codes lie there.
Error:  docs/bounds.md, B5.b: the products of outliers are summed in float32, column by column, and
        added last. The bits do not depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qframe_plugins.kernels.numba_cpu.dot_tile import PANEL
from qframe_plugins.kernels.numba_cpu.int8_products import Float32, Int8
from qframe_plugins.kernels.numba_cpu.int8_products import multiply as multiply_codes
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels, pack_channels
from qframe_plugins.kernels.numba_cpu.scratch import aligned
from qframe_plugins.kernels.numba_cpu.simd import QUAD, claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share
from qframe_plugins.kernels.numba_cpu.tokens import quantize, quantize_kept

_WIDTH = 1024  # columns of a task
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)


@dataclass(frozen=True, eq=False)
class Int8AndColumns:
    """A weight of eight bits, and as it is.

    panels    the codes
    columns   [columns, panels * PANEL] float32, the weight transposed, 0 beyond it
    """

    panels: PackedPanels
    columns: Float32


def lay_out_both(codes: Int8, scale: Float32, weight: Float32) -> Int8AndColumns:
    """Return a weight as the kernel reads it.

    codes    [rows, columns] int8
    scale    [rows] float32
    weight   [rows, columns] float32
    """
    panels = pack_channels(codes, scale)
    columns = aligned((weight.shape[1], len(panels.scale) * PANEL), np.float32)
    columns[:, : len(weight)] = weight.T
    return Int8AndColumns(panels, columns)


def multiply(x: Float32, threshold: float, weight: Int8AndColumns) -> Float32:
    """Return x W^T, [tokens, rows] float32, the columns with any |x| >= threshold as they are.

    x           [tokens, columns] float32
    threshold   a float32 number; 0: no column is an outlier
    """
    x = np.ascontiguousarray(x)
    if threshold <= 0 or not x.size:
        return multiply_codes(*quantize(x), weight.panels)
    keep = np.empty(x.shape[1], np.int32)
    tasks = -(-x.shape[1] // _WIDTH)
    least = np.float32(threshold).view(np.int32)
    share(_share_columns, tasks, x.view(np.int32), least, keep)
    outliers = np.flatnonzero(keep == 0)
    if not len(outliers):
        return multiply_codes(*quantize(x), weight.panels)
    others = np.zeros((len(outliers), -(-len(x) // QUAD) * QUAD), np.float32)
    others[:, : len(x)] = x[:, outliers].T
    codes, scale = quantize_kept(x, keep)
    return multiply_codes(codes, scale, weight.panels, others, weight.columns[outliers])


@kernel
def _share_columns(counter, bits, least, keep):  # type: ignore[no-untyped-def]
    """Claim columns; keep is 0 where a number is at least `least` in magnitude, else -1.

    bits    [tokens, columns] int32, of float32 numbers
    least   the bits of a positive number; bits of magnitudes are in the order of the numbers
    """
    tokens, columns = bits.shape
    first = claim(counter) * _WIDTH
    while first < columns:
        last = min(first + _WIDTH, columns)
        for column in range(first, last):
            keep[column] = -1
        for token in range(tokens):
            for column in range(first, last):
                size = bits[token, column] & _MAGNITUDE
                # A NaN is above infinity, and no outlier.
                large = np.int32(size >= least) & np.int32(size <= _INFINITY)
                keep[column] &= np.int32(large - np.int32(1))
        first = claim(counter) * _WIDTH
