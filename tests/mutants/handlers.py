"""Wrong outlier handlers, and right ones that do it otherwise.

AWQ (Lin et al., arXiv:2306.00978) makes channels with large activations larger, by the power alpha
of their magnitude that leaves the least output error. SmoothQuant (Xiao et al., arXiv:2211.10438)
divides the activations of a channel by sqrt(max |x| / max |w|). Both are small references: what
they lack is speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qframe import (
    Capabilities,
    Grid,
    Rewrite,
    RewriteProblem,
    Rotation,
    RoundingProblem,
    Scheme,
    rounding,
)
from qframe.claims import (
    FunctionPreserving,
    Incoherent,
    NoWorseThanUnscaled,
    ProtectsSalient,
    RowOrderFree,
    ScaleEquivariant,
    SignSymmetric,
)
from qframe.errors import NonFiniteError
from qframe.reference_ops import hadamard_matrix
from tests.mutants.mutant import Mutant, Twin

ANY_SCHEME = Capabilities()
ASYMMETRIC = Capabilities(symmetric=frozenset({False}))
SEARCH = (
    FunctionPreserving(),
    NoWorseThanUnscaled(sums="float64"),
    ProtectsSalient(gain=4, sums="float64"),
    ScaleEquivariant(),
    SignSymmetric(),
)
SMOOTH = (FunctionPreserving(), RowOrderFree(), SignSymmetric())


def with_statistic(problem, name, value):
    layers = {n: replace(layer, statistics={name: value}) for n, layer in problem.layers.items()}
    return RewriteProblem(layers=layers)


def refuse_nonsense(name, problem, value):
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"{problem.name!r}: the statistic {name!r} is not finite; look at the network's inputs"
        )


# AWQ ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AWQ:
    """Scales by magnitude^alpha; alpha from a grid with 0, by the output error of the group."""

    name: str = "awq"
    needs: frozenset[str] = frozenset({"hessian"})
    capabilities: Capabilities = ANY_SCHEME
    claims: tuple[Any, ...] = SEARCH
    steps: int = 20

    def rewrite(self, problem, rng):
        hessian, weights = problem.statistics["hessian"], problem.weights
        refuse_nonsense("hessian", problem, hessian)
        magnitude = self.magnitude(hessian, weights)
        best, chosen = None, None
        for alpha in self.alphas():
            scale = self.normalized(magnitude**alpha)
            loss = self.loss(problem.layers, scale, hessian)
            if self.better(loss, best):
                best, chosen = loss, scale
        return self.applied(weights, chosen)

    def alphas(self):
        return [step / self.steps for step in range(self.steps)]

    def magnitude(self, hessian, weights):
        """Return the root mean square of each channel; those far below the largest count as one."""
        root = (hessian.diagonal() / 2).sqrt()
        largest = root.max()
        return root.clamp(min=largest * 2.0**-12) if largest > 0 else torch.ones_like(root)

    def normalized(self, scale):
        return (scale / (scale.max() * scale.min()).sqrt()).float()

    def better(self, loss, best):
        return best is None or loss < best

    def loss(self, layers, scale, hessian):
        total = 0.0
        for layer in layers.values():
            error = layer.weight.double() - self.effective(layer, scale)
            total += float(((error @ hessian) * error).sum())
        return total

    def effective(self, layer, scale):
        scaled = replace(layer, weight=layer.weight * scale)
        return rounding.dequantize(rounding.to_nearest(scaled)).double() / scale.double()

    def applied(self, weights, scale):
        return Rewrite(weights={n: w * scale for n, w in weights.items()}, input_scale=scale)


class NotFoldedBack(AWQ):
    def applied(self, weights, scale):
        rewrite = super().applied(weights, scale)
        return Rewrite(weights=rewrite.weights, input_scale=torch.ones_like(scale))


class FoldedTwice(AWQ):
    def applied(self, weights, scale):
        rewrite = super().applied(weights, scale)
        return Rewrite(weights=rewrite.weights, input_scale=scale * scale)


class ShiftedChannel(AWQ):
    def applied(self, weights, scale):
        rewrite = super().applied(weights, scale)
        return Rewrite(weights=rewrite.weights, input_scale=scale.roll(1))


class Divided(AWQ):
    def applied(self, weights, scale):
        return Rewrite(weights={n: w / scale for n, w in weights.items()}, input_scale=scale)


class InverseSearch(AWQ):
    """Makes loud channels smaller: consistent, and of no use."""

    def normalized(self, scale):
        return super().normalized(1 / scale)


class WithoutZero(AWQ):
    def alphas(self):
        return [step / self.steps for step in range(self.steps // 2, self.steps)]


class KeepsWorst(AWQ):
    def better(self, loss, best):
        return best is None or loss > best


class KeepsLast(AWQ):
    def better(self, loss, best):
        return True


class KeepsFirst(AWQ):
    """Always falls back to alpha = 0, as a search does whose losses are all the same."""

    def better(self, loss, best):
        return best is None


class IgnoresActivations(AWQ):
    def loss(self, layers, scale, hessian):
        return super().loss(layers, scale, torch.eye(len(hessian), dtype=torch.float64))


class MagnitudeOfWeights(AWQ):
    def magnitude(self, hessian, weights):
        largest = torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0).double()
        return largest.clamp(min=float(largest.max()) * 2.0**-12)


class FirstLayerCounts(AWQ):
    def loss(self, layers, scale, hessian):
        name = next(iter(layers))
        return super().loss({name: layers[name]}, scale, hessian)


class UnroundedLoss(AWQ):
    """Compares the weights before they are rounded: all candidates are perfect but for noise."""

    def effective(self, layer, scale):
        return (layer.weight * scale).double() / scale.double()


class WeightEpsilon(AWQ):
    """Adds an absolute epsilon to weights, as code that guards a division does."""

    def effective(self, layer, scale):
        return super().effective(replace(layer, weight=layer.weight + 2.0**-6), scale)


class RandomAlphas(AWQ):
    def alphas(self):
        return [0.0, *np.random.rand(4)]


class SeedsAnew(AWQ):
    def alphas(self):
        np.random.seed(0)
        return super().alphas()


class NaNFallsBack(AWQ):
    """Compares without a look at NaN: nothing is better than the first, so alpha = 0 wins."""

    def rewrite(self, problem, rng):
        hessian = problem.statistics["hessian"]
        if bool(torch.isfinite(hessian).all()):
            return super().rewrite(problem, rng)
        clean = torch.nan_to_num(hessian.diagonal(), posinf=0.0)
        return super().rewrite(with_statistic(problem, "hessian", torch.diag(clean)), rng)


class OnlyFirstLayer(AWQ):
    def applied(self, weights, scale):
        rewritten = dict(weights)
        name = next(iter(weights))
        rewritten[name] = weights[name] * scale
        return Rewrite(weights=rewritten, input_scale=scale)


class ForgetsALayer(AWQ):
    def applied(self, weights, scale):
        rewrite = super().applied(weights, scale)
        return Rewrite(weights=dict(list(rewrite.weights.items())[:1]), input_scale=scale)


class InPlace(AWQ):
    def applied(self, weights, scale):
        for weight in weights.values():
            weight *= scale
        return Rewrite(weights=weights, input_scale=scale)


class DampsInPlace(AWQ):
    def magnitude(self, hessian, weights):
        hessian.diagonal().add_(hessian.diagonal().mean() / 128 + 2.0**-20)
        return super().magnitude(hessian, weights)


class TransposedResult(AWQ):
    """Returns W' as a view with strides of its own."""

    def applied(self, weights, scale):
        rewrite = super().applied(weights, scale)
        views = {n: w.t().contiguous().t() for n, w in rewrite.weights.items()}
        return Rewrite(weights=views, input_scale=scale)


