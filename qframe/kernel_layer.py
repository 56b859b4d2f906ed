"""A quantized layer that computes with kernels instead of dequantized weights.

What it computes is what `StoredLayer.multiply` does, with the roundings of the kernels: both keep
the same bounds. Codes and scales are laid out once, when the layer is made; what is stored stays as
it is, so that the layer can be saved, moved and verified like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qframe.contracts import Kernel, OpCall, QuantizedWeight
from qframe.dispatch import Dispatch
from qframe.errors import UnsupportedError
from qframe.kernels import short_dtypes
from qframe.model import replace_module
from qframe.scheme import ActivationScheme, Scheme
from qframe.stored import QuantizedLinear, StoredLayer

_INT8 = 127  # the largest code of activations


class KernelLinear(QuantizedLinear):
    """A quantized linear layer that runs on kernels.

    kernels   the names, operation/backend, of those that it calls

    What kernels laid out is kept beside what is stored, and counts as memory of the layer.
    """

    kernels: tuple[str, ...]

    def __init__(
        self, stored: StoredLayer, dispatch: Dispatch, bias: torch.Tensor | None = None
    ) -> None:
        """Raises UnsupportedError where no kernel serves the layer."""
        super().__init__(stored, bias)
        plan = _plan(stored, dispatch)
        self.kernels, self._product, self._prepared = plan.names, plan.product, plan.layouts
        # Where anything is added afterwards, sums of 32 bits are rounded once, at the end.
        alone = stored.transform is None and bias is None
        self._short = plan.short if alone else frozenset[torch.dtype]()
        self._kept = None if stored.kept is None else stored.kept.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x [..., columns], in the dtype of x."""
        if x.dtype in self._short:
            return self._product(x.reshape(-1, self.in_features)).view(
                *x.shape[:-1], self.out_features
            )
        transform = self._layout.transform
        z = x if x.dtype == torch.float32 else x.to(torch.float32)
        if transform is not None:
            z = transform.move(z)
        z = z.reshape(-1, self.in_features)
        if transform is None or transform.kept is None or self._kept is None:
            y = self._product(z)
        else:
            y = self._product(transform.rest(z)) + z[:, transform.kept] @ self._kept.T
        bias = self._buffers["bias"]  # which is found sooner than an attribute
        if bias is not None:
            y = y + bias
        y = y.view(*x.shape[:-1], self.out_features)
        return y if x.dtype == y.dtype else y.to(x.dtype)


@dataclass(frozen=True)
class _Plan:
    """How a layer is computed.

    names     of the kernels
    product   what they make of z [tokens, columns]
    layouts   of the constants
    short     dtypes of 16 bits that z may have; y has the same
    """

    names: tuple[str, ...]
    product: Callable[[torch.Tensor], torch.Tensor]
    layouts: tuple[Any, ...]
    short: frozenset[torch.dtype] = frozenset()


def _plan(stored: StoredLayer, dispatch: Dispatch) -> _Plan:
    scheme, inputs = stored.packed.scheme, stored.inputs
    weight = stored.packed.unpack()
    rows, columns = weight.codes.shape
    if scheme.type != "int":
        raise UnsupportedError(f"weights {scheme.describe()} are no integers: no kernel takes them")

    def call_of(op: str, *shape: int) -> OpCall:
        return OpCall(op=op, device="cpu", dtype="float32", scheme=scheme, shape=shape)

    def chosen(op: str, *shape: int) -> Kernel:
        return dispatch.choose(call_of(op, *shape))

    def short(kernel: Kernel, *shape: int) -> frozenset[torch.dtype]:
        taken = short_dtypes(kernel, call_of(kernel.op, *shape))
        return frozenset(getattr(torch, dtype) for dtype in taken)

    if inputs is None:
        kernel = chosen("linear_weight_only", 1, columns, rows)
        prepared = _prepared(kernel, _parts(weight))
        shorts = short(kernel, 1, columns, rows)
        return _Plan((_name(kernel),), lambda z: _called(kernel, (z,), prepared), prepared, shorts)
    if not _int8_tokens(inputs.scheme):
        raise UnsupportedError(f"no kernel takes inputs {inputs.scheme.describe()}")
    plain = _per_channel(weight, scheme)
    threshold = None if stored.transform is None else stored.transform.threshold
    if threshold:
        if plain is None:
            raise UnsupportedError(
                "linear_int8_outliers takes symmetric weights of 8 bits, one scale per channel, "
                f"not {scheme.describe()}"
            )
        mixed = chosen("linear_int8_outliers", 1, columns, rows)
        values = _prepared(mixed, (*plain, stored.packed.dequantize()))
        return _Plan((_name(mixed),), lambda z: _called(mixed, (z, threshold), values), values)
    first = chosen("quantize_activations", 1, columns)
    op = "linear_int8_groups" if plain is None else "linear_int8"
    second = chosen(op, 1, columns, rows)
    laid = _prepared(second, _parts(weight) if plain is None else plain)
    at_once = getattr(second, "from_activations", None)
    if at_once is not None and first.backend == second.backend:
        names, shorts = (_name(first), _name(second)), short(second, 1, columns, rows)
        return _Plan(names, lambda z: at_once(z, *laid), laid, shorts)

    def product(z: torch.Tensor) -> torch.Tensor:
        return _called(second, first(z), laid)

    return _Plan((_name(first), _name(second)), product, laid)


def _name(kernel: Kernel) -> str:
    return f"{kernel.op}/{kernel.backend}"


def _parts(weight: QuantizedWeight) -> tuple[torch.Tensor, ...]:
    """Return the operands of a weight in groups, in the order of the operations."""
    index = weight.group_index.to(torch.int32)
    return weight.codes, weight.scale, weight.zero_point.to(torch.int16), index


def _per_channel(
    weight: QuantizedWeight, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (codes int8, scale [rows]) where `linear_int8` takes the weight, else None."""
    groups = weight.scale.shape[1]
    if scheme.num_bits != 8 or not scheme.symmetric or groups != 1:
        return None
    if bool((weight.codes < -_INT8).any()):
        return None
    scale = weight.scale[:, 0].expand(len(weight.codes))
    return weight.codes.to(torch.int8), scale.contiguous()


def _int8_tokens(scheme: ActivationScheme) -> bool:
    """Return whether activations are what `quantize_activations` makes of them."""
    return (
        scheme.type == "int"
        and scheme.num_bits == 8
        and scheme.dynamic
        and scheme.strategy == "token"
    )


def _prepared(kernel: Kernel, constants: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """Return what takes the place of the constants in every call."""
    prepare = getattr(kernel, "prepare", None)
    return constants if prepare is None else (prepare(*constants),)


def _called(kernel: Kernel, operands: tuple[Any, ...], constants: tuple[Any, ...]) -> torch.Tensor:
    y: torch.Tensor = kernel(*operands, *constants)
    return y


def without_kernels(network: nn.Module) -> dict[str, str]:
    """Return layer -> why no kernel computes it, of a network that was put on kernels."""
    found = {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}
    return {name: module.no_kernel for name, module in found.items() if module.no_kernel}


def on_kernels(network: nn.Module, dispatch: Dispatch) -> nn.Module:
    """Put kernels under every quantized layer of a network, changed in place, and return it.

    Layers that no kernel serves go on as they were: `without_kernels` says which, and why.
    """
    found = [(n, m) for n, m in network.named_modules() if type(m) is QuantizedLinear]
    for name, module in found:
        try:
            made = KernelLinear(module.stored, dispatch, module.bias)
        except UnsupportedError as error:
            module.no_kernel = str(error)
            continue
        network = replace_module(network, name, made)
    return network
