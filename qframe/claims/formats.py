"""What a number format promises of its grids: exactly which values exist.

A claim about a grid has `name`, `theorem` and `certify(use)`, so a plugin may bring a grid of
its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.certificates import Certificate
from qframe.contracts import Grid

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridUse:
    """A grid, what it was asked for, and numbers to be rounded to it.

    grid, num_bits, symmetric, scale_rule   as in `NumberFormat.grid`
    probes   float64, of any size: also midpoints, and numbers beyond the range
    """

    grid: Grid
    num_bits: int
    symmetric: bool
    scale_rule: str
    probes: Float64

    def moved(self) -> Float64:
        """Return how far rounding to the nearest value moves each probe."""
        return np.abs(self.probes - bounds.nearest_value(self.probes, values_of(self.grid)))


def values_of(grid: Grid) -> Float64:
    """Return what the codes of a grid stand for at scale 1, float64."""
    if grid.values is None:
        return np.arange(grid.qmin, grid.qmax + 1, dtype=np.float64)
    return np.array(grid.values, np.float64)


@runtime_checkable
class GridClaim(Protocol):
    """A claim about the grids of a number format, which can be certified."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def theorem(self) -> str:
        """Its number in docs/bounds.md."""
        ...

    def certify(self, use: GridUse) -> Certificate:
        """Compare a grid with what it should be."""
        ...


@dataclass(frozen=True, slots=True)
class UniformGrid:
    """B2.c: the integers of `num_bits` bits; rounding moves nothing inside by more than 1/2.

    Symmetric and full: two's complement. Symmetric and restricted: without the lowest code, so
    that the grid is its own mirror image. Asymmetric: from 0.
    """

    name = "uniform grid"
    theorem = "B2.c"

    def certify(self, use: GridUse) -> Certificate:
        """Compare the ends exactly, and the probes with half a step."""
        half = 1 << (use.num_bits - 1)
        if not use.symmetric:
            wanted = Grid(0, 2 * half - 1)
        elif use.scale_rule == "full":
            wanted = Grid(-half, half - 1)
        else:
            wanted = Grid(1 - half, half - 1)
        found = values_of(use.grid)
        same = (use.grid.qmin, use.grid.qmax) == (wanted.qmin, wanted.qmax)
        if not same or not np.array_equal(found, values_of(wanted)):
            return _certificate(self, np.inf, f"{use.grid} should be {wanted}")
        beyond = np.maximum(wanted.qmin - use.probes, use.probes - wanted.qmax)
        return _rounded(self, use, np.maximum(1 / 2, beyond))


@dataclass(frozen=True, slots=True)
class FloatingPoint:
    """B2.a: the values are the floating-point numbers of these parameters, all and no others.

    significand    bits of the significand, the implicit one included
    min_exponent   the smallest normal number is 2^min_exponent; below it spacing stays the same
    largest        the largest finite value; numbers beyond it are rounded to it
    """

    significand: int
    min_exponent: int
    largest: float
    name = "floating point"
    theorem = "B2.a"

    def certify(self, use: GridUse) -> Certificate:
        """Compare the values exactly, and the probes with the bound of an element."""
        shape = (self.significand, self.min_exponent, self.largest)
        wrong = _difference(values_of(use.grid), bounds.representable(*shape))
        if wrong:
            return _certificate(self, np.inf, wrong)
        return _rounded(self, use, bounds.float_element(use.probes, *shape))


@dataclass(frozen=True, slots=True)
class Codebook:
    """B2.b: the values are these, ascending, for every use of the format."""

    values: tuple[float, ...]
    name = "codebook"
    theorem = "B2.b"

    def certify(self, use: GridUse) -> Certificate:
        """Compare the values exactly, and the probes with half of the cell they lie in."""
        values = np.array(self.values)
        wrong = _difference(values_of(use.grid), values)
        if wrong:
            return _certificate(self, np.inf, wrong)
        return _rounded(self, use, bounds.half_cell(use.probes, values))


def _difference(found: Float64, wanted: Float64) -> str:
    """Return what is missing or should not be there, "" for nothing."""
    if np.array_equal(found, wanted):
        return ""
    missing, extra = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
    if missing.size:
        return f"{missing.size} values are missing, such as {missing[0]:.9g}"
    if extra.size:
        return f"{extra.size} values should not be there, such as {extra[0]:.9g}"
    return "the values are not in ascending order, or some are there twice"


def _rounded(claim: GridClaim, use: GridUse, allowed: Float64) -> Certificate:
    ratio, flat = bounds.worst(use.moved(), allowed)
    at = f"{use.probes[flat]:.17g} is moved too far" if ratio > 1 else ""
    return _certificate(claim, ratio, at)


def _certificate(claim: GridClaim, ratio: float, note: str) -> Certificate:
    return Certificate(claim=claim.name, theorem=claim.theorem, ratio=ratio, note=note)
