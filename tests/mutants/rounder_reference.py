"""Round to nearest in parts, and coordinate descent: what wrong and right rounders are made of.

Everything that a mutant may get wrong is a method of its own.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import torch

from qframe import Capabilities, QuantizedWeight, Scheme, claims, rounding
from qframe.errors import NonFiniteError
from qframe_conformance.kinds import correlated_inputs, hessian_of, original_inputs
from qframe_conformance.strategies import correlated, rounding_problem
from tests.mutants.mutant import Mutant, Twin

NEAREST = (
    claims.HalfStep(),
    claims.SchemeScale(),
    claims.Covers(),
    claims.ScaleEquivariant(),
    claims.SignSymmetric(),
    claims.Idempotent(),
)


class Nearest:
    """Round to nearest (docs/bounds.md, B1), in NumPy; torch only stores scales."""

    name = "nearest"
    needs = frozenset()
    capabilities = Capabilities()
    claims = NEAREST

    def round(self, problem, rng):
        weight = self.weight(problem)
        scheme, grid = problem.scheme, problem.grid
        rows, columns = weight.shape
        index = self.index(columns, scheme)
        if self.searches(scheme):
            scales = rounding.fit_scales(problem.weight, scheme, grid, name=problem.name)
            scale, zero = (each.numpy() for each in scales)
        else:
            lo, hi = self.ends(weight, scheme)
            scale = self.whole(self.scale(lo, hi, grid, scheme), lo, hi, scheme)
            zero = self.zero(lo, hi, scale, grid)
            zero = np.zeros_like(zero) if scheme.symmetric else zero
        if not np.isfinite(scale).all():
            raise NonFiniteError(f"layer {problem.name!r}: a scale is not finite")
        with np.errstate(all="ignore"):
            steps = self.steps(weight, self.own(scale, index, rows))
            codes = self.codes(steps + self.own(zero, index, rows), grid)
        return self.result(codes, scale, zero, index, grid)

    def weight(self, problem):
        """Return the weight as float32, [rows, columns]."""
        return problem.weight.contiguous().numpy()

    def searches(self, scheme):
        """Return whether scales come from a search for the least squared error."""
        return scheme.observer == "mse"

    def index(self, columns, scheme):
        """Return the group of each column."""
        return np.arange(columns, dtype=np.int32) // scheme.group_width(columns)

    def ends(self, weight, scheme):
        """Return the smallest and largest weight of each group, [rows or 1, groups]."""
        if scheme.strategy == "tensor":
            weight = weight if weight.size else np.zeros((1, 1), np.float32)
            return weight.min().reshape(1, 1), weight.max().reshape(1, 1)
        parts = self.parts(weight, scheme.group_width(weight.shape[1]))
        lo = np.stack([part.min(1) for part in parts], 1)
        hi = np.stack([part.max(1) for part in parts], 1)
        return lo, hi

    def parts(self, weight, width):
        """Return the columns of each group."""
        return [weight[:, first : first + width] for first in range(0, weight.shape[1], width)]

    def scale(self, lo, hi, grid, scheme):
        """Return the scale of each group before it is stored, float32."""
        lo, hi = self.range(lo, hi)
        levels = np.float32(grid.qmax - grid.qmin)
        if scheme.symmetric:
            return np.maximum(np.abs(lo), np.abs(hi)) / (levels / 2)
        return (hi - lo) / levels

    def range(self, lo, hi):
        """Return what the codes must span: asymmetric ranges hold zero."""
        return np.minimum(lo, 0), np.maximum(hi, 0)

    def whole(self, scale, lo, hi, scheme):
        """Return the scales as they are stored: neither 0 for small groups nor for empty ones."""
        scale = self.store(np.float32(scale), scheme.scale_dtype)
        small = rounding.smallest_positive(scheme.scale_dtype)
        used = (lo != 0) | (hi != 0)
        scale = np.where((scale == 0) & used, small, scale)
        return np.float32(np.where(used, scale, 1))

    def store(self, scale, dtype):
        """Return scales rounded to the storage dtype."""
        return rounding.round_up(torch.from_numpy(scale), dtype).numpy()

    def zero(self, lo, hi, scale, grid):
        """Return the zero points, float32."""
        lo, _ = self.range(lo, hi)
        return np.clip(np.rint(grid.qmin - lo / scale), grid.qmin, grid.qmax)

    def own(self, each, index, rows):
        """Return values of groups as values of weights."""
        return np.broadcast_to(each[:, index], (rows, len(index)))

    def steps(self, weight, scale):
        """Return how many scales each weight is, rounded."""
        return np.rint(weight / scale)

    def codes(self, codes, grid):
        """Return the codes inside the grid."""
        return np.clip(codes, grid.qmin, grid.qmax)

    def result(self, codes, scale, zero, index, grid):
        """Return what the host is given."""
        return QuantizedWeight(
            codes=torch.from_numpy(np.int16(codes)),
            scale=torch.from_numpy(np.ascontiguousarray(scale)),
            zero_point=torch.from_numpy(np.int16(zero)),
            group_index=torch.from_numpy(index),
        )


# What an ordinary test looks at ------------------------------------------------------------------


def ordinary_problems(needs):
    """Return a few layers of random weights, in schemes that everybody uses."""
    for seed, scheme in enumerate(
        (
            Scheme(num_bits=4, group_size=32),
            Scheme(num_bits=8),
            Scheme(num_bits=4, group_size=32, symmetric=False),
        )
    ):
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(16, 64))
        problem = rounding_problem(weight, scheme, correlated(rng, 64) if needs else None)
        if "mismatch" in needs:
            x = correlated_inputs(rng, 64)
            moved = (2 / len(x)) * (original_inputs(x) - x).T @ x
            statistics = {"hessian": hessian_of(x), "mismatch": moved}
            values = {name: torch.from_numpy(value) for name, value in statistics.items()}
            problem = dataclasses.replace(problem, statistics=values)
        yield problem


def outputs(plugin):
    """Return what the codes of ordinary layers stand for."""
    return [
        rounding.dequantize(plugin.round(problem, np.random.default_rng(0))).numpy()
        for problem in ordinary_problems(plugin.needs)
    ]


# Small tools ------------------------------------------------------------------------------------


def changed(made, **fields):
    """Return what a rounder made, with other fields."""
    return dataclasses.replace(made, **fields)


def snake(name):
    """Return a class's name as the name of a mutant: RoundTrunc -> round_trunc."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def mutants(killed_by, correct=None):
    """Return the mutants of classes -> the check that must fail; their docstrings are the bugs.

    correct   what they are compared with; None: the class that each of them is made from
    """
    return tuple(
        Mutant(
            name=snake(wrong.__name__),
            kind="rounder",
            bug=wrong.__doc__,
            make=wrong,
            correct=correct or wrong.__mro__[1],
            killed_by=check,
        )
        for wrong, check in killed_by.items()
    )


def twins(why):
    """Return the twins of classes -> why they are right."""
    return tuple(
        Twin(name=twin.__name__, kind="rounder", why=reason, make=twin)
        for twin, reason in why.items()
    )
