"""The claim of GPTQ, LDLQ and Babai's nearest plane: codes are nearest to compensated weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.certificates import ROWS, Certificate, Closest, Evidence
from qframe.claims.nearest import unequal_steps
from qframe.contracts import QuantizedWeight, RoundingProblem
from qframe.hessian import (
    Feedback,
    Float64,
    damped,
    mismatch,
    processing_order,
    second_moments,
)
from qframe.pieces import highest_ratios
from qframe.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qframe.certificates import LayerClaim


@dataclass(frozen=True, slots=True)
class Babai:
    """B3.b: codes are GPTQ's, for the scales, order, Hessian and damping that were declared.

    Complete: what passes is GPTQ, or LDLQ, or Babai's nearest plane, up to ties.

    dampening_frac   share of mean(diag H) on the diagonal, or several to choose from: then
                     `info["damp"]` says which. It may also name a higher one,
    dampening_cap    tenfold at a time up to this, and then an event must say so
    order            "natural": left to right. "falling": by falling diag H, what is equal up to
                     rounding in any order. "any": as `QuantizedWeight.order` says
    dead             what becomes of a column with H_jj = 0. "mean": its diagonal is the mean of
                     the others. "zero": diagonal 1, and its weights are taken for 0
    factorization    the arithmetic of the Cholesky factor
    sums             the arithmetic in which errors w - q are fed back, and the factor is stored
    correction       share of W M H^-1 that is added to the weights, which makes up for inputs that
                     have moved (B3.h), or several to choose from: then `info["correction"]` says
                     which. Needs the statistic "mismatch"
    """

    dampening_frac: float | tuple[float, ...]
    dampening_cap: float = 1.0
    order: Literal["natural", "falling", "any"] = "any"
    dead: Literal["mean", "zero"] = "mean"
    factorization: Literal["float32", "float64"] = "float64"
    sums: Literal["float32", "float64"] = "float32"
    correction: float | tuple[float, ...] = 0.0
    name = "gptq residual"
    theorem = "B3.b"

    def objection(self, scheme: Scheme) -> str | None:
        """It is about integers."""
        return unequal_steps(scheme)

    def certify(self, evidence: Evidence) -> Certificate:
        """Recompute every compensated weight in float64, and compare."""
        from qframe import parallel

        replay = self.replay(evidence, self)
        if isinstance(replay, Certificate):
            return replay
        problem, grid, feedback = evidence.problem, evidence.problem.grid, replay.feedback
        norms, diagonal = replay.as_stored(feedback.norms), replay.as_stored(feedback.diagonal)

        weight, moved = replay.weight.numpy(), replay.moved

        def work(rows: slice) -> Closest:
            piece = evidence.piece(rows, weight)
            delta = piece.delta().reshape(weight[rows].shape)
            residual = replay.residual(delta)

            def judge(chosen: npt.NDArray[np.intp]) -> Closest:
                part = evidence.piece(rows.start + chosen, weight).whole_rows()
                error = bounds.decode(part.scale, part.codes - part.zero_point)
                if moved is not None:
                    rounded = bounds.gptq_aim_rounded(
                        problem.weight.numpy()[rows][chosen], weight[rows][chosen], self.sums
                    )
                    error = error + rounded.reshape(error.shape)
                allowance = bounds.gptq_allowance(
                    part.weight,
                    delta[chosen],
                    residual[chosen],
                    norms,
                    diagonal,
                    feedback.moved,
                    self.sums,
                    error,
                )
                if moved is not None:
                    allowance = allowance + moved[rows][chosen][:, None] / np.sqrt(diagonal)
                judged = bounds.nearest(residual[chosen], part.codes, part.scale, grid, allowance)
                return Closest.of(*judged)

            errors = residual.reshape(piece.weight.shape)
            most = highest_ratios(errors, piece.codes, piece.scale, grid)
            if most.ndim > 1:
                most = most.max(1, initial=0.0)
            return Closest.screened(most, judge, weight.shape[1], rows.start)

        found = parallel.spread(work, evidence.cut(ROWS), evidence.threads)
        return Closest.among(found).certificate(self)

    def replay(self, evidence: Evidence, claim: LayerClaim) -> Replay | Certificate:
        """Return what is needed to go through the columns once more, or what is known without.

        claim   on whose behalf, for the certificate
        """
        problem, quantized = evidence.problem, evidence.quantized
        damp, columns = self._damp(quantized), problem.weight.shape[1]
        order = processing_order(quantized, columns)
        moments = second_moments(problem)
        wrong = self._contradiction(quantized, damp, order, moments)
        if wrong:
            return Closest(float("inf")).certificate(claim, wrong)
        # Layers of one input group share their statistics, and `shared` with them.
        key = ("feedback", damp, self.dead, self.factorization, order.tobytes())
        if key not in evidence.shared:
            matrix = damped(moments, damp, dead=self.dead)
            evidence.shared[key] = Feedback.of(
                matrix, order, self.factorization, evidence.threads
            ) or _why_not(matrix, self.factorization)
        feedback: Feedback | str = evidence.shared[key]
        if feedback == _SINGULAR or (
            isinstance(feedback, Feedback) and not np.isfinite(feedback.moved)
        ):
            return Closest().certificate(claim, _SINGULAR)
        if isinstance(feedback, str):
            return Closest(float("inf")).certificate(claim, feedback)
        weight = problem.weight
        if self.dead == "zero":
            weight = weight * (moments.diagonal() != 0)
        share = float(quantized.info.get("correction", _several(self.correction)[0]))
        if not share:
            return Replay(weight, order, feedback)
        return self._corrected(problem, weight, order, feedback, share)

    def _corrected(
        self,
        problem: RoundingProblem,
        weight: torch.Tensor,
        order: npt.NDArray[np.int64],
        feedback: Feedback,
        share: float,
    ) -> Replay:
        """Return the replay for the aim W + share W M H^-1 instead of W (B3.h)."""
        from qframe import parallel

        back = np.argsort(order)
        with parallel.one_torch_thread():
            moments, start = mismatch(problem)[:, order], weight.double()
            pulled, pull = feedback.undone(start @ moments)
            moved = bounds.gptq_aim(
                pull,
                start.norm(dim=1).numpy(),
                moments.norm(dim=0).numpy(),
                (feedback.lengths(), feedback.spread, feedback.moved),
            )
            return Replay(start + share * pulled[:, back], order, feedback, moved)

    def _damp(self, quantized: QuantizedWeight) -> float:
        return float(quantized.info.get("damp", _several(self.dampening_frac)[0]))

    def _contradiction(
        self,
        quantized: QuantizedWeight,
        damp: float,
        order: npt.NDArray[np.int64],
        moments: torch.Tensor,
    ) -> str:
        """Return what was done otherwise than declared, "" for nothing."""
        first, shares = _several(self.dampening_frac), _several(self.correction)
        ladder = [min(first)]
        while 0 < ladder[-1] < self.dampening_cap:
            ladder.append(min(ladder[-1] * 10, self.dampening_cap))
        rounding = bounds.gamma(2 * len(ladder), bounds.UNIT["float64"])

        def among(steps: Iterable[float]) -> bool:
            return any(abs(damp - step) <= rounding * step for step in steps)

        if not among((*first, *ladder)):
            declared = ", ".join(f"{step:g}" for step in sorted({*first, *ladder}))
            return f"damping {damp:g} is not one of the declared {declared}"
        if not among(first) and not quantized.events:
            return f"damping was raised to {damp:g}, and no event says so"
        share = float(quantized.info.get("correction", shares[0]))
        if share not in shares:
            return f"correction {share:g} is not one of the declared {shares}"
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            return "the order is not a permutation of the columns"
        if self.order == "natural" and not np.array_equal(order, np.arange(len(order))):
            return "columns are not in their natural order"
        if self.order == "falling":
            diagonal = damped(moments, 0.0, dead=self.dead).diagonal().numpy()
            if not _falls(order, diagonal, bounds.UNIT[self.factorization]):
                return "columns are not ordered by falling diagonal of the Hessian"
        return ""


_SINGULAR = "nothing can be said: the damped Hessian is singular to working precision"
_INDEFINITE = "the damped Hessian is not positive definite"


def _several(declared: float | tuple[float, ...]) -> tuple[float, ...]:
    return declared if isinstance(declared, tuple) else (declared,)


def _why_not(matrix: torch.Tensor, factorization: str) -> str:
    """Return why there is no feedback: the matrix is near to singular, or it is indefinite (B3.g).

    A factorization that succeeded is that of a positive definite matrix within gamma_{3n+7} d d^T
    of H, d_i^2 = H_ii; so diag(1/d) H diag(1/d) + n gamma_{3n+7} I is positive definite.
    """
    import torch

    n = len(matrix)
    lengths = matrix.diagonal().clamp(min=0).sqrt()
    scaled = matrix / lengths[:, None] / lengths
    scaled.diagonal().add_(2 * n * bounds.gamma(3 * n + 7, bounds.UNIT[factorization]))
    _, failed = torch.linalg.cholesky_ex(scaled)
    return _INDEFINITE if int(failed) or not bool(scaled.isfinite().all()) else _SINGULAR


def _falls(order: npt.NDArray[np.int64], diagonal: Float64, unit: float) -> bool:
    """Return whether a diagonal falls in this order, but for what rounding it may have changed.

    Methods may scale H or store it in their arithmetic, and a dead column has a mean of n numbers:
    either of two neighbours may have moved by gamma_{n+1}.
    """
    placed = diagonal[order]
    rises = np.maximum(np.diff(placed), 0)
    return bounds.ratio(rises, 2 * bounds.gamma(len(order) + 1, unit) * placed[1:]) <= 1


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows in processing order, float64 [rows, columns] each.

    delta      what the codes stand for minus the weight
    residual   what the codes stand for minus the compensated weight
    """

    weight: Float64
    codes: npt.NDArray[np.int16]
    scale: Float64
    zero_point: Float64
    delta: Float64
    residual: Float64


