"""The layout of compressed-tensors, which transformers, vLLM and SGLang read.

Source: the format of the package compressed-tensors, 0.15 to 0.20, as its compressors read it. A
layer NAME is stored, by the `format` of its group of layers, as

pack-quantized        weight_packed, int32: codes + 2^(b-1), one stream of bits a row, lowest bit
                      first, as here; weight_shape, int64; weight_scale [rows, groups];
                      weight_zero_point, zero points + 2^(b-1), packed in the same way along rows
int-quantized         weight, int8: the codes; weight_scale; weight_zero_point, int8
float-quantized       weight, float8_e4m3fn; weight_scale. naive-quantized is the same without
                      quantized activations
mxfp8-quantized       the same with scales of groups of 32 as exponents, uint8
mxfp4-pack-quantized  weight_packed, uint8: two numbers of four bits, the first one in the low bits,
                      each a sign and the rank of its magnitude; weight_scale, exponents, uint8
nvfp4-pack-quantized  the same with scales float8_e4m3fn of groups of 16, which are divided by
                      weight_global_scale

and input_scale where activations have a stored scale. Codes of integers are signed, also with zero
points: those are moved by 2^(b-1) like the codes.

A scale of the input that nothing before a layer could divide by is stored as qframe_input_scale,
and the folder then says that it is qframe's; the same where groups have an index, which the format
had until 0.19: weight_g_idx.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qframe import Grid, LayerInfo, LayerOutline, Scheme, hookimpl
from qframe.errors import RecipeError, WeightsError
from qframe.layouts import SCALE_NAMES, objections_of, own_config, said_of_extras
from qframe.scheme import ActivationScheme
from qframe_plugins.layouts.reading import tensor_of

if TYPE_CHECKING:
    import torch

    from qframe.stored import StoredLayer
    from qframe.weights import ModelFolder

NAME = "compressed-tensors"
FP8, FP4 = "fp8_e4m3", "fp4_e2m1"
_NAMED = {  # here -> in qframe's own layout
    "qframe_input_scale": "input_scale",
    "weight_g_idx": "weight_g_idx",
    "input_scale": "input_step",
}
_CODES = {"pack-quantized", "int-quantized"}
_EIGHT_BIT_FLOATS = {"float-quantized", "naive-quantized", "mxfp8-quantized"}
_FOUR_BIT_FLOATS = {"mxfp4-pack-quantized", "nvfp4-pack-quantized"}
_FORMATS = _CODES | _EIGHT_BIT_FLOATS | _FOUR_BIT_FLOATS
_SCALES = {there: name for name, there in SCALE_NAMES.items()}  # dtype in a file -> scale_dtype


class CompressedTensors:
    """Folders that transformers with compressed-tensors, vLLM and SGLang load."""

    name: str = NAME
    readers: str = "transformers with compressed-tensors, vLLM, SGLang"
    parts: tuple[str, ...] = (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_global_scale",
        *_NAMED,
    )
    names_left: frozenset[str] = frozenset({"ignore"})

    def objections(self, layers: Sequence[LayerOutline]) -> list[str]:
        """Return what the format has no words for; see `format_of`."""
        return objections_of(layers, _objections)

    def shapes(self, layer: LayerOutline) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of all that `pack` returns."""
        info, scheme = layer.info, layer.scheme
        rows, columns, bits = info.rows, info.columns, scheme.num_bits
        scales = scheme.scale_shape(rows, columns)
        whole, kind = scheme.strategy == "tensor", format_of(scheme)
        stored = (1,) if whole else scales
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_scale": (SCALE_NAMES[scheme.scale_dtype], stored)
        }
        if kind == "pack-quantized":
            found["weight_packed"] = "I32", (rows, -(-columns * bits // 32))
            found["weight_shape"] = "I64", (2,)
        elif kind in _FOUR_BIT_FLOATS:
            found["weight_packed"] = "U8", (rows, columns // 2)
        else:
            found["weight"] = "I8" if kind == "int-quantized" else "F8_E4M3", (rows, columns)
        if not scheme.symmetric:
            plain = whole or kind == "int-quantized"
            packed = (-(-rows * bits // 32), scales[1])
            found["weight_zero_point"] = ("I8", stored) if plain else ("I32", packed)
        if scheme.two_level:
            found["weight_global_scale"] = "F32", (1,)
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            found["input_scale"] = "F32", (1,)
        for extra, part in (("scale", "qframe_input_scale"), ("group index", "weight_g_idx")):
            if extra in layer.extras:
                found[part] = "F32" if extra == "scale" else "I32", (columns,)
        return found

    def pack(self, layer: StoredLayer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer."""
        import torch

        from qframe.packing import unpack_codes

        packed = layer.packed
        scheme, grid = packed.scheme, packed.grid
        own = layer.tensors()
        found = {there: own[part] for there, part in _NAMED.items() if part in own}
        scale = packed.scale.flatten() if scheme.strategy == "tensor" else packed.scale
        found["weight_scale"] = scale
        kind = format_of(scheme)
        if kind in _CODES:
            return found | _integers(layer, kind)
        codes = unpack_codes(packed.words, scheme.num_bits, packed.columns)
        if kind in _EIGHT_BIT_FLOATS:
            values = _float_bits(grid)[codes.long()]
            return found | {"weight": values.view(torch.float8_e4m3fn)}
        nibbles = _float_bits(grid)[codes.long()]
        found["weight_packed"] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        if packed.global_scale is not None:
            found["weight_global_scale"] = 1 / packed.global_scale
        return found

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerOutline) -> StoredLayer:
        """Return the layer that `pack` packed, or that another writer of the format did."""
        import torch

        from qframe.stored import StoredLayer

        scheme, name = layer.scheme, layer.info.name
        kind = format_of(scheme)
        own = {part: tensors[there] for there, part in _NAMED.items() if there in tensors}
        scales = scheme.scale_shape(layer.info.rows, layer.info.columns)
        own["weight_scale"] = _reshaped(tensor_of(tensors, "weight_scale", name), scales, name)
        if "input_step" in own:
            own["input_step"] = _reshaped(own["input_step"].float(), (1,), name)
        if kind in _CODES:
            own |= _own_integers(tensors, layer, kind)
        elif kind in _EIGHT_BIT_FLOATS:
            weight = tensor_of(tensors, "weight", name, torch.float8_e4m3fn)
            own["weight_packed"] = _own_floats(weight.view(torch.uint8), layer)
        else:
            pairs = tensor_of(tensors, "weight_packed", name, torch.uint8)
            nibbles = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
            own["weight_packed"] = _own_floats(nibbles, layer)
            if scheme.two_level:
                own["weight_global_scale"] = 1 / tensor_of(tensors, "weight_global_scale", name)
        return StoredLayer.of_outline(own, layer)

    def config(self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]) -> dict[str, Any]:
        """Return the groups of layers that are stored alike."""
        if any(layer.extras for layer in layers):
            return {**own_config(layers), "layout": NAME}
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for layer in layers:
            words = _words(layer.scheme)
            groups.setdefault(repr(words), (words, []))[1].append(layer.info.name)
        kinds = sorted({words["format"] for words, _ in groups.values()})
        return {
            "quant_method": NAME,
            "format": kinds[0] if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": ["Linear"] if len(groups) == 1 else names,
                    **words,
                }
                for number, (words, names) in enumerate(groups.values())
            },
            "ignore": sorted(info.name for info in left),
            "kv_cache_scheme": None,
        }

    def layers(self, source: ModelFolder) -> list[tuple[LayerInfo, Scheme]] | None:
        """Return the layers of a folder with a section of this format."""
        section = source.config.get("quantization_config") or source.config.get(
            "compression_config"
        )
        if not isinstance(section, Mapping) or section.get("quant_method") != NAME:
            return None
        where = f"{source.path / 'config.json'}: quantization_config"
        groups = section.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise WeightsError(f"{where}: config_groups must say how layers are quantized")
        found = []
        for name in _stored_layers(source):
            for key, group in groups.items():
                if isinstance(group, Mapping) and _means(group.get("targets"), name):
                    at = f"{where}.config_groups.{key}"
                    found.append(_layer(source, name, group, section.get("format"), at))
                    break
            else:
                raise WeightsError(
                    f"{where}: layer {name!r} is stored as codes, and no group's targets name it"
                )
        return found


# What is stored how -----------------------------------------------------------------------------


def format_of(scheme: Scheme) -> str:
    """Return the format that a scheme is stored in, "" for none."""
    inputs = scheme.input_activations
    width, scales = scheme.group_size, scheme.scale_dtype
    if scheme.format_name == FP4 and (width, scales) == (32, "e8m0"):
        return "mxfp4-pack-quantized"
    if scheme.format_name == FP4 and (width, scales) == (16, "e4m3"):
        return "nvfp4-pack-quantized"
    if scheme.format_name == FP8 and (width, scales) == (32, "e8m0"):
        return "mxfp8-quantized"
    if scales in ("e8m0", "e4m3"):
        return ""
    if scheme.format_name == FP8:
        return "naive-quantized" if inputs is None else "float-quantized"
    if scheme.format is not None or scheme.type != "int":
        return ""
    return "int-quantized" if inputs is not None and scheme.num_bits == 8 else "pack-quantized"


def _objections(layer: LayerOutline) -> list[str]:
    """Return why a layer cannot be stored for others to read."""
    scheme, columns = layer.scheme, layer.info.columns
    said = said_of_extras(layer)
    if layer.info.kind != "Linear":
        said.append(f"weights of {layer.info.kind} are not read by others; ignore these layers")
    if not format_of(scheme):
        said.append(
            f"scheme {scheme.describe()!r} is in no format of it; it has integers, fp8_e4m3, MXFP8 "
            f"and MXFP4 with groups of 32, and NVFP4"
        )
    if scheme.group_size is not None and columns % scheme.group_size:
        said.append(
            f"group_size={scheme.group_size} does not divide the {columns} columns; use one that "
            f"does, or -1"
        )
    inputs = scheme.input_activations
    if inputs is not None and inputs.format_name not in ("int8", FP8):
        said.append(f"activations are {inputs.describe()}; it reads int8 and {FP8}")
    elif inputs is not None and (inputs.type == "int") != (scheme.type == "int"):
        said.append("integers and floats are not multiplied with one another")
    return said


def _words(scheme: Scheme) -> dict[str, Any]:
    """Return the entries of a group, without its targets."""
    inputs = scheme.input_activations
    weights = {
        "num_bits": scheme.num_bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.two_level else scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.scale_dtype == "e8m0":
        weights["scale_dtype"] = "torch.uint8"
    activations = None
    if inputs is not None:
        activations = {
            "num_bits": inputs.num_bits,
            "type": inputs.type,
            "symmetric": True,
            "strategy": inputs.strategy,
            "dynamic": inputs.dynamic,
        }
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": format_of(scheme),
    }


# Integers ---------------------------------------------------------------------------------------


def _integers(layer: StoredLayer, kind: str) -> dict[str, torch.Tensor]:
    """Return codes and zero points as they are stored."""
    import torch

    from qframe.packing import pack_codes, unpack_codes

    packed = layer.packed
    bits, half = packed.scheme.num_bits, 1 << packed.scheme.num_bits - 1
    # Signed codes and those from 0 on are moved alike where their grid is full.
    shift = packed.grid.qmin + half if packed.scheme.symmetric else 0
    found = {}
    if kind == "int-quantized":
        moved = unpack_codes(packed.words, bits, packed.columns) + shift
        found["weight"] = (moved.to(torch.int16) - half).to(torch.int8)
    else:
        words = packed.words  # the same ones, where nothing is moved
        if shift:
            words = pack_codes(unpack_codes(words, bits, packed.columns) + shift, bits)
        found["weight_packed"] = words
        found["weight_shape"] = torch.tensor([packed.rows, packed.columns])
    if packed.zero_point is None:
        return found
    zero_point = unpack_codes(packed.zero_point, bits, packed.scale.shape[1])
    if kind == "int-quantized" or packed.scheme.strategy == "tensor":
        signed = (zero_point.to(torch.int16) - half).to(torch.int8)
        found["weight_zero_point"] = (
            signed.flatten() if packed.scheme.strategy == "tensor" else signed
        )
    else:
        found["weight_zero_point"] = pack_codes(zero_point.T.contiguous(), bits).T.contiguous()
    return found


def _own_words(tensors: Mapping[str, torch.Tensor], layer: LayerOutline, kind: str) -> torch.Tensor:
    """Return codes as words of qframe."""
    import torch

    from qframe.packing import pack_codes, unpack_codes

    scheme, name, grid = layer.scheme, layer.info.name, layer.grid
    rows, columns = layer.info.rows, layer.info.columns
    bits, half = scheme.num_bits, 1 << scheme.num_bits - 1
    shift = grid.qmin + half if scheme.symmetric else 0
    if kind == "int-quantized":
        weight = tensor_of(tensors, "weight", name, torch.int8, (rows, columns))
        moved = (weight.to(torch.int16) + half).to(torch.uint8)
    else:
        shape = tensor_of(tensors, "weight_shape", name).flatten().tolist()
        if shape != [rows, columns]:
            raise WeightsError(
                f"layer {name!r}: weight_shape is {shape}, expected [{rows}, {columns}]"
            )
        width = -(-columns * bits // 32)
        words = tensor_of(tensors, "weight_packed", name, torch.int32, (rows, width))
        if not shift and 32 * width == columns * bits:
            return words  # the same ones; else others may have left something behind the last
        moved = unpack_codes(words, bits, columns)
    if shift > 0:
        least = int(moved.min()) - half if moved.numel() else 0
        if least < grid.qmin:
            raise WeightsError(
                f"layer {name!r}: holds code {least}, but the grid is [{grid.qmin}, {grid.qmax}]"
            )
        moved = moved - shift
    return pack_codes(moved, bits)


def _own_integers(
    tensors: Mapping[str, torch.Tensor], layer: LayerOutline, kind: str
) -> dict[str, torch.Tensor]:
    """Return codes and zero points as qframe stores them."""
    import torch

    from qframe.packing import pack_codes, unpack_codes

    scheme, name = layer.scheme, layer.info.name
    rows, columns = layer.info.rows, layer.info.columns
    bits, half = scheme.num_bits, 1 << scheme.num_bits - 1
    own = {"weight_packed": _own_words(tensors, layer, kind)}
    stored = tensors.get("weight_zero_point")
    if scheme.symmetric:
        if stored is not None and bool(stored.any()) and kind == "int-quantized":
            raise WeightsError(
                f"layer {name!r}: a symmetric scheme with zero points that are not 0"
            )
        return own
    groups = scheme.scale_shape(rows, columns)
    if kind == "int-quantized" or scheme.strategy == "tensor":
        signed = tensor_of(tensors, "weight_zero_point", name, torch.int8)
        signed = _reshaped(signed, groups, name)
        zero_point = (signed.to(torch.int16) + half).to(torch.uint8)
        if bits < 8 and zero_point.numel() and int(zero_point.max()) >= 1 << bits:
            raise WeightsError(f"layer {name!r}: a zero point does not fit {bits} bits")
    else:
        stored_shape = (-(-groups[0] * bits // 32), groups[1])
        words = tensor_of(tensors, "weight_zero_point", name, torch.int32, stored_shape)
        zero_point = unpack_codes(words.T.contiguous(), bits, groups[0]).T
    own["weight_zero_point"] = pack_codes(zero_point.contiguous(), bits)
    return own


# Floats -----------------------------------------------------------------------------------------


def _float_bits(grid: Grid) -> torch.Tensor:
    """Return the stored bits of each code, code - qmin -> sign and rank of the magnitude, uint8."""
    import torch

    sign = 1 << (grid.qmax - 1).bit_length()
    return torch.tensor(
        [abs(code) + sign * (code < 0) for code in range(grid.qmin, grid.qmax + 1)],
        dtype=torch.uint8,
    )


def _own_floats(bits: torch.Tensor, layer: LayerOutline) -> torch.Tensor:
    """Return codes as words of qframe, of the stored bits [rows, columns] uint8."""
    import torch

    from qframe.packing import pack_codes

    info, grid = layer.info, layer.grid
    if tuple(bits.shape) != (info.rows, info.columns):
        raise WeightsError(
            f"layer {info.name!r}: the stored weight is {list(bits.shape)}, expected "
            f"[{info.rows}, {info.columns}]"
        )
    sign = 1 << (grid.qmax - 1).bit_length()
    rank = (bits & sign - 1).to(torch.int16)
    if rank.numel() and int(rank.max()) > grid.qmax:
        raise WeightsError(f"layer {info.name!r}: a stored weight is no number (NaN)")
    codes = torch.where((bits & sign) > 0, -rank, rank) - grid.qmin
    return pack_codes(codes, layer.scheme.num_bits)


# Folders of others ------------------------------------------------------------------------------


def _stored_layers(source: ModelFolder) -> list[str]:
    """Return the names of layers that have a scale, in the order of their names' first tensor."""
    suffix = ".weight_scale"
    return [name.removesuffix(suffix) for name in source.tensors if name.endswith(suffix)]


def _means(targets: object, name: str) -> bool:
    """Return whether a group's targets mean a layer: by class, by name, or by a pattern."""
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        return False
    for target in targets:
        if target in ("Linear", name):
            return True
        if isinstance(target, str) and target.startswith("re:"):
            try:
                if re.match(target.removeprefix("re:"), name):
                    return True
            except re.error:
                raise WeightsError(f"target {target!r} is no regular expression") from None
    return False


def _layer(
    source: ModelFolder, name: str, group: Mapping[str, Any], overall: object, where: str
) -> tuple[LayerInfo, Scheme]:
    """Return what a layer of somebody else's folder is."""
    kind = group.get("format") or overall
    if kind not in _FORMATS:
        raise WeightsError(
            f"{where}: format {kind!r} is not known (known: {', '.join(sorted(_FORMATS))})"
        )
    stored = source.tensors
    if f"{name}.weight_shape" in stored:
        if stored[f"{name}.weight_shape"].shape != (2,):
            raise WeightsError(f"layer {name!r}: weight_shape should be two numbers")
        rows, columns = source.read(f"{name}.weight_shape").tolist()
    else:
        plain, halves = f"{name}.weight", f"{name}.weight_packed"
        there = stored.get(plain) or stored.get(halves)
        if there is None or len(there.shape) != 2:
            raise WeightsError(f"layer {name!r}: neither {plain} nor {halves} with two axes")
        rows, columns = there.shape
        columns *= 2 if plain not in stored else 1
    scales = _SCALES.get(stored[f"{name}.weight_scale"].dtype)
    if scales is None:
        raise WeightsError(
            f"layer {name!r}: scales of dtype {stored[f'{name}.weight_scale'].dtype}"
        )
    scheme = _scheme(group, scales, where)
    if format_of(scheme) != kind and {format_of(scheme), kind} not in _ALIKE:
        raise WeightsError(f"{where}: {scheme.describe()!r} is not what format {kind!r} holds")
    return LayerInfo(name=name, rows=rows, columns=columns), scheme


_ALIKE = ({"float-quantized", "naive-quantized"}, {"int-quantized", "naive-quantized"})


def _scheme(group: Mapping[str, Any], scales: str, where: str) -> Scheme:
    """Return the scheme that a group of layers has."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise WeightsError(f"{where}: weights must say how weights are quantized")
    if group.get("output_activations") is not None:
        raise WeightsError(f"{where}: output_activations are not known")
    strategy = weights.get("strategy")
    if strategy == "tensor_group":
        strategy = "group"
    fields: dict[str, Any] = {
        "num_bits": weights.get("num_bits", 8),
        "type": weights.get("type", "int"),
        "symmetric": weights.get("symmetric", True),
        "strategy": strategy,
        "scale_dtype": scales,
    }
    if strategy == "group":
        fields["group_size"] = weights.get("group_size")
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            raise WeightsError(f"{where}: input_activations must be an object")
        fields["input_activations"] = {
            key: inputs[key]
            for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")
            if inputs.get(key) is not None
        }
    try:
        if inputs is not None:
            ActivationScheme.parse(fields["input_activations"], f"{where}.input_activations")
        return Scheme.parse(fields, where)
    except RecipeError as error:
        raise WeightsError(str(error)) from None


def _reshaped(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Return scales or zero points in another shape: writers differ in axes of one number."""
    if tensor.numel() != math.prod(shape):
        raise WeightsError(
            f"layer {name!r}: {list(tensor.shape)} scales or zero points, expected {list(shape)}"
        )
    return tensor.reshape(shape)


@hookimpl
def qframe_layouts() -> Iterable[CompressedTensors]:
    """Register the layout."""
    return [CompressedTensors()]
