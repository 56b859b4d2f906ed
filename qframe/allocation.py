"""Which layer gets how many bits: the least loss that a budget of stored bits allows.

Pure arithmetic: options of layers in, a choice for each out. It is the multiple-choice knapsack
problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11). Losses are added in
the order of the layers, so that the same options give the same choice everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from qframe.errors import RecipeError

STATES = 1 << 16  # amounts of bits that the exact search tells apart


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a layer.

    bits   of the whole layer, everything included
    loss   what it costs, finite; what losses of several layers add up to is made small
    """

    bits: int
    loss: float


Options = Sequence[Sequence[Option]]  # of each layer; none is empty


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice for each layer.

    picks   of each layer, which of its options
    bits    of all layers
    loss    of all layers, added in their order
    gap     no choice within the budget has a loss that is less by more than this; 0: it is the best
    """

    picks: tuple[int, ...]
    bits: int
    loss: float
    gap: float


def allocate(options: Options, budget: int) -> Solution:
    """Return the choice of least loss whose bits are at most the budget.

    Of several that have the least loss, one with the fewest bits. It is the best there is, where
    all amounts of bits are multiples of a unit that is not too small (`search`): those of networks
    are. Elsewhere it is at most `gap` from it. A larger budget never gives a larger loss.

    Raises ValueError where even the fewest bits are more than the budget.
    """
    exact, greedy = search(options, budget), steepest(options, budget)
    if exact is None:
        return greedy
    if exact.gap == 0 or (exact.loss, exact.bits) <= (greedy.loss, greedy.bits):
        return Solution(exact.picks, exact.bits, exact.loss, min(exact.gap, greedy.gap))
    return greedy


def steepest(options: Options, budget: int) -> Solution:
    """Return what taking the steepest steps gives: those that lose the most loss for a bit.

    All layers begin with their fewest bits. The steps of a layer lead along the lower convex hull
    of its options, so they become less steep one after another. The steps of all layers are taken
    from the steepest on, and the first that does not fit ends it.

    The gap. Let C and L be bits and loss at the end, s the loss that the step which did not fit
    would lose for a bit, e its bits, and B the budget. Every choice has

        loss + s bits >= L + s C,

    because each layer by itself has the least loss + s bits: on its hull the steps steeper than s
    were taken, those less steep were not, and no option lies below the hull. So within the budget

        loss >= L - s (bits - C) >= L - s (B - C),   and B - C < e.

    The gap is s (B - C): less than the last step, s e, would have lost. It is 0 where all steps
    fit. (It is the bound of the linear relaxation; Sinha and Zoltners, Operations Research 27,
    1979.)

    Raises ValueError where even the fewest bits are more than the budget.
    """
    hulls = [hull(each) for each in options]
    picks = [each[0] for each in hulls]
    used = sum(each[pick].bits for each, pick in zip(options, picks, strict=True))
    _check(used, budget)
    steps = [
        (_slope(options[layer], below, above), layer, above)
        for layer, corners in enumerate(hulls)
        for below, above in pairwise(corners)
    ]
    steps.sort(key=lambda step: -step[0])  # stable: a layer's own stay in their order
    gap = Fraction(0)
    for slope, layer, above in steps:
        more = options[layer][above].bits - options[layer][picks[layer]].bits
        if used + more > budget:
            gap = slope * (budget - used)
            break
        picks[layer], used = above, used + more
    return _solution(options, picks, float(gap))


def search(options: Options, budget: int) -> Solution | None:
    """Return the best choice by dynamic programming over the bits that are spent.

    Bits are counted in units of the greatest common divisor of all differences within a layer, and
    then the result is the best one. Where that makes more than `STATES` amounts, the unit is larger
    and what an option takes is rounded up: the budget is kept, and the gap is infinite, as nothing
    is known of it. The unit does not depend on the budget, so that more of it allows more.

    Returns None where there is nothing to choose. Raises ValueError where even the fewest bits are
    more than the budget.
    """
    least = [min(option.bits for option in each) for each in options]
    _check(sum(least), budget)
    extras = [
        [option.bits - low for option in each] for each, low in zip(options, least, strict=True)
    ]
    divisor = math.gcd(*(extra for each in extras for extra in each))
    if divisor == 0:
        return None
    whole = sum(max(each) for each in extras)
    unit = divisor * max(1, -(-whole // (divisor * STATES)))
    units = [[-(-extra // unit) for extra in each] for each in extras]
    most = sum(max(each) for each in units)
    capacity = min((budget - sum(least)) // unit, most)
    losses: npt.NDArray[np.float64] = np.full(capacity + 1, np.inf)
    losses[0] = 0.0  # of exactly so many units
    taken: list[npt.NDArray[np.int16]] = []
    for each, sizes in zip(options, units, strict=True):
        best: npt.NDArray[np.float64] = np.full(capacity + 1, np.inf)
        which = np.zeros(capacity + 1, np.int16)
        for number in sorted(range(len(each)), key=lambda i: sizes[i]):
            size = sizes[number]
            if size > capacity:
                continue
            found = losses[: capacity + 1 - size] + each[number].loss
            better = found < best[size:]
            best[size:][better] = found[better]
            which[size:][better] = number
        losses = best
        taken.append(which)
    place = int(np.argmin(losses))  # the first of equal ones: the fewest bits
    picks = []
    for which, sizes in zip(reversed(taken), reversed(units), strict=True):
        picks.append(int(which[place]))
        place -= sizes[picks[-1]]
    return _solution(options, picks[::-1], 0.0 if unit == divisor else math.inf)


def hull(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull, fewest bits first, as long as the loss falls.

    Those that lie on a line between others are kept: smaller steps leave smaller gaps.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].bits, options[i].loss))
    corners: list[int] = []
    for number in order:
        if corners and options[number].loss >= options[corners[-1]].loss:
            continue
        while len(corners) > 1 and _slope(options, corners[-1], number) > _slope(
            options, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(number)
    return corners


def _slope(options: Sequence[Option], below: int, above: int) -> Fraction:
    """Return the loss that a step loses for each bit, exactly."""
    low, high = options[below], options[above]
    return (Fraction(low.loss) - Fraction(high.loss)) / (high.bits - low.bits)


def _solution(options: Options, picks: Sequence[int], gap: float) -> Solution:
    bits, loss = 0, 0.0
    for each, pick in zip(options, picks, strict=True):
        bits, loss = bits + each[pick].bits, loss + each[pick].loss
    return Solution(tuple(picks), bits, loss, gap)


def _check(least: int, budget: int) -> None:
    if least > budget:
        raise ValueError(f"the fewest bits, {least}, are more than the budget of {budget}")


# Targets ----------------------------------------------------------------------------------------


def budget_of(target_bits: float, weights: int) -> int:
    """Return the stored bits that so many bits per weight allow.

    The target counts as it is written: 4.3 is 43/10, not the float nearest to it.

    >>> budget_of(4.3, 10)
    43
    """
    return math.floor(Fraction(str(target_bits)) * weights)


def check_target(target_bits: float, least: int, most: int, weights: int) -> None:
    """Raise RecipeError where an average lies outside what can be reached.

    least, most   stored bits of all layers together, with the fewest and the most bits each
    """
    budget = Fraction(str(target_bits)) * weights
    if least <= budget <= most:
        return
    low, high = (f"{_outwards(bits, weights, up):g}" for bits, up in ((least, True), (most, False)))
    which = f"the smallest is {low}" if budget < least else f"the largest is {high}"
    raise RecipeError(
        f"target_bits={target_bits:g} cannot be reached: of averages that the candidates for "
        f"num_bits allow, {which} bits per weight, scales and zero points included (from {low} to "
        f"{high})"
    )


def _outwards(bits: int, weights: int, up: bool) -> float:
    """Return an average with four decimals that can be reached, were it asked for."""
    share = Fraction(bits * 10_000, weights)
    return (math.ceil(share) if up else math.floor(share)) / 10_000


# What is reported -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBits:
    """What a layer got.

    num_bits   of a code
    losses     num_bits -> predicted loss, of every candidate
    why        why there was nothing to choose, "" where there was
    """

    num_bits: int
    losses: Mapping[int, float]
    why: str = ""

    @property
    def loss(self) -> float:
        """What was predicted for the bits that it got; 0 where nothing was measured."""
        return self.losses.get(self.num_bits, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """How bits were given to layers.

    target_bits    stored bits per weight that were asked for, at most
    average_bits   what they are
    measure        what losses are: "KL divergence", nats for a token, or "output error", the
                   energy of a layer's output error over that of its output
    predicted      the sum of the losses
    gap            of what was minimized: no other choice has less by more than this; infinite for
                   as many bits everywhere, where nothing was
    uniform        num_bits -> the same sum, where every layer with a choice gets so many bits and
                   the target is kept
    tokens         that it was measured on
    chosen         which of the ways that were tried it is
    tried          way -> KL divergence, nats for a token, of the network with all layers rounded to
                   nearest by it; empty where there was one way only, or no logits
    """

    target_bits: float
    average_bits: float
    measure: str
    predicted: float
    gap: float
    tokens: int
    chosen: str = ""
    tried: Mapping[str, float] = field(default_factory=dict)
    uniform: Mapping[int, float] = field(default_factory=dict)
    layers: Mapping[str, LayerBits] = field(default_factory=dict)

    def counts(self) -> dict[int, int]:
        """Return num_bits -> how many layers have so many."""
        every = [layer.num_bits for layer in self.layers.values()]
        return {bits: every.count(bits) for bits in sorted(set(every))}

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "target_bits": self.target_bits,
            "average_bits": self.average_bits,
            "measure": self.measure,
            "predicted": self.predicted,
            "gap": self.gap,
            "uniform": {str(bits): loss for bits, loss in self.uniform.items()},
            "tokens": self.tokens,
            "chosen": self.chosen,
            "tried": dict(self.tried),
            "counts": {str(bits): count for bits, count in self.counts().items()},
            "layers": {
                name: {
                    "num_bits": layer.num_bits,
                    "losses": {str(bits): loss for bits, loss in layer.losses.items()},
                    "why": layer.why,
                }
                for name, layer in self.layers.items()
            },
        }
