"""Coordinate descent: change one code of a row at a time, as long as the output error falls.

Source: cyclic coordinate descent as in Behdin et al., QuantEase, 2023, arXiv:2309.01885.
Error:  the output error (w - q) H (w - q)^T of a row is never above that of rounding to nearest
        on the same scales. For one code, with all others fixed, the error is a parabola, so its
        best code is the one nearest to the parabola's lowest point.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe.errors import UncalibratedLayerError

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Descent:
    """Round to nearest, then improve code after code.

    sweeps   how often to go through all columns
    """

    sweeps: Annotated[int, Field(ge=1)] = 2

    name: str = field(init=False, default="descent")
    needs: frozenset[str] = field(init=False, default=frozenset({"hessian"}))
    capabilities: Capabilities = field(init=False, default=Capabilities())
    claims: tuple[Any, ...] = field(
        init=False, default=(claims.NoWorseThan("output", sums="float64"), claims.SchemeScale())
    )

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the codes. Needs statistics["hessian"], [columns, columns] float64."""
        import torch  # here and not above: listing plugins should not import torch

        from qframe import rounding

        if problem.tokens == 0:
            raise UncalibratedLayerError(
                f"layer {problem.name!r} saw no calibration tokens, which descent needs"
            )
        scale, zero_point = rounding.fit_scales(
            problem.weight, problem.scheme, problem.grid, name=problem.name
        )
        rows, columns = problem.weight.shape
        index = rounding.group_index(columns, problem.scheme)
        nearest = rounding.encode(problem.weight, scale, zero_point, index, problem.grid)
        step = rounding.expand(scale, index, rows).double()
        zero = rounding.expand(zero_point, index, rows).double()

        weight, hessian = problem.weight.double(), problem.statistics["hessian"].double()
        codes = nearest.double()
        error = weight - step * (codes - zero)
        pull = error @ hessian  # half the slope of a row's output error, by column
        for _ in range(self.sweeps):
            for j in range(columns):
                if hessian[j, j] == 0:
                    continue  # no token ever excited this column
                lowest = weight[:, j] - error[:, j] + pull[:, j] / hessian[j, j]
                best = (lowest / step[:, j]).round() + zero[:, j]
                codes[:, j] = best.clamp(problem.grid.qmin, problem.grid.qmax)
                moved = weight[:, j] - step[:, j] * (codes[:, j] - zero[:, j]) - error[:, j]
                error[:, j] += moved
                pull += moved[:, None] * hessian[j]

        # In real numbers no row is worse than before. In floating point, make sure of it.
        before = output_errors(weight - step * (nearest - zero), hessian)
        after = output_errors(weight - step * (codes - zero), hessian)
        better = (after < before)[:, None]
        return QuantizedWeight(
            codes=torch.where(better, codes.to(torch.int16), nearest),
            scale=scale,
            zero_point=zero_point,
            group_index=index,
            info={"rows_improved": int(better.sum())},
        )


def output_errors(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return e H e^T for every row e of `error`, [rows] float64."""
    return ((error @ hessian) * error).sum(1)


@hookimpl
def qframe_rounders() -> Iterable[Descent]:
    """Register descent."""
    return [Descent()]
