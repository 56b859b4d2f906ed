"""The grid that HQQ starts from, with rounded zero points, as a qframe rounder.

Runs `Quantizer.quantize(..., round_zero=True, optimize=False, axis=1)`: asymmetric, codes from 0,
scale = (max - min) / (2^b - 1), zero point = rint(-min / scale). What HQQ is known for, its
half-quadratic search, makes the zero point a float, for which `QuantizedWeight` has no word; it is
judged by the values that it decodes to (experiments.py).

  range      HQQ does not extend the range to 0, so zero points of groups of one sign lie outside
             the codes. They are not mapped: UnsupportedError. The suite's layers get a zero in
             every group.
  smallest   no scale is below 1 / 20000; where max - min is at most 1e-4 the scale is 1
  rounding   weights are multiplied by the reciprocal, of which the stored scale is the rounded
             reciprocal: HalfStep(roundings=2)
  groups     must divide the number of weights, not the row: groups that straddle rows are made
             without a word. They are not mapped either; the experiments show them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Capabilities, QuantizedWeight, RoundingProblem, Scheme, claims, hookimpl
from qframe.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

PACKAGES = ("hqq",)


class Mapped(Capabilities):
    """What HQQ has words for."""

    def objection(self, scheme: Scheme) -> str | None:
        if scheme.scale_dtype != "float32" or scheme.observer != "minmax":
            return "this adapter maps float32 scales of the minmax observer only"
        return Capabilities.objection(self, scheme)


@dataclass(frozen=True)
class HQQ:
    """Round to nearest on HQQ's first grid."""

    name: str = field(init=False, default="hqq-start")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(
        init=False,
        default=Mapped(
            num_bits=frozenset({2, 3, 4, 5, 6, 8}),
            strategies=frozenset({"channel", "group"}),
            symmetric=frozenset({False}),
        ),
    )
    claims = (
        claims.HalfStep(roundings=2, zero_point="before"),
        claims.SchemeScale(),
        claims.Covers(),
        claims.ScaleEquivariant(),
        claims.Idempotent(exact=False),
    )
    every_group_holds_zero = True
    """What layers it can be tried on."""

    def decoded(self, problem: RoundingProblem) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the codes, and the values that the library itself decodes them to."""
        import torch
        from hqq.core.quantize import Quantizer

        from qframe import rounding

        scheme, (rows, columns) = problem.scheme, problem.weight.shape
        objection = self.capabilities.objection(scheme)
        width = scheme.group_width(columns)
        if columns % width:
            objection = "groups that do not divide the row would straddle rows"
        if objection:
            raise UnsupportedError(f"layer {problem.name!r}: {objection}")
        try:
            packed, meta = Quantizer.quantize(
                problem.weight,
                nbits=scheme.num_bits,
                group_size=width,
                optimize=False,
                round_zero=True,
                axis=1,
                bitpack=False,
                device="cpu",
            )
            values = Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32})
        except (AssertionError, RuntimeError, IndexError) as error:
            raise UnsupportedError(
                f"layer {problem.name!r}: HQQ says {type(error).__name__}: {error}"
            ) from error
        zero_point, grid = meta["zero"], problem.grid
        if bool(((zero_point < grid.qmin) | (zero_point > grid.qmax)).any()):
            raise UnsupportedError(
                f"layer {problem.name!r}: a group without a zero has its zero point outside the "
                f"codes, which QuantizedWeight does not hold"
            )
        shape = scheme.scale_shape(rows, columns)
        quantized = QuantizedWeight(
            codes=packed.reshape(rows, columns).to(torch.int16),
            scale=meta["scale"].reshape(shape),
            zero_point=zero_point.reshape(shape).to(torch.int16),
            group_index=rounding.group_index(columns, scheme),
        )
        return quantized, values

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the library's codes."""
        return self.decoded(problem)[0]


@hookimpl
def qframe_rounders():
    return [HQQ()]
