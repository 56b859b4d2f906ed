"""Wrong outlier handlers that take kept columns out amiss, or leave them to run time amiss.

Which columns are kept is the subject of `handlers_kept`, where the reference is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qframe import Capabilities, Rewrite
from qframe.claims import FunctionPreserving, KeepsOutliers
from tests.mutants.handlers import outputs
from tests.mutants.handlers_kept import PLAIN, THRESHOLD, Keeper
from tests.mutants.mutant import Mutant, Twin

__all__ = ["MUTANTS", "TWINS", "outputs"]

QUANTIZED = Capabilities(quantized_inputs=frozenset({True}))
LATER = (FunctionPreserving(powers_of_two=True), KeepsOutliers(0, THRESHOLD), *PLAIN)


# The right one --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Later:
    """Leaves it to run time which columns are kept."""

    threshold: float = THRESHOLD
    name: str = "later"
    needs: frozenset[str] = frozenset()
    capabilities: Capabilities = QUANTIZED
    claims: tuple[Any, ...] = LATER

    def rewrite(self, problem, rng):
        made, threshold = torch.ones(problem.columns), self.said(problem)
        return Rewrite(weights=problem.weights, input_scale=made, threshold=threshold)

    def said(self, problem):
        return self.threshold or None


# Mutants: what becomes of them ----------------------------------------------------------------


class FirstLayerOnly(Keeper):
    """Takes the columns out of q_proj, and leaves them in k_proj and v_proj: they count twice."""

    def parted(self, weights, kept):
        made = super().parted(weights, kept)
        first = next(iter(weights))
        return replace(made, weights={**weights, first: made.weights[first]})


class NotTakenOut(Keeper):
    def rest(self, weight, kept):
        return weight.clone()


class TakenOutForGood(Keeper):
    def made(self, weights, kept):
        return super().made(weights, None)


class TakenOutInPlace(Keeper):
    def rest(self, weight, kept):
        return weight.index_fill_(1, kept, 0.0)


class OffByOne(Keeper):
    """The columns that are zero, and the list of them, are one apart."""

    def made(self, weights, kept):
        if kept is None:
            return super().made(weights, None)
        columns = next(iter(weights.values())).shape[1]
        return super().made(weights, ((kept + 1) % columns).sort().values)


class ByLoudness(Keeper):
    """The loudest first, as topk returns them."""

    def rewrite(self, problem, rng):
        made, absmax = super().rewrite(problem, rng), problem.statistics["absmax"]
        if made.kept is None:
            return made
        return replace(made, kept=made.kept[absmax[made.kept].argsort(descending=True)])


class InInt32(Keeper):
    def made(self, weights, kept):
        return super().made(weights, None if kept is None else kept.int())


class AsMask(Keeper):
    def made(self, weights, kept):
        made = super().made(weights, kept)
        if kept is None:
            return made
        return replace(made, kept=torch.zeros(len(made.input_scale)).index_fill(0, kept, 1).bool())


class ZeroInTheScale(Keeper):
    """Takes the columns out of the input, which is divided by nothing there."""

    def made(self, weights, kept):
        made = super().made(weights, kept)
        if kept is None:
            return made
        return replace(made, input_scale=made.input_scale.index_fill(0, kept, 0.0))


class TensorsAsInformation(Keeper):
    def made(self, weights, kept):
        made = super().made(weights, kept)
        return replace(made, info={"kept_columns": torch.tensor(0 if kept is None else len(kept))})


# Mutants: what is left to run time ------------------------------------------------------------


class SaysNothing(Later):
    def said(self, problem):
        return None


class SaysItInSteps(Later):
    def said(self, problem):
        return self.threshold / 127


@dataclass(frozen=True)
class BothAtOnce(Later):
    """Keeps the columns of the calibration tokens, though all of them are left to run time."""

    needs: frozenset[str] = frozenset({"absmax"})

    def rewrite(self, problem, rng):
        made = Keeper().rewrite(problem, rng)
        return replace(made, threshold=self.threshold)


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


MUTANTS = (
    _wrong(
        "first_layer_only",
        FirstLayerOnly,
        "rewrite_fits",
        "k_proj and v_proj have the columns in their codes, too: they count twice.",
    ),
    _wrong("not_taken_out", NotTakenOut, "rewrite_fits", "Columns count twice in all layers."),
    _wrong(
        "taken_out_for_good",
        TakenOutForGood,
        "function_preserved",
        "Columns are taken out, and nobody is told which: their outputs are lost.",
    ),
    _wrong(
        "taken_out_in_place",
        TakenOutInPlace,
        "handler_leaves_inputs",
        "The caller's weights are set to zero, and with them what should be kept.",
    ),
    _wrong("off_by_one", OffByOne, "rewrite_fits", "Other columns are zero than are named."),
    _wrong("by_loudness", ByLoudness, "rewrite_fits", "topk returns the loudest first."),
    _wrong("in_int32", InInt32, "rewrite_fits", "Columns are numbers of 32 bits."),
    _wrong("as_mask", AsMask, "rewrite_fits", "A mask in place of a list of columns."),
    _wrong(
        "zero_in_the_scale",
        ZeroInTheScale,
        "rewrite_fits",
        "The input scale is 0 in the columns that are taken out: x / 0.",
    ),
    _wrong(
        "tensors_as_information",
        TensorsAsInformation,
        "information",
        "A report cannot be written with a tensor in it.",
    ),
    _claimed("says_nothing", SaysNothing, "No threshold is passed on to run time.", Later),
    _claimed("says_it_in_steps", SaysItInSteps, "A threshold for codes, not for inputs.", Later),
    _claimed(
        "both_at_once",
        BothAtOnce,
        "Columns of the calibration tokens are kept besides those of a call.",
        Later,
    ),
)

TWINS = (
    Twin(
        name="later",
        kind="outlier handler",
        why="LLM.int8() with the columns of each call.",
        make=Later,
    ),
)
