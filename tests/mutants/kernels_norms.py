"""Wrong kernels of RMS norms, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_small import F32, SmallKernel, bfloat16, mutant, twin


class RMSNorm(SmallKernel):
    op = "rms_norm"

    def compute(self, x, weight, eps):
        return (self.divided(x, F32(eps)) * self.factor(weight)).astype(F32)

    def divided(self, x, eps):
        return x / np.sqrt(self.mean(x) + eps)

    def mean(self, x):
        return self.squares(x).mean(1, keepdims=True, dtype=F32)

    def squares(self, x):
        return x * x

    def factor(self, weight):
        return weight


NORMS = (
    ("no_eps", "eps is not added", {"divided": lambda s, x, e: x / np.sqrt(s.mean(x))}),
    (
        "eps_outside_the_root",
        "eps is added to the root",
        {"divided": lambda s, x, e: x / (np.sqrt(s.mean(x)) + e)},
    ),
    (
        "sum_for_mean",
        "squares are added up and not divided by their number",
        {"mean": lambda s, x: s.squares(x).sum(1, keepdims=True, dtype=F32)},
    ),
    (
        "mean_without_the_last",
        "the last column is not in the mean",
        {"mean": lambda s, x: s.squares(x)[:, :-1].sum(1, keepdims=True, dtype=F32) / x.shape[1]},
    ),
    (
        "variance",
        "the mean is taken off before squares are taken, as layer norms do",
        {"squares": lambda s, x: np.square(x - x.mean(1, keepdims=True, dtype=F32))},
    ),
    (
        "mean_of_all_tokens",
        "the mean is that of all tokens",
        {"mean": lambda s, x: np.broadcast_to(s.squares(x).mean(dtype=F32), (len(x), 1))},
    ),
    ("squares_in_bf16", "squares are bfloat16", {"squares": lambda s, x: bfloat16(x * x)}),
    ("weight_plus_one", "weights count from one on", {"factor": lambda s, w: 1 + w}),
    ("no_weight", "columns are not multiplied", {"factor": lambda s, w: np.ones_like(w)}),
    ("weight_in_bf16", "weights are rounded to bfloat16", {"factor": lambda s, w: bfloat16(w)}),
)

MUTANTS = tuple(mutant(RMSNorm, name, bug, "norms", **steps) for name, bug, steps in NORMS)

TWINS = (
    twin(
        RMSNorm,
        "column_after_column",
        "squares are added up one after another",
        mean=lambda self, x: np.cumsum(self.squares(x), 1, dtype=F32)[:, -1:] / F32(x.shape[1]),
    ),
    twin(
        RMSNorm,
        "by_the_reciprocal",
        "one over the root is rounded, and so is one over the number of columns",
        divided=lambda self, x, e: x * (1 / np.sqrt(self.mean(x) + e)),
        mean=lambda self, x: self.squares(x).sum(1, keepdims=True) * F32(1 / x.shape[1]),
    ),
    twin(
        RMSNorm,
        "in_float64",
        "all of it in float64, rounded at the end",
        divided=lambda self, x, e: x / np.sqrt(np.square(x, dtype=float).mean(1)[:, None] + e),
    ),
    twin(
        RMSNorm,
        "rounded_and_declared",
        "squares of numbers that are rounded to bfloat16, and declared",
        accumulator="bfloat16",
        squares=lambda self, x: np.square(bfloat16(x)),
    ),
)


def outputs(plugin):
    """Ordinary tokens."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, weight = (rng.normal(size=shape).astype(F32) for shape in ((5, 48), 48))
        found.append(kernels.run(plugin, [*map(torch.from_numpy, (x, weight)), 1e-5]).numpy())
    return found
