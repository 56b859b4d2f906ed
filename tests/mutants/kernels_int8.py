"""Wrong kernels that multiply codes of eight bits, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_activations import Activations
from tests.mutants.kernels_small import F32, SmallKernel, mutant, summed, twin


class Int8(SmallKernel):
    op = "linear_int8"

    def compute(self, x_codes, x_scale, w_codes, w_scale):
        product = self.accumulate(x_codes.astype(np.float64), w_codes.astype(np.float64))
        return self.result(self.rescale(product.astype(F32), x_scale, w_scale))

    def accumulate(self, x, w):
        return x @ w.T  # float64 holds these sums of integers exactly

    def rescale(self, product, x_scale, w_scale):
        return product * x_scale[:, None] * w_scale

    def result(self, y):
        return y


def in_int16(self, x, w):
    return np.clip(x @ w.T, -32768, 32767)


def bnb(self, product, x_scale, w_scale):
    return product * (x_scale[:, None] * F32(127) * w_scale * F32(127)) * F32(6.200124e-05)


PRODUCTS = (
    (
        "sums_in_fp32",
        "products of codes are added in float32, exact up to 1,040 columns only",
        {"accumulate": lambda s, x, w: summed(x.astype(F32), w.astype(F32))},
    ),
    (
        "sums_in_fp16",
        "products of codes are added in float16",
        {"accumulate": lambda s, x, w: (x @ w.T).astype(np.float16)},
    ),
    (
        "sums_saturate_at_16_bits",
        "sums are 16-bit integers that saturate",
        {"accumulate": in_int16},
    ),
    (
        "last_column_dropped",
        "the last column is not added",
        {"accumulate": lambda s, x, w: x[:, :-1] @ w[:, :-1].T},
    ),
    (
        "dropped_digit",
        "1 / 127^2 is 6.200124e-05: a digit is missing, as in a published backend",
        {"rescale": bnb},
    ),
    (
        "scales_of_128",
        "both scales are taken for absmax / 128",
        {"rescale": lambda s, p, a, b: p * a[:, None] * b * F32((127 / 128) ** 2)},
    ),
    (
        "token_scale_forgotten",
        "the scale of the token is not applied",
        {"rescale": lambda s, p, a, b: p * b + 0 * a[:, None]},
    ),
    (
        "scale_of_the_next_channel",
        "a channel takes its neighbour's scale",
        {"rescale": lambda s, p, a, b: p * a[:, None] * np.roll(b, 1)},
    ),
)

MUTANTS = (
    *(mutant(Int8, name, bug, "eight_bit_decode", **steps) for name, bug, steps in PRODUCTS),
    mutant(
        Int8,
        "wraps_at_24_bits",
        "sums are kept in 24 bits",
        "eight_bit_decode",
        accumulate=lambda self, x, w: (x @ w.T + 2**23) % 2**24 - 2**23,
    ),
    mutant(
        Int8,
        "scale_of_the_first_token",
        "the first token's scale serves all",
        "eight_bit_decode",
        rescale=lambda self, p, a, b: p * a[:1] * b + 0 * a[:, None],
    ),
    mutant(
        Int8,
        "output_in_fp16",
        "the output passes through float16",
        "eight_bit_decode",
        result=lambda self, y: y.astype(np.float16).astype(F32),
    ),
    mutant(
        Int8,
        "unsigned_codes",
        "codes of x are read as unsigned, and nothing makes up for it",
        "eight_bit_decode",
        accumulate=lambda self, x, w: (x % 256) @ w.T,
    ),
    mutant(
        Int8,
        "nan_becomes_zero",
        "a scale that is not finite gives zero",
        "nan_comes_out",
        result=lambda self, y: np.nan_to_num(y, nan=0.0, posinf=0.0, neginf=0.0),
    ),
    mutant(
        Int8,
        "not_deterministic",
        "an unlucky order of threads changes the last bit",
        "same_answer_again",
        result=lambda self, y: (y * (1 + np.random.default_rng().choice([0, 2**-23]))).astype(F32),
    ),
)

TWINS = (
    twin(
        Int8,
        "scales_first",
        "s_x s_w is formed before the product with the sum",
        rescale=lambda self, p, a, b: p * (a[:, None] * b),
    ),
    twin(
        Int8,
        "split_in_two",
        "the upper and the lower half of the columns are added separately",
        accumulate=lambda self, x, w: x[:, ::2] @ w[:, ::2].T + x[:, 1::2] @ w[:, 1::2].T,
    ),
    twin(
        Int8,
        "offset_codes",
        "codes of x are shifted to be unsigned; 128 sum w is taken off",
        accumulate=lambda self, x, w: (x + 128) @ w.T - 128 * w.sum(1),
    ),
)


def weight(rng):
    """Return an ordinary weight in eight bits: codes, scale, and as it is."""
    w = (rng.normal(size=(24, 96)) / 8).astype(F32)
    scale = np.abs(w).max(1) / F32(127)
    codes = np.rint(w / scale[:, None]).astype(np.int8)
    return [torch.from_numpy(each) for each in (codes, scale, w)]


def outputs(plugin):
    """Ordinary tokens and weights."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = [
            torch.from_numpy(p) for p in Activations().compute(rng.normal(size=(5, 96)).astype(F32))
        ]
        found.append(kernels.run(plugin, [*x, *weight(rng)[:2]]).numpy())
    return found
