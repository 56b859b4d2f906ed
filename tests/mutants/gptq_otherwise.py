"""GPTQs that are right, and do it otherwise than qframe's plugin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qframe import claims
from tests.mutants.gptq_numpy import LDLQ, NumpyGPTQ


class LDLQFloat32(LDLQ):
    dtype = np.float32


class LDLQAllFloat32(LDLQFloat32):
    """Also factorizes in float32, and says so."""

    @property
    def claims(self):
        return restated(super().claims, factorization="float32")

    def factor(self, damped):
        return super().factor(damped.astype(np.float32))


class NearestPlane(NumpyGPTQ):
    """Babai's algorithm: the last basis vector first, on the lattice with columns backwards.

    Everything is relative to the weights, so that a small one is not lost among large ones.
    """

    def factor(self, damped):
        return np.linalg.cholesky(damped[::-1, ::-1]).T  # damped, reversed, is B^T B

    def solve(self, run):
        dynamic, n, basis = self.is_dynamic(run.problem.scheme), run.columns, run.factor
        missed = np.zeros(run.original.shape)  # backwards: what fixed coordinates lack
        for place in range(n - 1, -1, -1):
            j = n - 1 - place
            rest = missed @ basis[: place + 1].T
            if dynamic and j % run.width == 0:
                last = min(j + run.width, n)
                shift = np.linalg.solve(basis[: place + 1, : place + 1], rest.T).T[:, ::-1]
                run.weight[:, j:last] = run.original[:, j:last] + shift[:, : last - j]
                self.begin(run, j, n, n)
            run.weight[:, j] = run.original[:, j] + rest[:, place] / basis[place, place]
            scale, zero = run.of_column(j)
            run.codes[:, j] = self.nearest(run.weight[:, j], scale, zero, run.problem.grid)
            missed[:, place] = run.original[:, j] - scale * (run.codes[:, j] - zero)

    def now(self, run, j, last, start, stop):
        return run.weight[:, j:last]


class HessianScaled(NumpyGPTQ):
    """Damping is relative, so that the unit of H does not matter."""

    def hessian(self, problem):
        return 7.5 * super().hessian(problem)


class HalfAway(NumpyGPTQ):
    """Ties go away from zero."""

    def nearest(self, weight, scale, zero, grid):
        steps = np.copysign(np.floor(np.abs(weight / scale) + 1 / 2), weight)
        return np.clip(steps + zero, grid.qmin, grid.qmax)


class DeadAsPublished(NumpyGPTQ):
    """Dead columns have diagonal 1 and weights 0, and it says so."""

    @property
    def claims(self):
        return restated(super().claims, dead="zero")

    def revive(self, hessian):
        np.fill_diagonal(hessian, np.where(hessian.diagonal() == 0, 1, hessian.diagonal()))
        return hessian

    def start(self, problem, order, factor):
        run = super().start(problem, order, factor)
        dead = self.hessian(problem).diagonal()[order] == 0
        run.weight[:, dead] = run.original[:, dead] = 0
        return run


class AnyOrder(NumpyGPTQ):
    """Takes the columns in an order of its own, and reports it."""

    @property
    def claims(self):
        return restated(super().claims, order="any")

    def order(self, hessian):
        return np.random.default_rng(len(hessian)).permutation(len(hessian))


def restated(claimed, **changes):
    """Return claims with changes to what is said of the codes."""
    out = []
    for claim in claimed:
        if isinstance(claim, claims.Babai):
            claim = replace(claim, **changes)
        elif isinstance(claim, claims.CompensatedScale):
            claim = claims.CompensatedScale(replace(claim.babai, **changes))
        out.append(claim)
    return tuple(out)
