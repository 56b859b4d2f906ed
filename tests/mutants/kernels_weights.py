"""Wrong kernels that multiply with a weight in codes, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_dequantize import Dequantize, of_both, weights
from tests.mutants.kernels_small import (
    F32,
    SmallKernel,
    bfloat16,
    cut,
    mutant,
    summed,
    tf32,
    twin,
)


class WeightOnly(SmallKernel):
    op = "linear_weight_only"
    index = Dequantize.index
    steps = Dequantize.steps
    codes = Dequantize.codes
    values = Dequantize.compute
    weight = Dequantize.result

    def compute(self, x, *weight):
        return self.result(self.multiply(x, self.weight(self.values(*weight))), x)

    def multiply(self, x, w):
        return x @ w.T

    def result(self, y, x=None):
        return y


# The mutants ----------------------------------------------------------------------------------


def first_write(self, y, x=None):
    y = y.copy()
    y[:1, :1] += x[:1, :1]
    return y


def swallow(self, y, x=None):
    return np.nan_to_num(y, nan=0.0, posinf=0.0, neginf=0.0)


MUTANTS = (
    *of_both(WeightOnly, "exact_where_float32_is"),
    mutant(
        WeightOnly,
        "zero_point_off_by_one",
        "the zero point is read minus one",
        "exact_where_float32_is",
        steps=lambda self, c, z: (c - z - 1).astype(F32),
    ),
    mutant(
        WeightOnly,
        "sums_in_fp16",
        "sums are float16",
        "weight_only_sums",
        multiply=lambda self, x, w: summed(x, w, to=np.float16),
    ),
    mutant(
        WeightOnly,
        "sums_in_bf16",
        "sums are bfloat16",
        "weight_only_sums",
        multiply=lambda self, x, w: summed(x, w, to=bfloat16),
    ),
    mutant(
        WeightOnly,
        "tf32_undeclared",
        "matrix units round both operands to 11 bits, and nobody says so",
        "weight_only_sums",
        multiply=lambda self, x, w: tf32(x) @ tf32(w).T,
    ),
    mutant(
        WeightOnly,
        "weight_rounded_to_bf16",
        "dequantized weights pass through bfloat16",
        "exact_where_float32_is",
        weight=lambda self, w: bfloat16(w),
    ),
    mutant(
        WeightOnly,
        "output_in_fp16",
        "the output passes through float16",
        "weight_only_sums",
        result=lambda self, y, x=None: y.astype(np.float16).astype(F32),
    ),
    mutant(
        WeightOnly,
        "tail_dropped",
        "columns after the last whole block of 16 are not added",
        "exact_where_float32_is",
        multiply=lambda self, x, w: x[:, : x.shape[1] // 16 * 16] @ w[:, : x.shape[1] // 16 * 16].T,
    ),
    mutant(
        WeightOnly,
        "tail_read_twice",
        "the last block of 16 begins 16 before the end, whatever was added before",
        "exact_where_float32_is",
        multiply=lambda self, x, w: (
            x[:, : x.shape[1] // 16 * 16] @ w[:, : x.shape[1] // 16 * 16].T
            + (x[:, -16:] @ w[:, -16:].T if x.shape[1] % 16 else 0)
        ).astype(F32),
    ),
    mutant(
        WeightOnly,
        "first_product_added_twice",
        "two threads add to the first output",
        "exact_where_float32_is",
        result=first_write,
    ),
    mutant(
        WeightOnly,
        "nan_becomes_zero",
        "what is not finite is replaced by zero",
        "nan_comes_out",
        result=swallow,
    ),
    mutant(
        WeightOnly,
        "single_token_path_is_wrong",
        "the path for one token skips the first column",
        "few_tokens",
        multiply=lambda self, x, w: x @ w.T if len(x) != 1 else x[:, 1:] @ w[:, 1:].T,
    ),
    mutant(
        WeightOnly,
        "no_tokens_fail",
        "no token at all is not foreseen",
        "few_tokens",
        multiply=lambda self, x, w: (
            (x / x.any(1).sum().clip(1)) @ w.T * x.any(1).sum().clip(1)
            if len(x)
            else np.zeros((1, len(w)), F32)
        ),
    ),
    mutant(
        WeightOnly,
        "tokens_share_a_scale",
        "tokens are scaled by their common maximum before a cast to float16",
        "weight_only_sums",
        multiply=lambda self, x, w: (
            (x / np.abs(x).max(initial=1)).astype(np.float16).astype(F32)
            @ w.T
            * np.abs(x).max(initial=1)
        ).astype(F32),
    ),
    mutant(
        WeightOnly,
        "writes_into_the_input",
        "the input is scaled in place",
        "leaves_operands_alone",
        compute=lambda self, x, *weight: (
            np.multiply(x, 2, out=x) @ self.values(*weight).T / 2
        ).astype(F32),
    ),
    mutant(
        WeightOnly,
        "strides_ignored",
        "memory is read as if x were contiguous",
        "weight_only_sums",
        compute=lambda self, x, *weight: (
            np.lib.stride_tricks.as_strided(x, x.shape, (4 * x.shape[1], 4))
            @ self.values(*weight).T
        ),
    ),
    mutant(
        WeightOnly,
        "token_independent_by_word_only",
        "a token alone is summed in another order, although the contrary is declared",
        "tokens_alone",
        multiply=lambda self, x, w: summed(x, w, range(x.shape[1])[:: -1 if len(x) == 1 else 1]),
        token_independent=True,
    ),
    mutant(
        WeightOnly,
        "supports_everything",
        "it claims to compute any operation anywhere",
        "says_why_not",
        supports=lambda self, call: None,
    ),
)


# The twins ------------------------------------------------------------------------------------


def pairwise(self, x, w):
    products = x[:, None, :] * w[None]
    while products.shape[-1] > 1:
        if products.shape[-1] % 2:
            products = np.concatenate([products, np.zeros_like(products[..., :1])], -1)
        products = products[..., 0::2] + products[..., 1::2]
    return products[..., 0]


def fused(self, x, w):
    """Multiply and add with one rounding."""
    total = np.zeros((len(x), len(w)), F32)
    for k in range(x.shape[1]):
        exact = total + x[:, k, None].astype(np.float64) * w[None, :, k]
        total = exact.astype(F32)
    return total


def matrix_unit(self, x, w):
    """Four exact products at a time, the sum cut to float32."""
    total = np.zeros((len(x), len(w)), F32)
    for k in range(0, x.shape[1], 4):
        four = x[:, k : k + 4].astype(np.float64) @ w[:, k : k + 4].astype(np.float64).T
        total = cut(total + four)
    return total


def factored(self, x, codes, scale, zero_point, group_index):
    """s (sum x c - z sum x), group by group."""
    y = np.zeros((len(x), len(codes)), F32)
    for group in range(scale.shape[1]):
        here = group_index == group
        inner = x[:, here] @ codes[:, here].astype(F32).T
        inner = inner - x[:, here].sum(1)[:, None] * zero_point[None, :, group].astype(F32)
        y += inner * scale[:, group]
    return y


TWINS = (
    twin(
        WeightOnly,
        "order_reversed",
        "the last product first: no order is promised",
        multiply=lambda self, x, w: summed(x, w, range(x.shape[1])[::-1]),
    ),
    twin(WeightOnly, "pairwise", "sums as a tree: no order is promised", multiply=pairwise),
    twin(WeightOnly, "fused", "multiply-add with one rounding, as FMA does", multiply=fused),
    twin(
        WeightOnly,
        "float64",
        "better sums than asked for, and declared",
        multiply=lambda self, x, w: (x.astype(np.float64) @ w.astype(np.float64).T).astype(F32),
        accumulator="float64",
    ),
    twin(
        WeightOnly,
        "sums_cut",
        "sums are cut to float32 as in matrix units, and this is declared",
        multiply=matrix_unit,
        accumulator="float32 truncated",
    ),
    twin(
        WeightOnly,
        "tf32_declared",
        "operands of 11 bits, and this is declared",
        multiply=lambda self, x, w: tf32(x) @ tf32(w).T,
        accumulator="tf32",
    ),
    twin(
        WeightOnly,
        "bfloat16_declared",
        "operands of 8 bits, and this is declared",
        multiply=lambda self, x, w: bfloat16(x) @ bfloat16(w).T,
        accumulator="bfloat16",
    ),
    twin(
        WeightOnly,
        "zero_factored_out",
        "the zero point is multiplied with the sum of x, once a group",
        compute=factored,
    ),
    twin(
        WeightOnly,
        "prepared",
        "weights are laid out once, transposed, by `prepare`",
        prepare=lambda self, *weight: self.values(*(o.numpy() for o in weight)).T.copy(),
        compute=lambda self, x, laid_out: x @ laid_out,
    ),
    twin(
        WeightOnly,
        "token_by_token",
        "no sum sees another token, and this is declared",
        multiply=lambda self, x, w: summed(x, w),
        token_independent=True,
    ),
)


def outputs(plugin):
    """Ordinary tokens, and weights in groups of 32 with zero points."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.normal(size=(5, 96)).astype(F32))
        found.append(kernels.run(plugin, [x, *weights(rng)]).numpy())
    return found
