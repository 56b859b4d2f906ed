"""Wrong ways to learn rounding, and right ones that do it otherwise (docs/bounds.md, B10).

All claim what qframe's autoround claims.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from qframe import Capabilities, rounding
from qframe.errors import UncalibratedLayerError
from qframe_plugins.rounders.autoround import AutoRound
from qframe_plugins.rounders.gptq import revive
from tests.mutants.rounder_reference import mutants, outputs, twins

__all__ = ["MUTANTS", "TWINS", "outputs"]


class Learner:
    """Offsets alone are learned, on the scheme's scales, all in float64."""

    name = "learner"
    needs = frozenset({"hessian"})
    capabilities = Capabilities(num_bits=frozenset({2, 3}), strategies=frozenset({"group"}))
    claims = AutoRound(correction=0.0).claims
    iterations, rate, reach = 12, 1 / 12, 1 / 2

    def round(self, problem, rng):
        if problem.tokens == 0:
            raise UncalibratedLayerError(f"layer {problem.name!r} saw no tokens")
        start, hessian = rounding.to_nearest(problem), self.hessian(problem)
        index, rows = start.group_index, len(problem.weight)
        weight = self.aim(problem)
        scale, zero = (
            rounding.expand(each, index, rows).double().numpy()
            for each in (start.scale, start.zero_point)
        )
        codes = start.codes.double().numpy()
        offset, best, kept = self.first(weight.shape), None, codes
        for step in range(self.iterations + 1):
            error = weight - scale * (codes - zero)
            pull = error @ hessian
            loss = self.loss(error, pull)
            take = self.take(loss, best, step)
            best = loss if best is None else np.where(take, loss, best)
            kept = np.where(take[:, None], codes, kept)
            place = self.nearest(weight / scale + offset) + zero
            inside = (place >= problem.grid.qmin) & (place <= problem.grid.qmax)
            speed = self.rate * (1 - step / self.iterations)
            offset = np.clip(offset + speed * np.sign(pull) * inside, -self.reach, self.reach)
            place = self.nearest(weight / scale + offset) + zero
            codes = np.clip(place, problem.grid.qmin, problem.grid.qmax)
        return self.result(start, kept, codes)

    def hessian(self, problem):
        return problem.statistics["hessian"].numpy()

    def aim(self, problem):
        """Return what the codes should come near to."""
        return problem.weight.double().numpy()

    def first(self, shape):
        """Return the offsets to begin with."""
        return np.zeros(shape)

    def nearest(self, x):
        return np.rint(x)

    def loss(self, error, pull):
        """Return the objective of each row."""
        return (error * pull).sum(1)

    def take(self, loss, best, step):
        """Return which rows keep what they have now."""
        return np.ones(len(loss), np.bool_) if best is None else loss < best

    def result(self, start, kept, last):
        return dataclasses.replace(start, codes=torch.from_numpy(np.int16(kept)))


class Swept(Learner):
    """Makes each code the best one in turn, as the others are, after what was learned."""

    sweeps = 3

    def result(self, start, kept, last):
        return super().result(start, self.swept(kept.copy()), last)

    def round(self, problem, rng):
        self.problem = problem
        return super().round(problem, rng)

    def swept(self, codes):
        problem, start = self.problem, rounding.to_nearest(self.problem)
        weight, hessian = problem.weight.double().numpy(), self.hessian(problem)
        scale, zero = (
            rounding.expand(each, start.group_index, len(weight)).double().numpy()
            for each in (start.scale, start.zero_point)
        )
        for _ in range(self.sweeps):
            error = weight - scale * (codes - zero)
            for j in np.flatnonzero(hessian.diagonal() > 0):
                s, x = scale[:, j], weight[:, j] / scale[:, j]
                place = np.rint(codes[:, j] - zero[:, j] + self.change(error, hessian, j) / s)
                place = self.reached(place, x) + zero[:, j]
                codes[:, j] = np.clip(place, problem.grid.qmin, problem.grid.qmax)
                self.replaced(error, j, weight[:, j] - s * (codes[:, j] - zero[:, j]))
        return codes

    def change(self, error, hessian, j):
        """Return by what the values of a column should change."""
        return error @ hessian[:, j] / hessian[j, j]

    def reached(self, place, x):
        """Return the nearest place that an offset can give."""
        return np.clip(place, np.rint(x - 1 / 2), np.rint(x + 1 / 2))

    def replaced(self, error, j, new):
        error[:, j] = new


# Wrong ----------------------------------------------------------------------------------------


class LastKept(Learner):
    """Returns the last iterate, not the best one: signed steps overshoot."""

    def result(self, start, kept, last):
        return super().result(start, last, last)


class StartNotCompared(Learner):
    """Compares iterates with one another, and leaves out the one that it starts from."""

    def take(self, loss, best, step):
        return super().take(loss, best, step) | (step == 1)


