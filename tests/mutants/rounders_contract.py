"""Rounders that break the contract, and ones that keep it in their own way.

Most of them round to nearest or up and down by chance, and claim little: what finds them are the
checks that every rounder has to pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from qframe import Capabilities, Event, rounding
from qframe.errors import UncalibratedLayerError, UnsupportedError
from tests.mutants.rounder_reference import changed, mutants, outputs
from tests.mutants.rounders_contract_twins import TWINS, Plain, UpOrDown

__all__ = ["MUTANTS", "TWINS", "outputs"]


# Structure ------------------------------------------------------------------------------------


class CodesOutOfRange(Plain):
    """Adds one to every code, as a shift from signed to unsigned does that comes twice."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        return changed(made, codes=made.codes + 1)


class CodesAreInt32(Plain):
    """Returns int32 codes, the dtype of packed words in other tools."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        return changed(made, codes=made.codes.int())


class NegativeScale(Plain):
    """Takes the sign of the largest weight into the scale, as ggml's formats do."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        zero = made.zero_point[:, made.group_index.long()]
        return changed(made, codes=2 * zero - made.codes, scale=-made.scale)


class ScalesInDouble(Plain):
    """Returns float64 scales, NumPy's default."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        return changed(made, scale=made.scale.double())


class Transposed(Plain):
    """Returns codes as [columns, rows], the layout of Conv1D layers."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        return changed(made, codes=made.codes.t().contiguous())


class OrderTwice(Plain):
    """Says an order that names a column twice, as an argsort of ties by hand does."""

    def round(self, problem, rng):
        made = super().round(problem, rng)
        order = torch.arange(made.codes.shape[1], dtype=torch.int32)
        order[-1:] = 0
        return changed(made, order=order)


class ReturnsWeights(Plain):
    """Returns the dequantized weight, as fake quantization does."""

    def round(self, problem, rng):
        return rounding.dequantize(super().round(problem, rng))


class TensorsInInfo(Plain):
    """Puts a tensor into info, which no report can show."""

    def round(self, problem, rng):
        return changed(super().round(problem, rng), info={"loss": torch.zeros(1)})


class EventOfAnotherLayer(Plain):
    """Names its own layer in events, not the one that was given."""

    def round(self, problem, rng):
        event = Event(kind="note", layer="layer", message="rounded to nearest")
        return changed(super().round(problem, rng), events=(event,))


class NanInSilence(Plain):
    """Lets NaN through a comparison: no weight is larger than a NaN, so nothing is noticed."""

    def ends(self, weight, scheme):
        return super().ends(np.where(np.isfinite(weight), weight, 0), scheme)


# Declarations ---------------------------------------------------------------------------------


class FourBitsOnly(Plain):
    """Says that it can do any number of bits, and refuses all but 4."""

    def round(self, problem, rng):
        if problem.scheme.num_bits != 4:
            raise UnsupportedError("only 4 bits")
        return super().round(problem, rng)


class _AnythingGoes(Capabilities):
    def objection(self, scheme):
        return None


class ObjectsToNothing(Plain):
    """Says that it can do 4 bits only, but overrides the objection that the host asks for."""

    capabilities = _AnythingGoes(num_bits=frozenset({4}))


class UnknownStrategy(Plain):
    """Declares a strategy under the name that another tool has for it."""

    capabilities = Capabilities(strategies=frozenset({"per_channel", "channel"}))


class UnknownNeed(Plain):
    """Needs an observer whose name is misspelt."""

    needs = frozenset({"hesian"})


@dataclass(frozen=True)
class OptionInPercent(Plain):
    """Keeps an option in another unit than it was given in, so each configuration changes it."""

    percent: float = 50.0
    name: str = field(init=False, default="nearest")

    def __post_init__(self):
        object.__setattr__(self, "percent", self.percent / 100)


class AbsentTokens(Plain):
    """Divides by the number of tokens, and there may be none."""

    needs = frozenset({"hessian"})

    def round(self, problem, rng):
        mean = float(problem.statistics["hessian"].trace()) / problem.tokens
        return changed(super().round(problem, rng), info={"mean": mean})


# Purity and determinism -----------------------------------------------------------------------


class WeightDividedInPlace(Plain):
    """Divides the weight by its scale in place and multiplies it back: most bits are restored."""

    def round(self, problem, rng):
        problem.weight.div_(3).mul_(3)
        return super().round(problem, rng)


class HessianDampedInPlace(Plain):
    """Adds the damping to the diagonal of the Hessian in place: the next layer gets it twice."""

    needs = frozenset({"hessian"})

    def round(self, problem, rng):
        if problem.tokens == 0:
            raise UncalibratedLayerError(problem.name)
        diagonal = problem.statistics["hessian"].diagonal()
        diagonal += diagonal.mean() / 100 + 1 / 100
        return super().round(problem, rng)


class Unseeded(UpOrDown):
    """Takes a generator of its own, without a seed."""

    def round(self, problem, rng):
        return super().round(problem, np.random.default_rng())


class GlobalNumpy(UpOrDown):
    """Draws from NumPy's global generator, seeded by whoever came last."""

    def chance(self, shape, rng):
        return np.random.random(shape).astype(np.float32)


class SeedsTorch(UpOrDown):
    """Seeds torch's global generator for itself, and so for everybody."""

    def chance(self, shape, rng):
        torch.manual_seed(0)
        return torch.rand(shape).numpy()


class CountsCalls(Plain):
    """Keeps a running largest weight between layers, as a moving average of calibration does."""

    def __init__(self):
        self.seen = 0

    def ends(self, weight, scheme):
        self.seen += 1
        lo, hi = super().ends(weight, scheme)
        return lo * np.float32(1 + 1 / self.seen), hi * np.float32(1 + 1 / self.seen)


class ThreadsInTheSum(Plain):
    """Takes the scale from a float32 sum of all weights, which torch splits among threads."""

    capabilities = Capabilities(row_independent=False)

    def round(self, problem, rng):
        made = super().round(problem, rng)
        total = problem.weight.abs().sum().clamp(1, 2**16) / 2**16
        scale = rounding.round_up(made.scale / total, problem.scheme.scale_dtype)
        return changed(made, scale=scale)


class StridesIgnored(Plain):
    """Hands the data pointer of the weight to a kernel that takes it for contiguous."""

    def weight(self, problem):
        rows, columns = problem.weight.shape
        return torch.as_strided(problem.weight, (rows, columns), (columns, 1)).numpy()


KILLED_BY = {
    CodesOutOfRange: "packs",
    CodesAreInt32: "packs",
    NegativeScale: "packs",
    ScalesInDouble: "packs",
    Transposed: "packs",
    OrderTwice: "packs",
    ReturnsWeights: "packs",
    TensorsInInfo: "information",
    EventOfAnotherLayer: "information",
    NanInSilence: "non_finite",
    FourBitsOnly: "answers",
    ObjectsToNothing: "refusals",
    UnknownStrategy: "declarations",
    UnknownNeed: "declarations",
    OptionInPercent: "options",
    AbsentTokens: "uncalibrated",
    WeightDividedInPlace: "purity",
    HessianDampedInPlace: "purity",
    Unseeded: "determinism",
    GlobalNumpy: "global_generators",
    SeedsTorch: "global_generators",
    CountsCalls: "determinism",
    ThreadsInTheSum: "threads",
    StridesIgnored: "layout",
}

MUTANTS = mutants(KILLED_BY)
