"""Wrong half-quadratic searches, and right ones that do it otherwise (docs/bounds.md, B10.e).

All claim what qframe's hqq claims.
"""

from __future__ import annotations

import numpy as np
import torch

from qframe import Capabilities, QuantizedWeight, rounding
from qframe.errors import NonFiniteError
from qframe_plugins.rounders.hqq import HQQ
from tests.mutants.rounder_reference import mutants, outputs, twins

__all__ = ["MUTANTS", "TWINS", "outputs"]

POWER, BETA, ITERATIONS = 0.7, 10.0, 5


class HalfQuadratic:
    """Shrinkage, zero points and scales in NumPy, all groups of a layer at once."""

    name = "half-quadratic"
    needs = frozenset()
    capabilities = Capabilities(num_bits=frozenset({2, 3}), strategies=frozenset({"group"}))
    claims = HQQ().claims

    def round(self, problem, rng):
        scheme, grid = problem.scheme, problem.grid
        rows, columns = problem.weight.shape
        if not bool(torch.isfinite(problem.weight).all()):
            raise NonFiniteError(f"layer {problem.name!r}: a weight is not finite")
        index = rounding.group_index(columns, scheme)
        width, groups = scheme.group_width(columns), scheme.groups(columns)
        weight = np.zeros((rows, groups * width))
        weight[:, :columns] = problem.weight.numpy()
        used = np.arange(groups * width).reshape(groups, width) < columns
        self.grid, self.count = grid, used.sum(1)[:, None]
        weight = weight.reshape(rows, groups, width)
        starts = [
            [
                each.double().numpy()[..., None]
                for each in rounding.fit_scales(problem.weight, rule, grid, name=problem.name)
            ]
            for rule in (scheme, scheme.replace(observer="minmax"))
        ]
        unit = starts[1][0]
        found = None
        with np.errstate(all="ignore"):
            for scale, zero in self.candidates(weight, starts, unit, scheme):
                loss = self.objective(weight, scale, zero, unit)
                if found is None:
                    found, least = [scale, zero], loss
                    continue
                take = self.better(loss, least) & (scale > 0) & np.isfinite(scale)
                least = np.where(take, loss, least)
                found = [np.where(take, *p) for p in zip((scale, zero), found, strict=True)]
        scale, zero = found
        codes = self.encode(weight, scale, zero)
        return QuantizedWeight(
            codes=torch.from_numpy(np.int16(codes.reshape(rows, groups * width)[:, :columns])),
            scale=torch.from_numpy(np.float32(scale[..., 0])),
            zero_point=torch.from_numpy(np.int16(zero[..., 0])),
            group_index=index,
        )

    def candidates(self, weight, starts, unit, scheme):
        """Yield scales and zero points, first those of round-to-nearest."""
        yield from starts
        zero = starts[1][1]
        points = [zero] if scheme.symmetric else self.points(self.zero_point(weight, unit, zero))
        for point in points:
            for scale in self.stored(self.scale(weight, unit, point), scheme.scale_dtype):
                yield scale, point

    def points(self, real):
        """Return integer zero points for real ones."""
        real = np.clip(real, self.grid.qmin, self.grid.qmax)
        return np.floor(real), np.ceil(real)

    def stored(self, scale, dtype):
        """Return real scales as they can be stored."""
        return [self.store(np.float32(scale), dtype)]

    def store(self, scale, dtype):
        return np.float64(rounding.round_up(torch.from_numpy(scale), dtype).numpy())

    def steps(self, weight, scale, zero):
        """Return the nearest codes minus the zero point."""
        low, high = self.grid.qmin - zero, self.grid.qmax - zero
        return np.clip(np.rint(weight / scale), low, high)

    def encode(self, weight, scale, zero):
        """Return the codes that are stored."""
        return self.steps(weight, scale, zero) + zero

    def shrink(self, x):
        size = np.abs(x)
        less = np.where(size > 0, size - size ** (POWER - 1) / BETA, 0)
        return np.sign(x) * np.maximum(less, 0)

    def zero_point(self, weight, scale, zero):
        point, x = np.float64(zero), weight / scale
        for _ in range(ITERATIONS):
            codes = np.clip(np.rint(x + point), self.grid.qmin, self.grid.qmax)
            spread = codes - (x - self.shrink(x - codes + point))
            point = (spread * (np.arange(weight.shape[-1]) < self.count)).sum(-1, keepdims=True)
            point = point / self.count
        return point

    def scale(self, weight, scale, zero):
        for _ in range(ITERATIONS):
            k, x = self.steps(weight, scale, zero), weight / scale
            products = (k * (x - self.shrink(x - k))).sum(-1, keepdims=True)
            squares = (k * k).sum(-1, keepdims=True)
            moves = (squares > 0) & (products > 0)
            scale = np.where(moves, scale * products / np.where(moves, squares, 1), scale)
        return scale

    def objective(self, weight, scale, zero, unit):
        gaps = np.abs(weight - scale * self.steps(weight, scale, zero)) / unit
        return np.cumsum(gaps, -1)[..., -1:]

    def better(self, loss, least):
        return loss < least


