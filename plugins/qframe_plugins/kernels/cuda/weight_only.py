"""Products of activations with a weight in codes: `linear_weight_only`.

Few tokens read the weight as it is packed (few_tokens.py); more share what is decoded in a tile
(float_tile.py). Groups may have any size and any columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.cuda import few_tokens, float_tile
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.packed import PackedWeight
from qframe_plugins.kernels.cuda.places import STEP
from qframe_plugins.kernels.cuda.short_floats import as_words, dtype_of

if TYPE_CHECKING:
    import torch

MOST_FEW = 8  # tokens up to which a tile would be mostly empty


def depth(tokens: int, group_index: npt.NDArray[np.int32]) -> int:
    """Return how many roundings of the sums a product passes at most, for so many tokens.

    group_index   [columns] int32
    """
    columns = len(group_index)
    if tokens > MOST_FEW:
        return columns + 1  # one sum after the other, of weights that were rounded
    steps = int((-(-np.bincount(group_index) // STEP)).sum()) if columns else 0
    in_turn = -(-steps // 32)  # steps that a lane adds
    return STEP + in_turn + 5  # lanes are added in a tree


def multiply(on: Launcher, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return x W^T, [tokens, rows], in the dtype of x [tokens, columns]."""
    import torch

    (tokens, columns), rows, places = x.shape, len(weight.words), weight.places
    y, dtype = torch.empty(tokens, rows, dtype=x.dtype, device=x.device), dtype_of(x)
    if not y.numel():
        return y
    numbers = tokens, columns, rows, places.pitch, weight.step, places.in_order
    given = (
        *(as_words(dense(x)), weight.words, weight.scale, weight.zero, places.column, places.group),
        *(Fresh(as_words(y)), *numbers),
    )
    if tokens <= MOST_FEW:
        many = 1 if tokens == 1 else few_tokens.SUMS
        block_rows = few_tokens.WARPS * few_tokens.SUMS // many
        grid = -(-rows // block_rows), -(-tokens // many)
        on.launch(few_tokens.FEW[dtype, weight.bits, many], grid, few_tokens.THREADS, *given)
    else:
        grid = -(-rows // float_tile.ROWS), -(-tokens // float_tile.TOKENS)
        on.launch(float_tile.TILES[dtype, weight.bits], grid, float_tile.THREADS, *given)
    return y
