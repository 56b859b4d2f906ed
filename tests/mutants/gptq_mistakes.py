"""GPTQs that are wrong in one step each.

Most are mistakes that have been made: an order that is not undone, a Hessian that lacks tokens, a
scale that is older than the weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from qframe import RoundingProblem, rounding
from qframe.certificates import group_ranges
from tests.mutants.gptq_numpy import LDLQ, NumpyGPTQ

# Errors that are fed back wrongly -------------------------------------------------------------


class NoUpdate(NumpyGPTQ):
    def loss(self, run, j, value):
        return np.zeros(len(run.weight))


class WrongSign(NumpyGPTQ):
    def loss(self, run, j, value):
        return value - run.weight[:, j]


class ErrorFromOriginal(NumpyGPTQ):
    def loss(self, run, j, value):
        return run.original[:, j] - value


class ErrorNotDivided(NumpyGPTQ):
    def loss(self, run, j, value):
        return (run.weight[:, j] - value) * run.factor[j, j]


class ErrorBeforeClipping(NumpyGPTQ):
    def value(self, run, j):
        scale, _ = run.of_column(j)
        return scale * np.rint(run.weight[:, j] / scale)


class ErrorFromFloat16(NumpyGPTQ):
    def value(self, run, j):
        with np.errstate(over="ignore"):
            value = super().value(run, j)
            half = np.float16(value).astype(np.float64)
        return np.where(np.isfinite(half), half, value)


class ErrorWithoutZeroPoint(NumpyGPTQ):
    def value(self, run, j):
        scale, zero = run.of_column(j)
        return scale * (run.codes[:, j] - zero + (zero != 0))


class UpdatesInBfloat16(NumpyGPTQ):
    def update(self, run, j, stop):
        super().update(run, j, stop)
        later = torch.from_numpy(run.weight[:, j + 1 : stop]).to(torch.bfloat16)
        run.weight[:, j + 1 : stop] = later.double().numpy()


class UpdateOneShort(NumpyGPTQ):
    def update(self, run, j, stop):
        super().update(run, j, stop - 1)


class LazyUpdateMissing(NumpyGPTQ):
    def catch_up(self, run, start, stop):
        pass


class LazyUpdateForgetsLast(NumpyGPTQ):
    def catch_up(self, run, start, stop):
        for k in range(start, max(stop - 1, start + 1)):
            run.weight[:, stop:] -= run.error[:, k, None] * run.factor[k, stop:]


class LazyUpdateTwice(NumpyGPTQ):
    def catch_up(self, run, start, stop):
        super().catch_up(run, start, stop)
        super().catch_up(run, start, min(start + 1, stop))


# Wrong factors --------------------------------------------------------------------------------


class StaleCholesky(NumpyGPTQ):
    def factor(self, damped):
        super().factor(damped)
        inverse = self.inverse(damped)
        return inverse / np.sqrt(inverse.diagonal())[:, None]


class WrongTriangle(NumpyGPTQ):
    def factor(self, damped):
        super().factor(damped)
        lower = np.linalg.cholesky(self.inverse(damped)[::-1, ::-1])
        return lower[::-1, ::-1]


class HessianNotInverted(NumpyGPTQ):
    def inverse(self, damped):
        return damped


class InverseInFloat16(NumpyGPTQ):
    def inverse(self, damped):
        size = damped.diagonal().max()
        rounded = np.float16(damped / size).astype(np.float64) * size
        np.fill_diagonal(rounded, damped.diagonal())
        return np.linalg.inv(rounded)


# Wrong Hessians -------------------------------------------------------------------------------


class DiagonalOnly(NumpyGPTQ):
    def hessian(self, problem):
        return np.diag(super().hessian(problem).diagonal())


class TokenLeftOut(NumpyGPTQ):
    def hessian(self, problem):
        hessian = super().hessian(problem)
        j = int(hessian.diagonal().argmax())
        if hessian[j, j] > 0:
            one = hessian[j] / np.sqrt(hessian[j, j])
            hessian -= np.outer(one, one) / 2
        return hessian


class NotDamped(NumpyGPTQ):
    def damping(self, hessian, share):
        return super().damping(hessian, share) / 1000


class DampedTwice(NumpyGPTQ):
    def damping(self, hessian, share):
        return 2 * super().damping(hessian, share)


class DampedByLargest(NumpyGPTQ):
    def damping(self, hessian, share):
        return share * hessian.diagonal().max()


class DampedByTrace(NumpyGPTQ):
    def damping(self, hessian, share):
        return share * hessian.diagonal().sum()


class DeadIgnored(NumpyGPTQ):
    def revive(self, hessian):
        return hessian if hessian.any() else super().revive(hessian)


class RescaledBeforeDeadFix(NumpyGPTQ):
    def revive(self, hessian):
        hessian = hessian / 1000
        np.fill_diagonal(hessian, np.where(hessian.diagonal() == 0, 1, hessian.diagonal()))
        return hessian


class DeadWeightsZeroed(NumpyGPTQ):
    def start(self, problem, order, factor):
        run = super().start(problem, order, factor)
        run.weight[:, self.hessian(problem).diagonal()[order] == 0] = 0
        return run


# Wrong orders, groups and reports ----------------------------------------------------------------


class Ascending(NumpyGPTQ):
    def order(self, hessian):
        return np.argsort(hessian.diagonal(), kind="stable")


class BackwardsUndeclared(NumpyGPTQ):
    def order(self, hessian):
        return super().order(hessian)[::-1].copy()

    def reported(self, order):
        return super().reported(order).flip(0)


class OrderNotReported(NumpyGPTQ):
    def reported(self, order):
        return None


class NotPutBack(NumpyGPTQ):
    def put_back(self, codes, order):
        return codes.copy()


class PutBackByInverse(NumpyGPTQ):
    def put_back(self, codes, order):
        return codes[:, order]


class GroupsByPlace(NumpyGPTQ):
    def start(self, problem, order, factor):
        run = super().start(problem, order, factor)
        run.group = np.sort(run.group)
        return run

    def index(self, run, order):
        return rounding.group_index(run.columns, run.problem.scheme).numpy()


class GroupsAsStored(NumpyGPTQ):
    def index(self, run, order):
        return rounding.group_index(run.columns, run.problem.scheme).numpy()


class RaisedInSilence(LDLQ):
    def events(self, run, damp):
        return ()


class RaisedTwofold(LDLQ):
    def ladder(self):
        shares = [self.dampening_frac]
        while shares[-1] < self.dampening_cap:
            shares.append(shares[-1] * 2)
        return shares


class DampingMisreported(NumpyGPTQ):
    def result(self, run, stored, order, damp):
        made = super().result(run, stored, order, 10 * damp)
        return replace(made, info={"damp": 10 * damp})


# Wrong codes ----------------------------------------------------------------------------------


class Floor(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.floor(weight / scale) + zero, grid.qmin, grid.qmax)


class TowardsZero(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.trunc(weight / scale) + zero, grid.qmin, grid.qmax)


class HalfUp(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.floor(weight / scale + 1 / 2) + zero, grid.qmin, grid.qmax)


class ZeroPointOffByOne(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.rint(weight / scale) + zero + 1, grid.qmin, grid.qmax)


class HighestCodeUnused(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.rint(weight / scale) + zero, grid.qmin, grid.qmax - 1)


class LowestCodeUnused(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.rint(weight / scale) + zero, grid.qmin + 1, grid.qmax)


class QuotientInFloat16(NumpyGPTQ):
    def nearest(self, weight, scale, zero, grid):
        with np.errstate(over="ignore"):
            quotient = np.float16(weight / scale).astype(np.float64)
        return np.clip(np.rint(quotient) + zero, grid.qmin, grid.qmax)


# Wrong scales ---------------------------------------------------------------------------------


class ScaleFromOriginal(NumpyGPTQ):
    def now(self, run, j, last, start, stop):
        return run.original[:, j:last]


class ScaleFromBlockStart(NumpyGPTQ):
    """What the published loop does: find_params(W[:, j:j+g]), W updated between blocks only."""

    def now(self, run, j, last, start, stop):
        now = super().now(run, j, last, start, stop)
        for k in range(start, j):
            now += run.error[:, k, None] * run.factor[k, j:last]
        return now


class ScaleMissesLazyUpdate(NumpyGPTQ):
    def now(self, run, j, last, start, stop):
        return run.weight[:, j:last]


class ScaleOfFirstGroupOnly(NumpyGPTQ):
    def begin(self, run, j, start, stop):
        if j == 0:
            super().begin(run, j, start, stop)
            run.scale[:], run.zero[:] = run.scale[:, run.group[:1]], run.zero[:, run.group[:1]]


class ScaleFromCompensated(NumpyGPTQ):
    """Takes scales when groups begin, although they were to be those of the original weights."""

    def is_dynamic(self, scheme):
        return scheme.strategy == "group"


class ScaleShrunk(NumpyGPTQ):
    def fit(self, problem, weight, scheme=None):
        scale, zero = super().fit(problem, weight, scheme)
        return np.where(scale == 1, scale, scale * 0.75), zero


class ScaleOfNextGroup(NumpyGPTQ):
    def start(self, problem, order, factor):
        run = super().start(problem, order, factor)
        run.scale, run.zero = np.roll(run.scale, 1, 1), np.roll(run.zero, 1, 1)
        return run


class ScaleRoundedDown(NumpyGPTQ):
    def fit(self, problem, weight, scheme=None):
        single = (scheme or problem.scheme).replace(scale_dtype="float32")
        scale, zero = super().fit(problem, weight, single)
        bits = {"float32": 0, "float16": 13, "bfloat16": 16}[problem.scheme.scale_dtype]
        stored = np.float32(scale).view(np.int32) >> bits << bits
        down = stored.view(np.float32).astype(np.float64)
        return np.where(scale < 2.0**-14, super().fit(problem, weight, scheme)[0], down), zero


class ZeroPointTruncated(NumpyGPTQ):
    def fit(self, problem, weight, scheme=None):
        scale, zero = super().fit(problem, weight, scheme)
        if problem.scheme.symmetric:
            return scale, zero
        chosen = scheme or problem.scheme
        index = rounding.group_index(np.shape(weight)[1], chosen)
        part = RoundingProblem(
            name=problem.name,
            weight=torch.as_tensor(np.float32(weight)),
            scheme=chosen,
            grid=problem.grid,
        )
        low = np.minimum(group_ranges(part, index)[0], 0)
        zero = np.trunc(problem.grid.qmin - low / scale)
        return scale, np.clip(zero, problem.grid.qmin, problem.grid.qmax)
