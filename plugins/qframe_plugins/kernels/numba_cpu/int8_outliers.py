"""LLM.int8(): products of codes, but for the columns of outliers: `linear_int8_outliers`.

Source: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339, section 3.2 and equation (8).
Method: one pass over the tokens finds the columns; a second makes codes and takes those columns for
        zeros. The few columns are multiplied panel by panel while the sums of codes lie there.
Error:  docs/bounds.md, B5.b: the products of outliers are summed in float32, column by column, and
        added last. The bits do not depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.dot_tile import BYTES, PANEL
from qframe_plugins.kernels.numba_cpu.int8_products import Float32, Int8
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
              weight is what the codes stand for: then columns are made when they are asked for
    """

    panels: PackedPanels
    columns: Float32 | None

    def taken(self, outliers: npt.NDArray[np.int64]) -> Float32:
        """Return some columns, [outliers, panels * PANEL] float32."""
        if self.columns is not None:
            return self.columns[outliers]
        panels = self.panels
        made = np.empty((len(outliers), len(panels.scale) * PANEL), np.float32)
        bytes_of = panels.planes[0].reshape(len(panels.scale), -1, PANEL, BYTES)
        _decode_columns(bytes_of, panels.scale[:, 0], panels.zero[:, 0], outliers, made)
        return made


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
    if threshold <= 0 or not x.size:
        return multiply_codes(*quantize(x), weight.panels)
    keep = np.empty(x.shape[1], np.int32)
    tasks = worth_sharing(-(-x.shape[1] // _WIDTH), x.nbytes, 0)
    least = np.float32(threshold).view(np.int32)
    share(_share_columns, tasks, x.view(np.int32), least, keep)
    outliers = np.flatnonzero(keep == 0)  # none of them, too: that is the same compiled code
    others = np.zeros((len(outliers), -(-len(x) // QUAD) * QUAD), np.float32)
    others[:, : len(x)] = x[:, outliers].T
    codes, scale = quantize_kept(x, keep)
    return multiply_codes(codes, scale, weight.panels, others, weight.taken(outliers))


@kernel
def _decode_columns(bytes_of, scale, zero, columns, out):  # type: ignore[no-untyped-def]
    """Set out[i] to what the codes of a column stand for.

    bytes_of      [panels, quads, PANEL, BYTES] uint8
    scale, zero   [panels, PANEL]
    """
    for panel in range(len(scale)):
        for i in range(len(columns)):
            quad, byte = columns[i] // BYTES, columns[i] % BYTES
            for lane in range(PANEL):
                step = np.int32(bytes_of[panel, quad, lane, byte]) - zero[panel, lane]
                out[i, panel * PANEL + lane] = np.float32(step) * scale[panel, lane]


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