# Wrong ----------------------------------------------------------------------------------------


class StartForgotten(HalfQuadratic):
    """Believes in the search: what it starts from is not among what is compared."""

    def candidates(self, weight, starts, unit, scheme):
        found = list(super().candidates(weight, starts, unit, scheme))[2:]
        zeros = ~weight.any(-1, keepdims=True)
        for scale, zero in found:
            valid = (scale > 0) & np.isfinite(scale) & ~zeros
            yield tuple(np.where(valid, *p) for p in zip((scale, zero), starts[0], strict=True))


class SquaresCompared(HalfQuadratic):
    """Compares squares of errors, which clipping raises."""

    def objective(self, weight, scale, zero, unit):
        return np.square((weight - scale * self.steps(weight, scale, zero)) / unit).sum(
            -1, keepdims=True
        )


class MinmaxForgotten(HalfQuadratic):
    """Shrinks the range it starts from by a tenth, and never looks at the whole of it."""

    def candidates(self, weight, starts, unit, scheme):
        scale = self.store(np.float32(starts[0][0] * 0.9), scheme.scale_dtype)
        zeros = ~weight.any(-1, keepdims=True)
        yield np.where(zeros, starts[0][0], scale), starts[0][1]


class CodesOfTheRealZeroPoint(HalfQuadratic):
    """Encodes with the real zero point, and stores that rounded, as a cast does."""

    def candidates(self, weight, starts, unit, scheme):
        self.real = None
        yield from super().candidates(weight, starts, unit, scheme)

    def points(self, real):
        self.real = real
        return super().points(real)

    def encode(self, weight, scale, zero):
        if self.real is None:
            return super().encode(weight, scale, zero)
        point = np.where(np.abs(self.real - zero) < 1, self.real, zero)
        return np.clip(np.rint(weight / scale + point), self.grid.qmin, self.grid.qmax)


class LargestKept(HalfQuadratic):
    """Keeps the largest objective."""

    def better(self, loss, least):
        return loss > least


class ShrinkageInUnits(HalfQuadratic):
    """Shrinks errors in units of the weights, as the published solver does, yet claims to scale."""

    def scale(self, weight, scale, zero):
        self.unit = scale
        return super().scale(weight, scale, zero)

    def shrink(self, x):
        unit = getattr(self, "unit", 1.0)
        return super().shrink(x * unit) / unit


class NanAsZero(HalfQuadratic):
    """Replaces weights that are not finite by 0 without a word."""

    def round(self, problem, rng):
        problem.weight.nan_to_num_(0.0, 0.0, 0.0)
        return super().round(problem, rng)


# Right ----------------------------------------------------------------------------------------


class NearestZeroPoint(HalfQuadratic):
    """Rounds the real zero point, instead of trying both integers beside it."""

    def points(self, real):
        return (np.rint(np.clip(real, self.grid.qmin, self.grid.qmax)),)


KILLED_BY = {
    StartForgotten: "no_worse_power",
    SquaresCompared: "no_worse_power",
    MinmaxForgotten: "no_worse_power",
    CodesOfTheRealZeroPoint: "half_step",
    LargestKept: "no_worse_power",
    ShrinkageInUnits: "scale_equivariance",
    NanAsZero: "non_finite",
}

MUTANTS = mutants(KILLED_BY)
TWINS = twins(
    {
        HalfQuadratic: "other constants, in NumPy, and scales that are rounded up only",
        NearestZeroPoint: "one integer zero point is tried, and not two",
    }
)
