"""The layouts of GPTQ, which GPTQModel, vLLM, SGLang and transformers read: gptq and gptq_v2.

Source: the format of AutoGPTQ 0.7 and GPTQModel 7.7, as their packers write it. A layer NAME of b
bits is stored, words being int32, as

qweight   [columns b / 32, rows]: the codes of a row one after the other, lowest bit first, as one
          stream of bits down a column of words; so 32 codes of 3 bits are 3 words
qzeros    [groups, rows b / 32]: zero points, packed in the same way along the words of a line
scales    [groups, rows], float16, bfloat16 or float32
g_idx     [columns] int32: which group a column belongs to

A weight is scale (code - zero point). gptq (v1) stores zero points less one, and no two readers
agree on what a stored 2^b - 1 is: AutoGPTQ adds one and gets 2^b, GPTQModel adds one to all fields
of a word at once, so that the next one gets the carry, and auto-round writes 1 where it had 0. So
v1 is for symmetric layers here, whose zero points are 2^(b-1), and a stored 2^b - 1 is refused;
gptq_v2 stores zero points as they are.

`dynamic` names layers, by patterns, that are stored otherwise than the rest or not at all, for
GPTQModel and vLLM; AutoGPTQ and transformers do not know it. modules_in_block_to_quantize says the
same to transformers, where all blocks leave out the same layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import qframe
from qframe import LayerInfo, LayerOutline, Scheme, hookimpl
from qframe.errors import RecipeError, WeightsError
from qframe.layouts import SCALE_NAMES, objections_of
from qframe_plugins.layouts.reading import tensor_of
from qframe_plugins.layouts.zero_points import (
    codes_and_zeros,
    has_negative_scales,
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

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"
SIDE_FILE = "quantize_config.json"
BITS = frozenset({2, 3, 4, 8})
LANES = 32  # layers are padded to multiples of it by no reader, and asked for by most
HEAD = "lm_head"
_INDEX = frozenset({"group index"})
_MEANT = ("bits", "group_size", "sym", "desc_act")  # keys that say what is stored
_BLOCK = re.compile(r"\.\d+\.")  # before the name of a layer in its block


class GPTQ:
    """Folders that GPTQModel, vLLM and SGLang load.

    name     "gptq" or "gptq_v2", what checkpoint_format says
    offset   what is taken off zero points: 1 or 0
    """

    readers: str = "GPTQModel, vLLM, SGLang, transformers with GPTQModel"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    names_left: frozenset[str] = frozenset({"dynamic", "modules_in_block_to_quantize"})

    def __init__(self, name: str, offset: int) -> None:
        self.name = name
        self.offset = offset

    def objections(self, layers: Sequence[LayerOutline]) -> list[str]:
        """Return what the format has no words for, or what its readers do not agree on."""
        return objections_of(layers, self._objections)

    def _objections(self, layer: LayerOutline) -> list[str]:
        said = said_of_integers(layer, BITS, known=_INDEX)
        for what, size in (("rows", layer.info.rows), ("columns", layer.info.columns)):
            if size % LANES:
                said.append(f"{size} {what} are no multiple of {LANES}; ignore these layers")
        if self.offset and not layer.scheme.symmetric:
            said.append(
                f"zero points that are 0 are read differently by different readers; use "
                f"symmetric: true, or format {V2!r}"
            )
        return said

    def shapes(self, layer: LayerOutline) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of all that `pack` returns."""
        info, bits = layer.info, layer.scheme.num_bits
        groups = layer.scheme.groups(info.columns)
        return {
            "qweight": ("I32", (info.columns * bits // 32, info.rows)),
            "qzeros": ("I32", (groups, info.rows * bits // 32)),
            "scales": (SCALE_NAMES[layer.scheme.scale_dtype], (groups, info.rows)),
            "g_idx": ("I32", (info.columns,)),
        }

    def pack(self, layer: StoredLayer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer."""
        from qframe.packing import pack_codes
        from qframe.rounding import group_index

        packed = layer.packed
        bits = packed.scheme.num_bits
        codes, zeros = codes_and_zeros(layer)
        stored = zeros - self.offset & (1 << bits) - 1
        index = packed.group_index
        return {
            "qweight": pack_codes(codes, bits).T.contiguous(),
            "qzeros": pack_codes(stored.T.contiguous(), bits),
            "scales": packed.scale.T.contiguous(),
            "g_idx": group_index(packed.columns, packed.scheme) if index is None else index,
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerOutline) -> StoredLayer:
        """Return the layer that `pack` packed, or that another writer of the format did."""
        import torch

        from qframe.packing import unpack_codes
        from qframe.rounding import group_index
        from qframe.stored import StoredLayer

        info, scheme = layer.info, layer.scheme
        shapes = {part: shape for part, (_, shape) in self.shapes(layer).items()}
        found = {
            part: tensor_of(tensors, part, info.name, torch.int32, shapes[part])
            for part in ("qweight", "qzeros", "g_idx")
        }
        scales = tensor_of(tensors, "scales", info.name, None, shapes["scales"])
        codes = unpack_codes(found["qweight"].T.contiguous(), scheme.num_bits, info.columns)
        zeros = self._zeros(unpack_codes(found["qzeros"], scheme.num_bits, info.rows), layer)
        zeros, scales = zeros.T.contiguous(), scales.T.contiguous()
        if not scheme.symmetric:
            codes, zeros, scales = upright(codes, zeros, scales, found["g_idx"], scheme.num_bits)
        own = own_codes(codes, zeros, layer)
        own["weight_scale"] = scales
        if not torch.equal(found["g_idx"], group_index(info.columns, scheme)):
            own["weight_g_idx"] = found["g_idx"]
        return StoredLayer.of_outline(own, layer)

    def _zeros(self, stored: torch.Tensor, layer: LayerOutline) -> torch.Tensor:
        """Return zero points, given what is stored of them, [groups, rows] uint8."""
        if not self.offset:
            return stored
        name, bits = layer.info.name, layer.scheme.num_bits
        if bool((stored == (1 << bits) - 1).any()):
            raise WeightsError(
                f"layer {name!r}: a zero point is stored as {(1 << bits) - 1}, which readers of "
                f"checkpoint_format {V1!r} take for 0 or for {1 << bits}; write the folder again "
                f"with checkpoint_format {V2!r}"
            )
        zeros = stored + self.offset
        if layer.scheme.symmetric and bool((stored == 1 << bits - 1).all()) and stored.numel():
            raise WeightsError(
                f"layer {name!r}: its zero points are those of checkpoint_format {V2!r}, and the "
                f"folder says {V1!r}; correct the key if you know who wrote it"
            )
        return zeros

    def config(self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]) -> dict[str, Any]:
        """Return what all layers have in common, and by name what some have not."""
        kinds = Counter(_words(layer.scheme) for layer in layers)
        usual = kinds.most_common(1)[0][0] if kinds else (4, -1, True)
        bits, group_size, symmetric = usual
        dynamic: dict[str, dict[str, Any]] = {
            f"+:^{re.escape(layer.info.name)}$": dict(
                zip(_MEANT, _words(layer.scheme), strict=False)
            )
            for layer in layers
            if _words(layer.scheme) != usual
        }
        inside = sorted(info.name for info in left if info.name != HEAD)
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in inside}
        found = {
            "quant_method": METHOD,
            "checkpoint_format": self.name,
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": any(layer.extras & _INDEX for layer in layers),
            "static_groups": False,
            "true_sequential": True,
            "lm_head": any(layer.info.name == HEAD for layer in layers),
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"qframe:{qframe.__version__}"]},
        }
        if dynamic:
            found["dynamic"] = dynamic
        stored, others = _in_block([layer.info.name for layer in layers]), _in_block(inside)
        if others and not stored & others:
            found["modules_in_block_to_quantize"] = [sorted(stored)]
        return found

    def side_files(
        self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]
    ) -> dict[str, dict[str, Any]]:
        """Return the file that AutoGPTQ looks for, with the same content."""
        return {SIDE_FILE: self.config(layers, left)}

    def layers(self, source: ModelFolder) -> list[tuple[LayerInfo, Scheme]] | None:
        """Return the layers of a folder that says it is of this checkpoint_format.

        One that does not say is v1, as the field has it: there was nothing else at first.
        """
        section = _section(source)
        if section is None:
            return None
        where = f"{source.path}: quantization_config"
        version = section.get("checkpoint_format", section.get("format", V1))
        if version not in (V1, V2) or section.get("is_marlin_format"):
            said = "marlin" if section.get("is_marlin_format") else version
            raise WeightsError(f"{where}: checkpoint_format {said!r} is not known ({V1}, {V2})")
        if version != self.name:
            return None
        return [_layer(source, name, section, where) for name in stored_layers(source)]


def _words(scheme: Scheme) -> tuple[int, int, bool]:
    """Return bits, group_size and sym of a scheme."""
    return scheme.num_bits, scheme.group_size or -1, scheme.symmetric


def _in_block(names: Iterable[str]) -> set[str]:
    """Return the names that layers of blocks have within their block."""
    found = set()
    for name in names:
        parts = _BLOCK.split(name, maxsplit=1)
        if len(parts) == 2:
            found.add(parts[1])
    return found


# Folders of others ------------------------------------------------------------------------------


def _section(source: ModelFolder) -> dict[str, Any] | None:
    """Return what a folder says of GPTQ, in config.json or beside it; None where it is not its own.

    Raises WeightsError where both say something, and not the same.
    """
    from qframe.weights import read_json

    section = source.config.get("quantization_config")
    file = source.path / SIDE_FILE
    if section is not None and not _is_own(section):
        return None
    beside = read_json(file) if file.is_file() else {}
    if section is None and not ("bits" in beside and _is_own({"quant_method": METHOD, **beside})):
        return None
    said = dict(section or {})
    for key in (*_MEANT, "checkpoint_format"):
        if key in said and key in beside and said[key] != beside[key]:
            raise WeightsError(
                f"{source.path}: config.json says {key}={said[key]!r}, and {SIDE_FILE} says "
                f"{beside[key]!r}"
            )
    return {**beside, **said}


def _is_own(section: object) -> bool:
    return isinstance(section, Mapping) and section.get("quant_method") == METHOD


def _layer(
    source: ModelFolder, name: str, section: Mapping[str, Any], where: str
) -> tuple[LayerInfo, Scheme]:
    """Return what a layer of somebody else's folder is."""
    (words, rows), scale_dtype = words_of(source, name)
    said = {key: section.get(key) for key in _MEANT} | _exceptions(section, name, where)
    bits, group_size, symmetric = said["bits"], said["group_size"], said["sym"]
    if bits not in BITS or isinstance(bits, bool):
        raise WeightsError(
            f"{where}: bits={bits!r} of layer {name!r}; known: {', '.join(map(str, sorted(BITS)))}"
        )
    if not isinstance(symmetric, bool) and symmetric is not None:
        raise WeightsError(f"{where}: sym must be true or false, got {symmetric!r}")
    if words * 32 % bits:
        raise WeightsError(
            f"layer {name!r}: {words} words hold no whole number of {bits}-bit codes"
        )
    try:
        scheme = Scheme.parse(
            {
                "num_bits": bits,
                "group_size": group_size,
                "symmetric": symmetric is not False and not has_negative_scales(source, name),
                "scale_dtype": scale_dtype,
            },
            where,
        )
    except RecipeError as error:
        raise WeightsError(str(error)) from None
    return LayerInfo(name=name, rows=rows, columns=words * 32 // bits), scheme


def _exceptions(section: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return what `dynamic` says of a layer; the first pattern that fits its name counts."""
    dynamic = section.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise WeightsError(f"{where}: dynamic must map patterns to what is different")
    for pattern, said in dynamic.items():
        try:
            fits = re.match(pattern.removeprefix("+:").removeprefix("-:"), name)
        except re.error:
            raise WeightsError(f"{where}: {pattern!r} is no regular expression") from None
        if fits and pattern.startswith("-:"):
            raise WeightsError(
                f"{where}: dynamic says that layer {name!r} is not quantized, and it is stored as "
                f"codes"
            )
        if fits and not isinstance(said, Mapping):
            raise WeightsError(f"{where}: dynamic.{pattern} must be an object")
        if fits:
            return {key: said[key] for key in _MEANT if key in said}
    return {}


@hookimpl
def qframe_layouts() -> Iterable[GPTQ]:
    """Register both versions."""
    return [GPTQ(V1, 1), GPTQ(V2, 0)]
