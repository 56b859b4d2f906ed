"""Wrong SmoothQuants that search for alpha, and right ones that do it otherwise.

Inputs and weights are rounded, and the outputs of a sample of tokens compared with what they were
(Xiao et al., arXiv:2211.10438, with the grid search of later code). A small reference in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qframe import Capabilities, RewriteProblem, rounding
from qframe.claims import FunctionPreserving, NoWorseOnSample
from tests.mutants.handlers import outputs, refuse_nonsense
from tests.mutants.mutant import Mutant, Twin

__all__ = ["MUTANTS", "TWINS", "outputs"]

ROWS = Capabilities(strategies=frozenset({"channel", "group"}))


@dataclass(frozen=True)
class Search:
    """Tries scales (max |x|)^alpha / (max |w|)^(1 - alpha), and none; keeps the best."""

    name: str = "search"
    needs: frozenset[str] = frozenset({"sample"})
    capabilities: Capabilities = ROWS
    claims: tuple[Any, ...] = (FunctionPreserving(), NoWorseOnSample())

    def rewrite(self, problem: RewriteProblem, rng):
        x = problem.statistics["sample"]
        refuse_nonsense("sample", problem, x)
        scales = [torch.ones(problem.columns), *(self.scale(problem, x, a) for a in self.alphas())]
        return problem.scaled(self.best(scales, [self.loss(problem, x, s) for s in scales]))

    def alphas(self):
        return (0.25, 0.5, 0.75)

    def best(self, scales, losses):
        return scales[losses.index(min(losses))]

    def scale(self, problem, x, alpha):
        largest = x.abs().amax(0).double()
        rows = torch.cat(list(problem.weights.values())).abs().amax(0).double()
        alive = (largest > 0) & (rows > 0)
        made = torch.where(alive, largest, 1) ** alpha / torch.where(alive, rows, 1) ** (1 - alpha)
        return made.clamp(2.0**-20, 2.0**20).float()

    def loss(self, problem, x, scale):
        return sum(
            float((x.double() @ layer.weight.double().T - self.output(layer, x, scale)).norm()) ** 2
            for layer in self.layers(problem)
        )

    def layers(self, problem):
        return list(problem.layers.values())

    def output(self, layer, x, scale):
        changed = replace(layer, weight=layer.weight * scale)
        weight = rounding.dequantize(rounding.to_nearest(changed)).double()
        return self.rounded(layer, x / scale).double() @ weight.T

    def rounded(self, layer, z):
        if layer.input_grid is None:
            return z
        largest, most = z.abs().amax(1, keepdim=True), self.codes(layer)
        step = torch.where(largest == 0, 1, (largest / most).clamp(min=2.0**-149))
        return (z / step).round().clamp(-most, most) * step

    def codes(self, layer):
        return layer.input_grid.qmax


class WithoutNone(Search):
    def best(self, scales, losses):
        return super().best(scales[1:], losses[1:])


class KeepsWorst(Search):
    def best(self, scales, losses):
        return scales[losses.index(max(losses))]


class KeepsLast(Search):
    def best(self, scales, losses):
        better = [s for s, loss in zip(scales, losses, strict=True) if loss <= 1.5 * losses[0]]
        return better[-1]


class IgnoresWeights(Search):
    def output(self, layer, x, scale):
        return self.rounded(layer, x / scale).double() @ (layer.weight * scale).double().T


class IgnoresInputs(Search):
    def rounded(self, layer, z):
        return z


class EightBitInputs(Search):
    def codes(self, layer):
        return 127


class WeightErrorAlone(Search):
    def loss(self, problem, x, scale):
        return super().loss(problem, torch.eye(problem.columns), scale)


class FirstLayerCounts(Search):
    def layers(self, problem):
        return super().layers(problem)[:1]


class FirstTokenCounts(Search):
    def loss(self, problem, x, scale):
        return super().loss(problem, x[:1], scale)


def _wrong(name, make, bug):
    return Mutant(
        name=f"search_{name}",
        kind="outlier handler",
        bug=bug,
        make=make,
        correct=Search,
        killed_by="rewrite_is_as_claimed",
    )


MUTANTS = (
    _wrong("without_none", WithoutNone, "No scale at all is not among the candidates."),
    _wrong("keeps_worst", KeepsWorst, "The largest loss is kept."),
    _wrong("keeps_last", KeepsLast, "The last candidate is kept that is not much worse."),
    _wrong("ignores_weights", IgnoresWeights, "Weights are not rounded while alphas are compared."),
    _wrong("ignores_inputs", IgnoresInputs, "Inputs are not rounded while alphas are compared."),
    _wrong("weight_error_alone", WeightErrorAlone, "Compares weights, and no outputs."),
    _wrong("eight_bit_inputs", EightBitInputs, "Inputs count as 8 bits, whatever the scheme says."),
    _wrong("first_layer_counts", FirstLayerCounts, "Layers that share the input have no say."),
    _wrong("first_token_counts", FirstTokenCounts, "One token decides for all of the sample."),
)


class Fine(Search):
    def alphas(self):
        return [k / 16 for k in range(16, -1, -1)]


class TokenByToken(Search):
    """Adds up token by token, the last one first."""

    def loss(self, problem, x, scale):
        return sum(super(TokenByToken, self).loss(problem, row[None], scale) for row in x.flip(0))


def _right(name, make, why):
    return Twin(name=name, kind="outlier handler", why=why, make=make)


TWINS = (
    _right("search", Search, "The search itself."),
    _right("search_fine", Fine, "More candidates, in another order."),
    _right("search_by_token", TokenByToken, "Sums in another order."),
)
