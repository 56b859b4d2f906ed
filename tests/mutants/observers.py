"""Wrong observers, and right ones that do it otherwise."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from qframe import InputGroup, LayerInfo
from qframe.claims import ChannelAbsmax, Mergeable, Reproducible, SecondMoments, SignBlind
from tests.mutants.mutant import Mutant, Twin

MOMENTS = (SecondMoments(), Mergeable(), SignBlind())
ABSMAX = (ChannelAbsmax(), Mergeable(exact=True), SignBlind(), Reproducible())


@dataclass(frozen=True)
class Watcher:
    """An observer made of a class of statistics."""

    statistic: type
    claims: tuple[Any, ...] = MOMENTS
    name: str = "watcher"

    def start(self, group):
        return self.statistic(group.columns)


# The right ones -------------------------------------------------------------------------------


class Moments:
    """H = (2/n) sum x x^T, all in float64."""

    def __init__(self, columns):
        self.sum = torch.zeros(columns, columns, dtype=torch.float64)
        self.tokens = 0

    def update(self, x):
        self.add(self.products(x.double()), len(x))

    def products(self, x):
        half = torch.tril(x.T @ x)  # so that the result is symmetric, however it was computed
        return half + torch.tril(half, -1).T

    def add(self, products, tokens):
        self.sum = self.sum + products
        self.tokens += tokens

    def merge(self, other):
        self.add(other.sum, other.tokens)

    def value(self):
        return self.sum * (2 / max(self.tokens, 1))


class Largest:
    """max |x| of each channel."""

    def __init__(self, columns):
        self.absmax = torch.zeros(columns)

    def update(self, x):
        if len(x):
            self.absmax = torch.maximum(self.absmax, x.abs().amax(0))

    def merge(self, other):
        self.absmax = torch.maximum(self.absmax, other.absmax)

    def value(self):
        return self.absmax.clone()


# Mutants of the second moments ----------------------------------------------------------------


class MergeForgetsTokens(Moments):
    def merge(self, other):
        self.sum = self.sum + other.sum


class MergeOverwrites(Moments):
    def merge(self, other):
        self.sum, self.tokens = other.sum.clone(), other.tokens


class MergeTakesHold(Moments):
    def merge(self, other):
        if self.tokens:
            self.add(other.sum, other.tokens)
        else:
            self.sum, self.tokens = other.sum, other.tokens

    def add(self, products, tokens):
        self.sum += products
        self.tokens += tokens


class MergeEmptiesOther(Moments):
    def merge(self, other):
        self.add(other.sum, other.tokens)
        other.sum, other.tokens = torch.zeros_like(other.sum), 0


class OneOverTokens(Moments):
    def value(self):
        return self.sum / max(self.tokens, 1)


class LastBatchOnly(Moments):
    def add(self, products, tokens):
        self.sum, self.tokens = products, tokens


class EmptyBatchStartsAnew(Moments):
    def add(self, products, tokens):
        if tokens:
            super().add(products, tokens)
        else:
            self.sum, self.tokens = torch.zeros_like(self.sum), 0


class MeanOfMeans(Moments):
    def add(self, products, tokens):
        if tokens:
            super().add(products / tokens, 1)


class CountsBatches(Moments):
    def add(self, products, tokens):
        super().add(products, 1)


class InFloat16(Moments):
    def products(self, x):
        return super().products(x.to(torch.float16)).double()


class InBfloat16(Moments):
    def products(self, x):
        return super().products(x.to(torch.bfloat16)).double()


class RunsForEver(Moments):
    """Declares runs of 256 tokens; sums in float32 without end."""

    def __init__(self, columns):
        super().__init__(columns)
        self.sum = self.sum.float()

    def update(self, x):
        for token in x:
            self.sum += torch.outer(token, token)
        self.tokens += len(x)

    def value(self):
        return super().value().double()


class DividesByZero(Moments):
    def value(self):
        return self.sum * (2 / torch.tensor(self.tokens, dtype=torch.float64))


class CentresInPlace(Moments):
    def update(self, x):
        x -= 0.0 if len(x) == 0 else x[0].clone() * 2.0**-10
        super().update(x)


class ValueStartsAnew(Moments):
    def value(self):
        found = super().value()
        self.sum, self.tokens = torch.zeros_like(self.sum), 0
        return found


class ValueEndsIt(Moments):
    done = False

    def update(self, x):
        if not self.done:
            super().update(x)

    def value(self):
        self.done = True
        return super().value()


class ValueScalesTheSum(Moments):
    """Returns its own sum, scaled in place once, for speed."""

    def add(self, products, tokens):
        before = self.tokens
        self.tokens += tokens
        if self.tokens:
            self.sum *= before / self.tokens
            self.sum += products * (2 / self.tokens)

    def merge(self, other):
        self.add(other.sum * (other.tokens / 2), other.tokens)

    def value(self):
        return self.sum


class SharedSum(Moments):
    """Keeps its sums in the class, by size: fine as long as there is one statistic."""

    sums: ClassVar[dict[int, torch.Tensor]] = {}

    def __init__(self, columns):
        super().__init__(columns)
        self.sums[columns] = self.sum

    def add(self, products, tokens):
        self.sums[len(products)] += products
        self.tokens += tokens
        self.sum = self.sums[len(products)]


class UpperOnly(Moments):
    def value(self):
        return super().value().triu()


class LowerIsStale(Moments):
    """Fills the other triangle from a transpose that was rounded to float32."""

    def value(self):
        found = super().value()
        return found.triu() + found.float().double().tril(-1)


class SwallowsNaN(Moments):
    def update(self, x):
        super().update(torch.nan_to_num(x, posinf=0.0, neginf=0.0))


class DropsRaggedTile(Moments):
    def update(self, x):
        whole = len(x) if len(x) < 64 else len(x) // 64 * 64
        super().update(x[:whole])


class HoldsALambda(Moments):
    def __init__(self, columns):
        super().__init__(columns)
        self.scale = lambda tokens: 2 / max(tokens, 1)


class CountsElsewhere(Moments):
    counts: ClassVar = weakref.WeakKeyDictionary()

    @property
    def tokens(self):
        return self.counts.get(self, 0)

    @tokens.setter
    def tokens(self, tokens):
        self.counts[self] = tokens


class Subsamples(Moments):
    """Takes half of the tokens of long batches, drawn from NumPy's global generator."""

    def update(self, x):
        if len(x) > 8:
            x = x[torch.from_numpy(np.random.permutation(len(x))[: len(x) // 2])]
        super().update(x)


class SeedsTheWorld(Moments):
    def update(self, x):
        torch.manual_seed(0)
        super().update(x)


class ThreadsShow(Moments):
    """Splits the tokens by the number of threads, and sums the parts in float32."""

    def products(self, x):
        parts = [super(ThreadsShow, self).products(p.float()) for p in self.parts(x)]
        return torch.stack(parts).sum(0).double()

    def parts(self, x):
        return x.chunk(torch.get_num_threads())


class CentresTheTokens(Moments):
    """Takes away the mean of the first batch it sees: a covariance, not a second moment."""

    mean = None

    def update(self, x):
        if self.mean is None and len(x):
            self.mean = x.double().mean(0)
        shift = 0 if self.mean is None else self.mean
        products = self.products(x.double() - shift)
        self.add(products, len(x))


# Mutants of the largest magnitude -------------------------------------------------------------


class LargestNotMagnitude(Largest):
    def update(self, x):
        if len(x):
            self.absmax = torch.maximum(self.absmax, x.amax(0))


class LargestOfLastBatch(Largest):
    def update(self, x):
        if len(x):
            self.absmax = x.abs().amax(0)


class LargestInFloat16(Largest):
    def update(self, x):
        super().update(x.half().float())


class LargestIgnoresNaN(Largest):
    def update(self, x):
        if len(x):
            self.absmax = torch.fmax(self.absmax, x.abs().nan_to_num(posinf=0.0).amax(0))


class LargestFailsOnNothing(Largest):
    def update(self, x):
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))


class LargestIsAnAlias(Largest):
    def update(self, x):
        if len(x):
            torch.maximum(self.absmax, x.abs().amax(0), out=self.absmax)

    def value(self):
        return self.absmax


class LargestPerTensor(Largest):
    def value(self):
        return self.absmax.max().expand(len(self.absmax)).clone()


class MergeOfSmaller(Largest):
    def merge(self, other):
        self.absmax = torch.minimum(self.absmax, other.absmax)


RUNS = (SecondMoments(run=256), *MOMENTS[1:])


def _wrong(name, statistic, killed_by, bug, claims=MOMENTS):
    right = Largest if claims is ABSMAX else Moments
    return Mutant(
        name=name,
        kind="observer",
        bug=bug,
        make=lambda: Watcher(statistic, claims),
        correct=lambda: Watcher(right, ABSMAX if claims is ABSMAX else MOMENTS),
        killed_by=killed_by,
    )


MUTANTS = (
    _wrong(
        "merge_forgets_tokens",
        MergeForgetsTokens,
        "merge_sees_both",
        "Merging adds the sums but not the counts, so the mean is too large.",
    ),
    _wrong(
        "merge_overwrites",
        MergeOverwrites,
        "merge_sees_both",
        "Merging keeps only the other statistic.",
    ),
    _wrong(
        "merge_takes_hold",
        MergeTakesHold,
        "merge_leaves_other",
        "An empty statistic takes over the other's tensor, and both go on adding to it.",
    ),
    _wrong(
        "merge_empties_other",
        MergeEmptiesOther,
        "merge_leaves_other",
        "Merging moves the sums instead of copying them.",
    ),
    _wrong(
        "one_over_tokens",
        OneOverTokens,
        "statistic_value",
        "1/n in place of 2/n: damping and scales depend on it when columns are dead.",
    ),
    _wrong(
        "last_batch_only",
        LastBatchOnly,
        "statistic_value",
        "The sum is assigned instead of added to.",
    ),
    _wrong(
        "empty_batch_starts_anew",
        EmptyBatchStartsAnew,
        "statistic_value",
        "A batch without tokens, as of an expert that none is sent to, forgets the others.",
    ),
    _wrong(
        "mean_of_means",
        MeanOfMeans,
        "statistic_value",
        "Batches of different length weigh the same.",
    ),
    _wrong(
        "counts_batches",
        CountsBatches,
        "statistic_value",
        "Divides by the number of batches, not tokens; published code for 3-d inputs did so.",
    ),
    _wrong(
        "in_float16", InFloat16, "statistic_value", "Sums in the dtype of a half-precision network."
    ),
    _wrong("in_bfloat16", InBfloat16, "statistic_value", "Rounds activations to bfloat16."),
    _wrong(
        "runs_for_ever",
        RunsForEver,
        "statistic_value",
        "Sums in float32 without end, where runs of 256 tokens are declared.",
        RUNS,
    ),
    _wrong(
        "divides_by_zero",
        DividesByZero,
        "value_of_nothing",
        "0/0 for a layer that saw no token.",
    ),
    _wrong(
        "centres_in_place",
        CentresInPlace,
        "update_leaves_activations",
        "Changes the activations, which the network goes on with.",
    ),
    _wrong(
        "value_starts_anew",
        ValueStartsAnew,
        "value_repeats",
        "Asking for the value empties the statistic.",
    ),
    _wrong(
        "value_ends_it",
        ValueEndsIt,
        "update_after_value",
        "What comes after the value was asked for does not count.",
    ),
    _wrong(
        "value_scales_the_sum",
        ValueScalesTheSum,
        "value_is_no_alias",
        "Returns its own tensor, as GPTQ's published code does.",
        MOMENTS[:1],
    ),
    _wrong(
        "shared_sum",
        SharedSum,
        "statistics_are_independent",
        "A mutable attribute of the class: all statistics share one sum.",
    ),
    _wrong("upper_only", UpperOnly, "statistic_value", "Only the upper triangle is filled."),
    _wrong(
        "lower_is_stale",
        LowerIsStale,
        "statistic_value",
        "The triangles differ in the last bits: no Cholesky factorization notices.",
    ),
    _wrong(
        "swallows_nan",
        SwallowsNaN,
        "non_finite_shows",
        "nan_to_num hides an overflow of the network from everyone.",
    ),
    _wrong(
        "drops_ragged_tile",
        DropsRaggedTile,
        "statistic_value",
        "Tokens after the last whole tile of 64 are forgotten.",
    ),
    _wrong(
        "holds_a_lambda",
        HoldsALambda,
        "statistic_travels",
        "Cannot be sent, so no other process can collect it.",
    ),
    _wrong(
        "counts_elsewhere",
        CountsElsewhere,
        "statistic_travels",
        "How many tokens there were is no attribute, and is not sent.",
    ),
    _wrong(
        "subsamples",
        Subsamples,
        "observing_repeats",
        "Draws tokens from a global generator.",
    ),
    _wrong(
        "seeds_the_world",
        SeedsTheWorld,
        "observing_leaves_global_rng",
        "Calls torch.manual_seed: all that is random afterwards is the same.",
    ),
    _wrong(
        "threads_show",
        ThreadsShow,
        "threads_do_not_show",
        "Splits a sum by the number of threads.",
        (SecondMoments(run=1 << 12), Reproducible()),
    ),
    _wrong(
        "centres_the_tokens",
        CentresTheTokens,
        "order_of_tokens",
        "Takes away the first batch's mean, so the order of batches counts.",
        MOMENTS[1:],
    ),
    _wrong(
        "largest_not_magnitude",
        LargestNotMagnitude,
        "statistic_value",
        "max x in place of max |x|.",
        ABSMAX,
    ),
    _wrong(
        "largest_of_last_batch",
        LargestOfLastBatch,
        "statistic_value",
        "The maximum of the last batch only.",
        ABSMAX,
    ),
    _wrong(
        "largest_in_float16",
        LargestInFloat16,
        "statistic_value",
        "Rounds to float16, where outliers beyond 65504 become infinite.",
        ABSMAX,
    ),
    _wrong(
        "largest_ignores_nan",
        LargestIgnoresNaN,
        "non_finite_shows",
        "fmax and nan_to_num let a NaN vanish.",
        ABSMAX,
    ),
    _wrong(
        "largest_fails_on_nothing",
        LargestFailsOnNothing,
        "update_leaves_activations",
        "The maximum of no tokens raises an IndexError.",
        ABSMAX,
    ),
    _wrong(
        "largest_is_an_alias",
        LargestIsAnAlias,
        "value_is_no_alias",
        "A value that was handed out changes with later updates.",
        ABSMAX,
    ),
    _wrong(
        "largest_per_tensor",
        LargestPerTensor,
        "statistic_value",
        "One number for all channels.",
        ABSMAX,
    ),
    _wrong(
        "merge_of_smaller",
        MergeOfSmaller,
        "merge_sees_both",
        "Merging keeps the smaller magnitude.",
        ABSMAX,
    ),
)


# Twins ----------------------------------------------------------------------------------------


class Parts(Moments):
    """Keeps all parts, and adds them up when asked, the smallest number of tokens first."""

    def __init__(self, columns):
        self.columns, self.parts = columns, []

    def update(self, x):
        self.parts.append((len(x), self.products(x.double())))

    def merge(self, other):
        self.parts = [*other.parts, *self.parts]

    def value(self):
        total = torch.zeros(self.columns, self.columns, dtype=torch.float64)
        for _, products in sorted(self.parts, key=lambda part: part[0]):
            total += products
        return total * (2 / max(sum(tokens for tokens, _ in self.parts), 1))


class Compensated(Moments):
    """Kahan's sum over pieces of eight tokens: a sum and what it lacks."""

    def __init__(self, columns):
        super().__init__(columns)
        self.lost = torch.zeros_like(self.sum)

    def update(self, x):
        for piece in x.double().split(8):
            self.add(self.products(piece), len(piece))

    def add(self, products, tokens):
        wanted = products - self.lost
        total = self.sum + wanted
        self.lost = (total - self.sum) - wanted
        self.sum = total
        self.tokens += tokens


class Tiles(Moments):
    """Waits until it has 32 tokens, and sums those in float32, the last token first."""

    def __init__(self, columns):
        super().__init__(columns)
        self.waiting = torch.zeros(0, columns)

    def update(self, x):
        self.waiting = torch.cat([self.waiting, x])
        while len(self.waiting) >= 32:
            self.flush(32)

    def flush(self, tokens):
        tile = self.waiting[:tokens].flip(0)
        self.add(self.products(tile).double(), len(tile))
        self.waiting = self.waiting[tokens:]

    def merge(self, other):
        self.add(other.sum, other.tokens)
        self.update(other.waiting)

    def value(self):
        if len(self.waiting):
            self.flush(len(self.waiting))
        return super().value()


class Running(Moments):
    """Keeps the mean instead of the sum, rescaled with every batch, as published GPTQ code does."""

    def add(self, products, tokens):
        before = self.tokens
        self.tokens += tokens
        if self.tokens:
            self.sum = self.sum * (before / self.tokens) + products * (2 / self.tokens)

    def merge(self, other):
        self.add(other.sum * (other.tokens / 2), other.tokens)

    def value(self):
        return self.sum.clone()


class Refuses(Moments):
    """Raises a typed error for what is not finite, and for a value of no tokens."""

    def update(self, x):
        from qframe.errors import NonFiniteError

        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("an activation is not finite; look at the network's inputs")
        super().update(x)

    def value(self):
        from qframe.errors import UncalibratedLayerError

        if self.tokens == 0:
            raise UncalibratedLayerError("no tokens were seen; give calibration data")
        return super().value()


class Ranges:
    """The smallest and largest input of each channel, as a tuple of NumPy arrays; claims little."""

    def __init__(self, columns):
        self.low, self.high = np.zeros(columns, np.float32), np.zeros(columns, np.float32)

    def update(self, x):
        array = x.numpy()
        self.low = np.minimum(self.low, array.min(0, initial=np.inf))
        self.high = np.maximum(self.high, array.max(0, initial=-np.inf))

    def merge(self, other):
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)

    def value(self):
        return self.low.copy(), {"high": self.high.copy(), "magnitude": float(self.high.max())}


