"""bitsandbytes' int8 weights, as a qframe rounder.

Runs `int8_vectorwise_quant`, with which `Linear8bitLt` makes its weights: symmetric, one scale per
row, codes -127..127, scale = absmax / 127. That is qframe's "restricted" rule. What is stored is
absmax; the scale here is float32(absmax / 127).

  rounding   weights are multiplied by the rounded 127 / absmax, and the scale here is rounded
             too, hence HalfStep(roundings=3)
  dtype      Linear8bitLt casts weights to float16 first. The function takes float32 as well, and
             is judged on it, so that only the rounding to int8 is judged.
  all zero   absmax is stored as 0, and 127 / 0 makes the codes. Here the scale is replaced by 1,
             which stands for the same zeros; the experiments show what is stored.

NF4 and FP4, and the constant of the int8 matrix product, are judged in experiments.py: a codebook
is no integer grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Capabilities, QuantizedWeight, RoundingProblem, Scheme, claims, hookimpl
from qframe.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

PACKAGES = ("bitsandbytes",)


class Mapped(Capabilities):
    """What int8_vectorwise_quant does."""

    def objection(self, scheme: Scheme) -> str | None:
        if scheme.scale_dtype != "float32" or scheme.observer != "minmax":
            return "this adapter maps float32 scales of the minmax observer only"
        if scheme.scale_rule != "restricted":
            return "int8_vectorwise_quant has codes -127..127"
        return Capabilities.objection(self, scheme)


@dataclass(frozen=True)
class BitsAndBytes:
    """Round to nearest, as bitsandbytes' int8_vectorwise_quant does it."""

    name: str = field(init=False, default="bitsandbytes")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Mapped(
            num_bits=frozenset({8}),
            strategies=frozenset({"channel"}),
            symmetric=frozenset({True}),
        ),
    )
    claims = (
        claims.HalfStep(roundings=3),
        claims.SchemeScale(),
        claims.Covers(),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
        claims.Idempotent(),
    )
    decode_roundings = 3
    """The library decodes with two products and a rounded 1 / 127, not with a scale."""

    def decoded(self, problem: RoundingProblem) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the codes, and the values that the library itself decodes them to."""
        import torch
        from bitsandbytes import functional

        from qframe import rounding

        objection = self.capabilities.objection(problem.scheme)
        if objection:
            raise UnsupportedError(f"layer {problem.name!r}: {objection}")
        try:
            codes, absmax, _ = functional.int8_vectorwise_quant(problem.weight)
            values = functional.int8_vectorwise_dequant(codes, absmax)
        except (ValueError, RuntimeError, IndexError) as error:
            raise UnsupportedError(
                f"layer {problem.name!r}: bitsandbytes says {type(error).__name__}: {error}"
            ) from error
        nothing = (absmax == 0)[:, None]
        scale = torch.where(nothing, 1, (absmax / 127)[:, None])
        quantized = QuantizedWeight(
            codes=torch.where(nothing, 0, codes.to(torch.int16)),
            scale=scale,
            zero_point=torch.zeros_like(scale, dtype=torch.int16),
            group_index=rounding.group_index(problem.weight.shape[1], problem.scheme),
        )
        return quantized, values

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the library's codes."""
        return self.decoded(problem)[0]


@hookimpl
def qframe_rounders():
    return [BitsAndBytes()]
