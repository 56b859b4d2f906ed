"""The Hessian of a layer's output error, damped and factorized: what certificates compare with.

H = U diag(D) U^T with U unit upper triangular, in processing order (docs/bounds.md, B3). Everything
is float64 and done with LAPACK and BLAS, apart from any plugin's solver, in pieces that do not
depend on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.contracts import QuantizedWeight, RoundingProblem
from qframe.errors import UncalibratedLayerError

if TYPE_CHECKING:
    import torch

Float64 = npt.NDArray[np.float64]

SECOND_MOMENTS = "hessian"  # the statistic that output errors are measured with
MISMATCH = "mismatch"  # and the one of how far inputs have moved from those of the original network
ROWS_AT_ONCE = 256  # of a weight: what is made of them stays in the cache
_COLUMNS = 192  # of a matrix at a time: of a triangular one zeros are left out


def second_moments(problem: RoundingProblem) -> torch.Tensor:
    """Return the problem's Hessian, [columns, columns] float64.

    Raises UncalibratedLayerError where the rounder did not ask for it.
    """
    return _statistic(problem, SECOND_MOMENTS, "the output error")


def mismatch(problem: RoundingProblem) -> torch.Tensor:
    """Return how far inputs have moved, (2/n) sum (y - x) x^T, [columns, columns] float64.

    Raises UncalibratedLayerError where the rounder did not ask for it.
    """
    return _statistic(problem, MISMATCH, "the outputs of the original network")


def _statistic(problem: RoundingProblem, name: str, about: str) -> torch.Tensor:
    try:
        found: torch.Tensor = problem.statistics[name]
    except KeyError:
        raise UncalibratedLayerError(
            f"layer {problem.name!r}: this claim is about {about}, which needs the statistic "
            f"{name!r}; name it in `needs`"
        ) from None
    return found.double()


def processing_order(quantized: QuantizedWeight, columns: int) -> npt.NDArray[np.int64]:
    """Return the columns in the order in which they were rounded, [columns]."""
    if quantized.order is None:
        return np.arange(columns)
    return quantized.order.numpy().astype(np.int64)


def damped(hessian: torch.Tensor, damp: float, *, dead: str = "mean") -> torch.Tensor:
    """Return hessian + damp mean(diag) I after dead diagonals are replaced.

    dead   what takes the place of H_jj = 0: "mean", that of the others, or "zero", which is 1
    """
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    dies = diagonal == 0
    if bool(dies.any()):
        live = diagonal[~dies]
        diagonal[dies] = live.mean() if dead == "mean" and len(live) else 1.0
    diagonal += damp * diagonal.mean()
    return matrix


@dataclass(frozen=True, slots=True)
class Feedback:
    """A damped Hessian in processing order, as U diag(D) U^T.

    unit       U, [n, n], unit upper triangular
    norms      [n]: the most that a column of the solver's U may measure above the diagonal (B3.g)
    diagonal   D, [n]
    spread     `inverse_spread`
    moved      2 ||E||: how far a factorization in the declared arithmetic may lie from this one;
               inf where the matrix is so near to singular that nothing is known of it
    """

    unit: torch.Tensor
    norms: Float64
    diagonal: Float64
    spread: float
    moved: float

    @classmethod
    def of(
        cls,
        hessian: torch.Tensor,
        order: npt.NDArray[np.int64],
        factorization: Literal["float32", "float64"],
        threads: int = 1,
    ) -> Feedback | None:
        """Factorize; None where the matrix is not positive definite.

        hessian   damped, [n, n] float64
        order     [n], the columns in the order in which they are rounded
        """
        import torch

        if not len(order):
            return cls(hessian, np.zeros(0), np.zeros(0), 0.0, 0.0)
        backwards = order[::-1]
        lower, failed = torch.linalg.cholesky_ex(
            torch.from_numpy(hessian.numpy()[np.ix_(backwards, backwards)])
        )
        if int(failed):
            return None
        upper = lower.flip(0, 1)
        del lower  # each of these is as large as the Hessian
        spread = inverse_spread(upper, threads)
        if not math.isfinite(spread):
            return None
        pivots = upper.diagonal().clone()
        unit = upper.div_(pivots)
        above = unit.triu(1).square_().sum(0).sqrt().numpy()
        diagonal = pivots.square().numpy()
        moved = bounds.gptq_moved(spread, len(upper), factorization)
        return cls(unit, bounds.gptq_norms(above, diagonal, moved), diagonal, spread, moved)

    def undone(self, offset: torch.Tensor) -> tuple[torch.Tensor, Float64]:
        """Return offset H^-1, and the lengths of its rows in the norm of H.

        offset   [rows, n] float64, in processing order
        """
        import torch

        towards = torch.linalg.solve_triangular(self.unit.T, offset, upper=False, left=False)
        towards /= torch.from_numpy(self.diagonal)
        pull = (towards.square() @ torch.from_numpy(self.diagonal)).sqrt().numpy()
        return torch.linalg.solve_triangular(self.unit, towards, upper=True, left=False), pull

    def lengths(self) -> Float64:
        """Return the roots of the diagonal of H, [n], in processing order."""
        import torch

        found: Float64 = (self.unit.square() @ torch.from_numpy(self.diagonal)).sqrt().numpy()
        return found

    def residual(self, delta: Float64) -> Float64:
        """Return delta U, [rows, n]: for each code, its value minus the compensated weight.

        delta   [rows, n], values of the codes minus weights, in processing order
        """
        import torch

        left = torch.from_numpy(delta)
        found = torch.empty_like(left)
        for first in range(0, delta.shape[1], _COLUMNS):
            last = first + _COLUMNS
            torch.mm(
                left[:, :last], self.unit[:last, first:last], out=found[:, first:last]
            )  # below the block U is zero
        return found.numpy()


def inverse_spread(upper: torch.Tensor, threads: int = 1) -> float:
    """Return || |R^-1| d ||^2, d_i the length of row i of R, or more; inf where R is singular.

    upper   R, [n, n] float64, upper triangular

    By this times gamma_{3n+7} another Cholesky factorization may lie from this one (B3.g). The
    columns of the inverse are found by substitution, so |R X - I| <= gamma_n |R| |X| (Higham,
    section 14.1), and with kappa = || |X| |R| || <= sqrt(n) ||X diag(d)||_F the true value is at
    most that of X divided by (1 - gamma_n kappa)^2.
    """
    import torch

    from qframe import parallel

    n = len(upper)
    lengths = upper.square().sum(1).sqrt()

    def work(first: int) -> tuple[torch.Tensor, float]:
        """Return |X| d and ||X diag(d)||^2 of some columns of the inverse X."""
        last = min(first + _COLUMNS, n)
        ends = torch.zeros(last, last - first, dtype=torch.float64)
        ends[first:].fill_diagonal_(1)
        columns = torch.linalg.solve_triangular(upper[:last, :last], ends, upper=True)
        scaled = columns.abs_() * lengths[first:last]
        return scaled.sum(1), float(scaled.square_().sum(1).cumsum(0)[-1])

    reach, squares = torch.zeros(n, dtype=torch.float64), 0.0
    for part, square in parallel.spread(work, range(0, n, _COLUMNS), threads):
        reach[: len(part)] += part
        squares += square
    lost = bounds.gamma(n, bounds.UNIT["float64"]) * math.sqrt(n * squares)
    if not lost < 1:
        return math.inf
    return float(reach.square().cumsum(0)[-1]) / (1 - lost) ** 2


def unit(moment: torch.Tensor) -> torch.Tensor:
    """Return a moment with a largest diagonal of 1, float32: what is compared cannot overflow."""
    largest = moment.diagonal().max() if len(moment) else 0
    return (moment / largest if largest > 0 else moment).float()


def energy(delta: torch.Tensor, moment: torch.Tensor) -> float:
    """Return tr(delta M delta^T), the squared output error of a change of weights.

    delta    [rows, columns] float32
    moment   M, [columns, columns] float32, symmetric: its upper triangle will do, half of the work

    It is computed from delta times the power of two that makes its largest number about 2^34: so
    neither small nor large weights leave the range of float32, and a power of two times delta has
    4 times that power as much energy, to the last bit.
    """
    if not delta.numel():
        return 0.0
    largest = max(abs(float(end)) for end in delta.aminmax())
    exponent = 34 - math.frexp(largest)[1]
    # The power itself may be none of float32's.
    pieces = ((rows.double() * 2.0**exponent).float() for rows in delta.split(ROWS_AT_ONCE))
    found = sum(total(_upper_products(rows, moment).mul_(rows)) for rows in pieces)
    return math.ldexp(max(found, 0.0), -2 * exponent)


def _upper_products(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return what, times rows and summed, is rows M rows^T, for a symmetric M.

    That is the product with the square blocks on M's diagonal and twice what is above them.
    """
    import torch

    found = torch.empty_like(rows)
    for first in range(0, len(moment), _COLUMNS):
        last = first + _COLUMNS
        corner = moment[first:last, first:last]
        part = found[:, first:last]
        torch.mm(rows[:, first:last], corner, out=part)
        if first:
            part.addmm_(rows[:, :first], moment[:first, first:last], alpha=2)
    return found


def total(x: torch.Tensor) -> float:
    """Return the sum of a matrix in float64: of each row, then of these in turn.

    torch splits the sum over a whole tensor by threads, which may change its last bit.
    """
    import torch

    return float(x.sum(1, dtype=torch.float64).cumsum(0)[-1]) if x.numel() else 0.0
