"""Wrong outlier handlers that keep columns in 16 bits, and right ones that do it otherwise.

LLM.int8() (Dettmers et al., arXiv:2208.07339) keeps the columns in which any input is at least 6 in
magnitude. The reference finds them in the calibration tokens. What becomes of them, and what is
left to run time, is in `handlers_parted`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qframe import Capabilities, Rewrite
from qframe.claims import (
    FunctionPreserving,
    KeepsOutliers,
    RowOrderFree,
    ScaleEquivariant,
    SignSymmetric,
)
from tests.mutants.handlers import ANY_SCHEME, Rotated, SmoothQuant, outputs, refuse_nonsense
from tests.mutants.mutant import Mutant, Twin

__all__ = ["MUTANTS", "TWINS", "outputs"]

THRESHOLD = 6.0
PLAIN = (RowOrderFree(), ScaleEquivariant(), SignSymmetric())
KEPT = (FunctionPreserving(powers_of_two=True), KeepsOutliers(THRESHOLD), *PLAIN)
NONE = (FunctionPreserving(powers_of_two=True), KeepsOutliers(0), *PLAIN)


# The right ones -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keeper:
    """Keeps the columns in which max |x| reaches the threshold."""

    threshold: float = THRESHOLD
    name: str = "keeper"
    needs: frozenset[str] = frozenset({"absmax"})
    capabilities: Capabilities = ANY_SCHEME
    claims: tuple[Any, ...] = KEPT

    def rewrite(self, problem, rng):
        absmax = problem.statistics["absmax"]
        refuse_nonsense("absmax", problem, absmax)
        return self.parted(problem.weights, torch.nonzero(self.loud(absmax, problem))[:, 0])

    def loud(self, absmax, problem):
        return (absmax >= self.threshold) & (self.threshold > 0)

    def parted(self, weights, kept):
        """Return the rewrite without the columns `kept`, which are put aside."""
        rest = {name: self.rest(weight, kept) for name, weight in weights.items()}
        return self.made(rest, kept if len(kept) else None)

    def rest(self, weight, kept):
        return weight.index_fill(1, kept, 0.0)

    def made(self, weights, kept):
        columns = next(iter(weights.values())).shape[1]
        return Rewrite(weights=weights, input_scale=torch.ones(columns), kept=kept)


# Mutants -------------------------------------------------------------------------------------


class StrictlyAbove(Keeper):
    def loud(self, absmax, problem):
        return absmax > self.threshold


@dataclass(frozen=True)
class RootMeanSquare(Keeper):
    """Looks at the diagonal of the second moments."""

    needs: frozenset[str] = frozenset({"hessian"})

    def rewrite(self, problem, rng):
        hessian = problem.statistics["hessian"]
        refuse_nonsense("hessian", problem, hessian)
        root = (hessian.diagonal() / 2).sqrt()
        return self.parted(problem.weights, torch.nonzero(root >= self.threshold)[:, 0])


class LoudWeights(Keeper):
    def loud(self, absmax, problem):
        return torch.cat(list(problem.weights.values())).abs().amax(0) >= self.threshold


class LoudProducts(Keeper):
    """Columns that the first layer does not read are not kept, though the others may read them."""

    def loud(self, absmax, problem):
        first = next(iter(problem.weights.values()))
        return super().loud(absmax, problem) & first.bool().any(0)


class ThresholdInSteps(Keeper):
    """Divides the threshold by the scale of int8, but not the inputs."""

    def loud(self, absmax, problem):
        return absmax >= self.threshold / 127


class ComparedInHalf(Keeper):
    def loud(self, absmax, problem):
        return absmax.half() >= self.threshold


class StandsOut(Keeper):
    """Compares with the median column: relative, where the threshold is a magnitude."""

    def loud(self, absmax, problem):
        return absmax >= self.threshold * absmax.median()


class AlwaysTheLargest(Keeper):
    """Keeps the three largest columns, whatever the threshold."""

    def loud(self, absmax, problem):
        places = absmax.topk(min(3, len(absmax))).indices
        return torch.zeros(len(absmax), dtype=torch.bool).index_fill(0, places, True)


class FourAtMost(Keeper):
    def parted(self, weights, kept):
        return super().parted(weights, kept[:4])


class OneFewer(Keeper):
    def parted(self, weights, kept):
        return super().parted(weights, kept[:-1])


class NeverAll(Keeper):
    """Where every column is loud, none is."""

    def loud(self, absmax, problem):
        found = super().loud(absmax, problem)
        return found & ~found.all()


class NextColumn(Keeper):
    """Counts columns from one: the neighbour of the outlier is kept."""

    def parted(self, weights, kept):
        columns = next(iter(weights.values())).shape[1]
        return super().parted(weights, ((kept + 1) % columns).sort().values)


class ZeroKeepsAll(Keeper):
    """|x| >= 0 is true everywhere."""

    def loud(self, absmax, problem):
        return absmax >= self.threshold


class NaNIsQuiet(Keeper):
    """Compares without a look at NaN, which no number reaches."""

    def rewrite(self, problem, rng):
        found = self.loud(problem.statistics["absmax"], problem)
        return self.parted(problem.weights, torch.nonzero(found)[:, 0])


# Twins ----------------------------------------------------------------------------------------


class ColumnByColumn(Keeper):
    """Loops over columns and layers, in Python."""

    def rewrite(self, problem, rng):
        absmax = problem.statistics["absmax"]
        refuse_nonsense("absmax", problem, absmax)
        rest = {name: weight.clone() for name, weight in problem.weights.items()}
        kept = []
        for column, largest in enumerate(absmax.tolist()):
            if largest >= self.threshold:
                kept.append(column)
                for weight in rest.values():
                    weight[:, column] = 0
        return self.made(rest, torch.tensor(kept, dtype=torch.int64) if kept else None)


class Masked(Keeper):
    """Multiplies by a mask, which leaves -0 where a weight was below zero."""

    def rest(self, weight, kept):
        return weight * torch.ones(weight.shape[1]).index_fill(0, kept, 0.0)


class SmoothedFirst(SmoothQuant):
    """Moves what is left of the others' outliers to the weights."""

    def rewrite(self, problem, rng):
        absmax = problem.statistics["absmax"]
        refuse_nonsense("absmax", problem, absmax)
        kept = torch.nonzero(absmax >= THRESHOLD)[:, 0]
        scale = self.scale(absmax, self.largest(problem.weights))
        scaled = {name: weight * scale for name, weight in problem.weights.items()}
        return replace(Keeper().parted(scaled, kept), input_scale=scale)


