"""Wrong ways to round to nearest and to store the codes, and right ones (docs/bounds.md, B1)."""

from __future__ import annotations

import numpy as np
import torch

from tests.mutants.rounder_reference import Nearest, mutants, outputs
from tests.mutants.rounders_rtn_twins import TWINS

__all__ = ["MUTANTS", "TWINS", "outputs"]


# Rounding -------------------------------------------------------------------------------------


class RoundTrunc(Nearest):
    """Rounds towards zero, as a cast to int does in C, NumPy and torch."""

    def steps(self, weight, scale):
        return np.trunc(weight / scale)


class RoundFloor(Nearest):
    """Rounds down, as a right shift or // does."""

    def steps(self, weight, scale):
        return np.floor(weight / scale)


class RoundCeil(Nearest):
    """Rounds up, as integer division by (n + d - 1) // d does."""

    def steps(self, weight, scale):
        return np.ceil(weight / scale)


class RoundHalfUp(Nearest):
    """Rounds ties up by floor(x + 1/2), so that -W is not the mirror image of W."""

    def steps(self, weight, scale):
        return np.floor(weight / scale + np.float32(0.5))


class HalfAddedToAll(Nearest):
    """Adds a half and casts to int: right for positive weights, one step off for negative ones."""

    def steps(self, weight, scale):
        return np.trunc(weight / scale + np.float32(0.5))


class RoundedTwice(Nearest):
    """Rounds to a finer grid first, as an int8 checkpoint that is made int4 does."""

    def steps(self, weight, scale):
        return np.rint(np.rint(weight / scale * 4) / 4)


class ZeroPointAddedFirst(Nearest):
    """Adds the zero point before it rounds, which moves ties, and does not say so."""

    def steps(self, weight, scale):
        return weight / scale

    def codes(self, codes, grid):
        return super().codes(np.rint(codes), grid)


class ArithmeticInHalf(Nearest):
    """Divides in float16, which a model loaded in half precision does."""

    def steps(self, weight, scale):
        return np.float32(np.rint(weight.astype(np.float16) / scale.astype(np.float16)))


class ArithmeticInBfloat16(Nearest):
    """Divides in bfloat16: 8 bits of significand cannot hold 255 steps and a half."""

    def steps(self, weight, scale):
        w, s = (torch.from_numpy(np.ascontiguousarray(x)).bfloat16() for x in (weight, scale))
        return torch.round(w / s).float().numpy()


class WeightsRoundedToHalf(Nearest):
    """Rounds the weights to float16 before it looks at them, as loading with torch_dtype does."""

    def weight(self, problem):
        return np.float32(np.float16(problem.weight.contiguous().numpy()))


class LastColumnForgotten(Nearest):
    """Loops over all columns but the last one, whose codes stay 0."""

    def steps(self, weight, scale):
        steps = np.rint(weight / scale)
        steps[:, -1] = 0
        return steps


# Codes ----------------------------------------------------------------------------------------


class QmaxOffByOne(Nearest):
    """Clips to qmax - 1, as an exclusive end of a range does."""

    def codes(self, codes, grid):
        return np.clip(codes, grid.qmin, grid.qmax - 1)


class QminOffByOne(Nearest):
    """Clips to qmin + 1, as a restricted range does where the full one was asked for."""

    def codes(self, codes, grid):
        return np.clip(codes, grid.qmin + 1, grid.qmax)


class NoClip(Nearest):
    """Does not clip: the largest weight of the full symmetric grid lies half a step beyond it."""

    def codes(self, codes, grid):
        return codes


class CodesThroughInt8(Nearest):
    """Keeps codes in int8, where 128..255 become negative."""

    def codes(self, codes, grid):
        return np.clip(codes, grid.qmin, grid.qmax).astype(np.int16).astype(np.int8)


class NibblesSwapped(Nearest):
    """Stores each two neighbouring codes the other way round, as the wrong nibble order does."""

    def codes(self, codes, grid):
        codes = np.clip(codes, grid.qmin, grid.qmax)
        even = codes.shape[1] // 2 * 2
        pairs = codes[:, :even].reshape(len(codes), -1, 2)[:, :, ::-1]
        return np.concatenate([pairs.reshape(len(codes), even), codes[:, even:]], 1)


# Layers ---------------------------------------------------------------------------------------


class NanBecomesZero(Nearest):
    """Replaces what is not finite by 0 in silence, as nan_to_num does."""

    def weight(self, problem):
        weight = problem.weight.contiguous().numpy()
        return np.nan_to_num(weight, nan=0.0, posinf=0.0, neginf=0.0)


class EmptyLayerCrashes(Nearest):
    """Looks at the largest weight of all before anything else, which an empty layer has not."""

    def weight(self, problem):
        weight = super().weight(problem)
        self.largest = weight.max()
        return weight


class OneColumnSqueezed(Nearest):
    """Squeezes axes of length 1, so that a layer with one column loses it."""

    def codes(self, codes, grid):
        return np.squeeze(super().codes(codes, grid))


KILLED_BY = {
    RoundTrunc: "half_step",
    RoundFloor: "half_step",
    RoundCeil: "half_step",
    RoundHalfUp: "sign_symmetry",
    HalfAddedToAll: "half_step",
    RoundedTwice: "half_step",
    ZeroPointAddedFirst: "half_step",
    ArithmeticInHalf: "half_step",
    ArithmeticInBfloat16: "half_step",
    WeightsRoundedToHalf: "half_step",
    LastColumnForgotten: "half_step",
    QmaxOffByOne: "half_step",
    QminOffByOne: "half_step",
    NoClip: "packs",
    CodesThroughInt8: "packs",
    NibblesSwapped: "half_step",
    NanBecomesZero: "non_finite",
    EmptyLayerCrashes: "answers",
    OneColumnSqueezed: "packs",
}

MUTANTS = mutants(KILLED_BY)
