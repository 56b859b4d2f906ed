"""Rounders of many kinds that keep the contract and their claims: no check may reject them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from qframe import Capabilities, QuantizedWeight, claims, rounding
from qframe.errors import UncalibratedLayerError
from tests.mutants.rounder_reference import NEAREST, Nearest, twins


class Plain(Nearest):
    claims = ()


class FourBits(Nearest):
    capabilities = Capabilities(
        num_bits=frozenset({4}), strategies=frozenset({"group"}), symmetric=frozenset({True})
    )


class SharedScales(Nearest):
    capabilities = Capabilities(row_independent=False)
    claims = (NEAREST[0], claims.SignSymmetric())

    def ends(self, weight, scheme):
        lo, hi = super().ends(weight, scheme)
        if lo.size:
            lo, hi = np.broadcast_to(lo.min(0), lo.shape), np.broadcast_to(hi.max(0), hi.shape)
        return lo, hi


class UpOrDown:
    """Up with the chance that makes the expected value right, as stochastic rounding does."""

    name = "up-or-down"
    needs = frozenset()
    capabilities = Capabilities()
    claims = (claims.Radius(1), claims.SchemeScale(), claims.Covers())

    def round(self, problem, rng):
        scheme = problem.scheme.replace(observer="minmax")
        rows, columns = problem.weight.shape
        scale, zero = rounding.fit_scales(problem.weight, scheme, problem.grid, name=problem.name)
        index = rounding.group_index(columns, scheme)
        step, origin = (
            rounding.expand(each, index, rows).double().numpy() for each in (scale, zero)
        )
        place = problem.weight.double().numpy() / step + origin
        codes = self.round_place(place, self.chance(place.shape, rng))
        codes = np.clip(codes, problem.grid.qmin, problem.grid.qmax)
        return QuantizedWeight(
            codes=torch.from_numpy(np.int16(codes)),
            scale=scale,
            zero_point=zero,
            group_index=index,
        )

    def chance(self, shape, rng):
        return rng.random(shape, dtype=np.float32)

    def round_place(self, place, chance):
        below = np.floor(place)
        return below + (chance < place - below)


class Unrepeatable(UpOrDown):
    capabilities = Capabilities(deterministic=False)

    def round(self, problem, rng):
        return super().round(problem, np.random.default_rng())


class OutputKnown(UpOrDown):
    """Needs the Hessian for its claim, and rounds columns that matter less up or down."""

    needs = frozenset({"hessian"})
    claims = (claims.Radius(1), claims.OutputBound(factor=2))

    def round(self, problem, rng):
        if problem.tokens == 0:
            raise UncalibratedLayerError(f"layer {problem.name!r} saw no tokens")
        diagonal = problem.statistics["hessian"].diagonal()
        self.matters = (diagonal > diagonal.median()).numpy()
        return super().round(problem, rng)

    def round_place(self, place, chance):
        return np.where(self.matters, np.rint(place), super().round_place(place, chance))


class Descent:
    """Rounds to nearest, then changes one code of a row at a time, while the output improves.

    Cyclic coordinate descent, as in QuantEase (Behdin et al., 2023, arXiv:2309.01885).
    """

    name = "column-descent"
    needs = frozenset({"hessian"})
    capabilities = Capabilities()
    claims = (claims.NoWorseThan(), claims.SchemeScale(), claims.Covers())

    def round(self, problem, rng):
        if problem.tokens == 0:
            raise UncalibratedLayerError(f"layer {problem.name!r} saw no tokens")
        nearest, hessian = rounding.to_nearest(problem), self.hessian(problem)
        rows, columns = problem.weight.shape
        weight = problem.weight.double()
        step, zero = (
            rounding.expand(each, nearest.group_index, rows).double()
            for each in (nearest.scale, nearest.zero_point)
        )
        codes = nearest.codes.double()
        for j in range(columns):
            if hessian[j, j] == 0:
                continue
            error = weight - step * (codes - zero)
            value, pull = weight[:, j] - error[:, j], error @ hessian[:, j] / hessian[j, j]
            lowest = self.target(value, pull)
            best = torch.round(lowest / step[:, j]) + zero[:, j]
            codes[:, j] = self.clamp(best, problem.grid)
        before, after = (
            self.losses(weight - step * (each - zero), hessian)
            for each in (nearest.codes.double(), codes)
        )
        chosen = torch.where(self.better(after, before)[:, None], codes, nearest.codes.double())
        chosen = chosen.clamp(problem.grid.qmin, problem.grid.qmax).to(torch.int16)
        return dataclasses.replace(nearest, codes=chosen)

    def hessian(self, problem):
        return problem.statistics["hessian"]

    def target(self, value, pull):
        return value + pull

    def losses(self, error, hessian):
        return ((error @ hessian) * error).sum(1)

    def better(self, after, before):
        return after < before

    def clamp(self, codes, grid):
        return codes.clamp(grid.qmin, grid.qmax)


class MeanSquare:
    """Shrinks the range of each group to the one with the least squared error of a few."""

    name = "mean-square"
    needs = frozenset()
    capabilities = Capabilities(strategies=frozenset({"channel", "group"}))
    claims = (claims.NoWorseThan(objective="weight"), claims.HalfStep(), claims.SignSymmetric())
    shrinks = (1.0, 0.9, 0.8)

    def round(self, problem, rng):
        weight, scheme = problem.weight, problem.scheme
        index = rounding.group_index(weight.shape[1], scheme)
        found = None
        for shrink in self.shrinks:
            made = self.nearest(problem, index, shrink)
            error = (weight.double() - rounding.dequantize(made)).square()
            loss = torch.zeros(made.scale.shape, dtype=torch.float64)
            loss.index_add_(1, index, error)
            if found is None:
                found, least = made, loss
                continue
            take = self.better(loss, least)
            least = torch.where(take, loss, least)
            found = dataclasses.replace(
                found,
                codes=torch.where(take[:, index.long()], made.codes, found.codes),
                scale=torch.where(take, made.scale, found.scale),
                zero_point=torch.where(take, made.zero_point, found.zero_point),
            )
        if scheme.observer == "mse":
            return rounding.to_nearest(problem)
        rounding.check_scales(found.scale, scheme, problem.name)
        return found

    def nearest(self, problem, index, shrink):
        """Round to nearest on a range that is shrunken."""
        parts = problem.weight.split(problem.scheme.group_width(problem.weight.shape[1]), dim=1)
        lo, hi = (torch.stack([end(p, 1) for p in parts], 1) for end in (torch.amin, torch.amax))
        scale, zero = rounding.scale_of_range(
            lo * shrink, hi * shrink, problem.scheme, problem.grid
        )
        zero = zero.to(torch.int16)
        codes = rounding.encode(problem.weight, scale, zero, index, problem.grid)
        return QuantizedWeight(codes=codes, scale=scale, zero_point=zero, group_index=index)

    def better(self, error, best):
        return error < best


class WeightedByAbsmax(Plain):
    """Makes the scale from the columns whose inputs are largest."""

    needs = frozenset({"absmax"})
    claims = (claims.HalfStep(),)

    def round(self, problem, rng):
        absmax = problem.statistics["absmax"].numpy()
        self.matters = absmax >= np.median(absmax)
        return super().round(problem, rng)

    def searches(self, scheme):
        return False

    def ends(self, weight, scheme):
        used = np.where(self.matters, weight, weight / 2)
        return super().ends(np.float32(used), scheme)


WHY = {
    Plain: "claims nothing: a black box that keeps the contract",
    FourBits: "can do one scheme only, and says so",
    SharedScales: "rows share their scales, and capabilities say that they are not independent",
    UpOrDown: "rounds up or down by chance, which is within one step",
    Unrepeatable: "takes a generator of its own, and says that it is not deterministic",
    OutputKnown: "twice the output error of half steps is all that a radius of one step allows",
    Descent: "moves codes by as much as helps the output, and is never worse than nearest",
    MeanSquare: "clips where that lessens the squared error, and is never worse than not clipping",
    WeightedByAbsmax: "clips columns whose inputs are small",
}

TWINS = twins(WHY)
