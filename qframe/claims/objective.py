"""Claims about the error of a row as a whole: of its output, or of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from qframe import bounds
from qframe.certificates import ROWS, Certificate, Closest, Evidence
from qframe.claims.gptq import Babai
from qframe.claims.nearest import unequal_steps
from qframe.contracts import QuantizedWeight, RoundingProblem
from qframe.hessian import Float64, second_moments
from qframe.scheme import Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class NoWorseThan:
    """B10.c: no row has a larger objective than with rounding to nearest on the scheme's scales.

    objective    "output": (w - q) H (w - q)^T. "weight": the sum of (w - q)^2
    sums         the arithmetic in which the method compares
    observer     the scales that nearest is given: of this observer, or None: of the scheme's
    correction   with more than 0 the output error is that of the aim instead of the weight, which
                 takes so large a share of what makes up for inputs that have moved (B3.h): (a - q)
                 H (a - q)^T. The weight is what nearest rounds. Needs the statistic "mismatch"
    dampening_frac   of the aim, as for `Babai`
    """

    objective: Literal["output", "weight"] = "output"
    sums: Literal["float32", "float64"] = "float64"
    observer: Literal["minmax", "mse"] | None = None
    correction: float = 0.0
    dampening_frac: float = 0.0
    name = "no worse than nearest"
    theorem = "B10.c"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """It is about integers."""
        return unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare row by row, both objectives in float64."""
        import torch

        from qframe import rounding

        problem = evidence.problem
        weight, columns = problem.weight.double(), problem.weight.shape[1]
        hessian = second_moments(problem) if self.objective == "output" else None
        nearest = _nearest(problem, self.observer)
        spare = _spare(evidence.quantized, problem), _spare(nearest, problem)
        apart = np.zeros(len(weight))  # how far the method's aim may be from the check's
        if self.correction:
            replay = Babai(self.dampening_frac, correction=self.correction).replay(evidence, self)
            if isinstance(replay, Certificate):
                return replay
            aim = replay.weight.double()
            rounded = torch.from_numpy(bounds.gptq_aim_rounded(problem.weight.numpy(), aim.numpy()))
            spare = spare[0] + rounded, spare[1] + rounded
            weight = aim
            if replay.moved is not None:
                apart = 2 * replay.moved
        own = weight - rounding.dequantize(evidence.quantized)
        theirs = weight - rounding.dequantize(nearest)

        def judge(part: slice) -> tuple[Float64, Float64]:
            mine, size = _objective(own[part], hessian, spare[0][part])
            base, base_size = _objective(theirs[part], hessian, spare[1][part])
            lengths = (own[part].abs() + theirs[part].abs()).sum(1).numpy()
            moved = sum(np.sqrt(_objective(each[part], hessian)[1]) for each in spare)
            sizes, total = size + base_size, moved + apart[part]
            return mine, bounds.no_worse(base, sizes, columns, self.sums, lengths, total)

        return _row_by_row(evidence, judge).certificate(self)


