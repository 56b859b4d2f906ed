"""GPTQ twice more, in NumPy, made of small steps that a mutant can replace one at a time.

Source: Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323, algorithm 1, in its own form: the Hessian
is inverted, the inverse factorized, weights updated in blocks. And Chee et al., QuIP, NeurIPS 2023,
arXiv:2307.13304, the LDL form, which needs no inverse. Both claim what qframe's plugin does; of the
first it is proved for a damping well above rounding errors only (docs/bounds.md, B3.g).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qframe import Capabilities, Event, QuantizedWeight, rounding
from qframe.errors import HessianError, NonFiniteError, UncalibratedLayerError
from qframe_plugins.rounders.gptq import GPTQ


@dataclass
class Run:
    """One layer on its way through the columns, in processing order.

    original   [rows, n] float64
    weight     [rows, n], compensated; columns of later blocks lag behind by the errors of this one
    error      [rows, n], (weight - value) / factor_jj of the columns that are done
    factor     C, [n, n] upper triangular, C^T C = H^-1
    group      [n], the group of each place
    scale, zero   [rows or 1, groups]
    codes      [rows, n]
    """

    problem: object
    original: np.ndarray
    weight: np.ndarray
    error: np.ndarray
    factor: np.ndarray
    group: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    codes: np.ndarray

    @property
    def columns(self):
        return len(self.factor)

    @property
    def width(self):
        return self.problem.scheme.group_width(self.columns)

    def of_column(self, j):
        """Return scale and zero point of column j, [rows or 1]."""
        return self.scale[:, self.group[j]], self.zero[:, self.group[j]]


@dataclass(frozen=True)
class NumpyGPTQ:
    """GPTQ. The options are those of qframe's plugin."""

    dampening_frac: float = 0.01
    dampening_cap: float = 1.0
    actorder: str | None = "static"
    static_groups: bool | None = None
    block_size: int = 5

    name = "gptq_numpy"
    needs = frozenset({"hessian"})
    capabilities = Capabilities()

    @property
    def claims(self):
        return GPTQ(
            dampening_frac=self.dampening_frac,
            dampening_cap=self.dampening_cap,
            actorder=self.actorder,
            static_groups=self.static_groups,
        ).claims

    def is_dynamic(self, scheme):
        fixed = self.actorder == "static" or bool(self.static_groups)
        return scheme.strategy == "group" and not fixed

    def round(self, problem, rng):
        if problem.tokens == 0:
            raise UncalibratedLayerError(f"layer {problem.name!r} saw no calibration tokens")
        if not bool(torch.isfinite(problem.weight).all()):
            raise NonFiniteError(f"layer {problem.name!r}: a weight is not finite")
        hessian = self.revive(self.hessian(problem))
        order = self.order(hessian)
        factor, damp = self.factorize(problem, hessian, order)
        run = self.start(problem, order, factor)
        self.solve(run)
        stored = self.put_back(run.codes, order)
        return self.result(run, stored, order, damp)

    # What is made of the Hessian

    def hessian(self, problem):
        return problem.statistics["hessian"].double().numpy().copy()

    def revive(self, hessian):
        """Set the diagonal of dead columns to the mean of the live ones."""
        diagonal = hessian.diagonal().copy()
        dead = diagonal == 0
        diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1
        np.fill_diagonal(hessian, diagonal)
        return hessian

    def order(self, hessian):
        if self.actorder is None:
            return np.arange(len(hessian))
        return np.argsort(-hessian.diagonal(), kind="stable")

    def damping(self, hessian, share):
        return share * hessian.diagonal().mean()

    def ladder(self):
        shares = [self.dampening_frac]
        while shares[-1] < self.dampening_cap:
            shares.append(min(shares[-1] * 10, self.dampening_cap))
        return shares

    def factorize(self, problem, hessian, order):
        """Return (C, the damping that worked)."""
        for share in self.ladder():
            damped = hessian + self.damping(hessian, share) * np.eye(len(hessian))
            try:
                return self.factor(damped[np.ix_(order, order)]), share
            except np.linalg.LinAlgError:
                continue
        raise HessianError(f"layer {problem.name!r}: the Hessian is not positive definite")

    def factor(self, damped):
        np.linalg.cholesky(damped)  # that the inverse can be factorized does not say enough
        return np.linalg.cholesky(self.inverse(damped)).T

    def inverse(self, damped):
        return np.linalg.inv(damped)

    # Groups and scales

    def start(self, problem, order, factor):
        scheme, columns = problem.scheme, len(order)
        weight = problem.weight.numpy().astype(np.float64)[:, order]
        index = rounding.group_index(columns, scheme).numpy()
        group = index if self.actorder == "group" else index[order]
        run = Run(
            problem=problem,
            original=weight.copy(),
            weight=weight,
            error=np.zeros(weight.shape),
            factor=factor,
            group=group,
            scale=np.ones(scheme.scale_shape(*weight.shape)),
            zero=np.zeros(scheme.scale_shape(*weight.shape)),
            codes=np.zeros(weight.shape, np.int64),
        )
        if not self.is_dynamic(scheme):
            chosen = order if self.actorder == "group" else np.arange(columns)
            run.scale, run.zero = self.fit(problem, problem.weight[:, chosen])
        return run

    def fit(self, problem, weight, scheme=None):
        """Return (scale, zero point) of a weight, float64 [rows or 1, groups]."""
        scale, zero = rounding.fit_scales(
            torch.as_tensor(np.float32(weight)),
            scheme or problem.scheme,
            problem.grid,
            name=problem.name,
        )
        return scale.double().numpy(), zero.double().numpy()

    def begin(self, run, j, start, stop):
        """Take the scale of a group whose first column is j, in the block start..stop."""
        last = min(j + run.width, run.columns)
        whole = run.problem.scheme.replace(strategy="channel", group_size=None)
        now = self.now(run, j, last, start, stop)
        scale, zero = self.fit(run.problem, now, whole)
        run.scale[:, [run.group[j]]], run.zero[:, [run.group[j]]] = scale, zero

    def now(self, run, j, last, start, stop):
        """Return the columns j..last as compensated for all before j."""
        now = run.weight[:, j:last].copy()
        for k in range(start, j):  # the errors of this block have not reached later blocks
            now[:, stop - j :] -= run.error[:, k, None] * run.factor[k, stop:last]
        return now

    # The columns

    def solve(self, run):
        dynamic = self.is_dynamic(run.problem.scheme)
        for start in range(0, run.columns, self.block_size):
            stop = min(start + self.block_size, run.columns)
            for j in range(start, stop):
                if dynamic and j % run.width == 0:
                    self.begin(run, j, start, stop)
                self.column(run, j)
                self.update(run, j, stop)
            self.catch_up(run, start, stop)

    def column(self, run, j):
        """Round column j, and keep its error."""
        (scale, zero), grid = run.of_column(j), run.problem.grid
        run.codes[:, j] = self.nearest(run.weight[:, j], scale, zero, grid)
        run.error[:, j] = self.loss(run, j, self.value(run, j)) / run.factor[j, j]

    def nearest(self, weight, scale, zero, grid):
        return np.clip(np.rint(weight / scale) + zero, grid.qmin, grid.qmax)

    def value(self, run, j):
        scale, zero = run.of_column(j)
        return scale * (run.codes[:, j] - zero)

    def loss(self, run, j, value):
        return run.weight[:, j] - value

    def update(self, run, j, stop):
        """Let the rest of the block make up for the error of column j."""
        run.weight[:, j + 1 : stop] -= run.error[:, j, None] * run.factor[j, j + 1 : stop]

    def catch_up(self, run, start, stop):
        """Let all later blocks make up for the errors of a block."""
        for k in range(start, stop):
            run.weight[:, stop:] -= run.error[:, k, None] * run.factor[k, stop:]

    # What is returned

    def put_back(self, codes, order):
        stored = np.empty_like(codes)
        stored[:, order] = codes
        return stored

    def index(self, run, order):
        """Return the group of each column as it is stored."""
        index = np.empty(run.columns, np.int32)
        index[order] = run.group
        return index

    def reported(self, order):
        return torch.from_numpy(order.astype(np.int32))

    def events(self, run, damp):
        if damp == self.dampening_frac:
            return ()
        message = f"dampening_frac {self.dampening_frac:g} failed, {damp:g} was used"
        return (Event(kind="damping raised", layer=run.problem.name, message=message),)

    def result(self, run, stored, order, damp):
        return QuantizedWeight(
            codes=torch.from_numpy(stored.astype(np.int16)),
            scale=torch.from_numpy(np.float32(run.scale)),
            zero_point=torch.from_numpy(run.zero.astype(np.int16)),
            group_index=torch.from_numpy(self.index(run, order)),
            order=self.reported(order),
            info={"damp": damp},
            events=self.events(run, damp),
        )


