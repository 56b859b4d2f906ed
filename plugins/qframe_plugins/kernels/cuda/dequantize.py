"""What codes stand for: `dequantize`.

Method: a thread for each column of a row, neighbours side by side.
Error:  docs/bounds.md, B1.d: code - zero_point is exact, and its product with the scale is rounded
        once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import cuda, float32, int32, uint32

from qframe_plugins.kernels.cuda.compile import source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense

if TYPE_CHECKING:
    import torch

THREADS = 128
_MOST = 65535  # blocks of a grid in its second direction


def dequantize(
    on: Launcher,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group_index: torch.Tensor,
) -> torch.Tensor:
    """Return scale * (code - zero_point), [rows, columns] float32.

    codes               [rows, columns] int16
    scale, zero_point   [rows or 1, groups], float32 and int16
    group_index         [columns] int32
    """
    import torch

    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.float32, device=codes.device)
    if out.numel():
        pitch = scale.shape[1] if len(scale) > 1 else 0
        parts = [dense(each) for each in (codes, scale, zero_point, group_index)]
        grid = -(-columns // THREADS), min(rows, _MOST)
        on.launch(dequantize_rows, grid, THREADS, *parts, Fresh(out), rows, columns, pitch)
    return out


@source("int16*, float32*, int16*, int32*, float32*, uint32, uint32, uint32")
def dequantize_rows(codes, scale, zero_point, group_index, out, rows, columns, pitch):  # type: ignore[no-untyped-def]
    """Set a column of some rows. pitch: groups of a row of scales, 0 where rows share theirs."""
    column = uint32(cuda.blockIdx.x * uint32(THREADS) + cuda.threadIdx.x)
    row = uint32(cuda.blockIdx.y)
    if column < columns:
        group = uint32(group_index[column])
        while row < rows:
            place = uint32(uint32(row * columns) + column)
            other = uint32(uint32(row * pitch) + group)
            steps = int32(codes[place]) - int32(zero_point[other])
            out[place] = float32(int32(steps)) * scale[other]
            row = uint32(row + uint32(cuda.gridDim.y))
