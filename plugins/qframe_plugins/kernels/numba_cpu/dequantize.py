"""What codes stand for: `dequantize`.

Error:  docs/bounds.md, B1.d: code - zero_point is exact, and its product with the scale is rounded
        once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing

_ROWS = 16  # of a task


def dequantize(
    codes: npt.NDArray[np.int16],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int16],
    group_index: npt.NDArray[np.int32],
) -> npt.NDArray[np.float32]:
    """Return scale * (code - zero_point), [rows, columns] float32.

    codes               [rows, columns] int16
    scale, zero_point   [rows or 1, groups], float32 and int16
    group_index         [columns] int32
    """
    rows, groups = len(codes), scale.shape[1]
    parts: list[npt.NDArray[Any]] = [
        np.ascontiguousarray(np.broadcast_to(each, (rows, groups))) for each in (scale, zero_point)
    ]
    out = np.empty(codes.shape, np.float32)
    whole = np.ascontiguousarray(codes), *parts, np.ascontiguousarray(group_index)
    tasks = worth_sharing(-(-rows // _ROWS), codes.nbytes + out.nbytes, 0)
    share(_share_rows, tasks, *whole, out)
    return out


@kernel
def _share_rows(counter, codes, scale, zero_point, group_index, out):  # type: ignore[no-untyped-def]
    """Claim rows."""
    rows, columns = codes.shape
    first = claim(counter) * _ROWS
    while first < rows:
        for row in range(first, min(first + _ROWS, rows)):
            start = 0
            while start < columns:
                group = group_index[start]
                end = start + 1
                while end < columns and group_index[end] == group:
                    end += 1
                step, zero = scale[row, group], np.int32(zero_point[row, group])
                for column in range(start, end):
                    steps = np.int32(codes[row, column]) - zero
                    out[row, column] = np.float32(steps) * step
                start = end
        first = claim(counter) * _ROWS
