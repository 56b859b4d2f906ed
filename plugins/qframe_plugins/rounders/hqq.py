"""HQQ: scale and zero point that make the errors sparse, by half-quadratic splitting. Data-free.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, Mobius Labs,
2023. The objective is sum |w - q|^p with p < 1, which few large errors disturb less than a sum of
squares. An auxiliary error e takes the power (shrinkage, eq. (4)), and the grid is fitted to w - e
in closed form (eq. (6)), in turns.
Error:  codes are the nearest ones (docs/bounds.md, B1.b); the sum of |w - q| of a row is at most
        that of round-to-nearest, on the scheme's scales and on those of the range (B10.e).

Where this departs from the paper:
  * zero points are integers, as everywhere in qframe, and stored in num_bits. So the real one that
    the paper's alternation gives is taken down and up, and for each of the two the scale is fitted
    by the same alternation;
  * of these, and of what round-to-nearest has, the least sum |w - q| stays, by which the published
    solver stops, and not the least power of it;
  * shrinkage is in steps of the group, not in units of the weights: what is found does not depend
    on how large weights are, and `beta` means the same everywhere. The published beta, 10 in units
    of the weights, is 10 s^(2-p) in steps of s, 0.1 for an s of 0.03. Shrinkage leaves something
    to e from beta^(-1/(2-p)) on, 5.9 steps: only of weights that are clipped far. For all others
    both solvers fit least squares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class HQQ:
    """Round to nearest on half-quadratic scales and zero points.

    lp_norm      p of the power that shrinkage is for
    beta         weight of the quadratic term, for errors in steps of the group
    kappa        what it grows by with every iteration
    iterations   at most, of either alternation
    """

    lp_norm: Annotated[float, Field(gt=0, le=1)] = 0.7
    beta: Annotated[float, Field(gt=0)] = 0.1
    kappa: Annotated[float, Field(ge=1)] = 1.01
    iterations: Annotated[int, Field(ge=0)] = 20

    name: str = field(init=False, default="hqq")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False, default=Capabilities(strategies=frozenset({"channel", "group"}))
    )
    by_rows = True
    claims = (
        claims.HalfStep(),
        claims.NoWorsePower(1.0),
        claims.NoWorsePower(1.0, observer="minmax"),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
    )

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the nearest codes on the scales that were found.

        Raises NonFiniteError for a weight that is not finite, and where the scale that spans a
        group does not fit its dtype.
        """
        import torch

        from qframe import rounding
        from qframe.weights import check_finite
        from qframe_plugins.kernels.numba_cpu.hqq import half_quadratic

        weight, scheme, grid = problem.weight, problem.scheme, problem.grid
        check_finite(weight, f"layer {problem.name!r}: its weight")
        spanning = scheme.replace(observer="minmax")
        first, kept = (
            tuple(
                each.numpy() for each in rounding.fit_scales(weight, rule, grid, name=problem.name)
            )
            for rule in (spanning, scheme)
        )
        made = half_quadratic(
            weight.numpy(),
            (first[0], first[1]),
            (kept[0], kept[1]),
            scheme.group_width(weight.shape[1]),
            grid.qmin,
            grid.qmax,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
            power=self.lp_norm,
            beta=self.beta,
            kappa=self.kappa,
            iterations=self.iterations,
        )
        codes, scale, zero_point = map(torch.from_numpy, made)
        return QuantizedWeight(
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            group_index=rounding.group_index(weight.shape[1], scheme),
        )


@hookimpl
def qframe_rounders() -> Iterable[HQQ]:
    """Register hqq."""
    return [HQQ()]