class RoundedScale(AWQ):
    """Stores the input scale in bfloat16 after the weights were multiplied by the exact one."""

    def applied(self, weights, scale):
        rewrite = super().applied(weights, scale)
        return Rewrite(weights=rewrite.weights, input_scale=scale.bfloat16().float())


class ReadsMore(AWQ):
    def rewrite(self, problem, rng):
        problem.statistics["absmax"]
        return super().rewrite(problem, rng)


# SmoothQuant ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmoothQuant:
    """input_scale = sqrt(max |x| / max |w|) of each channel, 1 where either is zero."""

    name: str = "smoothquant"
    needs: frozenset[str] = frozenset({"absmax"})
    capabilities: Capabilities = ANY_SCHEME
    claims: tuple[Any, ...] = SMOOTH

    def rewrite(self, problem, rng):
        absmax = problem.statistics["absmax"]
        refuse_nonsense("absmax", problem, absmax)
        scale = self.scale(absmax, self.largest(problem.weights))
        return self.applied(problem.weights, scale)

    def largest(self, weights):
        return torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0)

    def scale(self, x, w):
        return torch.where((x > 0) & (w > 0), (x.double() / w.double()).sqrt().float(), 1.0)

    def applied(self, weights, scale):
        return Rewrite(weights={n: w * scale for n, w in weights.items()}, input_scale=scale)


