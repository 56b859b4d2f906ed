"""Wrong kernels that turn codes into weights, and a right one that does it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from tests.mutants.kernels_small import F32, SmallKernel, mutant, twin


class Dequantize(SmallKernel):
    op = "dequantize"

    def compute(self, codes, scale, zero_point, group_index):
        index = self.index(group_index, scale.shape[1])
        return self.result(self.steps(self.codes(codes), zero_point[:, index]) * scale[:, index])

    def codes(self, codes):
        return codes

    def index(self, group_index, groups):
        return group_index

    def steps(self, codes, zero):
        return (codes - zero).astype(F32)

    def result(self, weight):
        return weight


def swapped(self, codes):
    """The low and the high half of a byte have changed places."""
    out, even = codes.copy(), codes.shape[1] // 2 * 2
    out[:, 0:even:2], out[:, 1:even:2] = codes[:, 1:even:2], codes[:, 0:even:2]
    return out


def one_late(self, group_index, groups):
    return np.append(group_index[1:], group_index[-1:])


def last_is_first(self, group_index, groups):
    return np.where(group_index == groups - 1, 0, group_index)


def assumed(self, group_index, groups):
    """Groups are taken for neighbouring columns of equal width, the last not ragged."""
    width = -(-len(group_index) // groups)
    return np.arange(len(group_index)) // width


BOTH = (
    ("nibble_order_swapped", "the halves of a byte are unpacked in the other order", swapped),
    ("group_index_off_by_one", "a column takes the scale of the next column's group", one_late),
    ("last_group_uses_scale_0", "the last group, or the only tail, reads scale 0", last_is_first),
    ("groups_assumed_even", "a ragged last group, or GPTQ's order, is not foreseen", assumed),
)


def of_both(base, killed_by):
    for name, bug, step in BOTH:
        method = "codes" if step is swapped else "index"
        yield mutant(base, name, bug, killed_by, **{method: step})


MUTANTS = (
    *of_both(Dequantize, "values_of_codes"),
    mutant(
        Dequantize,
        "zero_point_off_by_one",
        "the zero point is stored minus one, as some file formats do, and read as it is",
        "values_of_codes",
        steps=lambda self, c, z: (c - z - 1).astype(F32),
    ),
    mutant(
        Dequantize,
        "difference_wraps_in_int8",
        "code - zero_point is taken in eight bits",
        "values_of_codes",
        steps=lambda self, c, z: (c - z).astype(np.int8).astype(F32),
    ),
    mutant(
        Dequantize,
        "values_in_fp16",
        "values pass through float16",
        "values_of_codes",
        result=lambda self, w: w.astype(np.float16).astype(F32),
    ),
    mutant(
        Dequantize,
        "zero_point_of_the_first_row",
        "one zero point per group serves all rows",
        "values_of_codes",
        steps=lambda self, c, z: (c - z[:1]).astype(F32),
    ),
    mutant(
        Dequantize,
        "scale_times_code_minus_zero",
        "s c - z is computed for s (c - z)",
        "values_of_codes",
        compute=lambda self, c, s, z, i: (c * s[:, i] - z[:, i]).astype(F32),
    ),
    mutant(
        Dequantize,
        "returns_float64",
        "the result is float64",
        "answers",
        result=lambda self, w: w.astype(np.float64),
    ),
)

TWINS = (
    twin(
        Dequantize,
        "in_float64",
        "the product in float64, rounded once",
        compute=lambda self, c, s, z, i: ((c - z[:, i]) * s[:, i].astype(np.float64)).astype(F32),
    ),
)


def weights(rng):
    """Return an ordinary weight: codes, scale, zero point, group index."""
    arrays = (
        rng.integers(0, 16, (24, 96)).astype(np.int16),
        (rng.random((24, 3)) / 100).astype(F32),
        rng.integers(0, 16, (24, 3)).astype(np.int16),
        (np.arange(96) // 32).astype(np.int32),
    )
    return [torch.from_numpy(each) for each in arrays]


def outputs(plugin):
    """Ordinary weights in groups of 32, with zero points."""
    found = []
    for seed in range(3):
        found.append(kernels.run(plugin, weights(np.random.default_rng(seed))).numpy())
    return found
