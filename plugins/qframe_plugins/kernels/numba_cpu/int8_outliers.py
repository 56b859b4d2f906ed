"""LLM.int8(): products of codes, but for the columns of outliers: `linear_int8_outliers`.

Source: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339, section 3.2 and equation (8).
Method: one pass over the tokens finds the columns; a second makes codes and takes those columns for
        zeros. The few columns are multiplied panel by panel, while its codes and their sums are in
        the cache.
Error:  docs/bounds.md, B5.b: the products of outliers are summed in float32, column by column, and
        added last. The bits do not depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import PANEL
from qframe_plugins.kernels.numba_cpu.few_codes import few
from qframe_plugins.kernels.numba_cpu.int8_products import Float32, Int8, quantize_few, share_few
from qframe_plugins.kernels.numba_cpu.int8_products import multiply as multiply_codes
from qframe_plugins.kernels.numba_cpu.packed import PackedPanels, pack_channels
from qframe_plugins.kernels.numba_cpu.scratch import aligned
from qframe_plugins.kernels.numba_cpu.simd import QUAD, claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.tokens import quantize, quantize_kept
from qframe_plugins.kernels.numba_cpu.vectors import INT32, INT64, Vectors

_WIDTH = 1024  # columns of a task
_LANES = 16
_BYTE = 8
_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
_INFINITY = 0x7F800000
_HUGE = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Int8AndColumns:
    """A weight of eight bits, and as it is.

    panels    the codes
    columns   [columns, panels * PANEL] float32, the weight transposed, 0 beyond it; None where the
              weight is what the codes stand for
    """

    panels: PackedPanels
    columns: Float32 | None


def lay_out_both(codes: Int8, scale: Float32, weight: Float32) -> Int8AndColumns:
    """Return a weight as the kernel reads it.

    codes    [rows, columns] int8
    scale    [rows] float32
    weight   [rows, columns] float32
    """
    panels = pack_channels(codes, scale)
    if panels.bits == _BYTE and np.array_equal(codes * scale[:, None], weight):
        return Int8AndColumns(panels, None)
    columns = aligned((weight.shape[1], len(panels.scale) * PANEL), np.float32)
    columns[:, : len(weight)] = weight.T
    return Int8AndColumns(panels, columns)


def multiply(x: Float32, threshold: float, weight: Int8AndColumns) -> Float32:
    """Return x W^T, [tokens, rows] float32, the columns with any |x| >= threshold as they are.

    x           [tokens, columns] float32
    threshold   a float32 number; 0: no column is an outlier
    """
    x = np.ascontiguousarray(x)
    if threshold <= 0 or not x.size or not weight.panels.rows:
        return multiply_codes(*quantize(x), weight.panels)
    panels, least = weight.panels, np.float32(threshold).view(np.int32)
    if len(x) <= few(panels.bits):
        y = np.empty((len(x), panels.rows), np.float32)
        tasks = worth_sharing(len(panels.scale), panels.nbytes, y.size * panels.columns)
        operands = *panels.filled, panels.scale, panels.points, weight.columns
        quads = panels.groups * panels.quads
        share(_share_few_outliers, tasks, x, least, panels.spread, quads, *operands, y)
        return y
    keep = np.empty(x.shape[1], np.int32)
    tasks = worth_sharing(-(-x.shape[1] // _WIDTH), x.nbytes, 0)
    share(_share_columns, tasks, x.view(np.int32), least, keep)
    codes, scale = quantize_kept(x, keep)
    return multiply_codes(codes, scale, panels, (*_taken(x, keep), weight.columns))


@kernel
def _share_few_outliers(  # type: ignore[no-untyped-def]
    counter, x, least, spread, quads, planes, widths, scale, zero, columns, y
):
    """Claim panels, and compute their columns of y; every thread finds outliers and makes codes."""
    keep = np.empty(x.shape[1], np.int32)
    _share_columns(np.zeros(1, np.int64), x.view(np.int32), least, keep)
    others, outliers = _taken(x, keep)
    codes, x_scale = quantize_few(x, keep, spread, quads)
    kept = others, outliers, columns
    share_few(counter, codes, x_scale, planes, widths, scale, zero, *kept, y)


@kernel
def _taken(x, keep):  # type: ignore[no-untyped-def]
    """Return the columns of x that are kept as they are, as `Kept` has them, and their numbers.

    None of them, too: that is the same compiled code.
    """
    count = 0
    for column in range(len(keep)):
        count += keep[column] == 0
    outliers = np.empty(count, np.int64)
    others = np.zeros((count, -(-len(x) // QUAD) * QUAD), np.float32)
    count = 0
    for column in range(len(keep)):
        if keep[column] == 0:
            outliers[count] = column
            for token in range(len(x)):
                others[count, token] = x[token, column]
            count += 1
    return others, outliers


@intrinsic
def _lower(
    typing: Any, bits: Any, token: Any, first: Any, passes: Any, least: Any, over: Any
) -> Any:
    """Lower over[i] to (|bits[token, first + i]| - least) mod 2^32, for i < _LANES passes."""
    index = types.int64
    signature = types.void(bits, index, index, index, types.int32, over)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, width) = v.array(signature.args[0], values[0])
        over_at, _ = v.array(signature.args[5], values[5])
        place = builder.add(builder.mul(values[1], width), values[2])
        at = v.at(at, builder.mul(place, INT64(4)))
        vector = ir.VectorType(INT32, _LANES)
        least = v.splat(values[4], _LANES)
        with v.loop(values[3]) as loop:
            here = builder.mul(loop.index, INT64(4 * _LANES))
            size = builder.and_(v.load(v.at(at, here), vector), v.const(vector, _MAGNITUDE))
            rest, spot = builder.sub(size, least), v.at(over_at, here)
            before = v.load(spot, vector)
            less = builder.icmp_unsigned("<", rest, before)
            v.store(builder.select(less, rest, before), spot)
        return context.get_dummy_value()

    return signature, emit


@kernel
def _share_columns(counter, bits, least, keep):  # type: ignore[no-untyped-def]
    """Claim columns; keep is 0 where a number is at least `least` in magnitude, else -1.

    bits    [tokens, columns] int32, of float32 numbers
    least   the bits of a positive number; bits of magnitudes are in the order of the numbers

    Without signs, bits less `least` are the smaller the less a number is above it, and huge for one
    that is below. So the least of a column says whether it has an outlier. A NaN is above infinity,
    and no outlier.
    """
    tokens, columns = bits.shape
    over = np.empty(_WIDTH, np.uint32)
    most = np.uint32(_INFINITY - least)
    first = claim(counter) * _WIDTH
    while first < columns:
        count = min(_WIDTH, columns - first)
        passes = count // _LANES
        over[:] = np.uint32(_HUGE)
        for token in range(tokens):
            _lower(bits, token, first, passes, least, over)
            for column in range(passes * _LANES, count):
                rest = np.uint32((bits[token, first + column] & _MAGNITUDE) - least)
                over[column] = min(over[column], rest)
        for column in range(count):
            keep[first + column] = np.int32(0) if over[column] <= most else np.int32(-1)
        first = claim(counter) * _WIDTH
