"""Claims about scales and zero points: they are those of the scheme's rule, and they reach.

Without them an over-large scale would pass every claim about codes, and one too small would be
excused as clipping.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qframe import bounds
from qframe.certificates import Certificate, Closest, Evidence
from qframe.contracts import Grid
from qframe.hessian import Float64
from qframe.scheme import Scheme

ALL = frozenset({"tensor", "channel", "group"})


def elsewhere(strategies: frozenset[str], scheme: Scheme) -> str | None:
    """Return why a claim that is made for some strategies says nothing of a scheme, or None."""
    if scheme.strategy not in strategies:
        return f"it is claimed for strategy {' and '.join(sorted(strategies))}"
    return None


def against_rule(
    scale: Float64,
    ideal: Float64,
    narrow: Float64,
    wide: Float64,
    scheme: Scheme,
    unit: float = 1.0,
) -> tuple[Float64, Float64]:
    """Return (error, what is allowed on its side) of scales, B1.c.

    ideal          of what is known of the group; 0 for a group of zeros, whose scale is 1
    narrow, wide   the least and the largest ideal scale that the group may have in truth
    unit           the scale of the tensor in a two-level scheme
    """
    lowest, highest = bounds.scale_rule(narrow, scheme.scale_dtype, unit)
    if wide is not narrow:
        _, highest = bounds.scale_rule(wide, scheme.scale_dtype, unit)
    if scheme.observer == "mse":
        lowest = np.zeros_like(lowest)
    error = np.abs(scale - ideal)
    allowed = np.where(scale < ideal, ideal - lowest, highest - ideal)
    perhaps = (narrow == 0) & (scale == unit)
    surely = wide == 0
    return np.where(perhaps, 0, error), np.where(surely, 0, allowed)


def beyond(lo: Float64, hi: Float64, scale: Float64, zero: Float64, grid: Grid) -> Float64:
    """Return how far groups reach beyond their codes, 0 where they do not (B1.f)."""
    values = grid.values
    first, last = (grid.qmin, grid.qmax) if values is None else (values[0], values[-1])
    below = scale * (first - zero) - lo
    above = hi - scale * (last - zero)
    outside = np.maximum(np.maximum(below, above), 0)
    return np.where(np.isfinite(scale), outside, np.inf)


@dataclass(frozen=True, slots=True)
class SchemeScale:
    """B1.c: scales are those of the scheme's rule, taken from the original weights.

    With the mse observer, which may clip, it says that no scale is larger than minmax's.
    Columns of a group need not be neighbours: the group index says who belongs together. In a
    two-level scheme (B2.e) the scale of the tensor is held to its rule, too; the rule "ocp" is
    kept exactly (B2.f).

    strategies   for which it is claimed
    """

    strategies: frozenset[str] = ALL
    name = "scale"
    theorem = "B1.c"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """It is about some strategies."""
        return elsewhere(self.strategies, scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare every scale with the smallest and largest weight of its group."""
        problem = evidence.problem
        lo, hi = evidence.ranges()
        ideal = bounds.ideal_scale(lo, hi, problem.grid, symmetric=problem.scheme.symmetric)
        scale = evidence.quantized.scale.numpy()
        if problem.scheme.scale_rule == "ocp":
            wanted = bounds.ocp_scale(lo, hi, problem.grid)
            error = np.abs(scale.astype(np.float64) - np.where(wanted > 0, wanted, 1))
            return Closest.of(error, np.zeros_like(error)).certificate(self)
        unit, of_tensor = 1.0, 0.0
        if evidence.quantized.global_scale is not None:
            unit = float(evidence.quantized.global_scale)
            of_tensor = _of_tensor(unit, ideal)

        def judge(rows: slice) -> tuple[Float64, Float64]:
            own = ideal[rows]
            return against_rule(scale[rows].astype(np.float64), own, own, own, problem.scheme, unit)

        found = evidence.closest_group(judge, len(ideal))
        if of_tensor > max(found.ratio, 1):
            note = f"the scale of the tensor is {unit:.9g}"
            return Certificate(claim=self.name, theorem="B2.e", ratio=of_tensor, note=note)
        return found.certificate(self)


def _of_tensor(unit: float, ideal: Float64) -> float:
    """Return how far the scale of a tensor is from what its rule allows, at most 1 if it is kept.

    ideal   of all groups
    """
    largest = ideal.max(initial=0)
    if largest == 0:
        return bounds.ratio(unit - 1, 0)
    lowest, highest = bounds.tensor_scale(largest)
    middle = (lowest + highest) / 2
    return bounds.ratio(unit - middle, highest - middle)


@dataclass(frozen=True, slots=True)
class Covers:
    """B1.f: the codes of a group reach as far as its weights do, but for half a step.

    Where codes stand for values (B2.d) nothing is beyond them, and with the rule "ocp" no more than
    it leaves out (B2.f).

    It takes B1.b's excuse away: a zero point or scale that clips is found out.

    strategies   for which it is claimed
    """

    strategies: frozenset[str] = ALL
    name = "coverage"
    theorem = "B1.f"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """The mse observer clips on purpose."""
        if scheme.observer == "mse":
            return "the mse observer may clip"
        return elsewhere(self.strategies, scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare the ends of every group with the ends of its codes."""
        problem, grid = evidence.problem, evidence.problem.grid
        lo, hi = evidence.ranges()
        scales, zeros = evidence.quantized.scale.numpy(), evidence.quantized.zero_point.numpy()
        scheme = problem.scheme

        def judge(rows: slice) -> tuple[Float64, Float64]:
            low, high = lo[rows], hi[rows]
            scale, zero = (each[rows].astype(np.float64) for each in (scales, zeros))
            allowed = bounds.coverage(
                low,
                high,
                scale,
                grid,
                symmetric=scheme.symmetric,
                rule=scheme.scale_rule,
                two_level=scheme.two_level,
            )
            return beyond(low, high, scale, zero, grid), allowed

        return evidence.closest_group(judge, len(lo)).certificate(self)
