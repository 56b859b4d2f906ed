"""optimum-quanto's integer weights, as two qframe rounders.

Runs the optimizers that `quanto.quantize(model, weights=...)` takes by default, and the library's
`quantize_weight`:

  quanto             qint8: symmetric, per channel, AbsmaxOptimizer, scale = absmax / 127. That is
                     qframe's "restricted" rule; code -128 is allowed but not needed.
  quanto-zeropoint   qint2, qint4: asymmetric, per channel or group, MaxOptimizer, scale =
                     (max - min) / (2^b - 1), with the option zeropoint=True: an integer zero
                     point. By default a float shift takes its place, for which `QuantizedWeight`
                     has no word; it is judged by the values that it decodes to (experiments.py).

The scale of a group without a range is stored as 0. Here it is replaced by 1 and the codes by the
zero point, which stand for the same zeros; the experiments show what is stored. Groups that do not
divide the row are refused by quanto itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Capabilities, QuantizedWeight, RoundingProblem, Scheme, claims, hookimpl
from qframe.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

PACKAGES = ("optimum-quanto",)
NEAREST = (
    claims.HalfStep(),
    claims.SchemeScale(),
    claims.Covers(),
    claims.ScaleEquivariant(),
    claims.SignSymmetric(),
    claims.Idempotent(),
)


class Mapped(Capabilities):
    """What qint2, qint4 and qint8 have words for."""

    def objection(self, scheme: Scheme) -> str | None:
        if scheme.scale_dtype != "float32" or scheme.observer != "minmax":
            return "this adapter maps float32 scales of the minmax observer only"
        if scheme.symmetric and scheme.scale_rule != "restricted":
            return "qint8 has scale absmax / 127"
        return Capabilities.objection(self, scheme)


class Adapter:
    """What both have in common."""

    capabilities: Capabilities

    def quantized(self, weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
        """Return (codes int16 [rows, columns], scale, zero point int16, decoded values)."""
        raise NotImplementedError

    def decoded(self, problem: RoundingProblem) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the codes, and the values that the library itself decodes them to."""
        import torch

        from qframe import rounding

        scheme, (rows, columns) = problem.scheme, problem.weight.shape
        objection = self.capabilities.objection(scheme)
        if objection:
            raise UnsupportedError(f"layer {problem.name!r}: {objection}")
        try:
            codes, scale, zero_point, values = self.quantized(problem.weight, scheme)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise UnsupportedError(
                f"layer {problem.name!r}: quanto says {type(error).__name__}: {error}"
            ) from error
        shape = scheme.scale_shape(rows, columns)
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        index = rounding.group_index(columns, scheme)
        nothing = scale == 0
        codes = torch.where(
            rounding.expand(nothing, index, rows), rounding.expand(zero_point, index, rows), codes
        )
        quantized = QuantizedWeight(
            codes=codes,
            scale=torch.where(nothing, 1, scale),
            zero_point=zero_point,
            group_index=index,
        )
        return quantized, values

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the library's codes."""
        return self.decoded(problem)[0]


@dataclass(frozen=True)
class Quanto(Adapter):
    """Round to nearest, as optimum-quanto's qint8 does it."""

    name: str = field(init=False, default="quanto")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Mapped(
            num_bits=frozenset({8}),
            strategies=frozenset({"channel"}),
            symmetric=frozenset({True}),
        ),
    )
    claims = NEAREST

    def quantized(self, weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
        import torch
        from optimum.quanto import AbsmaxOptimizer, qint8
        from optimum.quanto.tensor.weights.quantization import quantize_weight

        scale = AbsmaxOptimizer()(weight, qint8, 0)
        theirs = quantize_weight(weight, qint8, 0, scale)
        zero_point = torch.zeros_like(scale, dtype=torch.int16)
        return theirs._data.to(torch.int16), scale, zero_point, theirs.dequantize()


@dataclass(frozen=True)
class QuantoZeroPoint(Adapter):
    """Round to nearest, as optimum-quanto's qint2 and qint4 do it with zeropoint=True."""

    name: str = field(init=False, default="quanto-zeropoint")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Mapped(
            num_bits=frozenset({2, 4}),
            strategies=frozenset({"channel", "group"}),
            symmetric=frozenset({False}),
        ),
    )
    claims = NEAREST

    def quantized(self, weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
        import torch
        from optimum.quanto import MaxOptimizer, qint2, qint4
        from optimum.quanto.tensor.weights.quantization import quantize_weight

        qtype = {2: qint2, 4: qint4}[scheme.num_bits]
        size = scheme.group_size
        scale, shift = MaxOptimizer()(weight, qtype, 0, size, zeropoint=True)
        theirs = quantize_weight(weight, qtype, 0, scale, shift, size)
        codes = theirs._data.unpack().reshape(weight.shape).to(torch.int16)
        return codes, scale, shift.to(torch.int16), theirs.dequantize()


@hookimpl
def qframe_rounders():
    return [Quanto(), QuantoZeroPoint()]
