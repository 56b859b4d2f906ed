"""Wrong kernels of LLM.int8(), and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_activations import Activations, by_reciprocal
from tests.mutants.kernels_int8 import PRODUCTS, Int8, weight
from tests.mutants.kernels_small import F32, SmallKernel, mutant, summed, twin


class Outliers(SmallKernel):
    op = "linear_int8_outliers"
    accumulate = Int8.accumulate
    absmax = Activations.absmax
    scale = Activations.scale
    encode = Activations.encode
    round = Activations.round
    clip = Activations.clip
    rescale = Int8.rescale

    def compute(self, x, threshold, w_codes, w_scale, weight):
        outlier = self.outlier(x, threshold)
        rest = self.rest(x, outlier)
        scale = self.scale(self.absmax(self.measured(x, rest)))
        codes = self.encode(rest, scale[:, None])
        product = self.accumulate(codes.astype(np.float64), w_codes.astype(np.float64))
        y = self.rescale(product.astype(F32), scale, w_scale)
        return (y + self.kept(x, outlier, weight, w_codes, w_scale)).astype(F32)

    def outlier(self, x, threshold):
        if threshold <= 0:
            return np.zeros(x.shape[1], bool)
        return self.beyond(x, threshold).any(0)

    def beyond(self, x, threshold):
        return np.abs(x) >= threshold

    def rest(self, x, outlier):
        return np.where(outlier, F32(0), x)

    def measured(self, x, rest):
        return rest

    def kept(self, x, outlier, weight, w_codes, w_scale):
        return x[:, outlier] @ weight[:, outlier].T


def of_codes(self, x, outlier, weight, w_codes, w_scale):
    return x[:, outlier] @ (w_codes * w_scale[:, None])[:, outlier].T


THRESHOLDS = (
    (
        "threshold_strict",
        "a number equal to the threshold is no outlier",
        {"beyond": lambda s, x, t: np.abs(x) > t},
    ),
    ("threshold_signed", "only positive numbers are outliers", {"beyond": lambda s, x, t: x >= t}),
    (
        "threshold_for_all_tokens",
        "a column is an outlier when all of its numbers are",
        {"outlier": lambda s, x, t: (np.abs(x) >= t).all(0) & (t > 0)},
    ),
    (
        "threshold_ignored",
        "there are no outliers",
        {"beyond": lambda s, x, t: np.zeros(x.shape, bool)},
    ),
    (
        "threshold_zero_takes_all",
        "threshold 0 makes every column an outlier",
        {"outlier": lambda s, x, t: (np.abs(x) >= t).any(0)},
    ),
    (
        "absmax_includes_outliers",
        "the scale of a token is that of its outliers",
        {"measured": lambda s, x, rest: x},
    ),
    (
        "outliers_stay_in_eight_bits",
        "outliers are added and stay in the eight-bit product as well",
        {"rest": lambda s, x, outlier: x, "measured": lambda s, x, rest: np.clip(x, -6, 6)},
    ),
    ("outliers_dropped", "outliers are not added", {"kept": lambda s, x, o, w, c, b: F32(0)}),
    (
        "outliers_added_twice",
        "outliers are added twice",
        {"kept": lambda s, x, o, w, c, b: 2 * (x[:, o] @ w[:, o].T)},
    ),
    (
        "outliers_times_codes",
        "outliers meet the weight in eight bits",
        {"kept": of_codes},
    ),
    (
        "outliers_of_the_next_column",
        "the weight's columns are one off",
        {"kept": lambda s, x, o, w, c, b: x[:, o] @ np.roll(w, 1, 1)[:, o].T},
    ),
    ("truncates", "codes are cut toward zero", {"round": lambda s, t: np.trunc(t)}),
    ("stops_at_126", "codes end at 126", {"clip": lambda s, t: np.clip(t, -126, 126)}),
    (
        "zero_token_divides_by_zero",
        "a token without anything but outliers has scale 0",
        {
            "scale": lambda s, a: a / F32(127),
            "encode": lambda s, x, scale: s.clip(np.rint(x / scale)),
        },
    ),
    (
        "scale_of_the_first_token",
        "the first token's scale serves all",
        {"absmax": lambda s, x: np.full(len(x), np.abs(x[:1]).max(initial=0), F32)},
    ),
)

KILLED_BY = {
    "outliers_times_codes": "outliers_are_not_rounded",
    "outliers_dropped": "eight_bit_output",
}


MUTANTS = tuple(
    mutant(Outliers, name, bug, KILLED_BY.get(name, "eight_bit_decode"), **steps)
    for name, bug, steps in (*THRESHOLDS, *PRODUCTS)
)

TWINS = (
    twin(
        Outliers,
        "by_reciprocal",
        "one division a token, then products",
        encode=by_reciprocal,
    ),
    twin(
        Outliers,
        "outliers_in_order",
        "outliers are added one column after another",
        kept=lambda self, x, o, w, c, b: summed(x[:, o], w[:, o]),
    ),
)


def outputs(plugin):
    """Ordinary weights, and tokens with one outlier column."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(5, 96)).astype(F32)
        x[:, 3] *= 20
        found.append(kernels.run(plugin, [torch.from_numpy(x), 6.0, *weight(rng)]).numpy())
    return found
