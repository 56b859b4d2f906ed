"""Operations for GPUs: the code is in `cuda`, compiled at the first call.

Two backends run the same PTX: "cuda" on a GPU, and "ptx_host" on the CPU, by a device that executes
PTX. The second one is for looking at kernels, not for speed, so "auto" never takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qframe import OpCall, Unsupported, hookimpl
from qframe.kernels import ACTIVATIONS
from qframe_plugins.kernels import short

if TYPE_CHECKING:
    import torch

    from qframe import KVScheme
    from qframe_plugins.kernels.cuda.device import Launcher
    from qframe_plugins.kernels.cuda.int8_layout import Int8Weight
    from qframe_plugins.kernels.cuda.int8_outliers import Int8AndColumns
    from qframe_plugins.kernels.cuda.packed import PackedWeight

LONGEST = (2**31 - 1) // 127**2  # columns whose products of codes fit an int32


class CudaKernel:
    """What all of them have in common.

    on            where it runs; None: as the backend says
    device        where its operands are
    activations   the dtypes of activations that it reads
    """

    op: str
    activations: tuple[str, ...] = ("float32",)
    token_independent = True

    def __init__(self, backend: str = "cuda", on: Launcher | None = None) -> None:
        self.backend = backend
        self.device = "cpu" if backend == "ptx_host" else "cuda"
        self.by_name_only = backend == "ptx_host"
        self.priority = 20 if backend == "cuda" else 0
        self._on = on

    @property
    def on(self) -> Any:
        """What launches it, a `Launcher`."""
        if self._on is None:
            devices = _gpu("device")
            self._on = devices.PtxHost() if self.backend == "ptx_host" else devices.Gpu()
        return self._on

    @property
    def targets(self) -> dict[str, CudaKernel]:
        """On the CPU, the kernel for each architecture that is tested."""
        if self.backend != "ptx_host":
            return {}
        archs = _gpu("compile").ARCHS
        return {arch: type(self)(self.backend, replace(self.on, arch=arch)) for arch in archs}

    @property
    def variants(self) -> dict[str, CudaKernel]:
        """On the CPU, the kernel in other orders of threads, and for another architecture.

        The architectures are compared in a ring, so a row for each compares all of them.
        """
        if self.backend != "ptx_host":
            return {}
        archs = _gpu("compile").ARCHS
        own = archs.index(self.on.arch) if self.on.arch in archs else -1
        others = {
            "reverse": replace(self.on, order="reverse"),
            "random": replace(self.on, order="random", seed=1),
            archs[(own + 1) % len(archs)]: replace(self.on, arch=archs[(own + 1) % len(archs)]),
        }
        return {name: type(self)(self.backend, on) for name, on in others.items()}

    @property
    def made_by(self) -> str:
        """Python that makes it."""
        name, on = type(self).__name__, ", None"
        lines = [f"from qframe_plugins.kernels.cuda_ops import {name}"]
        if self.backend == "ptx_host":
            lines.append("from qframe_plugins.kernels.cuda.device import PtxHost")
            on = f", {replace(self.on, runs=None)!r}"
        return "\n".join([*lines, "", f"plugin = {name}({self.backend!r}{on})", ""])

    def supports(self, call: OpCall) -> Unsupported | None:
        """Serve activations that it reads, and codes that are integers, where kernels compile."""
        if call.op != self.op:
            return Unsupported(f"this kernel computes {self.op}, not {call.op}")
        if call.device.partition(":")[0] != self.device:
            return Unsupported(f"{self.backend} computes on {self.device}, not on {call.device}")
        absent = self.absent()
        if absent is not None:
            return absent
        other = short.objection(call, self.activations)
        if other is not None:
            return other
        if getattr(call.scheme, "type", "int") != "int":
            return Unsupported("codes of floats stand for values; dequantize the weight first")
        return self.objection(call)

    def absent(self) -> Unsupported | None:
        """Return why kernels cannot run on this machine at all, or None."""
        return _absent(self.backend)

    def objection(self, call: OpCall) -> Unsupported | None:
        """Return what else stands against the call."""
        return None


class QuantizeActivations(CudaKernel):
    """Codes of tokens; the bits are those of a division."""

    op = "quantize_activations"
    activations = ACTIVATIONS

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (codes int8 [tokens, columns], scale float32 [tokens])."""
        made: tuple[torch.Tensor, torch.Tensor] = _gpu("tokens").quantize(self.on, x)
        return made