@dataclass(frozen=True, slots=True)
class NoWorsePower:
    """B10.e: no row has a larger sum |w - q|^p than with rounding to nearest.

    power      p, in (0, 1]
    observer   the scales that nearest is given: of this observer, or None: of the scheme's
    """

    power: float
    observer: Literal["minmax", "mse"] | None = None
    name = "no worse in the power"
    theorem = "B10.e"
    by_rows = True

    def objection(self, scheme: Scheme) -> str | None:
        """It is about integers."""
        return unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare row by row, in float64."""
        from qframe import rounding

        problem = evidence.problem
        weight, columns = problem.weight.double(), problem.weight.shape[1]
        nearest = _nearest(problem, self.observer)
        own = (weight - rounding.dequantize(evidence.quantized)).numpy()
        theirs = (weight - rounding.dequantize(nearest)).numpy()
        spare = [_spare(each, problem).numpy() for each in (evidence.quantized, nearest)]

        def judge(part: slice) -> tuple[Float64, Float64]:
            mine, base, *moved = (
                (np.abs(each[part]) ** self.power).sum(1) for each in (own, theirs, *spare)
            )
            return mine, bounds.no_worse_power(base, moved[0] + moved[1], columns)

        return _row_by_row(evidence, judge).certificate(self)


@dataclass(frozen=True, slots=True)
class OutputBound:
    """B10.b: the output error of a row is at most `factor` times the worst that half steps can do.

    The worst case of |e_j| <= s_j / 2 is sqrt(e H e^T) <= sum_j sqrt(H_jj) s_j / 2, with the
    scheme's own minmax scales. A method that rounds up or down as it likes keeps factor 2.
    """

    factor: float
    name = "output bound"
    theorem = "B10.b"

    def objection(self, scheme: Scheme) -> str | None:
        """It is about integers."""
        return unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Compare row by row, in float64."""
        from qframe import rounding

        problem = evidence.problem
        rows, columns = problem.weight.shape
        hessian = second_moments(problem)
        minmax = problem.scheme.replace(observer="minmax")
        scale, _ = rounding.fit_scales(problem.weight, minmax, problem.grid, name=problem.name)
        index = rounding.group_index(columns, minmax)
        step = rounding.expand(scale, index, rows).numpy()
        error = problem.weight.double() - rounding.dequantize(evidence.quantized)
        lengths = np.sqrt(np.maximum(hessian.diagonal().numpy(), 0))

        def judge(part: slice) -> tuple[Float64, Float64]:
            value, size = _objective(error[part], hessian)
            reach = (bounds.half_steps(step[part], problem.grid) * lengths).sum(1)
            return np.sqrt(value), bounds.output_bound(reach, self.factor, size, columns)

        return _row_by_row(evidence, judge).certificate(self)


def _row_by_row(evidence: Evidence, judge: Callable[[slice], tuple[Float64, Float64]]) -> Closest:
    """Return where rows come closest to a bound; judge returns (error, allowed) of some rows."""
    from qframe import parallel

    def work(first: int) -> Closest:
        return Closest.of(*judge(slice(first, first + ROWS)), first)

    starts = range(0, len(evidence.problem.weight), ROWS)
    return Closest.among(parallel.spread(work, starts, evidence.threads))


def _nearest(problem: RoundingProblem, observer: str | None) -> QuantizedWeight:
    """Return the layer rounded to nearest, on scales of this observer; None: of the scheme's."""
    from qframe import rounding

    scheme = problem.scheme.replace(observer=observer or problem.scheme.observer)
    return rounding.to_nearest(replace(problem, scheme=scheme))


def _objective(
    error: torch.Tensor, hessian: torch.Tensor | None, spare: torch.Tensor | float = 0.0
) -> tuple[Float64, Float64]:
    """Return (e H e^T, |e| |H| |e|^T) of every row; H the identity for None.

    spare   what |e| may be more in the second
    """
    size = error.abs() + spare
    if hessian is None:
        return error.square().sum(1).numpy(), size.square().sum(1).numpy()
    value = ((error @ hessian) * error).sum(1)
    magnitude = ((size @ hessian.abs()) * size).sum(1)
    return value.clamp(min=0).numpy(), magnitude.numpy()


def _spare(quantized: QuantizedWeight, problem: RoundingProblem) -> torch.Tensor:
    """Return what float32 takes off the values (B1.d), [rows, columns]; 0 for 16-bit scales."""
    import torch

    from qframe import rounding

    rows, index = len(quantized.codes), quantized.group_index
    if problem.scheme.scale_dtype not in ("float32", "e4m3"):
        return torch.zeros(quantized.codes.shape, dtype=torch.float64)
    scale = rounding.expand(quantized.scale, index, rows).numpy()
    steps = quantized.codes - rounding.expand(quantized.zero_point, index, rows)
    return torch.from_numpy(bounds.decode(scale, steps.numpy()))
