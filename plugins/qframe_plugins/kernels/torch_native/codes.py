"""Products of codes without error, by whichever of PyTorch's kernels has none.

torch._int_mm multiplies bytes. On a CPU it is oneDNN's, which adds pairs of products in 16 bits
where the processor has no instruction for four at once (VNNI): 127 * 127 + 127 * 127 does not fit,
and comes out too small without a word (oneDNN, "Nuances of int8 computations"). So it is asked
first for sums that would not fit. Where it fails, or takes no such shape, runs of columns are
multiplied in float32, each so short that its sum is exact (docs/bounds.md, B9.c).

Error: none (B5.c).
"""

from __future__ import annotations

from functools import cache

import torch

from qframe_plugins.kernels.torch_native.layout import row_major

INT8 = 127  # the largest code of a token
_INT32 = 2**31 - 1
_EXACT = 1 << 24  # a float32 holds every integer up to this
_NARROW = 1 << 8  # steps up to this are exact in bfloat16 too, to which PyTorch may round operands


def integer_product(x_codes: torch.Tensor, steps: torch.Tensor, largest: int) -> torch.Tensor:
    """Return the sums of products, [tokens, rows], without error: int32, float32 or float64.

    x_codes   [tokens, columns] int8, -127..127
    steps     [rows, columns], integers of any dtype
    largest   what no step is larger than in magnitude
    """
    if steps.dtype == torch.int8 and _served(x_codes, steps, largest):
        product: torch.Tensor = torch._int_mm(row_major(x_codes), row_major(steps).T)
        return product
    columns = x_codes.shape[1]
    run = _EXACT // (INT8 * max(largest, 1))
    if largest > _NARROW:  # sums below 2^53 are exact in float64
        return x_codes.to(torch.float64) @ steps.to(torch.float64).T
    if columns <= run:
        return x_codes.to(torch.float32) @ steps.to(torch.float32).T
    total = torch.zeros(len(x_codes), len(steps), dtype=torch.float64, device=steps.device)
    for first in range(0, columns, run):
        part = slice(first, first + run)
        total += x_codes[:, part].to(torch.float32) @ steps[:, part].to(torch.float32).T
    return total


def _served(x_codes: torch.Tensor, steps: torch.Tensor, largest: int) -> bool:
    """Return whether torch._int_mm takes these, and is right about them."""
    (tokens, columns), rows = x_codes.shape, len(steps)
    # Of one column no stride tells how it lies: torch._int_mm is wrong about it in any case.
    if not tokens or not rows or columns <= 1 or columns * INT8 * largest > _INT32:
        return False
    if x_codes.device.type == "cpu":
        return int_mm_is_exact()
    return tokens > 16 and columns % 8 == 0 and rows % 8 == 0


@cache
def int_mm_is_exact() -> bool:
    """Return whether torch._int_mm adds products of bytes without error on this CPU.

    Asked once: products of the largest codes of both signs, for one token and for many, for a few
    rows and for whole registers of them.
    """
    shapes = ((1, 2, 1), (1, 64, 64), (17, 66, 5), (48, 256, 64))
    for tokens, columns, rows in shapes:
        for x, w in ((INT8, INT8), (INT8, -INT8), (-INT8, INT8), (-INT8, -INT8)):
            made = torch._int_mm(
                torch.full((tokens, columns), x, dtype=torch.int8),
                torch.full((rows, columns), w, dtype=torch.int8).T,
            )
            if bool((made != columns * x * w).any()):
                return False
    return True
