"""compressed-tensors and llm-compressor, as qframe rounders: round to nearest, and GPTQ.

Runs what a checkpoint of llm-compressor is made with: its observer "memoryless_minmax" for scales
and zero points, compressed-tensors' `quantize` for codes, `quantize_weight` for GPTQ. Their
conventions are those of qframe's "full" scale rule with float32 scales:

  symmetric    codes -2^(b-1)..2^(b-1)-1, scale = absmax / (2^b - 1) * 2
  asymmetric   scale = (max - min) / (2^b - 1), the range holds 0, the zero point is rounded and
               clamped; codes are signed, so 2^(b-1) is added to codes and zero points here
  all zero     scale = 2^-23, the epsilon of float32, where qframe has 1

Not declared: 16-bit scales and the mse observer. Groups that do not divide the row are refused by
compressed-tensors itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qframe import Capabilities, Event, QuantizedWeight, RoundingProblem, Scheme, claims, hookimpl
from qframe.certificates import group_ranges
from qframe.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

PACKAGES = ("compressed-tensors", "llmcompressor")


class Mapped(Capabilities):
    """What compressed-tensors has words for."""

    def objection(self, scheme: Scheme) -> str | None:
        if scheme.scale_dtype != "float32" or scheme.observer != "minmax":
            return "this adapter maps float32 scales of the minmax observer only"
        if scheme.symmetric and scheme.scale_rule != "full":
            return "compressed-tensors uses all 2^b codes"
        return Capabilities.objection(self, scheme)


DECLARED = Mapped(num_bits=frozenset(range(2, 9)))


@contextlib.contextmanager
def in_their_words(problem: RoundingProblem, **more: object):
    """Give the scheme as QuantizationArgs; the library's refusals become UnsupportedError."""
    from compressed_tensors.quantization import QuantizationArgs

    scheme = problem.scheme
    objection = DECLARED.objection(scheme)
    if objection:
        raise UnsupportedError(f"layer {problem.name!r}: {objection}")
    words = {"num_bits": scheme.num_bits, "symmetric": scheme.symmetric}
    words |= {"strategy": scheme.strategy, "group_size": scheme.group_size}
    try:
        yield QuantizationArgs(**words, **more)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"layer {problem.name!r}: compressed-tensors says {type(error).__name__}: {error}"
        ) from error


def observed(weight: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point as llm-compressor finds them for a weight."""
    from llmcompressor.observers import Observer

    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
    found = observer(weight).get_qparams()
    return found["scale"], found["zero_point"]


def coded(
    values: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    problem: RoundingProblem,
    args,
    **more,
) -> tuple[QuantizedWeight, torch.Tensor]:
    """Return codes as a checkpoint stores them, and what compressed-tensors decodes them to."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    from qframe import rounding

    codes = quantize(values, scale, zero_point, args, dtype=torch.int8)
    decoded = dequantize(codes, scale, zero_point, args)
    scheme, (rows, columns) = problem.scheme, values.shape
    unsigned = 0 if scheme.symmetric else 1 << (scheme.num_bits - 1)
    shape = scheme.scale_shape(rows, columns)
    quantized = QuantizedWeight(
        codes=codes.to(torch.int16) + unsigned,
        scale=scale.reshape(shape),
        zero_point=zero_point.to(torch.int16).reshape(shape) + unsigned,
        group_index=rounding.group_index(columns, scheme),
        **more,
    )
    return quantized, decoded


class TheirScale(claims.SchemeScale):
    """The scheme's rule; the scale of a group of zeros, which means nothing, is 2^-23."""

    def certify(self, evidence):
        made = evidence.quantized
        low, high = group_ranges(evidence.problem, made.group_index)
        nothing = (low == 0) & (high == 0) & (made.scale.numpy() == 2.0**-23)
        scale = made.scale.clone()
        scale[nothing] = 1
        return claims.SchemeScale.certify(
            self, replace(evidence, quantized=replace(made, scale=scale))
        )


@dataclass(frozen=True)
class CompressedTensors:
    """Round to nearest, as llm-compressor's QuantizationModifier does it."""

    name: str = field(init=False, default="compressed-tensors")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(init=False, default=DECLARED)
    claims = (
        claims.HalfStep(zero_point="before"),
        TheirScale(),
        claims.Covers(),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
        claims.Idempotent(),
    )

    def decoded(self, problem: RoundingProblem) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the codes, and the values that the library itself decodes them to."""
        with in_their_words(problem) as args:
            scale, zero_point = observed(problem.weight, args)
            return coded(problem.weight, scale, zero_point, problem, args)

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the library's codes."""
        return self.decoded(problem)[0]


@dataclass(frozen=True)
class LLMCompressorGPTQ:
    """GPTQ, as llm-compressor's GPTQModifier calls it for one layer.

    actorder   "static": columns by falling diagonal of the Hessian; "": left to right
    """

    dampening_frac: float = 0.01
    block_size: int = 128
    actorder: str = "static"
    name: str = field(init=False, default="llmcompressor-gptq")
    needs: frozenset[str] = field(init=False, default=frozenset({"hessian"}))
    capabilities: Capabilities = field(init=False, default=DECLARED)

    @property
    def claims(self) -> tuple[object, ...]:
        """GPTQ on the scales of the original weight; a dead column has diagonal 1, weight 0."""
        babai = claims.Babai(
            self.dampening_frac,
            dampening_cap=self.dampening_frac,
            order="any" if self.actorder else "natural",
            dead="zero",
            factorization="float32",
        )
        return (babai, TheirScale(), claims.Covers())

    def decoded(self, problem: RoundingProblem) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the codes, and the values that the library itself decodes them to."""
        import torch
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        with in_their_words(problem, actorder=self.actorder or None) as args:
            scale, zero_point = observed(problem.weight, args)
            hessian = problem.statistics["hessian"].float()[None]
            order = None
            if self.actorder:  # the library's own sort, which need not be stable
                falling = torch.argsort(hessian.diagonal(dim1=1, dim2=2), dim=-1, descending=True)
                order = falling[0].to(torch.int32)
            values, _, fell_back = quantize_weight(
                weights=problem.weight[None].clone(),  # the library works in place on both
                hessians=hessian.clone(),
                scale=scale[None],
                zero_point=zero_point[None],
                global_scale=None,
                quant_args=args,
                blocksize=self.block_size,
                percdamp=self.dampening_frac,
            )
            events: tuple[Event, ...] = ()
            if bool(fell_back[0]):
                message = "the Hessian could not be factorized; llm-compressor rounded to nearest"
                events = (Event(kind="fallback", layer=problem.name, message=message),)
            more = {"order": order, "events": events}
            return coded(values[0], scale, zero_point, problem, args, **more)

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the library's codes."""
        return self.decoded(problem)[0]


@hookimpl
def qframe_rounders():
    return [CompressedTensors(), LLMCompressorGPTQ()]
