"""Wrong ways to round to the nearest of listed values, and right ones (docs/bounds.md, B2.d-f)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from qframe import Capabilities, Host, QuantizedWeight, RoundingProblem, Scheme, claims, rounding
from qframe.errors import NonFiniteError
from qframe.grids import grid_of
from tests.mutants.rounder_reference import NEAREST, Nearest, mutants, twins

__all__ = ["MUTANTS", "TWINS", "outputs"]


class NearestValue(Nearest):
    """The nearest of listed values, in NumPy."""

    capabilities = Capabilities(
        types=frozenset({"float"}),
        scale_dtypes=frozenset({"float32", "float16", "bfloat16", "e8m0", "e4m3"}),
    )

    def round(self, problem, rng):
        weight, scheme, grid = self.weight(problem), problem.scheme, problem.grid
        index = self.index(weight.shape[1], scheme)
        whole = self.of_tensor(problem)
        with np.errstate(all="ignore"):
            if self.searches(scheme):
                scale = rounding.fit_scales(problem.weight, scheme, grid)[0].numpy()
            else:
                scale = self.fit(*self.ends(weight, scheme), scheme, grid, whole)
            if not np.isfinite(scale).all():
                raise NonFiniteError(f"layer {problem.name!r}: a scale is not finite")
            codes = self.nearest(weight / self.own(scale, index, len(weight)), grid)
        zero = np.zeros(scale.shape, np.int16)
        made = self.result(codes, np.float32(scale), zero, index, grid)
        return dataclasses.replace(made, grid=grid, global_scale=whole)

    def of_tensor(self, problem):
        """Return the scale of the tensor, where the scheme has one."""
        return rounding.tensor_scale(problem.weight, problem.scheme, problem.grid)

    def fit(self, lo, hi, scheme, grid, whole):
        """Return the scale of each group."""
        absmax = np.maximum(np.abs(lo), np.abs(hi))
        if scheme.scale_rule == "ocp":
            scale = self.ocp(absmax, grid)
        else:
            ideal = absmax / np.float32(self.reach(grid))
            unit = 1 if whole is None else whole.numpy()
            top = np.float32(np.inf if whole is None else 448)
            scale = self.whole(np.minimum(ideal / unit, top), lo, hi, scheme) * unit
        return np.where(np.isfinite(absmax), scale, np.inf)

    def reach(self, grid):
        """Return what the largest weight becomes."""
        return grid.values[-1]

    def ocp(self, absmax, grid):
        """Return the scale of the OCP rule."""
        exponent = np.frexp(absmax)[1] - np.frexp(grid.values[-1])[1]
        power = np.ldexp(np.float32(1), np.clip(exponent, -127, 127))
        return np.where(absmax > 0, power, 1)

    def nearest(self, place, grid):
        """Return the codes of the values nearest to w / s."""
        values = np.array(grid.values)
        middles = (values[1:] + values[:-1]) / 2
        low = np.searchsorted(middles, np.float64(place), side="left")
        high = np.searchsorted(middles, np.float64(place), side="right")
        return grid.qmin + np.where((low + grid.qmin) % 2 == 0, low, high)


# Codes ----------------------------------------------------------------------------------------


class ValueBelow(NearestValue):
    """Searches the values and not their midpoints, so that everything is rounded down."""

    def nearest(self, place, grid):
        found = np.searchsorted(np.array(grid.values), place, side="right") - 1
        return grid.qmin + np.clip(found, 0, grid.levels - 1)


class NextValue(NearestValue):
    """Takes the code after the right one, as a search that counts from 1 does."""

    def nearest(self, place, grid):
        return np.minimum(super().nearest(place, grid) + 1, grid.qmax)


class CodesOfIntegers(NearestValue):
    """Rounds to integers, as if codes stood for themselves."""

    def nearest(self, place, grid):
        return np.clip(np.rint(place), grid.qmin, grid.qmax)


class TiesUp(NearestValue):
    """Rounds ties up, so that -W is not the mirror image of W."""

    def nearest(self, place, grid):
        values = np.array(grid.values)
        middles = (values[1:] + values[:-1]) / 2
        return grid.qmin + np.searchsorted(middles, np.float64(place), side="right")


class MidpointsInHalf(NearestValue):
    """Compares in float16, which has neither the range nor the digits."""

    def nearest(self, place, grid):
        return super().nearest(np.float16(place), grid)


class SubnormalsToZero(NearestValue):
    """Gives the smallest values of either sign to 0, as hardware that flushes them does."""

    def nearest(self, place, grid):
        codes = super().nearest(place, grid)
        return np.where(np.abs(codes) == 1, 0, codes)


class LargestForgotten(NearestValue):
    """Never gives the largest value: the search stops one before it."""

    def nearest(self, place, grid):
        return np.minimum(super().nearest(place, grid), grid.qmax - 1)


class GridForgotten(NearestValue):
    """Does not say what codes stand for, so that a reader would take them for integers."""

    def round(self, problem, rng):
        return dataclasses.replace(super().round(problem, rng), grid=None)


# Scales ---------------------------------------------------------------------------------------


class ReachIsTheLastCode(NearestValue):
    """Divides by qmax, the number of positive values, in place of the largest one."""

    def reach(self, grid):
        return grid.qmax


class PowerOfTwoRoundedDown(NearestValue):
    """Rounds scales of e8m0 down, which clips up to half of a range."""

    def store(self, scale, dtype):
        stored = super().store(scale, dtype)
        return np.where(stored > scale, stored / 2, stored) if dtype == "e8m0" else stored


class OcpTakesTheCeiling(NearestValue):
    """Rounds the exponent of the OCP rule up."""

    def ocp(self, absmax, grid):
        return 2 * super().ocp(absmax, grid)


class OcpWithoutTheElement(NearestValue):
    """Forgets the exponent of the largest value in the OCP rule."""

    def ocp(self, absmax, grid):
        return super().ocp(absmax, grid) * 2.0 ** (np.frexp(grid.values[-1])[1] - 1)


class TensorScaleDoubled(NearestValue):
    """Takes 224 for the largest scale: half of the range of e4m3 is never used."""

    def of_tensor(self, problem):
        whole = super().of_tensor(problem)
        return None if whole is None else whole * 2


class TensorScaleForgotten(NearestValue):
    """Multiplies scales with that of the tensor, but does not say so."""

    def round(self, problem, rng):
        return dataclasses.replace(super().round(problem, rng), global_scale=None)


class GroupScaleToNearest(NearestValue):
    """Rounds scales of e4m3 to nearest, as a cast does: the range of every other group is short."""

    def store(self, scale, dtype):
        if dtype != "e4m3":
            return super().store(scale, dtype)
        near = torch.from_numpy(scale).to(torch.float8_e4m3fn).float()
        return np.where(near > 0, near, super().store(scale, dtype))


KILLED_BY = {
    ValueBelow: "half_step",
    NextValue: "half_step",
    CodesOfIntegers: "half_step",
    TiesUp: "sign_symmetry",
    MidpointsInHalf: "half_step",
    SubnormalsToZero: "half_step",
    LargestForgotten: "half_step",
    GridForgotten: "packs",
    ReachIsTheLastCode: "scheme_scale",
    PowerOfTwoRoundedDown: "scheme_scale",
    OcpTakesTheCeiling: "scheme_scale",
    OcpWithoutTheElement: "scheme_scale",
    TensorScaleDoubled: "scheme_scale",
    TensorScaleForgotten: "packs",
    GroupScaleToNearest: "scheme_scale",
}

MUTANTS = mutants(KILLED_BY)


# Twins ----------------------------------------------------------------------------------------


class TiesToZero(NearestValue):
    def nearest(self, place, grid):
        values = np.array(grid.values)
        middles = (values[1:] + values[:-1]) / 2
        low = np.searchsorted(middles, np.float64(place), side="left")
        high = np.searchsorted(middles, np.float64(place), side="right")
        return grid.qmin + np.where(place > 0, low, high)


class ByReciprocal(NearestValue):
    claims = (claims.HalfStep(roundings=2), *NEAREST[1:5])

    def nearest(self, place, grid):
        return super().nearest(np.nextafter(place, np.float32(0)), grid)


class ByDistance(NearestValue):
    def nearest(self, place, grid):
        values = np.array(grid.values)
        clipped = np.clip(np.float64(place), 2 * values[0], 2 * values[-1])
        far = np.abs(clipped[..., None] - values)
        order = np.argsort(np.abs(values), kind="stable")  # of two as near, the smaller one
        return grid.qmin + order[far[..., order].argmin(-1)]


TWINS = twins(
    {
        NearestValue: "NumPy's search, in float64",
        TiesToZero: "ties go towards zero, as gguf has it: as near, and as symmetric",
        ByDistance: "looks at the distance of every value, without midpoints",
        ByReciprocal: "quotients are off by another rounding, and it says so",
    }
)


def outputs(plugin):
    """Return what the codes of ordinary layers stand for, in formats that everybody uses."""
    host = Host.discover()
    for seed, name in enumerate(("NF4", "MXFP4", "NVFP4", "W8A16_FP8")):
        weight = torch.from_numpy(np.float32(np.random.default_rng(seed).normal(size=(16, 64))))
        scheme = Scheme.preset(name)
        grid = grid_of(host, scheme)
        problem = RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
        made: QuantizedWeight = plugin.round(problem, np.random.default_rng(0))
        yield rounding.dequantize(made).numpy()
