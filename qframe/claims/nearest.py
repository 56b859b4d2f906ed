"""Claims about single weights: which code each of them gets, whatever the others get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.certificates import Certificate, Closest, Evidence
from qframe.contracts import Grid
from qframe.hessian import Float64
from qframe.pieces import Piece
from qframe.scheme import Scheme


def unequal_steps(scheme: Scheme) -> str | None:
    """Return why claims about s (c - z) say nothing of a scheme, or None."""
    if scheme.type != "int":
        return f"the steps of type {scheme.type!r} are not equal, as the theorem wants them"
    return None


@dataclass(frozen=True, slots=True)
class HalfStep:
    """B1.b: every code is the nearest one to its weight; B2.d where codes stand for values.

    roundings    of the quotient w / s: 1 for a division, 2 for a product with fl(1 / s), which
                 is to be used only where 1 / s is a normal number
    zero_point   whether it is added to the code "after" rounding, or to the quotient "before"
    """

    roundings: int = 1
    zero_point: Literal["after", "before"] = "after"
    name = "half step"
    theorem = "B1.b"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """There is none."""
        return None

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare each weight with what its code stands for."""
        grid, gamma = evidence.problem.grid, bounds.gamma(self.roundings)
        if grid.values is not None:
            return evidence.closest(self._of_values(grid)).certificate(self)
        added = 0.0
        if self.zero_point == "before" and not evidence.problem.scheme.symmetric:
            added = float(bounds.zero_point_added(1.0, grid))

        most, groups = evidence.differences().highest, evidence.piece(slice(0))
        # Where groups are wide alike, the whole is nothing but views.
        whole = evidence.piece(slice(None)) if most.ndim > 1 else None

        def judge(places: npt.NDArray[np.intp]) -> Closest:
            piece = whole or evidence.piece(places)
            strips = places if whole else np.arange(len(places))
            inside, error, allowed = piece.closest(strips, grid, gamma, added)
            found = Closest.of(error, allowed)
            return replace(found, place=(*found.place, int(inside[found.place])))

        at_once = most.size if whole else None
        return Closest.screened(most, judge, groups.width, at_once=at_once).certificate(self)

    def _of_values(self, grid: Grid) -> Callable[[Piece], tuple[Float64, Float64]]:
        """Return what judges a piece of a layer on a grid with values."""
        gamma = bounds.gamma(self.roundings)

        def judge(piece: Piece) -> tuple[Float64, Float64]:
            allowance = gamma * np.abs(piece.weight, dtype=np.float64)
            allowance += piece.scale * bounds.ETA["float32"]  # where the quotient underflows
            return bounds.nearest(piece.delta(), piece.codes, piece.scale, grid, allowance)

        return judge


@dataclass(frozen=True, slots=True)
class Radius:
    """B10.a: no weight moves by more than `steps` steps, but for what the range takes off it.

    steps   1 for methods that round up or down as they like
    """

    steps: float
    name = "radius"
    theorem = "B10.a"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """It is about integers."""
        return unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare each weight with what its code stands for."""
        grid = evidence.problem.grid

        def judge(piece: Piece) -> tuple[Float64, Float64]:
            return bounds.radius(
                piece.weight, piece.delta(), piece.codes, piece.scale, grid, self.steps
            )

        return evidence.closest(judge).certificate(self)
