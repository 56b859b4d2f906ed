"""Wrong kernels that round tokens to eight bits, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_small import F32, SmallKernel, mutant, twin


class Activations(SmallKernel):
    op = "quantize_activations"

    def compute(self, x):
        scale = self.scale(self.absmax(x))
        return self.encode(x, scale[:, None]).astype(np.int8), scale

    def absmax(self, x):
        return np.abs(x).max(1)

    def scale(self, absmax):
        return np.where(absmax == 0, F32(1), np.maximum(absmax / F32(127), F32(2.0**-149)))

    def encode(self, x, scale):
        return np.nan_to_num(self.clip(self.round(x / scale)))

    def round(self, t):
        return np.rint(t)

    def clip(self, t):
        return np.clip(t, -127, 127)


TOKENS = (
    (
        "truncates",
        "codes are cut toward zero",
        "codes_of_tokens",
        {"round": lambda s, t: np.trunc(t)},
    ),
    ("floors", "codes are rounded down", "codes_of_tokens", {"round": lambda s, t: np.floor(t)}),
    (
        "stops_at_126",
        "codes end at 126",
        "codes_of_tokens",
        {"clip": lambda s, t: np.clip(t, -126, 126)},
    ),
    (
        "max_not_absmax",
        "the scale is that of max x",
        "scales_of_tokens",
        {"absmax": lambda s, x: x.max(1)},
    ),
    (
        "scale_of_the_first_token",
        "one scale, of the first token, serves all",
        "scales_of_tokens",
        {"absmax": lambda s, x: np.full(len(x), np.abs(x[:1]).max(initial=0), F32)},
    ),
    (
        "zero_token_divides_by_zero",
        "a token of zeros has scale 0",
        "scales_of_tokens",
        {"scale": lambda s, a: a / F32(127)},
    ),
    (
        "divides_by_128",
        "the scale is absmax / 128",
        "scales_of_tokens",
        {"scale": lambda s, a: np.where(a == 0, F32(1), a / F32(128))},
    ),
    (
        "epsilon_in_the_scale",
        "absmax is at least 1e-5, as in several libraries",
        "scales_of_tokens",
        {"scale": lambda s, a: np.maximum(a, F32(1e-5)) / F32(127)},
    ),
    (
        "reciprocal_overflows",
        "x is multiplied with 127 / absmax, which is infinite for tiny tokens",
        "codes_of_tokens",
        {"encode": lambda s, x, scale: np.nan_to_num(s.clip(s.round(x * (F32(1) / scale))))},
    ),
    (
        "nan_becomes_zero",
        "a NaN is no larger than anything, so the scale does not know of it",
        "nan_comes_out",
        {"absmax": lambda s, x: np.nan_to_num(np.abs(x), posinf=1).max(1)},
    ),
    (
        "minus_128",
        "the lowest code of a byte is used",
        "codes_of_tokens",
        {"round": lambda s, t: np.rint(t * F32(1.004)), "clip": lambda s, t: np.clip(t, -128, 127)},
    ),
)

MUTANTS = tuple(
    mutant(Activations, name, bug, check, **steps) for name, bug, check, steps in TOKENS
)


def by_reciprocal(self, x, scale):
    inverse = F32(1) / scale
    t = np.where(np.isfinite(inverse), x * inverse, x / scale)
    return np.nan_to_num(self.clip(self.round(t)))


def scale_of_the_reciprocal(self, absmax):
    inverse = F32(127) / absmax
    return np.where(np.isfinite(inverse), F32(1) / inverse, Activations().scale(absmax))


def half_away(self, t):
    size = np.abs(t).astype(np.float64)
    return np.copysign(np.floor(size + 1 / 2), t)


TWINS = (
    twin(
        Activations,
        "half_away",
        "ties go away from zero: both neighbours are nearest",
        round=half_away,
    ),
    twin(
        Activations,
        "by_reciprocal",
        "one division a token, then products",
        encode=by_reciprocal,
    ),
    twin(
        Activations,
        "scale_by_product",
        "absmax times fl(1 / 127): two roundings",
        scale=lambda self, a: np.where(
            a == 0, F32(1), np.maximum(a * (F32(1) / F32(127)), F32(2.0**-149))
        ),
    ),
    twin(
        Activations,
        "scale_of_the_reciprocal",
        "1 / fl(127 / absmax), where that is finite: two roundings",
        scale=scale_of_the_reciprocal,
    ),
)


def outputs(plugin):
    """Ordinary tokens."""
    found = []
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(5, 96)).astype(F32)
        found += [part.numpy() for part in kernels.run(plugin, [torch.from_numpy(x)])]
    return found
