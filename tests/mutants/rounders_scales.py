"""Wrong scales, zero points and groups of round-to-nearest (docs/bounds.md, B1.c and B1.f)."""

from __future__ import annotations

import numpy as np
import torch

from tests.mutants.rounder_reference import Nearest, mutants, outputs

__all__ = ["MUTANTS", "TWINS", "outputs"]


# Scales ---------------------------------------------------------------------------------------


class OneLevelTooMany(Nearest):
    """Divides the range by the number of codes and not by the number of steps between them."""

    def scale(self, lo, hi, grid, scheme):
        levels = grid.qmax - grid.qmin
        return super().scale(lo, hi, grid, scheme) * np.float32(levels / (levels + 1))


class MaxNotAbsmax(Nearest):
    """Takes max(w) for max(|w|): groups whose largest weight is negative are clipped."""

    def range(self, lo, hi):
        return np.maximum(-hi, lo), np.maximum(hi, 0)


class MeanNotMax(Nearest):
    """Takes the scale from a typical weight instead of the largest, as ternary nets do."""

    def scale(self, lo, hi, grid, scheme):
        return super().scale(lo, hi, grid, scheme) / 2


class RangeWithoutZero(Nearest):
    """Spans [min, max] also where that does not hold 0, so that the zero point is clipped."""

    def range(self, lo, hi):
        return lo, hi


class EpsilonOfScale(Nearest):
    """Keeps scales above 1e-5, as a clamp against division by zero does: small weights become 0."""

    def store(self, scale, dtype):
        return super().store(np.maximum(scale, np.float32(1e-5)), dtype)


class EpsilonAdded(Nearest):
    """Adds 1e-8 to every scale against division by zero."""

    def store(self, scale, dtype):
        return super().store(scale + np.float32(1e-8), dtype)


class ScaleStoredToNearest(Nearest):
    """Stores scales rounded to nearest: one that is rounded down clips the largest weight."""

    def store(self, scale, dtype):
        kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
        return torch.from_numpy(scale).to(kind).float().numpy()


