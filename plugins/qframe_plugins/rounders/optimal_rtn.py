"""Optimal RTN: round to nearest on the best scales there are. No calibration.

Every group takes the scale, a number of the scheme's scale_dtype, and the integer zero point whose
nearest codes have the least squared error sum (w - scale (code - zero_point))^2 of all, found by an
exact sweep over the pieces of that error, not by trying some clippings of the range.

Source: the objective is that of clipping by mean squared error, Banner et al., NeurIPS 2019,
arXiv:1810.05723; the exact search is qframe's own (kernels/numba_cpu/best_scale.py). It finds the
best scale that can be stored, which need not be the best real one rounded.
Error:  codes are the nearest ones (docs/bounds.md, B1.b); the error of a group is that of no other
        scale and zero point (B10.d), hence at most that of both observers' scales (B10.c).

The scheme's observer plays no part. Where the weights' range needs a scale that scale_dtype cannot
hold, the layer is refused as rtn refuses it, though a smaller scale would be storable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class OptimalRTN:
    """Round to nearest on the scales and zero points of least squared weight error.

    At most 4 bits: a group of n weights has n (2^bits - 1) pieces for each of 2^bits zero points.
    """

    name: str = field(init=False, default="optimal_rtn")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Capabilities(
            num_bits=frozenset({2, 3, 4}), strategies=frozenset({"channel", "group"})
        ),
    )
    by_rows = True
    claims = (
        claims.HalfStep(),
        claims.FittedScale(),
        claims.NoWorseThan("weight", observer="minmax"),
        claims.NoWorseThan("weight", observer="mse"),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
    )

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the nearest codes on the best scales.

        Raises NonFiniteError for a weight that is not finite, and where the scale that spans a
        group does not fit its dtype.
        """
        import torch

        from qframe import rounding
        from qframe.weights import check_finite
        from qframe_plugins.kernels.numba_cpu.best_scale import best_scales

        weight, scheme, grid = problem.weight, problem.scheme, problem.grid
        check_finite(weight, f"layer {problem.name!r}: its weight")
        spanning = scheme.replace(observer="minmax")
        scale, zero_point = rounding.fit_scales(weight, spanning, grid, name=problem.name)
        made = best_scales(
            weight.numpy(),
            scale.numpy(),
            zero_point.numpy(),
            scheme.group_width(weight.shape[1]),
            grid.qmin,
            grid.qmax,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
        )
        codes, scale, zero_point = map(torch.from_numpy, made)
        return QuantizedWeight(
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            group_index=rounding.group_index(weight.shape[1], scheme),
        )


@hookimpl
def qframe_rounders() -> Iterable[OptimalRTN]:
    """Register optimal_rtn."""
    return [OptimalRTN()]