class Dequantize(CudaKernel):
    """What codes stand for."""

    op = "dequantize"

    def __call__(self, *operands: torch.Tensor) -> torch.Tensor:
        """Return the weight, [rows, columns] float32."""
        made: torch.Tensor = _gpu("dequantize").dequantize(self.on, *operands)
        return made


class Hadamard(CudaKernel):
    """Randomized Hadamard transforms, by butterflies."""

    op = "hadamard"
    activations = ACTIVATIONS

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse blocks that are no powers of two, do not divide the columns, or do not fit."""
        _, columns, block = call.shape
        if block < 1 or block & (block - 1):
            return Unsupported(f"block={block} is not a power of two")
        if columns % block:
            return Unsupported(f"block={block} does not divide columns={columns}")
        if block > LARGEST_BLOCK:
            return Unsupported(f"block={block}: shared memory holds up to {LARGEST_BLOCK} columns")
        return None

    def __call__(self, x: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
        """Return x diag(signs) H / sqrt(block), [tokens, columns] float32."""
        made: torch.Tensor = _gpu("hadamard").hadamard(self.on, x, signs, block)
        return made


class Int8Kernel(CudaKernel):
    """Products of codes with a weight that was laid out."""

    activations = ACTIVATIONS  # `from_activations`

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse rows so long that a sum may not fit."""
        return _too_long(call.shape[1])

    def __call__(
        self, x_codes: torch.Tensor, x_scale: torch.Tensor, weight: Int8Weight
    ) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        made: torch.Tensor = _gpu("int8_products").multiply(self.on, x_codes, x_scale, weight)
        return made

    def from_activations(self, x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
        """Return x W^T of activations [tokens, columns], of which codes are made."""
        codes, scale = _gpu("tokens").quantize(self.on, x)
        dtype = _gpu("short_floats").dtype_of(x)
        made: torch.Tensor
        made = _gpu("int8_products").multiply(self.on, codes, scale, weight, dtype)
        return made


class LinearInt8(Int8Kernel):
    """Products of codes; the sums are exact."""

    op = "linear_int8"

    def prepare(self, w_codes: torch.Tensor, w_scale: torch.Tensor) -> Int8Weight:
        """Return the weight in whole steps."""
        laid: Int8Weight = _gpu("int8_layout").lay_out_channels(w_codes, w_scale)
        return laid


class LinearInt8Groups(Int8Kernel):
    """Products of codes with a weight in groups; the sums of groups are exact."""

    op = "linear_int8_groups"

    def prepare(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_index: torch.Tensor,
    ) -> Int8Weight:
        """Return the weight group after group."""
        laid: Int8Weight = _gpu("int8_layout").lay_out(codes, scale, zero_point, group_index)
        return laid


class LinearInt8Outliers(CudaKernel):
    """LLM.int8()."""

    op = "linear_int8_outliers"
    token_independent = False  # an outlier of one token is one of all

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse rows so long that a sum may not fit."""
        return _too_long(call.shape[1])

    def prepare(
        self, w_codes: torch.Tensor, w_scale: torch.Tensor, weight: torch.Tensor
    ) -> Int8AndColumns:
        """Return the weight in whole steps, and transposed."""
        both: Int8AndColumns = _gpu("int8_outliers").lay_out_both(w_codes, w_scale, weight)
        return both

    def __call__(self, x: torch.Tensor, threshold: float, weight: Int8AndColumns) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        made: torch.Tensor = _gpu("int8_outliers").multiply(self.on, x, threshold, weight)
        return made


class HessianUpdate(CudaKernel):
    """Second moments; runs of tokens are summed in float32, and the runs in float64."""

    op = "hessian_update"
    activations = ACTIVATIONS
    token_independent = False  # it has no answer for a token

    def depth(self, operands: Mapping[str, Any]) -> int:
        """Return how many roundings to float32 a product passes at most."""
        return min(len(operands["x"]), int(_gpu("hessian").RUN))

    def __call__(self, hessian: torch.Tensor, x: torch.Tensor) -> None:
        """Add x^T x to the lower triangle."""
        _gpu("hessian").accumulate(self.on, hessian, x)


class LinearWeightOnly(CudaKernel):
    """Products of float32 activations with a weight in codes."""

    op = "linear_weight_only"
    activations = ACTIVATIONS
    token_independent = False  # many tokens are added up in another order than few

    def prepare(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_index: torch.Tensor,
    ) -> PackedWeight:
        """Return the weight group after group."""
        packed: PackedWeight = _gpu("packed").pack(codes, scale, zero_point, group_index)
        return packed

    def depth(self, operands: Mapping[str, Any]) -> int:
        """Return how many roundings of the sums a product passes at most."""
        made: int = _gpu("weight_only").depth(len(operands["x"]), operands["group_index"])
        return made

    def __call__(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Return x W^T, [tokens, rows] float32."""
        made: torch.Tensor = _gpu("weight_only").multiply(self.on, x, weight)
        return made


class AttentionKV(CudaKernel):
    """Attention over a cache in codes."""

    op = "attention_kv"

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
        keys = k_words, k_scale, k_offset, k_scheme
        values = v_words, v_scale, v_offset, v_scheme
        made: tuple[torch.Tensor, torch.Tensor]
        made = _gpu("attention").attend(self.on, q, keys, values, tokens)
        return made


class RMSNorm(CudaKernel):
    """Norms of tokens."""

    op = "rms_norm"
    activations = ACTIVATIONS

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return weight x / sqrt(mean(x^2) + eps), [tokens, columns] float32."""
        made: torch.Tensor = _gpu("rms_norm").rms_norm(self.on, x, weight, eps)
        return made


class AttentionRotary(CudaKernel):
    """Attention of the newest token, its position turned in."""

    op = "attention_rotary"

    def objection(self, call: OpCall) -> Unsupported | None:
        """Refuse heads that are no pairs of numbers."""
        width = call.shape[-1]
        return Unsupported(f"head_dim={width} is no number of pairs") if width % 2 else None

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
        made: tuple[torch.Tensor, torch.Tensor]
        parts = (q, k, v), (cos, sin), (keys, values)
        made = _gpu("attention_rotary").attend(self.on, *parts, scaling)
        return made


LARGEST_BLOCK = 8192  # columns that are transformed in shared memory
KERNELS: tuple[type[CudaKernel], ...] = (
    QuantizeActivations,
    Dequantize,
    Hadamard,
    LinearInt8,
    LinearInt8Groups,
    LinearInt8Outliers,
    LinearWeightOnly,
    RMSNorm,
    AttentionKV,
    AttentionRotary,
    HessianUpdate,
)


def _too_long(columns: int) -> Unsupported | None:
    if columns > LONGEST:
        return Unsupported(f"an int32 holds the sums of up to {LONGEST} columns")
    return None


@cache
def _gpu(name: str) -> Any:
    """Return a module of `cuda`, which imports numba.cuda."""
    return import_module(f"qframe_plugins.kernels.cuda.{name}")


@cache
def _absent(backend: str) -> Unsupported | None:
    """Return what this machine lacks, looked up once."""
    package = _gpu("compile").missing()
    if package is not None:
        return Unsupported(f'{package} is not installed; run: pip install "qframe[cuda]"')
    if backend == "cuda":
        import torch

        if not torch.cuda.is_available():
            return Unsupported("PyTorch finds no CUDA device")
        if torch.cuda.get_device_capability() < (8, 0):
            return Unsupported("kernels need a GPU of compute capability 8.0 or above")
    return None


def kernels_on(on: Launcher) -> list[CudaKernel]:
    """Return a kernel for each operation that is launched by `on`, such as PtxHost("sm_80")."""
    backend = "cuda" if on.device == "cuda" else "ptx_host"
    return [kernel(backend, on) for kernel in KERNELS]


@hookimpl
def qframe_kernels() -> Iterable[Any]:
    """Register one kernel for each operation and backend."""
    return [kernel(backend) for backend in ("cuda", "ptx_host") for kernel in KERNELS]
