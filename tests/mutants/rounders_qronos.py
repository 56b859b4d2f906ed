"""Wrong ways to make up for inputs that have moved, and right ones (docs/bounds.md, B3.h).

All claim what qframe's qronos claims.
"""

from __future__ import annotations

import numpy as np
import torch

from qframe import Capabilities, QuantizedWeight, rounding
from qframe.errors import NonFiniteError, UncalibratedLayerError
from qframe_plugins.rounders.qronos import Qronos
from tests.mutants.rounder_reference import mutants, outputs, twins

__all__ = ["MUTANTS", "TWINS", "outputs"]


class Corrected:
    """The aim in NumPy, with an inverse; then LDLQ's recursion, column by column."""

    name = "corrected"
    needs = frozenset({"hessian", "mismatch"})
    capabilities = Capabilities()
    claims = Qronos(correction=1.0, dampening_frac=0.01).claims
    share, damp = 1.0, 0.01

    def round(self, problem, rng):
        if problem.tokens == 0:
            raise UncalibratedLayerError(f"layer {problem.name!r} saw no tokens")
        if not bool(torch.isfinite(problem.weight).all()):
            raise NonFiniteError(f"layer {problem.name!r}: a weight is not finite")
        weight = problem.weight.double().numpy()
        hessian = problem.statistics["hessian"].double().numpy().copy()
        self.dead = np.diag(hessian) == 0
        live = np.diag(hessian)[~self.dead]
        hessian[self.dead, self.dead] = live.mean() if len(live) else 1.0
        order = np.argsort(-np.diag(hessian), kind="stable")
        damped = hessian + self.damp * np.diag(hessian).mean() * np.eye(len(hessian))
        mismatch = problem.statistics["mismatch"].double().numpy()
        aim = self.aim(weight, mismatch, damped, hessian, order)
        scheme, grid = problem.scheme, problem.grid
        scale, zero = rounding.fit_scales(
            self.scaled(problem.weight, aim), scheme, grid, name=problem.name
        )
        index = rounding.group_index(weight.shape[1], scheme)
        wide, offsets = (
            rounding.expand(each, index, len(weight)).double().numpy() for each in (scale, zero)
        )
        lower = np.linalg.cholesky(damped[np.ix_(order[::-1], order[::-1])])
        upper = lower[::-1, ::-1]
        feedback = upper / np.diag(upper)
        target, codes = aim[:, order], np.zeros(weight.shape, np.int16)
        errors = np.zeros(weight.shape)
        for place, column in enumerate(order):
            wanted = target[:, place] + errors[:, :place] @ feedback[:place, place]
            steps = np.rint(wanted / wide[:, column]) + offsets[:, column]
            codes[:, column] = np.clip(steps, grid.qmin, grid.qmax)
            value = wide[:, column] * (codes[:, column] - offsets[:, column])
            errors[:, place] = self.error(aim, weight, order)[:, place] - value
        return QuantizedWeight(
            codes=torch.from_numpy(codes),
            scale=scale,
            zero_point=zero,
            group_index=index,
            order=torch.from_numpy(order.astype(np.int32)),
            info={"damp": self.damp, "correction": 1.0},
        )

    def aim(self, weight, mismatch, damped, hessian, order):
        """Return W + W M H^-1."""
        return weight + self.share * weight @ mismatch @ np.linalg.inv(damped)

    def error(self, aim, weight, order):
        """Return what values are subtracted from, in processing order."""
        return aim[:, order]

    def scaled(self, weight, aim):
        """Return the weights that scales are made for."""
        return weight


class Ignored(Corrected):
    """The inputs that have moved are not made up for: this is GPTQ."""

    share = 0.0


class Half(Corrected):
    """Half of the correction, while all of it is claimed."""

    share = 0.5


class OtherSign(Corrected):
    """M is (x - y) x^T: it makes the error twice as large."""

    share = -1.0


class Transposed(Corrected):
    """M is taken for its transpose."""

    def aim(self, weight, mismatch, damped, hessian, order):
        return weight + weight @ mismatch.T @ np.linalg.inv(damped)


class Undamped(Corrected):
    """The correction is not damped, as the rounding is."""

    def aim(self, weight, mismatch, damped, hessian, order):
        return weight + weight @ mismatch @ np.linalg.pinv(hessian)


class DiagonalOnly(Corrected):
    """Divided by the diagonal of H."""

    def aim(self, weight, mismatch, damped, hessian, order):
        return weight + weight @ mismatch / np.diag(damped)


class NotReordered(Corrected):
    """H in processing order, M as it is stored."""

    def aim(self, weight, mismatch, damped, hessian, order):
        swapped = damped[np.ix_(order, order)]
        return weight + weight @ mismatch @ np.linalg.inv(swapped)


class OriginalMoments(Corrected):
    """The mean of W and of what all of Y^T X asks for."""

    def aim(self, weight, mismatch, damped, hessian, order):
        return weight + weight @ (mismatch + hessian) @ np.linalg.inv(damped) / 2


class FeedsBackTheOldError(Corrected):
    """Errors are those of W instead of the aim's."""

    def error(self, aim, weight, order):
        return weight[:, order]


class ScalesOfTheAim(Corrected):
    """Scales of other weights than are claimed."""

    def scaled(self, weight, aim):
        return torch.from_numpy(np.float32(aim))


class Solved(Corrected):
    """Solves instead of inverting."""

    def aim(self, weight, mismatch, damped, hessian, order):
        return weight + np.linalg.solve(damped, (weight @ mismatch).T).T


class ByColumns(Corrected):
    """M H^-1 first, which is the same for all rows."""

    def aim(self, weight, mismatch, damped, hessian, order):
        return weight + weight @ np.linalg.solve(damped, mismatch.T).T


MUTANTS = mutants(
    {
        Ignored: "gptq_residual",
        Half: "gptq_residual",
        OtherSign: "gptq_residual",
        Transposed: "gptq_residual",
        Undamped: "gptq_residual",
        DiagonalOnly: "gptq_residual",
        NotReordered: "gptq_residual",
        OriginalMoments: "gptq_residual",
        FeedsBackTheOldError: "gptq_residual",
        ScalesOfTheAim: "scheme_scale",
    },
    correct=Corrected,
)
TWINS = twins(
    {
        Corrected: "An explicit inverse, in float64.",
        Solved: "An LU factorization.",
        ByColumns: "M H^-1 first, one for all rows.",
    }
)
