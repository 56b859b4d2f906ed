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

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe.errors import HessianError, UnsupportedError
from qframe_plugins.rounders.gptq import Factor

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
        if self.correction == "auto" and not self.needs <= problem.held_out.keys():
            raise UnsupportedError(
                f"layer {problem.name!r}: correction='auto' is chosen on held-out tokens, and "
                f"there are none; give held_out_fraction more than 0, or correction a number"
            )
        factor = Factor.of(
            problem, self.name, self.dampening_frac, self.dampening_cap, self.actorder is not None
        )
        if self.correction == "auto":
            return self._best(problem, [self._round(problem, factor, s) for s in CORRECTIONS])
        return self._round(problem, factor, self.correction)

    def _round(self, problem: RoundingProblem, factor: Factor, share: float) -> QuantizedWeight:
        """Return the codes for a share of the correction."""
        from qframe import rounding
        from qframe_plugins.kernels.numba_cpu import gptq as solver

        weight, scheme, grid = problem.weight, problem.scheme, problem.grid
        aim = aim_of(problem, factor.hessian, factor.damp, share)
        index = rounding.group_index(weight.shape[1], scheme)
        scale, zero_point = rounding.fit_scales(weight, scheme, grid, name=problem.name)
        codes = solver.solve_static(
            aim[:, factor.order].contiguous().numpy(),
            factor.feedback,
            scale.numpy(),
            zero_point.numpy(),
            index[factor.order].numpy(),
            grid.qmin,
            grid.qmax,
        )
        moved = relative_change(weight, aim)
        return factor.quantized(codes, scale, zero_point, index, correction=share, moved=moved)

    def _best(self, problem: RoundingProblem, tried: list[QuantizedWeight]) -> QuantizedWeight:
        """Return what has the least output error on held-out tokens, the first of equals."""
        from qframe import parallel, rounding
        from qframe.hessian import energy, total

        weight, held_out = problem.weight, problem.held_out
        hessian = held_out["hessian"]
        size = float(hessian.diagonal().max()) or 1.0  # what is compared cannot overflow
        moment, mismatch = ((each / size).float() for each in (hessian, held_out["mismatch"]))
        with parallel.one_torch_thread():
            towards = weight @ mismatch
            losses = []
            for quantized in tried:  # ||Y W^T - X Q^T||^2 but for a constant
                change = rounding.dequantize(quantized) - weight
                losses.append(energy(change, moment) - 2 * total(towards.double() * change))
        return tried[losses.index(min(losses))]


def aim_of(
    problem: RoundingProblem, hessian: torch.Tensor, damp: float, share: float
) -> torch.Tensor:
    """Return W + share W M (H + damping)^-1, [rows, columns] float32.

    hessian   with dead diagonals replaced, [columns, columns] float64
    damp      share of the mean of its diagonal that is added to it

    Needs statistics["mismatch"]. Raises HessianError where H + damping is near to singular,
    NonFiniteError for an aim that is not finite.
    """
    import torch

    from qframe import parallel
    from qframe.weights import check_finite

    if not share:
        return problem.weight
    damped = hessian.clone()
    damped.diagonal().add_(damp * damped.diagonal().mean())
    with parallel.one_torch_thread():
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            raise HessianError(
                f"layer {problem.name!r}: the damped Hessian of {problem.tokens} tokens is too "
                f"near to singular to make up for the layers before; use a higher dampening_frac"
            )
        weight = problem.weight.double()
        pull = (weight @ problem.statistics["mismatch"].double()).T
        aim = (weight + share * torch.cholesky_solve(pull, lower).T).float()
    check_finite(aim, f"layer {problem.name!r}: what its weight should become")
    return aim


def relative_change(weight: torch.Tensor, aim: torch.Tensor) -> float:
    """Return ||A - W|| / ||W||, the same whatever the number of threads; 0 where W is 0."""
    from qframe.hessian import total

    change, size = (total(each.double().square()) for each in (aim - weight, weight))
    return math.sqrt(change / size) if size > 0 else 0.0


@hookimpl
def qframe_rounders() -> Iterable[Qronos]:
    """Register qronos."""
    return [Qronos()]
