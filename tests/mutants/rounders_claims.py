"""Rounders whose rows, calibration or claims are not what they say (docs/bounds.md, B10)."""

from __future__ import annotations

import numpy as np
import torch

from qframe import claims, rounding
from qframe.certificates import Certificate
from tests.mutants.rounder_reference import Nearest, changed, mutants, outputs
from tests.mutants.rounders_contract_twins import Descent, MeanSquare, Plain, UpOrDown

__all__ = ["MUTANTS", "TWINS", "outputs"]


# Rows and zeros -------------------------------------------------------------------------------


class RowsLeak(Plain):
    """Centres the weights by the mean row, without saying that rows are not independent."""

    def weight(self, problem):
        weight = super().weight(problem)
        return np.float32(weight + weight.mean(0) / 64) if len(weight) else weight


class RowsReversed(Plain):
    """Returns the codes of the rows in reverse, as a stack of blocks that is popped does."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        return changed(made, codes=made.codes.flip(0))


class ZerosDithered(UpOrDown):
    """Adds dither before it rounds, also to zeros: pruned weights come back."""

    def round_place(self, place, chance):
        return np.floor(place + 2 * chance)


# Calibration ----------------------------------------------------------------------------------


class CalibrationIgnored(Plain):
    """Needs a Hessian, and does not look at it: a wrong key gives the default."""

    needs = frozenset({"hessian"})


class CalibrationOfOneKind(Descent):
    """Overwrites the Hessian by its first entry times the identity: one batch, one channel."""

    claims = ()

    def hessian(self, problem):
        hessian = super().hessian(problem)
        return torch.eye(len(hessian), dtype=torch.float64)


# Claims ---------------------------------------------------------------------------------------


class RadiusOfTwo(UpOrDown):
    """Claims to move weights by at most one step, and moves them by up to two."""

    def round_place(self, place, chance):
        return np.where(place == np.rint(place), place, np.floor(place) + np.rint(3 * chance) - 1)


class Maximises(Descent):
    """Walks up the slope of the output error instead of down, and believes what it finds."""

    def target(self, value, pull):
        return value - pull

    def better(self, after, before):
        return torch.ones_like(after, dtype=torch.bool)


class DescentForgetsRange(Descent):
    """Compares before it clips: what is stored is not what was found to be better."""

    def clamp(self, codes, grid):
        return codes


class SearchWithoutOne(MeanSquare):
    """Searches shrunken ranges and leaves out the one that is not shrunken."""

    shrinks = (0.4, 0.5)


class SearchMaximises(MeanSquare):
    """Keeps the range with the largest error."""

    def better(self, error, best):
        return error > best


class OutputTooGood(UpOrDown):
    """Claims the output error of rounding to nearest, and rounds up or down."""

    needs = frozenset({"hessian"})
    claims = (claims.OutputBound(factor=0.5),)


class ScalePlusEpsilon(Plain):
    """Claims to be scale equivariant, with 1e-6 in every scale."""

    claims = (claims.ScaleEquivariant(),)

    def store(self, scale, dtype):
        return super().store(scale + np.float32(1e-6), dtype)


class ShrinksEachTime(Plain):
    """Claims to be idempotent, and clips 5 percent of every range, also of one that it made."""

    claims = (claims.Idempotent(),)

    def scale(self, lo, hi, grid, scheme):
        return super().scale(lo, hi, grid, scheme) * np.float32(0.95)


class OneUlpTooMuch(Nearest):
    """Makes scales one last bit too large, so that not even its own grid is reproduced."""

    def scale(self, lo, hi, grid, scheme):
        scale = super().scale(lo, hi, grid, scheme)
        return np.nextafter(scale, np.float32(np.inf)) if scheme.scale_dtype == "float32" else scale


class _Exact:
    """A theorem of the rounder's own: nothing is lost."""

    name = "nothing is lost"
    theorem = "own"

    def objection(self, scheme):
        return None

    def certify(self, evidence):
        lost = rounding.dequantize(evidence.quantized) != evidence.problem.weight
        return Certificate(claim=self.name, theorem=self.theorem, ratio=2.0 * bool(lost.any()))


class OwnTheoremIsWrong(Plain):
    """Brings a theorem of its own, which is false."""

    claims = (_Exact(),)


KILLED_BY = {
    RowsLeak: "row_independence",
    RowsReversed: "row_independence",
    ZerosDithered: "zeros",
    CalibrationIgnored: "calibration",
    CalibrationOfOneKind: "calibration",
    RadiusOfTwo: "radius",
    Maximises: "no_worse_than_nearest",
    DescentForgetsRange: "no_worse_than_nearest",
    SearchWithoutOne: "no_worse_than_nearest",
    SearchMaximises: "no_worse_than_nearest",
    OutputTooGood: "output_bound",
    ScalePlusEpsilon: "scale_equivariance",
    ShrinksEachTime: "idempotence",
    OneUlpTooMuch: "fixed_point",
    OwnTheoremIsWrong: "own_claims",
}

MUTANTS = mutants(KILLED_BY)
TWINS = ()  # those of rounders_contract.py make claims as well