class LDLQ(NumpyGPTQ):
    """Sums the errors w - q, as QuIP does, and needs no inverse."""

    dtype = np.float64

    def factor(self, damped):
        upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return (upper / upper.diagonal()).astype(self.dtype)

    def start(self, problem, order, factor):
        run = super().start(problem, order, factor)
        run.weight = run.original.astype(self.dtype)
        run.error = np.zeros(run.weight.shape, self.dtype)
        return run

    def column(self, run, j):
        run.weight[:, j] = self.target(run, j)
        scale, zero = (each.astype(self.dtype) for each in run.of_column(j))
        run.codes[:, j] = self.nearest(run.weight[:, j], scale, zero, run.problem.grid)
        value = scale * (run.codes[:, j] - zero).astype(self.dtype)
        run.error[:, j] = run.original[:, j].astype(self.dtype) - value

    def target(self, run, j):
        target = run.original[:, j].astype(self.dtype)
        for k in range(j):
            target = target + run.error[:, k] * run.factor[k, j]
        return target

    def update(self, run, j, stop):
        pass

    def catch_up(self, run, start, stop):
        pass

    def now(self, run, j, last, start, stop):
        for k in range(j, last):
            now = self.target(run, k)
            run.error[:, k] = run.original[:, k].astype(self.dtype) - now
        return run.original[:, j:last].astype(self.dtype) - run.error[:, j:last]
