"""torchao's integer weights, as a qframe rounder.

Runs `IntxUnpackedToInt8Tensor.from_hp`, which `quantize_(model, IntxWeightOnlyConfig(...))` calls
for every linear layer: 2 to 8 bits, per channel or group, MappingType.SYMMETRIC or ASYMMETRIC, and
float32 scales because the weight is float32. Its conventions are those of qframe's "full" rule:

  symmetric    codes -2^(b-1)..2^(b-1)-1, scale = absmax / (2^b - 1) * 2
  asymmetric   scale = (max - min) / (2^b - 1), the range holds 0, the zero point is rounded and
               clamped; codes are signed, so 2^(b-1) is added to codes and zero points here
  smallest     no scale is below `eps`, by default the smallest normal number of the weight's dtype

Weights are multiplied by the rounded reciprocal of the scale, hence HalfStep(roundings=2). Not
declared: one scale for a whole tensor, which IntxWeightOnlyConfig does not offer. Groups that do
not divide the row are refused by torchao itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from qframe import Capabilities, QuantizedWeight, RoundingProblem, Scheme, bounds, claims, hookimpl
from qframe.certificates import group_ranges
from qframe.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

PACKAGES = ("torchao",)
EPS = 2.0**-126
"""The smallest normal float32, torchao's default `eps`."""


class Mapped(Capabilities):
    """What IntxWeightOnlyConfig has words for."""

    def objection(self, scheme: Scheme) -> str | None:
        if scheme.scale_dtype != "float32" or scheme.observer != "minmax":
            return "this adapter maps float32 scales of the minmax observer only"
        if scheme.symmetric and scheme.scale_rule != "full":
            return "MappingType.SYMMETRIC uses all 2^b codes"
        return Capabilities.objection(self, scheme)


class TheirScale(claims.SchemeScale):
    """The scheme's rule, but no scale is below `eps`, as torchao documents."""

    def certify(self, evidence):
        import torch

        problem, made = evidence.problem, evidence.quantized
        low, high = group_ranges(problem, made.group_index)
        ideal = bounds.ideal_scale(low, high, problem.grid, symmetric=problem.scheme.symmetric)
        raised = (ideal < EPS) & (made.scale.numpy() == EPS)
        scale = made.scale.numpy().copy()
        scale[raised] = np.where(ideal == 0, 1, ideal)[raised]
        made = replace(made, scale=torch.from_numpy(scale))
        return claims.SchemeScale.certify(self, replace(evidence, quantized=made))


@dataclass(frozen=True)
class TorchAO:
    """Round to nearest, as torchao's IntxWeightOnlyConfig does it."""

    name: str = field(init=False, default="torchao")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Mapped(num_bits=frozenset(range(2, 9)), strategies=frozenset({"channel", "group"})),
    )
    claims = (
        claims.HalfStep(roundings=2),
        TheirScale(),
        claims.Covers(),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
        claims.Idempotent(),
    )

    def decoded(self, problem: RoundingProblem) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the codes, and the values that the library itself decodes them to."""
        import torch
        from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

        from qframe import rounding

        scheme, (rows, columns) = problem.scheme, problem.weight.shape
        objection = self.capabilities.objection(scheme)
        if objection:
            raise UnsupportedError(f"layer {problem.name!r}: {objection}")
        mapping = MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC
        try:
            theirs = IntxUnpackedToInt8Tensor.from_hp(
                problem.weight,
                (1, scheme.group_width(columns)),
                getattr(torch, f"int{scheme.num_bits}"),
                mapping_type=mapping,
            )
        except (AssertionError, RuntimeError, IndexError) as error:
            raise UnsupportedError(
                f"layer {problem.name!r}: torchao says {type(error).__name__}: {error}"
            ) from error
        unsigned = 0 if scheme.symmetric else 1 << (scheme.num_bits - 1)
        shape = scheme.scale_shape(rows, columns)
        quantized = QuantizedWeight(
            codes=theirs.qdata.to(torch.int16) + unsigned,
            scale=theirs.scale.reshape(shape),
            zero_point=theirs.zero_point.to(torch.int16).reshape(shape) + unsigned,
            group_index=rounding.group_index(columns, scheme),
        )
        return quantized, theirs.dequantize()

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the library's codes."""
        return self.decoded(problem)[0]


@hookimpl
def qframe_rounders():
    return [TorchAO()]
