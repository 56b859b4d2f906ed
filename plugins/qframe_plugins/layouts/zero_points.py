"""What GPTQ's and AWQ's layouts have in common: codes from 0 on, and a zero point for every scale.

A symmetric layer is one whose zero points are all 2^(b-1), its codes moved by as much.

Some writers, auto-round among them, have scales of either sign, so that the largest weight of a
group may have the code that has no counterpart. s (c - z) is |s| (c' - z') with c' = 2^b - 1 - c
and z' = 2^b - 1 - z: such layers are read as ones with zero points.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from qframe import LayerOutline
from qframe.errors import WeightsError
from qframe.layouts import SCALE_NAMES, said_of_extras

if TYPE_CHECKING:
    import torch

    from qframe.stored import StoredLayer
    from qframe.weights import ModelFolder

SCALES = {SCALE_NAMES[name]: name for name in ("float16", "bfloat16", "float32")}
"""How safetensors names a dtype -> scale_dtype."""


def said_of_integers(
    layer: LayerOutline, bits: Collection[int], known: frozenset[str] = frozenset()
) -> list[str]:
    """Return why a layer is not integers of one of these bits, with scales of whole groups.

    known   extras that the layout has words for
    """
    scheme, columns = layer.scheme, layer.info.columns
    said = said_of_extras(layer, known)
    if layer.info.kind != "Linear":
        said.append(f"weights of {layer.info.kind} are not read by others; ignore these layers")
    if scheme.type != "int" or scheme.format is not None or scheme.num_bits not in bits:
        some = ", ".join(str(each) for each in sorted(bits))
        said.append(f"scheme {scheme.describe()!r}: it has integers with num_bits of {some}")
    elif scheme.scale_dtype not in SCALES.values():
        said.append(f"scales are {scheme.scale_dtype}; use scale_dtype: float16")
    if scheme.input_activations is not None:
        said.append(
            f"activations are {scheme.input_activations.describe()}; it quantizes weights alone: "
            f"leave input_activations away"
        )
    if scheme.strategy == "tensor":
        said.append("one scale for a whole tensor; use group_size: -1, one for each row")
    if scheme.group_size is not None and columns % scheme.group_size:
        said.append(
            f"group_size={scheme.group_size} does not divide the {columns} columns; use one that "
            f"does, or -1"
        )
    return said


def codes_and_zeros(layer: StoredLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [rows, columns] and zero points [rows, groups], both uint8 from 0 on."""
    import torch

    from qframe.packing import unpack_codes

    packed = layer.packed
    bits = packed.scheme.num_bits
    codes = unpack_codes(packed.words, bits, packed.columns)
    if packed.zero_point is not None:
        return codes, unpack_codes(packed.zero_point, bits, packed.scale.shape[1])
    half = 1 << bits - 1
    zeros = torch.full(packed.scale.shape, half, dtype=torch.uint8)
    return codes + (packed.grid.qmin + half), zeros


def own_codes(
    codes: torch.Tensor, zeros: torch.Tensor, layer: LayerOutline
) -> dict[str, torch.Tensor]:
    """Return codes and zero points as qframe stores them; arguments as `codes_and_zeros` has them.

    Raises WeightsError where they are not those of a symmetric layer that should be one.
    """
    from qframe.packing import pack_codes

    bits = layer.scheme.num_bits
    if not layer.scheme.symmetric:
        return {
            "weight_packed": pack_codes(codes, bits),
            "weight_zero_point": pack_codes(zeros, bits),
        }
    half = 1 << bits - 1
    others = zeros[zeros != half]
    if len(others):
        raise WeightsError(
            f"layer {layer.info.name!r}: a zero point is {int(others[0])}, and a symmetric layer "
            f"of {bits} bits has {half} alone; look at what config.json says of it"
        )
    moved = layer.grid.qmin + half
    if codes.numel() and int(codes.min()) < moved:
        raise WeightsError(
            f"layer {layer.info.name!r}: holds code {int(codes.min()) - half}, but the grid is "
            f"[{layer.grid.qmin}, {layer.grid.qmax}]"
        )
    return {"weight_packed": pack_codes(codes - moved, bits)}


def upright(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, zero points and scales that stand for the same weights, no scale negative.

    codes, zeros   as `codes_and_zeros` has them
    scales         [rows, groups], of any sign
    index          [columns], the group of each column
    """
    turned = scales < 0
    if not bool(turned.any()) or not _in_range(index, scales.shape[1]):
        return codes, zeros, scales
    most = (1 << bits) - 1
    codes = codes.where(~turned[:, index.long()], most - codes)
    return codes, zeros.where(~turned, most - zeros), scales.abs()


def has_negative_scales(source: ModelFolder, name: str) -> bool:
    """Return whether a layer has scales of either sign, for which its scales are read."""
    return bool((source.raw(f"{name}.scales") < 0).any())


def _in_range(index: torch.Tensor, groups: int) -> bool:
    return not index.numel() or 0 <= int(index.min()) <= int(index.max()) < groups


def stored_layers(source: ModelFolder) -> list[str]:
    """Return the names of layers that have packed codes, in the order of their names."""
    suffix = ".qweight"
    return [name.removesuffix(suffix) for name in source.tensors if name.endswith(suffix)]


def words_of(source: ModelFolder, name: str) -> tuple[tuple[int, int], str]:
    """Return the shape of a layer's packed codes, and its scale_dtype, from headers alone.

    Raises WeightsError when they are not words of 32 bits, or scales of no known dtype.
    """
    stored, scales = source.tensors[f"{name}.qweight"], source.tensors.get(f"{name}.scales")
    if scales is None:
        raise WeightsError(f"layer {name!r}: scales missing")
    if scales.dtype not in SCALES:
        raise WeightsError(
            f"layer {name!r}: scales of dtype {scales.dtype} (known: {', '.join(SCALES)})"
        )
    if stored.dtype != "I32" or len(stored.shape) != 2:
        raise WeightsError(
            f"layer {name!r}: qweight should be I32 with two axes, got {stored.dtype} "
            f"{list(stored.shape)}"
        )
    return (stored.shape[0], stored.shape[1]), SCALES[scales.dtype]