class WholeLayerCompared(Learner):
    """Keeps the iterate that is best for the layer as a whole, though some rows lose by it."""

    def take(self, loss, best, step):
        if best is None:
            return super().take(loss, best, step)
        return np.full(len(loss), loss.sum() < best.sum())


class WorstKept(Learner):
    """Keeps the largest error."""

    def take(self, loss, best, step):
        return np.ones(len(loss), np.bool_) if best is None else loss > best


class WeightErrorCompared(Learner):
    """Compares errors of the weights without the Hessian; the gradients have it."""

    def loss(self, error, pull):
        return -np.abs(error).sum(1)


class OffsetsUnbounded(Learner):
    """Does not clip offsets to 1/2, so that weights move by several steps."""

    rate, reach = 1.0, 8.0


class StartsAboveZero(Learner):
    """Starts offsets at a quarter of a step, as drawn from [0, 1/2) they would be on average."""

    def first(self, shape):
        return np.full(shape, 1 / 4)


class TiesUp(Learner):
    """Rounds ties up, by floor(x + 1/2)."""

    def nearest(self, x):
        return np.floor(x + 0.5)


class HessianOfOneKind(Learner):
    """Takes the identity for the Hessian: a wrong key gives the default."""

    def hessian(self, problem):
        return np.eye(problem.weight.shape[1])


class SweptAllAtOnce(Swept):
    """Changes all codes of a sweep by the same errors: together they overshoot."""

    def replaced(self, error, j, new):
        pass


class SweptTheOtherWay(Swept):
    """Changes codes away from where the loss is least: a sign is wrong."""

    def change(self, error, hessian, j):
        return -super().change(error, hessian, j)


class SweptWithoutWeight(Swept):
    """Forgets what the column itself weighs in the loss."""

    def change(self, error, hessian, j):
        return error @ hessian[:, j]


class SweptAnywhere(Swept):
    """Gives codes that no offset can give, so that weights move by several steps."""

    def reached(self, place, x):
        return place


class Towards(Learner):
    """Learns for the outputs that the layer would have, had nothing before it been quantized."""

    needs = frozenset({"hessian", "mismatch"})
    claims = AutoRound(correction=1.0).claims
    share, damp = 1.0, 0.1

    def aim(self, problem):
        weight = problem.weight.double().numpy()
        hessian, _ = revive(problem.statistics["hessian"])
        damped = hessian.numpy() + self.damp * float(hessian.diagonal().mean()) * np.eye(
            len(hessian)
        )
        moved = self.turned(problem.statistics["mismatch"].numpy())
        return weight + self.share * np.linalg.solve(damped, (weight @ moved).T).T

    def turned(self, moved):
        return moved


class PulledAway(Towards):
    """Pulls from the outputs that the layer should have: a sign is wrong."""

    share = -1.0


class PulledTwice(Towards):
    """Pulls twice as far."""

    share = 2.0


class MovedTheOtherWay(Towards):
    """Takes M for its transpose."""

    def turned(self, moved):
        return moved.T


class NotPulled(Towards):
    """Makes up for nothing, though it claims to."""

    share = 0.0


class NearestOfTheAim(Towards):
    """Compares with rounding the aim to nearest, which may be worse than rounding the weight."""

    def take(self, loss, best, step):
        return super().take(loss, best, step) | (step == 1)


# Right ----------------------------------------------------------------------------------------


class AtOnce(Learner):
    """Takes large steps, so that every offset is at an end after a few."""

    iterations, rate = 5, 0.4


KILLED_BY = {
    LastKept: "no_worse_than_nearest",
    StartNotCompared: "no_worse_than_nearest",
    WholeLayerCompared: "no_worse_than_nearest",
    WorstKept: "no_worse_than_nearest",
    WeightErrorCompared: "no_worse_than_nearest",
    OffsetsUnbounded: "radius",
    StartsAboveZero: "sign_symmetry",
    TiesUp: "sign_symmetry",
    HessianOfOneKind: "calibration",
    SweptAllAtOnce: "no_worse_than_nearest",
    SweptTheOtherWay: "no_worse_than_nearest",
    SweptWithoutWeight: "no_worse_than_nearest",
    SweptAnywhere: "radius",
}
OF_OUTPUTS = dict.fromkeys(
    (PulledAway, PulledTwice, MovedTheOtherWay, NotPulled, NearestOfTheAim), "no_worse_than_nearest"
)

MUTANTS = [*mutants(KILLED_BY), *mutants(OF_OUTPUTS)]
TWINS = twins(
    {
        Learner: "learns offsets and no ranges, in float64",
        Towards: "makes up for the layers before, in float64",
        AtOnce: "other rates and fewer steps",
        Swept: "each code in turn after that",
    }
)