class ScaleCutOff(Nearest):
    """Stores bfloat16 scales by dropping the lower 16 bits, which rounds them down."""

    def store(self, scale, dtype):
        if dtype != "bfloat16":
            return super().store(scale, dtype)
        return (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


class ScaleUnderflowsToOne(Nearest):
    """Takes 1 for a scale that underflowed, as `scale[scale == 0] = 1` does."""

    def whole(self, scale, lo, hi, scheme):
        scale = self.store(np.float32(scale), scheme.scale_dtype)
        return np.float32(np.where(scale == 0, 1, scale))


class ScaleOfZerosIsZero(Nearest):
    """Leaves groups of zeros with scale 0, and divides 0 by 0."""

    def whole(self, scale, lo, hi, scheme):
        return self.store(np.float32(scale), scheme.scale_dtype)

    def codes(self, codes, grid):
        return np.clip(np.nan_to_num(codes), grid.qmin, grid.qmax)


class AlwaysFourBits(Nearest):
    """Makes the scales of 4 bits whatever the number of bits is, as a constant left in does."""

    def scale(self, lo, hi, grid, scheme):
        levels = grid.qmax - grid.qmin
        return super().scale(lo, hi, grid, scheme) * np.float32(levels / 15)


class OneScalePerTensor(Nearest):
    """Reduces over the whole tensor although a scale per channel or group was asked for."""

    def scale(self, lo, hi, grid, scheme):
        if lo.size:
            lo, hi = np.full_like(lo, lo.min()), np.full_like(hi, hi.max())
        return super().scale(lo, hi, grid, scheme)


class RuleOfFullGrid(Nearest):
    """Takes the scale of the full grid where the restricted one was asked for."""

    def scale(self, lo, hi, grid, scheme):
        scale = super().scale(lo, hi, grid, scheme)
        if scheme.symmetric and grid.qmin == -grid.qmax:
            return scale * np.float32(grid.qmax / (grid.qmax + 0.5))
        return scale


# Zero points ----------------------------------------------------------------------------------


class ZeroPointTruncated(Nearest):
    """Casts the zero point to int without rounding it: one end is clipped by up to a step."""

    def zero(self, lo, hi, scale, grid):
        lo, _ = self.range(lo, hi)
        return np.clip(np.trunc(grid.qmin - lo / scale), grid.qmin, grid.qmax)


class ZeroPointOffByOne(Nearest):
    """Adds one zero point and stores another: GPTQ checkpoints hold zero point minus one."""

    def result(self, codes, scale, zero, index, grid):
        zero = np.where(zero > grid.qmin, zero - 1, zero)
        return super().result(codes, scale, zero, index, grid)


class ZeroPointMirrored(Nearest):
    """Stores qmax - z for z, which the other convention, w = s (z - c), would need."""

    def result(self, codes, scale, zero, index, grid):
        if grid.qmin == 0:
            zero = grid.qmax - zero
        return super().result(codes, scale, zero, index, grid)


# Groups ---------------------------------------------------------------------------------------


class RaggedGroupForgotten(Nearest):
    """Counts columns // group_size groups; what is left over has scale 1."""

    def whole(self, scale, lo, hi, scheme):
        scale = super().whole(scale, lo, hi, scheme)
        if self.ragged:
            scale[:, -1:] = 1
        return scale

    def parts(self, weight, width):
        self.ragged = weight.shape[1] % width != 0
        return super().parts(weight, width)

    def ends(self, weight, scheme):
        self.ragged = False
        return super().ends(weight, scheme)


class TailUsesGroupBefore(Nearest):
    """Rounds the ragged last group with the scale of the group before it."""

    def own(self, each, index, rows):
        counts = np.bincount(index)
        if len(counts) > 1 and counts[-1] < counts[0]:
            index = np.minimum(index, len(counts) - 2)
        return super().own(each, index, rows)


class ScaleOfNextGroup(Nearest):
    """Rounds every group with the scale of the next one: an index that starts at 1."""

    def own(self, each, index, rows):
        return super().own(np.roll(each, -1, axis=1), index, rows)


class GroupsDoubled(Nearest):
    """Makes one scale for two groups, as a group size that counts something else does."""

    def scale(self, lo, hi, grid, scheme):
        lo, hi = lo.copy(), hi.copy()
        even = lo.shape[1] // 2 * 2
        lo[:, :even] = np.minimum(lo[:, :even:2], lo[:, 1:even:2]).repeat(2, axis=1)
        hi[:, :even] = np.maximum(hi[:, :even:2], hi[:, 1:even:2]).repeat(2, axis=1)
        return super().scale(lo, hi, grid, scheme)


class GroupsRunDown(Nearest):
    """Reads the weight as if columns lay one after the other: groups run down instead of along."""

    def ends(self, weight, scheme):
        return super().ends(weight.T.reshape(weight.shape), scheme)


class GroupIndexFromOne(Nearest):
    """Numbers the groups from 1."""

    def result(self, codes, scale, zero, index, grid):
        return super().result(codes, scale, zero, index + 1, grid)


KILLED_BY = {
    OneLevelTooMany: "scheme_scale",
    MaxNotAbsmax: "scheme_scale",
    MeanNotMax: "scheme_scale",
    RangeWithoutZero: "scheme_scale",
    EpsilonOfScale: "scheme_scale",
    EpsilonAdded: "scheme_scale",
    ScaleStoredToNearest: "scheme_scale",
    ScaleCutOff: "scheme_scale",
    ScaleUnderflowsToOne: "scheme_scale",
    ScaleOfZerosIsZero: "packs",
    AlwaysFourBits: "scheme_scale",
    OneScalePerTensor: "scheme_scale",
    RuleOfFullGrid: "scheme_scale",
    ZeroPointTruncated: "coverage",
    ZeroPointOffByOne: "half_step",
    ZeroPointMirrored: "half_step",
    RaggedGroupForgotten: "scheme_scale",
    TailUsesGroupBefore: "half_step",
    ScaleOfNextGroup: "half_step",
    GroupsDoubled: "scheme_scale",
    GroupsRunDown: "scheme_scale",
    GroupIndexFromOne: "packs",
}

MUTANTS = mutants(KILLED_BY)
TWINS = ()  # those of rounders_rtn.py have other scales too
