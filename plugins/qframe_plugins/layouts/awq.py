"""The layout of AWQ, version "gemm", which AutoAWQ, vLLM, SGLang and transformers read.

Source: the format of AutoAWQ 0.2.9, as its linear layer WQLinear_GEMM packs it. A layer NAME is
stored, words being int32 with eight codes of 4 bits, as

qweight   [columns, rows / 8]: a word holds the codes of eight rows, lowest bits first those of rows
          0, 2, 4, 6, 1, 3, 5, 7 of the eight
qzeros    [groups, rows / 8]: zero points, in the same order
scales    [groups, rows], float16

A weight is scale (code - zero point). A symmetric layer is one whose zero points are all 8; nothing
says so, and without qframe's manifest it is read as one with zero points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qframe import LayerInfo, LayerOutline, Scheme, hookimpl
from qframe.errors import RecipeError, WeightsError
from qframe.layouts import SCALE_NAMES, objections_of
from qframe.strict import by_layers
from qframe_plugins.layouts.reading import tensor_of
from qframe_plugins.layouts.zero_points import (
    codes_and_zeros,
    own_codes,
    said_of_integers,
    stored_layers,
    upright,
    words_of,
)

if TYPE_CHECKING:
    import torch

    from qframe.stored import StoredLayer
    from qframe.weights import ModelFolder

NAME = "awq"
SIDE_FILE = "quant_config.json"  # what AutoAWQ wrote before there was a section in config.json
BITS = 4
LANES = 32 // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which row's code lies where in a word, lowest bits first
HEAD = "lm_head"
_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}


class AWQ:
    """Folders that AutoAWQ, vLLM, SGLang and transformers load."""

    name: str = NAME
    readers: str = "vLLM, SGLang, AutoAWQ, transformers with GPTQModel"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")
    names_left: frozenset[str] = frozenset({"modules_to_not_convert"})

    def objections(self, layers: Sequence[LayerOutline]) -> list[str]:
        """Return what the format has no words for."""
        said = objections_of(layers, _objections)
        sizes = {layer.scheme.group_size or -1: layer.info.name for layer in layers}
        if len(sizes) > 1:
            found = " and ".join(str(size) for size in sorted(sizes))
            reason = f"group_size is {found}; it has one for all layers"
            said += by_layers((name, reason) for _, name in sorted(sizes.items()))
        return said

    def shapes(self, layer: LayerOutline) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of all that `pack` returns."""
        info = layer.info
        groups = layer.scheme.groups(info.columns)
        return {
            "qweight": ("I32", (info.columns, info.rows // LANES)),
            "qzeros": ("I32", (groups, info.rows // LANES)),
            "scales": (SCALE_NAMES[layer.scheme.scale_dtype], (groups, info.rows)),
        }

    def pack(self, layer: StoredLayer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer."""
        codes, zeros = codes_and_zeros(layer)
        return {
            "qweight": _packed(codes.T),
            "qzeros": _packed(zeros.T),
            "scales": layer.packed.scale.T.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerOutline) -> StoredLayer:
        """Return the layer that `pack` packed, or that another writer of the format did."""
        import torch

        from qframe.rounding import group_index
        from qframe.stored import StoredLayer

        name, rows = layer.info.name, layer.info.rows
        shapes = {part: shape for part, (_, shape) in self.shapes(layer).items()}
        qweight, qzeros = (
            tensor_of(tensors, part, name, torch.int32, shapes[part])
            for part in ("qweight", "qzeros")
        )
        scales = tensor_of(tensors, "scales", name, None, shapes["scales"])
        codes, zeros, turned = upright(
            _unpacked(qweight, rows),
            _unpacked(qzeros, rows),
            scales.T.contiguous(),
            group_index(layer.info.columns, layer.scheme),
            BITS,
        )
        own = own_codes(codes, zeros, layer)
        own["weight_scale"] = turned
        return StoredLayer.of_outline(own, layer)

    def config(self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]) -> dict[str, Any]:
        """Return what all layers have in common, and the names of those that are left."""
        sizes = {layer.scheme.group_size or -1 for layer in layers}
        return {
            "quant_method": NAME,
            "version": "gemm",
            "bits": BITS,
            "group_size": min(sizes, default=-1),
            "zero_point": True,
            "modules_to_not_convert": sorted(info.name for info in left),
        }

    def layers(self, source: ModelFolder) -> list[tuple[LayerInfo, Scheme]] | None:
        """Return the layers of a folder with a section of this format."""
        section = _section(source)
        if section is None:
            return None
        where = f"{source.path}: quantization_config"
        known = {"version": "gemm", "bits": BITS, "zero_point": True}
        for key, value in known.items():
            said = section.get(key, value)
            if (said.lower() if isinstance(said, str) else said) != value:
                raise WeightsError(f"{where}: {key}={said!r} is not known, only {value!r}")
        return [_layer(source, name, section, where) for name in stored_layers(source)]


def _objections(layer: LayerOutline) -> list[str]:
    """Return why a layer cannot be stored for others to read."""
    said = said_of_integers(layer, {BITS})
    if layer.scheme.scale_dtype in ("float32", "bfloat16"):
        said.append(f"scales are {layer.scheme.scale_dtype}; use scale_dtype: float16")
    if layer.info.rows % LANES:
        said.append(f"{layer.info.rows} rows are no multiple of {LANES}; ignore these layers")
    if layer.info.name == HEAD:
        said.append("readers take the output layer for one that is not quantized; ignore it")
    return said


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Return codes [lines, rows] uint8 as words [lines, rows / 8] int32."""
    from qframe.packing import pack_codes

    lines, rows = codes.shape
    ordered = codes.reshape(lines, rows // LANES, LANES)[:, :, list(ORDER)]
    return pack_codes(ordered.reshape(lines, rows), BITS)


def _unpacked(words: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the codes that `_packed` packed the other way round, [rows, lines] uint8."""
    import torch

    from qframe.packing import unpack_codes

    ordered = unpack_codes(words, BITS, rows).reshape(len(words), rows // LANES, LANES)
    codes = torch.empty_like(ordered)
    codes[:, :, list(ORDER)] = ordered
    return codes.reshape(len(words), rows).T.contiguous()


# Folders of others ------------------------------------------------------------------------------


def _section(source: ModelFolder) -> dict[str, Any] | None:
    """Return what a folder says of AWQ, by the newer names of keys; None where it is another's."""
    from qframe.weights import read_json

    section = source.config.get("quantization_config")
    file = source.path / SIDE_FILE
    if section is None and file.is_file():
        section = {"quant_method": NAME, **read_json(file)}
    if not isinstance(section, Mapping) or section.get("quant_method") != NAME:
        return None
    return {_ALIASES.get(str(key), str(key)): value for key, value in section.items()}


def _layer(
    source: ModelFolder, name: str, section: Mapping[str, Any], where: str
) -> tuple[LayerInfo, Scheme]:
    """Return what a layer of somebody else's folder is."""
    (columns, words), scale_dtype = words_of(source, name)
    fields = {
        "num_bits": BITS,
        "group_size": section.get("group_size", -1),
        "symmetric": False,
        "scale_dtype": scale_dtype,
    }
    try:
        scheme = Scheme.parse(fields, where)
    except RecipeError as error:
        raise WeightsError(str(error)) from None
    return LayerInfo(name=name, rows=words * LANES, columns=columns), scheme


@hookimpl
def qframe_layouts() -> Iterable[AWQ]:
    """Register the layout."""
    return [AWQ()]