class MeanMagnitude(Moments):
    """AWQ's mean |x|, a mean that is updated as by Welford; claims nothing at all."""

    def __init__(self, columns):
        self.mean, self.tokens = torch.zeros(columns), 0

    def update(self, x):
        if len(x):
            self.add(x.abs().mean(0), len(x))

    def merge(self, other):
        self.add(other.mean, other.tokens)

    def add(self, mean, tokens):
        both = self.tokens + tokens
        if both:
            self.mean = self.mean + (mean - self.mean) * (tokens / both)
        self.tokens = both

    def value(self):
        return self.mean.clone()


def _right(name, statistic, why, claims=MOMENTS):
    return Twin(name=name, kind="observer", why=why, make=lambda: Watcher(statistic, claims))


TWINS = (
    _right("float64", Moments, "Everything in float64, by the matrix product of torch."),
    _right("largest", Largest, "The plain maximum.", ABSMAX),
    _right("parts", Parts, "Merging makes a longer list; sums are taken in another order."),
    _right(
        "compensated",
        Compensated,
        "Kahan's summation rounds otherwise than a plain sum.",
    ),
    _right(
        "tiles",
        Tiles,
        "Tiles of 32 tokens in another order; asking for the value ends a tile early.",
        (SecondMoments(run=32), Mergeable(), SignBlind()),
    ),
    _right(
        "running",
        Running,
        "A running mean rounds with every batch; it does not claim to be exact on integers.",
        (SecondMoments(), SignBlind()),
    ),
    _right("refuses", Refuses, "Typed errors are an answer, too."),
    _right("ranges", Ranges, "A value of another form, with one claim.", (Mergeable(exact=True),)),
    _right("mean_magnitude", MeanMagnitude, "A black box: nothing is claimed.", ()),
)


# What a unit test looks at --------------------------------------------------------------------


def outputs(plugin):
    """Return the values after a batch, three batches, and a merge."""
    rng = np.random.default_rng(0)
    layer, found = LayerInfo(name="block.up", rows=4, columns=6), []
    width = 12 if getattr(plugin, "pairs", False) else 6
    for counts in ((32,), (32, 32, 32)):
        halves = [plugin.start(InputGroup(layers=(layer,))) for _ in range(2)]
        for statistic in halves:
            for count in counts:
                x = rng.normal(size=(count, width)).astype(np.float32)
                statistic.update(torch.from_numpy(x))
        found.append(np.asarray(halves[0].value()).copy())
        halves[0].merge(halves[1])
        found.append(np.asarray(halves[0].value()).copy())
    return found