class RotatedFirst(Rotated):
    """Keeps every third column of what a rotation has made."""

    def rewrite(self, problem, rng):
        made = super().rewrite(problem, rng)
        parted = Keeper().parted(made.weights, torch.arange(0, problem.columns, 3))
        return replace(parted, rotation=made.rotation)


# All of them ----------------------------------------------------------------------------------


def _wrong(name, make, killed_by, bug, correct=Keeper):
    return Mutant(
        name=name,
        kind="outlier handler",
        bug=bug,
        make=make,
        correct=correct,
        killed_by=killed_by,
    )


def _claimed(name, make, bug, correct=Keeper):
    return _wrong(name, make, "rewrite_is_as_claimed", bug, correct)


def keeps_nothing():
    return Keeper(threshold=0.0, claims=NONE)


MUTANTS = (
    _claimed("strictly_above", StrictlyAbove, "> in place of >=."),
    _claimed("root_mean_square", RootMeanSquare, "The mean magnitude in place of the largest."),
    _claimed("loud_weights", LoudWeights, "The threshold is compared with weights."),
    _claimed(
        "loud_for_the_first_layer",
        LoudProducts,
        "A column that q_proj does not read is not kept for k_proj and v_proj.",
    ),
    _claimed("threshold_in_steps", ThresholdInSteps, "The threshold is divided by a scale."),
    _claimed(
        "compared_in_half",
        ComparedInHalf,
        "Maxima are rounded to float16 first, so what is just below the threshold reaches it.",
    ),
    _claimed("stands_out", StandsOut, "A multiple of the median column is no magnitude."),
    _claimed("always_the_largest", AlwaysTheLargest, "The three largest, whatever the threshold."),
    _claimed("four_at_most", FourAtMost, "There is room for a fixed number of columns."),
    _claimed("one_fewer", OneFewer, "The last column is cut off."),
    _claimed("never_all", NeverAll, "Where every column holds an outlier, none is kept."),
    _claimed("next_column", NextColumn, "Columns are counted from one: the neighbour is kept."),
    _claimed(
        "zero_keeps_all",
        lambda: ZeroKeepsAll(threshold=0.0, claims=NONE),
        "|x| >= 0 is true everywhere, where 0 should turn the method off.",
        keeps_nothing,
    ),
    _wrong(
        "nan_is_quiet",
        NaNIsQuiet,
        "non_finite_statistics_show",
        "No NaN reaches any threshold, so an overflow of the network is not seen.",
    ),
)


def _right(name, make, why):
    return Twin(name=name, kind="outlier handler", why=why, make=make)


TWINS = (
    _right("keeper", Keeper, "LLM.int8() with the columns of the calibration tokens."),
    _right("keeps_nothing", keeps_nothing, "Threshold 0 turns the method off."),
    _right(
        "rough_threshold",
        lambda: Keeper(threshold=6.7, claims=(KEPT[0], KeepsOutliers(6.7), *PLAIN)),
        "6.7 is no float32 number; inputs and threshold are compared as such numbers.",
    ),
    _right("column_by_column", ColumnByColumn, "A loop over columns, and over layers in it."),
    _right(
        "masked",
        lambda: Masked(claims=(FunctionPreserving(), *KEPT[1:])),
        "The product with a mask is -0 where a weight was below zero.",
    ),
    _right(
        "smoothed_first",
        lambda: SmoothedFirst(claims=(FunctionPreserving(), KeepsOutliers(THRESHOLD))),
        "What is kept and what is not is scaled, too.",
    ),
    _right(
        "rotated_first",
        lambda: RotatedFirst(claims=(FunctionPreserving(), SignSymmetric())),
        "Columns of the rotated input are kept, which are no columns of the input.",
    ),
)
