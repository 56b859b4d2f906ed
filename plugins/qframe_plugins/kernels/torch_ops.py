"""Every operation in PyTorch: slow or not, it works on any shape and any device of PyTorch.

PyTorch's own kernels are called where they are right; docs/kernels.md says which are.
What is here runs where nothing faster does, and is what faster kernels are compared with.

Sources: LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv:2208.07339); the fast Walsh-Hadamard
transform by butterflies, as in QuaRot (Ashkboos et al., NeurIPS 2024, arXiv:2404.00456).
Error:   sums in float32, by whatever order the BLAS has (docs/bounds.md, B9.b); sums of eight-bit
products without error (B5.b); the transform by butterflies (B8.a).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qframe import OpCall, Unsupported, hookimpl
from qframe_plugins.kernels.short import ThroughFloat32, objection, through_float32

if TYPE_CHECKING:
    import torch

    from qframe import KVScheme
    from qframe_plugins.kernels.torch_native.groups import Blocks, Steps

_CHUNK = 1 << 17  # weights that are dequantized at a time: 512 KiB, which stays in the cache
_RUN = 256  # tokens of second moments that are summed in float32


class TorchKernel(ThroughFloat32):
    """One operation in PyTorch."""

    backend = "torch"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.op = function.__name__
        self.function = function

    def supports(self, call: OpCall) -> Unsupported | None:
        """Serve all schemes of integers, on the CPU and on CUDA devices that PyTorch has."""
        import torch

        if call.op != self.op:
            return Unsupported(f"this kernel computes {self.op}, not {call.op}")
        other = objection(call, self.activations)
        if other is not None:
            return other
        if getattr(call.scheme, "type", "int") != "int":
            return Unsupported("codes of floats stand for values; dequantize the weight first")
        kind = call.device.partition(":")[0]
        if kind == "cuda" and not torch.cuda.is_available():
            return Unsupported("PyTorch finds no CUDA device")
        if kind not in ("cpu", "cuda"):
            return Unsupported(f"device {call.device!r} is neither cpu nor cuda")
        if self.op == "hadamard":
            return _block_objection(*call.shape[1:])
        if self.op == "attention_rotary" and call.shape[-1] % 2:
            return Unsupported(f"head_dim={call.shape[-1]} is no number of pairs")
        return None

    @through_float32
    def __call__(self, *operands: Any) -> Any:
        """Compute; see `qframe.kernels.OPS`."""
        return self.function(*operands)


@cache
def _native(name: str) -> Any:
    """Return a module of `torch_native`, which imports torch."""
    return import_module(f"qframe_plugins.kernels.torch_native.{name}")


def _block_objection(columns: int, block: int) -> Unsupported | None:
    if block < 1 or block & (block - 1):
        return Unsupported(f"block={block} is not a power of two")
    if columns % block:
        return Unsupported(f"block={block} does not divide columns={columns}")
    return None


# Norms ----------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight x / sqrt(mean(x^2) + eps), token by token, [tokens, columns] float32."""
    from torch.nn import functional

    return functional.rms_norm(x, weight.shape, weight, eps)


# Weights --------------------------------------------------------------------------------------


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_index: torch.Tensor
) -> torch.Tensor:
    """Return scale * (code - zero_point), [rows, columns] float32."""
    import torch

    index = group_index.long()
    steps = codes.to(torch.int32) - zero_point.to(torch.int32).index_select(1, index)
    return steps * scale.index_select(1, index)


class LinearWeightOnly(TorchKernel):
    """x W^T; only a chunk of W exists at a time."""

    def __init__(self) -> None:
        super().__init__(linear_weight_only)

    def prepare(self, *weight: torch.Tensor) -> Steps:
        """Return the weight group after group."""
        return _native("groups").lay_out(*weight)  # type: ignore[no-any-return]


def linear_weight_only(x: torch.Tensor, weight: Steps) -> torch.Tensor:
    """Return x W^T, [tokens, rows] float32."""
    return _native("groups").multiply_floats(x, weight, _CHUNK)  # type: ignore[no-any-return]


# Eight bits -----------------------------------------------------------------------------------


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes int8 [tokens, columns], scale float32 [tokens]); scale is absmax / 127."""
    import torch

    absmax = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    smallest = 2.0**-149  # a token that is not zero must not vanish
    scale = torch.where(absmax == 0, 1, torch.clamp(absmax / 127, min=smallest))
    codes = torch.round(x / scale[:, None]).clamp(-127, 127)
    return torch.nan_to_num(codes).to(torch.int8), scale


def linear_int8(
    x_codes: torch.Tensor, x_scale: torch.Tensor, w_codes: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    """Return s_x s_w sum of products of codes, [tokens, rows] float32."""
    import torch

    codes = _native("codes")
    product = codes.integer_product(x_codes, w_codes, codes.INT8).to(torch.float32)
    return product * x_scale[:, None] * w_scale  # type: ignore[no-any-return]


class LinearInt8Groups(TorchKernel):
    """Products of codes with a weight in groups; the sums of groups are exact."""

    def __init__(self) -> None:
        super().__init__(linear_int8_groups)

    def prepare(self, *weight: torch.Tensor) -> Blocks:
        """Return the weight group by group."""
        return _native("groups").lay_out(*weight).blocks()  # type: ignore[no-any-return]


def linear_int8_groups(
    x_codes: torch.Tensor, x_scale: torch.Tensor, weight: Blocks
) -> torch.Tensor:
    """Return s_x times the sum over groups of s_g a_g, [tokens, rows] float32."""
    return _native("groups").multiply_codes(x_codes, x_scale, weight)  # type: ignore[no-any-return]


def linear_int8_outliers(
    x: torch.Tensor,
    threshold: float,
    w_codes: torch.Tensor,
    w_scale: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return LLM.int8(): columns with any |x| >= threshold as they are, the others in 8 bits."""
    if threshold <= 0:
        return linear_int8(*quantize_activations(x), w_codes, w_scale)
    outlier = (x.abs() >= threshold).any(0)
    codes, scale = quantize_activations(x.masked_fill(outlier, 0))
    return linear_int8(codes, scale, w_codes, w_scale) + x[:, outlier] @ weight[:, outlier].T


# Rotation, attention, statistics --------------------------------------------------------------


def hadamard(x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Return x diag(signs) H / sqrt(block), each block of columns on its own."""
    from qframe import Rotation

    return Rotation(signs.reshape(-1, block)).apply(x)


def attention_kv(
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
    """Return softmax(z) V and log sum exp z: [batch, heads, head_dim], [batch, heads] float32."""
    keys, values = (k_words, k_scale, k_offset, k_scheme), (v_words, v_scale, v_offset, v_scheme)
    return _native("attention").attend(q, keys, values, tokens)  # type: ignore[no-any-return]


def attention_rotary(
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
    return _native("attention").attend_newest(q, k, v, cos, sin, keys, values, scaling)  # type: ignore[no-any-return]


def hessian_update(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x on and below the diagonal: runs of tokens in float32, their sums in float64."""
    for first in range(0, len(x), _RUN):
        run = x[first : first + _RUN]
        hessian += (run.T @ run).double().tril()


@hookimpl
def qframe_kernels() -> Iterable[TorchKernel]:
    """Register all of them."""
    plain = (
        dequantize,
        quantize_activations,
        linear_int8,
        linear_int8_outliers,
        hadamard,
        rms_norm,
        attention_kv,
        attention_rotary,
        hessian_update,
    )
    return [LinearWeightOnly(), LinearInt8Groups(), *(TorchKernel(each) for each in plain)]
