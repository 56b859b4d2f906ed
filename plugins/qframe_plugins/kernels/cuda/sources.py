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
    tokens.quantize_tokens,
    dequantize.dequantize_rows,
    hadamard.transform,
    int8_layout.place_codes,
    int8_products.multiply_few,
    int8_products.multiply_tile,
    *few_tokens.FEW.values(),
    *float_tile.TILES.values(),
    attention.attend_piece,
    attention_steps.merge_pieces,
    attention_rotary.turn_heads,
    attention_rotary.attend_newest,
    rms_norm.normalize_tokens,
    int8_outliers.mark_outliers,
    int8_outliers.list_outliers,
    int8_outliers.quantize_rest,
    int8_outliers.add_outliers,
    hessian.add_moments,
)
