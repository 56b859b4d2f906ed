"""Step 4 for activations: the inputs of a layer as codes, each time before they are multiplied.

What a layer multiplies is what the codes stand for, scale * value, in float32; a kernel that
multiplies the codes themselves computes the same (docs/bounds.md, B6). A scale is absmax over the
largest value that a code stands for: of a token, of all tokens of a call, or as it was stored.

Source of the columns that are left as they are: Dettmers et al., LLM.int8(), NeurIPS 2022,
arXiv:2208.07339, section 3.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from qframe import rounding
from qframe.contracts import Grid, RoundingProblem
from qframe.scales import smallest_positive
from qframe.scheme import ActivationScheme


@dataclass(frozen=True, slots=True, eq=False)
class InputQuantizer:
    """Quantizes the inputs of one layer.

    scheme   to what
    grid     the codes that exist
    scale    [1] float32, where the scheme is not dynamic
    """

    scheme: ActivationScheme
    grid: Grid
    scale: torch.Tensor | None = None

    @classmethod
    def calibrated(
        cls, scheme: ActivationScheme, grid: Grid, reach: torch.Tensor | None = None
    ) -> InputQuantizer:
        """Return the quantizer with its scale, where it has one that is stored.

        reach   [1], the largest input that is not to be clipped. Raises ValueError where a scheme
                that is not dynamic lacks it
        """
        if scheme.dynamic:
            return cls(scheme, grid)
        if reach is None:
            raise ValueError(f"inputs {scheme.describe()} need the reach of their scale")
        return cls(scheme, grid, scale_of(reach.to(torch.float32).reshape(1), grid))

    def scales(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scales for inputs x [..., columns], float32, to be broadcast with them."""
        if self.scale is not None:
            return self.scale
        size = x.abs()
        if not size.numel():
            return size.new_ones(1)
        if self.scheme.strategy == "tensor":
            return scale_of(size.amax().reshape(1), self.grid)
        return scale_of(size.amax(-1, keepdim=True), self.grid)

    def apply(self, x: torch.Tensor, threshold: float | None = None) -> torch.Tensor:
        """Return what the codes of x [..., columns] stand for, in float32; NaN for NaN.

        threshold   columns in which any |x| is at least this large are returned as they are, and
                    have no part in any scale; 0 and None for no such column
        """
        x = x.to(torch.float32)
        loud = None if not threshold else outliers(x, threshold)
        rest = x if loud is None else x.masked_fill(loud, 0.0)
        scale = self.scales(rest)
        values = rounding.nearest_value(rest / scale, self.grid) * scale
        return values if loud is None else torch.where(loud, x, values)

    def clipped(self, x: torch.Tensor) -> float:
        """Return the share of x that lies beyond the largest value; 0 for dynamic scales."""
        if self.scale is None or not x.numel():
            return 0.0
        return float((x.abs() > self.scale * self.grid.reach).double().mean())


def scale_of(absmax: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return absmax over the largest value; 1 for zero, and never 0 for what is not zero."""
    scale = (absmax / grid.reach).clamp(min=smallest_positive("float32"))
    return torch.where(absmax == 0, torch.ones_like(scale), scale)


def outliers(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return in which columns of x [..., columns] any |x| >= threshold, [columns] bool."""
    return (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)


def output_change(
    problem: RoundingProblem, x: torch.Tensor, input_scale: torch.Tensor
) -> torch.Tensor:
    """Return x W^T - Q(x / s) Q(W s)^T, [tokens, rows] float64: all that rounding changes.

    x             [tokens, columns] float32
    input_scale   s, [columns] float32

    Weights are rounded to nearest; a scale of activations that would be stored reaches the largest
    |x / s|. Raises NonFiniteError where W s has no scale.
    """
    rewritten = dataclasses.replace(problem, weight=problem.weight * input_scale)
    weight = rounding.dequantize(rounding.to_nearest(rewritten)).to(torch.float64)
    z, scheme = x / input_scale, problem.scheme.input_activations
    if scheme is not None and problem.input_grid is not None:
        reach = z.abs().amax().reshape(1) if z.numel() else z.new_zeros(1)
        z = InputQuantizer.calibrated(scheme, problem.input_grid, reach).apply(z)
    return x.to(torch.float64) @ problem.weight.to(torch.float64).T - z.to(torch.float64) @ weight.T