class DeadChannelNaN(SmoothQuant):
    def scale(self, x, w):
        return (x / w).sqrt()


class DeadChannelZero(SmoothQuant):
    def scale(self, x, w):
        return torch.where(w > 0, (x.double() / w.double()).sqrt().float(), 1.0)


class ScaleInFloat16(SmoothQuant):
    def scale(self, x, w):
        return super().scale(x, w).half().float()


class LargestWithoutAbs(SmoothQuant):
    def largest(self, weights):
        return torch.stack([w.amax(0) for w in weights.values()]).amax(0)


class LargestOfFirstRow(SmoothQuant):
    def largest(self, weights):
        return next(iter(weights.values()))[0].abs()


class ScaleOfEachLayer(SmoothQuant):
    """Every layer is multiplied by a scale of its own; the input has room for one."""

    def rewrite(self, problem, rng):
        parts = [
            super(ScaleOfEachLayer, self).rewrite(RewriteProblem(layers={name: layer}), rng)
            for name, layer in problem.layers.items()
        ]
        rewritten = {n: part.weights[n] for n, part in zip(problem.layers, parts, strict=True)}
        return Rewrite(weights=rewritten, input_scale=parts[0].input_scale)


class ScaleInFloat64(SmoothQuant):
    def scale(self, x, w):
        return super().scale(x, w).double()

    def applied(self, weights, scale):
        rewritten = {n: (w * scale).float() for n, w in weights.items()}
        return Rewrite(weights=rewritten, input_scale=scale)


class WeightsInHalf(SmoothQuant):
    def applied(self, weights, scale):
        rewritten = {n: (w * scale).half().float() for n, w in weights.items()}
        return Rewrite(weights=rewritten, input_scale=scale)


class TinyChannelsOverflow(SmoothQuant):
    """Divides quiet channels by so little that x / s overflows at run time."""

    def scale(self, x, w):
        return torch.where(x > 2.0**5, 2.0**-126, super().scale(x, w))


class SwallowsNaN(SmoothQuant):
    def rewrite(self, problem, rng):
        clean = torch.nan_to_num(problem.statistics["absmax"], nan=0.0, posinf=1.0)
        return super().rewrite(with_statistic(problem, "absmax", clean), rng)


class NotQuitePowers(SmoothQuant):
    """Claims powers of two; the exponent is not rounded."""

    def scale(self, x, w):
        return torch.exp2(super().scale(x, w).log2().clamp(-20, 20))


class ReturnsATuple(SmoothQuant):
    def applied(self, weights, scale):
        return {n: w * scale for n, w in weights.items()}, scale


