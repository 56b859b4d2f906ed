"""Qronos: GPTQ that makes up for what was lost before the layer as well.

Source: Zhang, Zhang, Colbert and Saab, Qronos, ICLR 2026, arXiv:2505.11695; GPTAQ (Li et al., ICML
2025, arXiv:2504.02692) has the same objective. The inputs of a layer in the quantized network, X,
are not those of the original one, Y, and the outputs that it should have are Y W^T. With
H = (2/n) X^T X and M = (2/n) (Y - X)^T X

    ||Y W^T - X Q^T||^2 = tr (Q - A) H (Q - A)^T n / 2 + const,    A = W + W M H^-1,

so the best codes for W on Y are the best codes for the aim A on X, which GPTQ looks for: in the
order of the columns, each is rounded to the code nearest to

    t_i = a_i + sum_{j<i} (a_j - q_j) U_ji / U_ii,    H + damping = U U^T.

With the damping the aim is the minimum of ||Y W^T - X A^T||^2 n/2 + damping ||A - W||^2: what few
tokens tell of the inputs pulls less.

Error:  (q - a) H (q - a)^T = sum_j U_jj^2 (q_j - t_j)^2, as for GPTQ (docs/bounds.md, B3.h).

Where the paper is silent, or this is simpler:
  * the paper rounds the first column with the others held at W, and all later ones as here; here
    all are rounded alike, which is Babai's nearest plane for Y W^T;
  * scales are those of W. They are known before the first column is rounded;
  * `correction` takes a share of A - W. With 0 this is GPTQ, bit for bit. "auto" takes for each
    layer the share of CORRECTIONS that does best on held-out tokens;
  * with little text the aim is fitted to it: inputs have moved by what nobody can tell from a few
    thousand tokens, and all of the correction with GPTQ's damping does much harm. Hence half of it,
    and ten times the damping, are the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe.errors import HessianError, UncalibratedLayerError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

CORRECTIONS = (0.0, 0.5, 1.0)  # what "auto" tries


@dataclass(frozen=True)
class Qronos:
    """GPTQ for the outputs that the layer would have, had nothing before it been quantized.

    correction       share of what is needed to make up for the layers before; "auto": for each
                     layer that of CORRECTIONS which does best on tokens that were held out
    dampening_frac   share of the mean of diag(H) that is added to the diagonal
    dampening_cap    the highest share that is tried when the factorization fails
    actorder         order of the columns. None: left to right. "static": by falling diag(H)
    """

    correction: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.1
    dampening_cap: Annotated[float, Field(gt=0)] = 1.0
    actorder: Literal["static"] | None = "static"

    name: str = field(init=False, default="qronos")
    needs: frozenset[str] = field(init=False, default=frozenset({"hessian", "mismatch"}))

    @property
    def capabilities(self) -> Capabilities:
        """All integer schemes; an automatic correction is one for all rows of a layer."""
        return Capabilities(row_independent=self.correction != "auto")

    @property
    def claims(self) -> tuple[object, ...]:
        """Codes are nearest to the compensated aims; scales are the scheme's, of the weights."""
        babai = claims.Babai(
            dampening_frac=self.dampening_frac,
            dampening_cap=self.dampening_cap,
            order="natural" if self.actorder is None else "falling",
            correction=CORRECTIONS if self.correction == "auto" else self.correction,
        )
        return babai, claims.SchemeScale(), claims.Covers(), claims.SignSymmetric()

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the codes. Needs statistics["hessian"] and ["mismatch"], [columns, columns] each.

        Raises UncalibratedLayerError without tokens, NonFiniteError for a weight or an aim that is
        not finite, HessianError when no damping up to the cap makes the Hessian positive definite,
        and UnsupportedError for correction="auto" when no tokens are held out.
        """
        if self.correction == "auto":
            return self._round_best(problem, rng)
        import torch

        from qframe import rounding
        from qframe.weights import check_finite
        from qframe_plugins.kernels.numba_cpu import gptq as solver
        from qframe_plugins.rounders.gptq import damping_raised, factorize, revive

        weight, scheme, grid = problem.weight, problem.scheme, problem.grid
        if problem.tokens == 0:
            raise UncalibratedLayerError(
                f"layer {problem.name!r} saw no calibration tokens, which qronos needs; give it "
                f"another method with an override, or text that reaches it"
            )
        check_finite(weight, f"layer {problem.name!r}: its weight")
        hessian, dead = revive(problem.statistics["hessian"])
        columns = weight.shape[1]
        order = torch.arange(columns)
        if self.actorder is not None:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        feedback, damp = factorize(hessian, order, self.dampening_frac, self.dampening_cap, problem)
        aim = weight
        if self.correction:
            aim = self._aim(problem, hessian, damp, self.correction)
            check_finite(aim, f"layer {problem.name!r}: what its weight should become")
        index = rounding.group_index(columns, scheme)
        scale, zero_point = rounding.fit_scales(weight, scheme, grid, name=problem.name)
        codes = solver.solve_static(
            aim[:, order].contiguous().numpy(),
            feedback,
            scale.numpy(),
            zero_point.numpy(),
            index[order].numpy(),
            grid.qmin,
            grid.qmax,
        )
        stored = torch.empty(weight.shape, dtype=torch.int16)
        stored[:, order] = torch.from_numpy(codes)
        return QuantizedWeight(
            codes=stored,
            scale=scale,
            zero_point=zero_point,
            group_index=index,
            order=order.to(torch.int32),
            info={
                "damp": damp,
                "dead_columns": int(dead.sum()),
                "correction": self.correction,
                "moved": float((aim - weight).norm() / weight.norm().clamp(min=1e-30)),
            },
            events=damping_raised(damp, self.dampening_frac, problem),
        )

    def _aim(
        self, problem: RoundingProblem, hessian: torch.Tensor, damp: float, share: float
    ) -> torch.Tensor:
        """Return W + share W M (H + damping)^-1, [rows, columns] float32.

        hessian   with dead diagonals replaced, [columns, columns] float64
        """
        import torch

        from qframe import parallel

        damped = hessian.clone()
        damped.diagonal().add_(damp * damped.diagonal().mean())
        with parallel.one_torch_thread():
            lower, failed = torch.linalg.cholesky_ex(damped)
            if int(failed):
                raise HessianError(
                    f"layer {problem.name!r}: the damped Hessian of {problem.tokens} tokens is too "
                    f"near to singular for qronos; use a higher dampening_frac"
                )
            weight = problem.weight.double()
            pull = (weight @ problem.statistics["mismatch"].double()).T
            return (weight + share * torch.cholesky_solve(pull, lower).T).float()

    def _round_best(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the codes of the correction with the least output error on held-out tokens."""
        from qframe import parallel, rounding
        from qframe.hessian import energy, total

        held_out = problem.held_out
        if not {"hessian", "mismatch"} <= held_out.keys():
            raise UnsupportedError(
                f"layer {problem.name!r}: correction='auto' is chosen on held-out tokens, and "
                f"there are none; give held_out_fraction more than 0, or correction a number"
            )
        weight, hessian = problem.weight, held_out["hessian"].float()
        tried = [replace(self, correction=each).round(problem, rng) for each in CORRECTIONS]
        with parallel.one_torch_thread():
            towards = weight @ held_out["mismatch"].float()
            losses = []
            for quantized in tried:  # ||Y W^T - X Q^T||^2 but for a constant
                change = rounding.dequantize(quantized) - weight
                losses.append(energy(change, hessian) - 2 * total(towards * change))
        return tried[losses.index(min(losses))]  # the first of equals


@hookimpl
def qframe_rounders() -> Iterable[Qronos]:
    """Register qronos."""
    return [Qronos()]
