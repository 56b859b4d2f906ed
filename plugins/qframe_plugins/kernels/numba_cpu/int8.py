"""Products of codes of eight bits: `linear_int8`.

Method: a weight is laid out in panels of 64 rows, four neighbouring columns of a row side by side,
        as code + 128, a byte without sign: what one instruction of many processors multiplies
        with four codes of a token. Then sum x w = sum x (w + 128) - 128 sum x. A panel is read
        once for every six tokens, from the cache that it lies in; one layout serves any number.
Error:  sums are exact (docs/bounds.md, B5.c), so the answer has the three roundings of B5.b, and is
        the same on every processor and for every number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.dot_tile import (
    BLOCK,
    BYTES,
    PANEL,
    QUAD_BYTES,
    dot_panel,
    share_arrange,
)
from qframe_plugins.kernels.numba_cpu.scratch import aligned
from qframe_plugins.kernels.numba_cpu.simd import QUAD, claim, kernel, tile_add
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

_OFFSET = 128  # what is added to a code of a weight

Int8 = npt.NDArray[np.int8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Int8Panels:
    """A weight of eight bits as the kernel reads it.

    bytes     [panels, quads, PANEL, BYTES] uint8, code + 128; what is beyond the weight is 128
    scale     [panels * PANEL] float32, 0 beyond the weight
    rows, columns   of the weight
    """

    bytes: npt.NDArray[np.uint8]
    scale: Float32
    rows: int
    columns: int


def lay_out(codes: Int8, scale: Float32) -> Int8Panels:
    """Return a weight in panels.

    codes   [rows, columns] int8
    scale   [rows] float32
    """
    rows, columns = codes.shape
    panels, quads = -(-rows // PANEL), -(-columns // BYTES)
    padded = np.full((panels * PANEL, quads * BYTES), _OFFSET, np.uint8)
    padded[:rows, :columns] = codes.view(np.uint8) ^ np.uint8(_OFFSET)
    parted = aligned((panels, quads, PANEL, BYTES), np.uint8)
    parted[:] = padded.reshape(panels, PANEL, quads, BYTES).transpose(0, 2, 1, 3)
    wide = aligned((panels * PANEL,), np.float32)
    wide[:rows] = scale
    return Int8Panels(parted, wide, rows, columns)


def multiply(x_codes: Int8, x_scale: Float32, weight: Int8Panels) -> Float32:
    """Return s_x s_w sum of products of codes, [tokens, rows] float32.

    x_codes   [tokens, columns] int8
    x_scale   [tokens] float32
    """
    none = np.empty((0, 0), np.float32)
    return add_products(x_codes, x_scale, weight, none, none)


def add_products(
    x_codes: Int8,
    x_scale: Float32,
    weight: Int8Panels,
    others: Float32,
    columns_of: Float32,
) -> Float32:
    """Return the same and the products of columns that are kept as they are.

    others       [kept columns, tokens up to a multiple of QUAD] float32
    columns_of   [kept columns, panels * PANEL] float32, the weight's columns
    """
    tokens, columns = x_codes.shape
    y = np.empty((tokens, weight.rows), np.float32)
    if not y.size:
        return y
    panels, quads = weight.bytes.shape[:2]
    if columns % BYTES or not x_codes.flags.c_contiguous:
        padded = np.zeros((tokens, quads * BYTES), np.int8)
        padded[:, :columns] = x_codes
        x_codes = padded
    arranged, totals = np.empty((tokens, quads), np.int32), np.empty((tokens, 1), np.int32)
    share(share_arrange, -(-tokens // BLOCK), x_codes.view(np.int32), arranged, totals)
    w, x_scale = weight.bytes.reshape(-1), np.ascontiguousarray(x_scale)
    panels = worth_sharing(panels, w.nbytes, tokens * w.nbytes)
    share(_share_panels, panels, arranged, totals, x_scale, w, weight.scale, others, columns_of, y)
    return y


@kernel
def _scaled(sums, extra, x_scale, w_scale, y, row):  # type: ignore[no-untyped-def]
    """Write y = s_x s_w sums + extra for a panel whose first row is `row`; extra may be None."""
    width = min(PANEL, y.shape[1] - row)
    some = len(extra) > 0
    for token in range(len(y)):
        scale = x_scale[token]
        if width == PANEL:  # a count that the compiler knows: whole registers
            for lane in range(PANEL):
                made = np.float32(sums[token, lane]) * scale * w_scale[row + lane]
                y[token, row + lane] = made + extra[token, lane] if some else made
        else:
            for lane in range(width):
                made = np.float32(sums[token, lane]) * scale * w_scale[row + lane]
                y[token, row + lane] = made + extra[token, lane] if some else made


@kernel
def _kept_products(others, columns_of, row, extra):  # type: ignore[no-untyped-def]
    """Set extra [tokens, PANEL] to the products of the kept columns with a panel."""
    count, tokens = others.shape
    stripes = np.empty((count, PANEL), np.float32)
    for k in range(count):
        for lane in range(PANEL):
            stripes[k, lane] = columns_of[k, row + lane]
    for token in range(0, tokens, QUAD):
        for m in range(QUAD):
            for lane in range(PANEL):
                extra[token + m, lane] = 0
        tile_add(extra, token, others, 0, token, stripes, 0, count)


@kernel
def _share_panels(counter, x, totals, x_scale, w, w_scale, others, columns_of, y):  # type: ignore[no-untyped-def]
    """Claim panels, and compute their columns of y."""
    tokens, quads = x.shape
    size = quads * QUAD_BYTES
    sums = np.empty((tokens, PANEL), np.int32)
    extra = np.empty((others.shape[1], PANEL), np.float32)
    panel = claim(counter)
    while panel * PANEL < y.shape[1]:
        for token in range(tokens):
            for lane in range(PANEL):
                sums[token, lane] = np.int32(-_OFFSET) * totals[token, 0]
        dot_panel(sums, x, w, panel * size, size)
        if len(others):
            _kept_products(others, columns_of, panel * PANEL, extra)
        _scaled(sums, extra, x_scale, w_scale, y, panel * PANEL)
        panel = claim(counter)
