"""RMS norms: `rms_norm`.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, arXiv:1910.07467.
Method: a block of threads for each token; neighbouring lanes have neighbouring columns.
Error:  docs/bounds.md, B13.a; the squares of a thread are added one after another, those of threads
        as a tree.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numba import cuda, float32, uint32

from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels.cuda.attention_steps import of_block
from qframe_plugins.kernels.cuda.compile import Source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.short_floats import (
    READ,
    WRITE,
    as_words,
    dtype_of,
    for_activations,
)

if TYPE_CHECKING:
    import torch

THREADS = 128  # what `of_block` adds up
WARPS = THREADS // 32


def rms_norm(on: Launcher, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight x / sqrt(mean(x^2) + eps), token by token, [tokens, columns], like x.

    x        [tokens, columns] of activations
    weight   [columns] float32
    """
    import torch

    tokens, columns = x.shape
    y = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    if y.numel():
        given = as_words(dense(x)), dense(weight), Fresh(as_words(y)), columns, 1 / columns, eps
        on.launch(NORMALIZE[dtype_of(x)], tokens, THREADS, *given)
    return y


def _normalize_tokens(dtype: str) -> Source:
    read, write = READ[dtype], WRITE[dtype]

    def normalize_tokens(x, weight, y, columns, share, eps):  # type: ignore[no-untyped-def]
        """Normalize a token; `share` is what one column has in the mean."""
        found = cuda.shared.array(WARPS, float32)
        thread = uint32(cuda.threadIdx.x)
        row = uint32(cuda.blockIdx.x * columns)
        total = float32(0)
        column = thread
        while column < columns:
            number = read(x, uint32(row + column))
            total = cuda.fma(number, number, total)
            column = uint32(column + uint32(THREADS))
        factor = float32(1) / math.sqrt(cuda.fma(of_block(total, found, False), share, eps))
        column = thread
        while column < columns:
            number = read(x, uint32(row + column)) * factor * weight[column]
            write(y, uint32(row + column), number)
            column = uint32(column + uint32(THREADS))

    return for_activations(normalize_tokens, "x, float32*, x, uint32, float32, float32", dtype)


NORMALIZE = {dtype: _normalize_tokens(dtype) for dtype in ACTIVATIONS}
