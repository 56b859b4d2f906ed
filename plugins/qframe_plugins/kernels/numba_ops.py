"""Operations in numba, on the CPU: the code is in `numba_cpu`, loaded at the first call."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qframe import OpCall, Unsupported, hookimpl
from qframe_plugins.kernels.short import ThroughFloat32, objection, through_float32

if TYPE_CHECKING:
    import torch

    from qframe import KVScheme
    from qframe_plugins.kernels.numba_cpu.int8_outliers import Int8AndColumns
    from qframe_plugins.kernels.numba_cpu.packed import PackedPanels

LONGEST = (2**31 - 1) // 127**2  # columns whose products of codes fit an int32


class NumbaKernel(ThroughFloat32):
    """What all of them have in common."""

    op: str
    backend = "numba"
    priority = 10  # on the CPU it is the fastest
    token_independent = True

    def supports(self, call: OpCall) -> Unsupported | None:
        """Serve activations of 32 and 16 bits and codes that are integers, on the CPU."""
        if call.op != self.op:
            return Unsupported(f"this kernel computes {self.op}, not {call.op}")
        if call.device != "cpu":
            return Unsupported(f"numba computes on the CPU, not on {call.device}")
        other = objection(call, self.activations)
        if other is not None:
            return other
        if getattr(call.scheme, "type", "int") != "int":
            return Unsupported("codes of floats stand for values; dequantize the weight first")
        return self.objection(call)

    def objection(self, call: OpCall) -> Unsupported | None:
        """Return what else stands against the call."""
        return None


class QuantizeActivations(NumbaKernel):
    """Codes of tokens; the bits are those of a division."""

    op = "quantize_activations"

    @through_float32
    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (codes int8 [tokens, columns], scale float32 [tokens])."""
        codes, scale = _cpu("tokens").quantize(x.numpy())
        return _tensor(codes), _tensor(scale)


class Dequantize(NumbaKernel):
    """What codes stand for."""

    op = "dequantize"

    def __call__(self, *operands: torch.Tensor) -> torch.Tensor:
        """Return the weight, [rows, columns] float32."""
        return _tensor(_cpu("dequantize").dequantize(*(part.numpy() for part in operands)))


class Hadamard(NumbaKernel):
    """Randomized Hadamard transforms, by butterflies."""

    op = "hadamard"

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse blocks that are no powers of two, or do not divide the columns."""
        _, columns, block = call.shape
        if block < 1 or block & (block - 1):
            return Unsupported(f"block={block} is not a power of two")
        if columns % block:
            return Unsupported(f"block={block} does not divide columns={columns}")
        return None

    @through_float32
    def __call__(self, x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
        """Return x diag(signs) H / sqrt(block), [tokens, columns] float32."""
        return _tensor(_cpu("hadamard").hadamard(x.numpy(), signs.numpy(), block))


class RMSNorm(NumbaKernel):
    """Norms of tokens."""

    op = "rms_norm"

    @through_float32
    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return weight x / sqrt(mean(x^2) + eps), [tokens, columns] float32."""
        return _tensor(_cpu("rms_norm").rms_norm(x.numpy(), weight.numpy(), eps))


class LinearWeightOnly(NumbaKernel):
    """Products of float32 activations with a weight in codes."""

    op = "linear_weight_only"

    def prepare(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_index: torch.Tensor,
    ) -> PackedPanels:
        """Return the weight in panels."""
        return _packed(codes, scale, zero_point, group_index)

    @through_float32
    def __call__(self, x: torch.Tensor, weight: PackedPanels) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        return _tensor(_cpu("weight_only").multiply(x.numpy(), weight))


class LinearInt8(NumbaKernel):
    """Products of codes; the sums are exact."""

    op = "linear_int8"

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse rows so long that a sum may not fit."""
        return _too_long(call.shape[1])

    def prepare(self, w_codes: torch.Tensor, w_scale: torch.Tensor) -> PackedPanels:
        """Return the weight in panels."""
        packed: PackedPanels = _cpu("packed").pack_channels(w_codes.numpy(), w_scale.numpy())
        return packed

    def __call__(
        self, x_codes: torch.Tensor, x_scale: torch.Tensor, weight: PackedPanels
    ) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        made = _cpu("int8_products").multiply(x_codes.numpy(), x_scale.numpy(), weight)
        return _tensor(made)

    @through_float32
    def from_activations(self, x: torch.Tensor, weight: PackedPanels) -> torch.Tensor:
        """Return x W^T of activations [tokens, columns] float32, of which codes are made."""
        return _tensor(_cpu("int8_products").multiply_activations(x.numpy(), weight))


class LinearInt8Groups(NumbaKernel):
    """Products of codes with a weight in groups; the sums of groups are exact."""

    op = "linear_int8_groups"

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse rows so long that a sum may not fit."""
        return _too_long(2 * call.shape[1])  # |c - z| is at most 255

    def prepare(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_index: torch.Tensor,
    ) -> PackedPanels:
        """Return the weight in panels."""
        return _packed(codes, scale, zero_point, group_index)

    def __call__(
        self, x_codes: torch.Tensor, x_scale: torch.Tensor, weight: PackedPanels
    ) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        made = _cpu("int8_products").multiply(x_codes.numpy(), x_scale.numpy(), weight)
        return _tensor(made)

    @through_float32
    def from_activations(self, x: torch.Tensor, weight: PackedPanels) -> torch.Tensor:
        """Return x W^T of activations [tokens, columns] float32, of which codes are made."""
        return _tensor(_cpu("int8_products").multiply_activations(x.numpy(), weight))