# Rotations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotated:
    """x diag(signs) H / sqrt(n) with the matrix as it is."""

    name: str = "rotated"
    needs: frozenset[str] = frozenset()
    capabilities: Capabilities = ANY_SCHEME
    claims: tuple[Any, ...] = (FunctionPreserving(), Incoherent(), RowOrderFree(), SignSymmetric())

    def rewrite(self, problem, rng):
        signs = self.signs(problem.columns, rng)
        turned = {n: self.turned(w, signs) for n, w in problem.weights.items()}
        return Rewrite(
            weights=turned, input_scale=torch.ones(problem.columns), rotation=Rotation(signs)
        )

    def block(self, columns):
        return columns & -columns

    def signs(self, columns, rng):
        block = self.block(columns)
        return torch.from_numpy(rng.choice([-1.0, 1.0], (columns // block, block))).float()

    def turned(self, weight, signs):
        blocks = weight.double().unflatten(1, signs.shape) * signs
        return (blocks @ self.matrix(signs.shape[1])).flatten(1).float()

    def matrix(self, block):
        return torch.from_numpy(hadamard_matrix(block)) / block**0.5


class SignsAfterwards(Rotated):
    """Q = H diag(signs): orthogonal as well, but not what is done to the input."""

    def turned(self, weight, signs):
        blocks = weight.double().unflatten(1, signs.shape) @ self.matrix(signs.shape[1])
        return (blocks * signs).flatten(1).float()


class NotNormalized(Rotated):
    def matrix(self, block):
        return super().matrix(block) * block**0.5


class InputNotRotated(Rotated):
    def rewrite(self, problem, rng):
        return replace(super().rewrite(problem, rng), rotation=None)


class SignsOfAnotherDraw(Rotated):
    """Weights and input are rotated with generators that went different ways."""

    def rewrite(self, problem, rng):
        made = super().rewrite(problem, rng)
        return replace(made, rotation=Rotation(self.signs(problem.columns, rng)))


class NoRandomSigns(Rotated):
    """A plain Hadamard transform: the weights that are its rows become single spikes."""

    def signs(self, columns, rng):
        return torch.ones_like(super().signs(columns, rng))


class SmallBlocks(Rotated):
    """Blocks of 32 columns, whatever is possible: outliers are spread over few."""

    def block(self, columns):
        return min(super().block(columns), 32)


class InterleavedBlocks(Rotated):
    """Takes every so many-th column for a block, where the input takes neighbours."""

    def turned(self, weight, signs):
        count, block = signs.shape
        mixed = weight.unflatten(1, (block, count)).transpose(1, 2).flatten(1)
        turned = super().turned(mixed, signs)
        return turned.unflatten(1, (count, block)).transpose(1, 2).flatten(1).contiguous()


class WalshOrder(Rotated):
    """Rows of the matrix by rising number of sign changes, as signal processing has them."""

    def matrix(self, block):
        matrix = super().matrix(block)
        changes = (matrix[:, 1:] * matrix[:, :-1] < 0).sum(1)
        return matrix[torch.argsort(changes, stable=True)]


class SignsOfTheGlobalGenerator(Rotated):
    def signs(self, columns, rng):
        block = self.block(columns)
        return torch.randint(0, 2, (columns // block, block)).float() * 2 - 1


class RotatedInHalf(Rotated):
    def turned(self, weight, signs):
        return super().turned(weight, signs).half().float()


class SignsOfZero(Rotated):
    """sign(normal number rounded to an integer) is 0 now and then."""

    def signs(self, columns, rng):
        block = self.block(columns)
        drawn = rng.normal(size=(columns // block, block))
        return torch.from_numpy(np.sign(np.rint(drawn))).float()


class FewerRows(Rotated):
    """Rotates outputs, not inputs, which keeps W only where it is square and symmetric."""

    def turned(self, weight, signs):
        rows = len(weight)
        block = rows & -rows
        turned = self.matrix(block) @ weight.double().unflatten(0, (rows // block, block))
        return turned.flatten(0, 1).float()


def _original(make):
    return next(right for right in (SmoothQuant, Rotated, AWQ) if issubclass(make, right))


def _wrong(name, make, killed_by, bug):
    right = _original(make)
    return Mutant(
        name=name,
        kind="outlier handler",
        bug=bug,
        make=make,
        correct=right,
        killed_by=killed_by,
    )


MUTANTS = (
    _wrong(
        "scale_not_folded_back",
        NotFoldedBack,
        "function_preserved",
        "Weights are multiplied, the input is not divided.",
    ),
    _wrong(
        "scale_folded_twice", FoldedTwice, "function_preserved", "The input is divided by s twice."
    ),
    _wrong(
        "scale_folded_into_next_channel",
        ShiftedChannel,
        "function_preserved",
        "The input scale is off by one channel.",
    ),
    _wrong(
        "weights_divided",
        Divided,
        "function_preserved",
        "W / s where W s is meant: published layouts keep s or 1/s, and mix them up.",
    ),
    _wrong(
        "loud_channels_made_smaller",
        InverseSearch,
        "rewrite_is_as_claimed",
        "The search is consistent, but goes the wrong way and never finds anything.",
    ),
    _wrong(
        "grid_without_zero",
        WithoutZero,
        "rewrite_is_as_claimed",
        "alpha = 0 is not among the candidates, so the result may be worse than none.",
    ),
    _wrong("keeps_worst", KeepsWorst, "rewrite_is_as_claimed", "> in place of <."),
    _wrong("keeps_last", KeepsLast, "rewrite_is_as_claimed", "The last candidate wins."),
    _wrong(
        "keeps_first",
        KeepsFirst,
        "rewrite_is_as_claimed",
        "No candidate is ever better than the first: a method that does nothing at all.",
    ),
    _wrong(
        "objective_ignores_activations",
        IgnoresActivations,
        "rewrite_is_as_claimed",
        "The error of the weights in place of the error of the output.",
    ),
    _wrong(
        "magnitude_of_weights",
        MagnitudeOfWeights,
        "rewrite_is_as_claimed",
        "Salient are large weights, not large activations.",
    ),
    _wrong(
        "objective_of_first_layer",
        FirstLayerCounts,
        "rewrite_is_as_claimed",
        "q_proj decides for k_proj and v_proj.",
    ),
    _wrong(
        "objective_without_rounding",
        UnroundedLoss,
        "rewrite_is_as_claimed",
        "The loss is taken before rounding.",
    ),
    _wrong(
        "absolute_epsilon",
        WeightEpsilon,
        "scales_of_weights",
        "An epsilon that small weights cannot bear.",
    ),
    _wrong(
        "random_candidates",
        RandomAlphas,
        "rewriting_repeats",
        "Candidates come from a global generator, not from the one that was given.",
    ),
    _wrong(
        "seeds_the_world",
        SeedsAnew,
        "rewriting_leaves_global_rng",
        "Calls numpy.random.seed.",
    ),
    _wrong(
        "nan_falls_back",
        NaNFallsBack,
        "non_finite_statistics_show",
        "A NaN in the Hessian is cleared away in silence.",
    ),
    _wrong(
        "only_first_layer",
        OnlyFirstLayer,
        "function_preserved",
        "q_proj is rewritten, the others still expect the old input.",
    ),
    _wrong("forgets_a_layer", ForgetsALayer, "rewrite_fits", "Returns only the first layer."),
    _wrong("in_place", InPlace, "handler_leaves_inputs", "Multiplies the caller's weights."),
    _wrong(
        "damps_in_place",
        DampsInPlace,
        "handler_leaves_inputs",
        "Damps the Hessian that the rounder is still to read.",
    ),
    _wrong(
        "transposed_result", TransposedResult, "rewrite_fits", "Weights that are not contiguous."
    ),
    _wrong(
        "scale_rounded_later",
        RoundedScale,
        "function_preserved",
        "The input scale is stored in bfloat16, the weights know the exact one.",
    ),
    _wrong(
        "reads_more_than_it_needs",
        ReadsMore,
        "rewrite_fits",
        "Reads a statistic that `needs` does not name.",
    ),
    _wrong("dead_channel_nan", DeadChannelNaN, "rewrite_fits", "0 / 0 and 1 / 0 are not caught."),
    _wrong("dead_channel_zero", DeadChannelZero, "rewrite_fits", "A dead channel has scale 0."),
    _wrong("scale_in_float16", ScaleInFloat16, "rewrite_fits", "Small scales underflow to 0."),
    _wrong(
        "largest_without_abs",
        LargestWithoutAbs,
        "signs_of_weights",
        "max w in place of max |w|.",
    ),
    _wrong(
        "largest_of_first_row",
        LargestOfFirstRow,
        "order_of_rows",
        "One row decides for all of them.",
    ),
    _wrong(
        "scale_of_each_layer",
        ScaleOfEachLayer,
        "function_preserved",
        "A scale per layer, where the group has one input.",
    ),
    _wrong("scale_in_float64", ScaleInFloat64, "rewrite_fits", "input_scale is not float32."),
    _wrong(
        "weights_in_half",
        WeightsInHalf,
        "function_preserved",
        "W' is rounded to the checkpoint's float16.",
    ),
    _wrong(
        "run_time_overflow",
        TinyChannelsOverflow,
        "output_preserved",
        "x / s overflows at run time, though W' / s is W.",
    ),
    _wrong(
        "swallows_nan",
        SwallowsNaN,
        "non_finite_statistics_show",
        "nan_to_num hides an overflow of the network.",
    ),
    Mutant(
        name="not_quite_powers",
        kind="outlier handler",
        bug="Claims powers of two, without rounding the exponent.",
        make=lambda: NotQuitePowers(claims=(FunctionPreserving(powers_of_two=True),)),
        correct=SmoothQuant,
        killed_by="powers_of_two",
    ),
    _wrong("returns_a_tuple", ReturnsATuple, "rewrite_fits", "Not a Rewrite."),
    _wrong(
        "signs_after_the_transform",
        SignsAfterwards,
        "function_preserved",
        "Q = H diag(signs): orthogonal, but not what becomes of the input.",
    ),
    _wrong(
        "rotation_not_normalized",
        NotNormalized,
        "function_preserved",
        "The matrix of +1 and -1 as it is: weights grow by sqrt(n).",
    ),
    _wrong(
        "input_not_rotated",
        InputNotRotated,
        "function_preserved",
        "Weights are rotated, the input is not.",
    ),
    _wrong(
        "signs_of_another_draw",
        SignsOfAnotherDraw,
        "function_preserved",
        "Weights and input have signs from different states of the generator.",
    ),
    _wrong(
        "no_random_signs",
        NoRandomSigns,
        "rewrite_is_as_claimed",
        "A plain Hadamard transform makes spikes of weights that are its rows.",
    ),
    _wrong(
        "small_blocks",
        SmallBlocks,
        "rewrite_is_as_claimed",
        "Blocks of 32 columns, whatever is possible: outliers stay large.",
    ),
    _wrong(
        "interleaved_blocks",
        InterleavedBlocks,
        "function_preserved",
        "A block of weights is every so many-th column, one of the input is neighbours.",
    ),
    _wrong(
        "walsh_order",
        WalshOrder,
        "function_preserved",
        "Walsh's order of the matrix for weights, Sylvester's for the input.",
    ),
    _wrong(
        "signs_of_the_global_generator",
        SignsOfTheGlobalGenerator,
        "rewriting_leaves_global_rng",
        "Signs come from torch's global generator.",
    ),
    _wrong(
        "rotated_in_half",
        RotatedInHalf,
        "function_preserved",
        "Rotated weights are rounded to float16.",
    ),
    _wrong("signs_of_zero", SignsOfZero, "rewrite_fits", "The sign of a drawn 0 is 0."),
    _wrong(
        "rotated_rows",
        FewerRows,
        "function_preserved",
        "Outputs are rotated and not inputs: the wrong side of the weight.",
    ),
)


# Twins ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """Rewrites nothing."""

    name: str = "nothing"
    needs: frozenset[str] = frozenset()
    capabilities: Capabilities = ASYMMETRIC
    claims: tuple[Any, ...] = (
        FunctionPreserving(powers_of_two=True),
        NoWorseThanUnscaled(),
        RowOrderFree(),
        ScaleEquivariant(),
    )

    def rewrite(self, problem, rng):
        return Rewrite(weights=problem.weights, input_scale=torch.ones(problem.columns))


class PowersOfTwo(SmoothQuant):
    """SmoothQuant with scales that change no bit but the exponent's."""

    def scale(self, x, w):
        return torch.exp2(super().scale(x, w).log2().round().clamp(-20, 20))


class Reciprocal(AWQ):
    """Divides the weights by 1 / s: one rounding more."""

    def applied(self, weights, scale):
        inverse = 1 / scale
        return Rewrite(weights={n: w / inverse for n, w in weights.items()}, input_scale=scale)


class Chopped(AWQ):
    """Cuts products off, as some hardware does: one rounding of up to two units."""

    def applied(self, weights, scale):
        found = {}
        for name, weight in weights.items():
            exact = weight.double() * scale.double()  # 24 bits times 24 bits are 48
            nearest = exact.float()
            above = nearest.double().abs() > exact.abs()
            chopped = torch.where(above, torch.nextafter(nearest, torch.zeros(())), nearest)
            found[name] = chopped
        return Rewrite(weights=found, input_scale=scale)


class SinglePrecision(AWQ):
    """Compares losses in float32, and takes the last of equal ones."""

    def better(self, loss, best):
        return best is None or loss <= best

    def loss(self, layers, scale, hessian):
        total = torch.zeros(())
        for layer in layers.values():
            error = layer.weight - self.effective(layer, scale).float()
            total = total + ((error @ hessian.float()) * error).sum()
        return total


class FineSearch(AWQ):
    """A finer grid from the other end, by the channel's absolute maximum."""

    def alphas(self):
        return [step / 32 for step in range(31, -1, -1)]


class Drawn(AWQ):
    """Draws candidates from the generator that is passed in, and has 0 and a quarter besides."""

    def rewrite(self, problem, rng):
        chosen = [0.0, 0.3, *rng.random(3)]
        return _WithAlphas(claims=self.claims, drawn=tuple(chosen)).rewrite(problem, rng)


@dataclass(frozen=True)
class _WithAlphas(AWQ):
    drawn: tuple[float, ...] = ()

    def alphas(self):
        return self.drawn


def _right(name, make, why):
    return Twin(name=name, kind="outlier handler", why=why, make=make)


LOOSE = (NoWorseThanUnscaled(sums="float32"), ProtectsSalient(gain=4, sums="float32"))

TWINS = (
    _right("awq", AWQ, "The search as published, with the root mean square for the mean."),
    _right("smoothquant", SmoothQuant, "No search, and nothing said about an objective."),
    _right("nothing", Nothing, "A rewrite that changes nothing is one, too."),
    _right(
        "powers_of_two",
        lambda: PowersOfTwo(claims=(FunctionPreserving(powers_of_two=True), *SMOOTH[1:])),
        "Scales rounded to powers of two; they round other channels' roots otherwise.",
    ),
    _right("reciprocal", Reciprocal, "W' has two roundings in place of one."),
    _right("chopped", Chopped, "Products are cut off, which is no more than two roundings."),
    _right(
        "single_precision",
        lambda: SinglePrecision(claims=(FunctionPreserving(), *LOOSE)),
        "Losses in float32: of two that are next to equal either may win.",
    ),
    _right("fine_search", FineSearch, "Other candidates, in another order."),
    _right(
        "drawn",
        lambda: Drawn(claims=SEARCH[:3]),
        "Candidates may be random, when they come from the generator that is passed in.",
    ),
    _right(
        "black_box",
        lambda: SmoothQuant(claims=(), capabilities=Capabilities(num_bits=frozenset({8}))),
        "Claims nothing, and does eight bits only.",
    ),
    _right("rotated", Rotated, "The matrix as it is, in float64, in place of butterflies."),
)


# What a unit test looks at --------------------------------------------------------------------


def outputs(plugin):
    """Return the rounded output of ordinary layers, and the input scale."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16)) * np.exp(rng.normal(size=16))
    statistics = {
        "hessian": torch.from_numpy((2 / len(x)) * x.T @ x),
        "absmax": torch.from_numpy(np.abs(x).max(0).astype(np.float32)),
        "sample": torch.from_numpy(x.astype(np.float32)),
    }
    layers = {
        name: RoundingProblem(
            name=name,
            weight=torch.from_numpy(rng.normal(size=(6, 16)).astype(np.float32)),
            scheme=Scheme(group_size=8),
            grid=Grid(-8, 7),
            statistics=statistics,
        )
        for name in "qk"
    }
    made = plugin.rewrite(RewriteProblem(layers=layers), rng)
    if not isinstance(made, Rewrite):
        return []
    scale = made.input_scale.double().numpy()
    return [(x / scale) @ made.weights[n].double().numpy().T for n in made.weights]
