"""Wrong kernels of second moments, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_small import F32, SmallKernel, bfloat16, mutant, twin


class Moments(SmallKernel):
    op = "hessian_update"

    def compute(self, hessian, x):
        below = np.tril_indices(len(hessian))
        hessian[below] = self.combined(hessian, self.products(x))[below]

    def products(self, x):
        return x.T @ x

    def combined(self, hessian, products):
        return hessian + products


def whole_square(self, hessian, x):
    hessian += x.T @ x


MOMENTS = (
    ("overwrites", "what was there is lost", {"combined": lambda s, h, p: p.astype(np.float64)}),
    (
        "last_token_dropped",
        "the last token is not added",
        {"products": lambda s, x: x[:-1].T @ x[:-1]},
    ),
    (
        "mean_not_sum",
        "the mean over the tokens is added",
        {"products": lambda s, x: x.T @ x / F32(max(len(x), 1))},
    ),
    (
        "products_in_bf16",
        "activations pass through bfloat16",
        {"products": lambda s, x: bfloat16(x).T @ bfloat16(x)},
    ),
    ("diagonal_only", "only squares are added", {"products": lambda s, x: np.diag((x * x).sum(0))}),
    (
        "added_in_fp32",
        "H is rounded to float32 when tokens are added",
        {"combined": lambda s, h, p: (h.astype(F32) + p).astype(np.float64)},
    ),
    ("added_twice", "two threads add the same tokens", {"products": lambda s, x: 2 * (x.T @ x)}),
    (
        "centred",
        "the mean is taken off first",
        {"products": lambda s, x: np.cov(x.T, bias=True).reshape(x.shape[1], -1) * len(x)},
    ),
)

MUTANTS = (
    *(mutant(Moments, name, bug, "second_moments", **steps) for name, bug, steps in MOMENTS),
    mutant(
        Moments,
        "writes_above_the_diagonal",
        "the whole square is written",
        "leaves_operands_alone",
        compute=whole_square,
    ),
)

TWINS = (
    twin(
        Moments,
        "float64",
        "products in float64",
        products=lambda self, x: x.T.astype(np.float64) @ x.astype(np.float64),
    ),
    twin(
        Moments,
        "token_by_token",
        "each token is added to the float64 sum on its own",
        products=lambda self, x: sum(
            (np.outer(row, row).astype(np.float64) for row in x), np.zeros((x.shape[1],) * 2)
        ),
    ),
)


def outputs(plugin):
    """Moments of ordinary tokens."""
    found = []
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(6, 64)).astype(F32)
        hessian = torch.zeros(64, 64, dtype=torch.float64)
        kernels.run(plugin, [hessian, torch.from_numpy(x)])
        found.append(hessian.numpy())
    return found