@dataclass(frozen=True, slots=True)
class Replay:
    """A layer to go through once more, column by column.

    weight     [rows, columns], dead columns as the method takes them
    order      [columns]
    feedback   of the damped Hessian in that order
    moved      where weights are an aim, float64: `bounds.gptq_aim`, [rows]
    """

    weight: torch.Tensor
    order: npt.NDArray[np.int64]
    feedback: Feedback
    moved: Float64 | None = None

    def rows(self, evidence: Evidence, first: int) -> Rows:
        """Return at most ROWS rows from the first on."""
        quantized, part = evidence.quantized, slice(first, first + ROWS)
        index = quantized.group_index.numpy()[self.order]
        own = slice(None) if len(quantized.scale) == 1 else part
        scale = quantized.scale[own].numpy().astype(np.float64)[:, index]
        zero = quantized.zero_point[own].numpy().astype(np.float64)[:, index]
        codes = quantized.codes[part].numpy()[:, self.order]
        weight = self.weight[part].numpy().astype(np.float64)[:, self.order]
        delta = scale * (codes - zero) - weight
        return Rows(weight, codes, scale, zero, delta, self.feedback.residual(delta))

    def residual(self, delta: Float64) -> Float64:
        """Return what codes stand for minus the compensated weights, [rows, columns] as stored.

        delta   what they stand for minus the weights
        """
        found = self.feedback.residual(np.take(delta, self.order, axis=1))
        return self.as_stored(found)

    def as_stored(self, values: Float64) -> Float64:
        """Return numbers in processing order as the columns are stored, along the last axis."""
        return np.take(values, np.argsort(self.order), axis=-1)
