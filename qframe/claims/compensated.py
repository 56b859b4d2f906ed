"""The claim of GPTQ with dynamic groups: scales follow the weights as compensated so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qframe import bounds
from qframe.certificates import ROWS, Certificate, Closest, Evidence
from qframe.claims.gptq import Babai, Replay, Rows
from qframe.claims.nearest import unequal_steps
from qframe.claims.scales import against_rule, beyond, elsewhere
from qframe.hessian import Float64
from qframe.scheme import Scheme


@dataclass(frozen=True, slots=True)
class CompensatedScale:
    """B3.f: a group's scale follows the scheme's rule on its weights as compensated when it begins.

    Compensated for all columns before the group, whatever the block size: what the published loop
    does when a group does not begin a block is something else. Groups are of columns that follow
    one another in processing order. With the mse observer it says that no scale is larger than
    minmax's; with minmax also that zero point and scale clip nothing by more than half a step.

    babai   what is claimed of the codes: order, damping and arithmetic
    """

    babai: Babai
    name = "compensated scale"
    theorem = "B3.f"

    def objection(self, scheme: Scheme) -> str | None:
        """A tensor or a row has one scale, taken before anything is compensated."""
        return elsewhere(frozenset({"group"}), scheme) or unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Recompute what every group was when it began, in float64, and compare."""
        from qframe import parallel

        replay = self.babai.replay(evidence, self)
        if isinstance(replay, Certificate):
            return replay
        columns = len(replay.order)
        width = evidence.problem.scheme.group_width(columns)
        index = evidence.quantized.group_index.numpy()[replay.order]
        if not np.array_equal(index, np.arange(columns) // width):
            note = "groups are not columns that follow one another in processing order"
            return Closest(float("inf")).certificate(self, note)

        def work(first: int) -> Closest:
            rows = replay.rows(evidence, first)
            starts = range(0, columns, width)
            ends = [self._ends(replay, rows, a, min(a + width, columns)) for a in starts]
            return _closest(evidence, rows, np.stack(ends, 2), first)

        starts = range(0, len(replay.weight), ROWS)
        return Closest.among(parallel.spread(work, starts, evidence.threads)).certificate(self)

    def _ends(self, replay: Replay, rows: Rows, first: int, last: int) -> Float64:
        """Return the ends of one group when it began: (lo, hi), each (least, seen, most).

        The group is columns first..last; the result is [6, rows].
        """
        weight = rows.weight[:, first:last]
        if first == 0:  # nothing is compensated yet, so nothing is rounded
            lo, hi = weight.min(1), weight.max(1)
            return np.stack([lo, lo, lo, hi, hi, hi])
        change, reach = _look_ahead(replay, rows, first, last)
        feedback, group = replay.feedback, slice(first, last)
        steps = rows.codes[:, :first] - rows.zero_point[:, :first]
        own = bounds.gamma(len(replay.order) + 2, bounds.UNIT["float64"])
        lengths = np.linalg.norm(rows.delta, axis=1, keepdims=True)
        seen = np.abs(rows.residual) + own * (np.abs(rows.delta) + lengths * feedback.norms)
        slack = bounds.gptq_compensated(
            weight,
            change,
            (
                np.linalg.norm(rows.delta[:, :first], axis=1),
                np.linalg.norm(bounds.decode(rows.scale[:, :first], steps), axis=1),
                (seen[:, :first] ** 2 * feedback.diagonal[:first]).sum(1),
            ),
            feedback.norms[group],
            feedback.diagonal[group],
            reach,
            feedback.moved,
            len(replay.order),
            self.babai.sums,
        )
        y = weight + change
        low, high = y - slack, y + slack
        ends = [low.min(1), y.min(1), high.min(1), low.max(1), y.max(1), high.max(1)]
        return np.stack(ends)


def _look_ahead(replay: Replay, rows: Rows, first: int, last: int) -> tuple[Float64, Float64]:
    """Return (compensated minus original weights of columns first..last, their `reach`).

    With the columns S before the group G fixed, the minimum over the others leaves residuals 0, so
    delta_S U_SG + (w' - w) U_GG = 0.
    """
    import torch

    unit = replay.feedback.unit
    before = torch.from_numpy(np.ascontiguousarray(rows.delta[:, :first]))
    own = unit[first:last, first:last]
    change = torch.linalg.solve_triangular(
        own, -(before @ unit[:first, first:last]), upper=True, left=False, unitriangular=True
    )
    factor = own * torch.from_numpy(np.sqrt(replay.feedback.diagonal[first:last]))
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(last - first, dtype=torch.float64), upper=True
    )
    return change.numpy(), inverse.square().sum(0).sqrt().numpy()


def _closest(evidence: Evidence, rows: Rows, ends: Float64, first: int) -> Closest:
    """Compare the scales and zero points of some rows with the ends of their groups.

    ends   [6, rows, groups], of `CompensatedScale._ends`
    """
    problem = evidence.problem
    scheme, grid, part = problem.scheme, problem.grid, slice(first, first + len(rows.weight))
    least_lo, lo, most_lo, least_hi, hi, most_hi = ends
    scale = evidence.quantized.scale[part].numpy().astype(np.float64)
    zero = evidence.quantized.zero_point[part].numpy().astype(np.float64)

    def ideal(low: Float64, high: Float64) -> Float64:
        return bounds.ideal_scale(low, high, grid, symmetric=scheme.symmetric)

    if scheme.symmetric:  # what is certain is how far at least one end is from 0
        reach = np.maximum(np.maximum(least_hi, -most_lo), 0)
        narrow = ideal(-reach, reach)
    else:
        narrow = ideal(np.minimum(most_lo, 0), np.maximum(least_hi, 0))
    wide = ideal(least_lo, most_hi)
    found = [Closest.of(*against_rule(scale, ideal(lo, hi), narrow, wide, scheme), first)]
    if scheme.observer != "mse":
        allowed = bounds.coverage(least_lo, most_hi, scale, grid, symmetric=scheme.symmetric)
        found.append(Closest.of(beyond(most_lo, least_hi, scale, zero, grid), allowed, first))
    return Closest.among(found)
