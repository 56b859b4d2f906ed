"""Wrong ways to learn the layers of a block together, and right ones that do it otherwise."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from qframe import Capabilities, claims, rounding
from qframe_conformance.rounder_blocks import SPARE
from qframe_plugins.rounders.rtn import RTN
from tests.mutants.rounder_reference import mutants, outputs, twins

__all__ = ["MUTANTS", "TWINS", "outputs"]


def values(codes):
    return {name: rounding.dequantize(each) for name, each in codes.items()}


class BlockLearner:
    """Moves one code of each row at a time, the way that the slope of the block's error says."""

    name = "block_learner"
    needs = frozenset()
    capabilities = Capabilities(num_bits=frozenset({2, 4}), strategies=frozenset({"group"}))
    claims = (claims.Radius(steps=1), claims.NoWorseBlock())
    steps = 6

    def round(self, problem, rng):
        return RTN().round(problem, rng)

    def learn(self, problem, rng):
        now = {name: rounding.to_nearest(layer) for name, layer in problem.layers.items()}
        kept, least = self.start(now), self.error(problem, now)
        moved = {name: torch.zeros_like(made.codes) for name, made in now.items()}
        for _ in range(self.steps):
            _, slopes = problem.slopes(values(now), self.inputs(problem))
            now = {
                name: self.step(problem.layers[name], made, slopes[name], moved[name])
                for name, made in now.items()
            }
            error = self.error(problem, now)
            if self.better(error, least):
                kept, least = now, error
        return self.result(problem, kept, now)

    def start(self, nearest):
        return nearest

    def inputs(self, problem):
        return problem.fitted

    def error(self, problem, codes):
        return problem.error(values(codes))

    def better(self, error, least):
        return error < least

    def step(self, layer, made, slope, moved):
        """Move the code of each row whose slope is the steepest, once and within half a step."""
        index, rows = made.group_index, len(made.codes)
        scale = rounding.expand(made.scale, index, rows)
        error = layer.weight - rounding.dequantize(made)  # w - q: positive where q is too low
        way = -slope.sign().to(torch.int16)
        free = (moved == 0) & (error * way > 0) & (error.abs() > scale / 8)
        best = (slope.abs() * free).argmax(1, keepdim=True)
        chosen = torch.zeros_like(moved).scatter_(1, best, 1) * free * way
        codes = (made.codes + chosen).clamp(layer.grid.qmin, layer.grid.qmax)
        moved += chosen
        return dataclasses.replace(made, codes=codes.to(torch.int16))

    def result(self, problem, kept, last):
        return kept


# Wrong ----------------------------------------------------------------------------------------


class UphillBlock(BlockLearner):
    """Moves codes up the slope and keeps the last ones."""

    def step(self, layer, made, slope, moved):
        return super().step(layer, made, -slope, moved)

    def result(self, problem, kept, last):
        return last


class LastBlockKept(BlockLearner):
    """Returns the last iterate, not the best one."""

    def result(self, problem, kept, last):
        return last


class WorstBlockKept(BlockLearner):
    """Keeps what has the largest error."""

    def better(self, error, least):
        return error > least


class NearestNotCompared(BlockLearner):
    """Keeps the best of what it has learned, and does not compare it with rounding to nearest."""

    def error(self, problem, codes):
        return math.inf if not hasattr(self, "_begun") else super().error(problem, codes)

    def learn(self, problem, rng):
        self.__dict__.pop("_begun", None)
        return super().learn(problem, rng)

    def inputs(self, problem):
        self._begun = True
        return super().inputs(problem)


class ComparedOnOneInput(BlockLearner):
    """Compares errors of the first input alone, which need not be those of all."""

    def error(self, problem, codes):
        return problem.error(values(codes), [0])


class FittedOnAll(BlockLearner):
    """Fits on inputs that are held out as well."""

    def inputs(self, problem):
        return range(len(problem.targets))


class ChosenOnHeldOut(BlockLearner):
    """Chooses among its iterates by the error of held-out inputs too."""

    claims = (claims.Radius(steps=1),)

    def error(self, problem, codes):
        return problem.error(values(codes), range(len(problem.targets)))


class TargetsIgnored(BlockLearner):
    """Learns for outputs of zeros: targets never arrive."""

    claims = (claims.Radius(steps=1),)

    def learn(self, problem, rng):
        zeros = [torch.zeros_like(each) for each in problem.targets]
        return super().learn(dataclasses.replace(problem, targets=zeros), rng)


class SpareForgotten(BlockLearner):
    """Returns nothing for a layer that no token reaches."""

    def result(self, problem, kept, last):
        return {name: made for name, made in kept.items() if name != SPARE}


class GlobalGenerator(BlockLearner):
    """Draws the order of inputs from a global generator."""

    def inputs(self, problem):
        return np.random.permutation(len(problem.fitted)).tolist()


class MovesTwoSteps(BlockLearner):
    """Moves codes by two steps, away from a weight that lies between them."""

    def result(self, problem, kept, last):
        moved = {}
        for name, made in kept.items():
            grid = problem.layers[name].grid
            way = torch.where(made.codes < (grid.qmin + grid.qmax) // 2, 2, -2)
            moved[name] = dataclasses.replace(made, codes=(made.codes + way).to(torch.int16))
        return moved


class WeightOverwritten(BlockLearner):
    """Writes what codes stand for into the weights that it was given."""

    def result(self, problem, kept, last):
        for name, value in values(kept).items():
            problem.layers[name].weight.copy_(value)
        return kept


# Right ----------------------------------------------------------------------------------------


class NothingGained(BlockLearner):
    """Only moves once."""

    steps = 1


KILLED_BY = {
    UphillBlock: "block_no_worse",
    LastBlockKept: "block_no_worse",
    WorstBlockKept: "block_no_worse",
    NearestNotCompared: "block_no_worse",
    ComparedOnOneInput: "block_no_worse",
    FittedOnAll: "block_held_out",
    ChosenOnHeldOut: "block_held_out",
    TargetsIgnored: "block_targets",
    SpareForgotten: "block_answers",
    GlobalGenerator: "block_purity",
    MovesTwoSteps: "block_layers",
    WeightOverwritten: "block_purity",
}

MUTANTS = mutants(KILLED_BY)
TWINS = twins(
    {
        BlockLearner: "moves one code of a row at a time",
        NothingGained: "stops after one step",
    }
)
