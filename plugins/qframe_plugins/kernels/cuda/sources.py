"""All kernels, so that a tool can build each of them for every architecture."""

from __future__ import annotations

from typing import Final

from qframe_plugins.kernels.cuda import (
    attention,
    attention_rotary,
    attention_steps,
    dequantize,
    few_tokens,
    float_tile,
    hadamard,
    hessian,
    int8_layout,
    int8_outliers,
    int8_products,
    rms_norm,
    tokens,
)
from qframe_plugins.kernels.cuda.compile import Source

SOURCES: Final[tuple[Source, ...]] = (
    *tokens.QUANTIZE.values(),
    dequantize.dequantize_rows,
    *hadamard.TRANSFORM.values(),
    int8_layout.place_codes,
    *int8_products.FEW_TOKENS.values(),
    *int8_products.TILES.values(),
    *few_tokens.FEW.values(),
    *float_tile.TILES.values(),
    attention.attend_piece,
    attention_steps.merge_pieces,
    attention_rotary.turn_heads,
    attention_rotary.attend_newest,
    *rms_norm.NORMALIZE.values(),
    int8_outliers.mark_outliers,
    int8_outliers.list_outliers,
    int8_outliers.quantize_rest,
    int8_outliers.add_outliers,
    *hessian.MOMENTS.values(),
)