class LinearInt8Outliers(NumbaKernel):
    """LLM.int8()."""

    op = "linear_int8_outliers"
    token_independent = False  # an outlier of one token is one of all

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse rows so long that a sum may not fit."""
        return _too_long(call.shape[1])

    def prepare(
        self, w_codes: torch.Tensor, w_scale: torch.Tensor, weight: torch.Tensor
    ) -> Int8AndColumns:
        """Return the weight in panels, and transposed."""
        parts = w_codes.numpy(), w_scale.numpy(), weight.numpy()
        both: Int8AndColumns = _cpu("int8_outliers").lay_out_both(*parts)
        return both

    @through_float32
    def __call__(self, x: torch.Tensor, threshold: float, weight: Int8AndColumns) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        return _tensor(_cpu("int8_outliers").multiply(x.numpy(), threshold, weight))


class AttentionKV(NumbaKernel):
    """Attention over a cache in codes."""

    op = "attention_kv"

    @through_float32
    def __call__(
        self,
        q: torch.Tensor,
        k_words: torch.Tensor,
        k_scale: torch.Tensor,
        k_offset: torch.Tensor,
        k_scheme: KVScheme,
        v_words: torch.Tensor,
        v_scale: torch.Tensor,
        v_offset: torch.Tensor,
        v_scheme: KVScheme,
        tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return softmax(z) V and log sum exp z: [batch, heads, head_dim] and [batch, heads]."""
        keys = (k_words.numpy(), k_scale.numpy(), k_offset.numpy(), k_scheme)
        values = (v_words.numpy(), v_scale.numpy(), v_offset.numpy(), v_scheme)
        out, lse = _cpu("attention").attend(q.numpy(), keys, values, tokens)
        return _tensor(out), _tensor(lse)


class AttentionRotary(NumbaKernel):
    """Attention of the newest token, its position turned in."""

    op = "attention_rotary"

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse heads that are no pairs of numbers."""
        width = call.shape[-1]
        return Unsupported(f"head_dim={width} is no number of pairs") if width % 2 else None

    @through_float32
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the output [batch, heads, head_dim], the key, turned, like k), float32."""
        parts = (each.numpy() for each in (q, k, v, cos, sin, keys, values))
        out, turned = _cpu("attention_rotary").attend(*parts, scaling)
        return _tensor(out), _tensor(turned)


class HessianUpdate(NumbaKernel):
    """Second moments; runs of tokens are summed in float32, and the runs in float64."""

    op = "hessian_update"
    token_independent = False  # it has no answer for a token

    @through_float32
    def __call__(self, hessian: torch.Tensor, x: torch.Tensor) -> None:
        """Add x^T x to the lower triangle."""
        _cpu("hessian").accumulate(hessian.numpy(), x.numpy())


@cache
def _cpu(name: str) -> Any:
    """Return a module of `numba_cpu`, looked up once: a call takes microseconds."""
    return import_module(f"qframe_plugins.kernels.numba_cpu.{name}")


def _tensor(array: Any) -> torch.Tensor:
    """Return an array as a tensor of the same memory."""
    import torch

    return torch.from_numpy(array)


def _packed(*parts: torch.Tensor) -> PackedPanels:
    packed: PackedPanels = _cpu("packed").pack(*(part.numpy() for part in parts))
    return packed


def _too_long(columns: int) -> Unsupported | None:
    if columns > LONGEST:
        return Unsupported(f"an int32 holds the sums of up to {LONGEST} columns")
    return None


@hookimpl
def qframe_kernels() -> Iterable[Any]:
    """Register one kernel for each operation."""
    return [
        Dequantize(),
        LinearWeightOnly(),
        QuantizeActivations(),
        LinearInt8(),
        LinearInt8Groups(),
        LinearInt8Outliers(),
        Hadamard(),
        RMSNorm(),
        AttentionKV(),
        AttentionRotary(),
        HessianUpdate(),
    ]
