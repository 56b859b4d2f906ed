"""How a folder stores its layers: qframe's own layout, and the choice among all that plugins bring.

qframe's own holds whatever a recipe can ask for, and only qframe reads it. Others are plugins; the
field's usual one is the default, where it can express what the recipe asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qframe.contracts import EXTRAS, LayerInfo, LayerOutline, Layout
from qframe.errors import UnsupportedError
from qframe.host import Host
from qframe.parts import PARTS
from qframe.strict import by_layers, suggestion
from qframe.transforms import SCALE, SIGNS, STEP, block_of

if TYPE_CHECKING:
    import torch

    from qframe.scheme import Scheme
    from qframe.stored import StoredLayer
    from qframe.weights import ModelFolder

OWN = "qframe"
SCALE_NAMES: Mapping[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "e8m0": "U8",
    "e4m3": "F8_E4M3",
}
"""scale_dtype -> how safetensors names the dtype that scales are stored in."""
OTHERS_SIDE_FILES = frozenset({"quantize_config.json", "quant_config.json"})
"""Files beside config.json that say how a folder is stored; not to be copied into another one."""
USUAL = "compressed-tensors"  # what a folder is written as where nothing else is asked for
SHOWN = 5  # objections in a message


class OwnLayout:
    """qframe's own layout: codes, scales, and all that is done to the input at run time."""

    name: str = OWN
    readers: str = "qframe"
    parts: tuple[str, ...] = PARTS

    def objections(self, layers: Sequence[LayerOutline]) -> list[str]:
        """Return nothing: it holds everything."""
        return []

    def shapes(self, layer: LayerOutline) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of all that `pack` returns, but for columns that are kept."""
        info, scheme = layer.info, layer.scheme
        rows, groups = scheme.scale_shape(info.rows, info.columns)
        words = -(-info.columns * scheme.num_bits // 32)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (info.rows, words)),
            "weight_scale": (SCALE_NAMES[scheme.scale_dtype], (rows, groups)),
        }
        if scheme.two_level:
            found["weight_global_scale"] = "F32", (1,)
        if not scheme.symmetric:
            found["weight_zero_point"] = "I32", (rows, -(-groups * scheme.num_bits // 32))
        if "group index" in layer.extras and groups > 1:
            found["weight_g_idx"] = "I32", (info.columns,)
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            found[STEP] = "F32", (1,)
        if "scale" in layer.extras:
            found[SCALE] = "F32", (info.columns,)
        if "rotation" in layer.extras:
            block = block_of(info.columns)
            found[SIGNS] = "I8", (info.columns // block, block)
        return found

    def pack(self, layer: StoredLayer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer, `StoredLayer.tensors`."""
        return layer.tensors()

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerOutline) -> StoredLayer:
        """Return the layer. Raises WeightsError when `pack` cannot have returned the tensors."""
        from qframe.stored import StoredLayer

        return StoredLayer.of_outline(tensors, layer)

    def config(self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]) -> dict[str, Any]:
        """Return the section that names qframe as the only reader."""
        return own_config(layers)

    def layers(self, source: ModelFolder) -> list[tuple[LayerInfo, Scheme]] | None:
        """Return None: what is in a folder of qframe's own is said by its manifest."""
        return None


def own_config(layers: Sequence[LayerOutline]) -> dict[str, Any]:
    """Return `quantization_config` of a folder that only qframe reads."""
    import qframe

    return {
        "quant_method": OWN,
        "version": qframe.__version__,
        "schemes": sorted({layer.scheme.describe() for layer in layers}),
        "note": "load with qframe.load(folder)",
    }


def layout_named(name: str, host: Host | None = None) -> Layout:
    """Return a layout by its name. Raises UnknownNameError."""
    if name == OWN:
        return OwnLayout()
    found: Layout = (host or Host.discover()).get("layout", name)
    return found


def layout_names(host: Host) -> list[str]:
    """Return the names of all layouts."""
    return [OWN, *host.names("layout")]


def choose(
    wanted: str | None, layers: Sequence[LayerOutline], host: Host
) -> tuple[Layout, list[str]]:
    """Return the layout to write, and why it is not the usual one.

    wanted   a name; None for the usual layout, and qframe's own where it has objections

    Raises UnsupportedError with the objections of one that was asked for by name.
    """
    if wanted is None:
        if USUAL not in host.names("layout"):
            return OwnLayout(), [f"the plugin of layout {USUAL!r} is not there"]
        usual = layout_named(USUAL, host)
        said = usual.objections(layers)
        return (OwnLayout(), said) if said else (usual, [])
    if wanted not in layout_names(host):
        raise UnsupportedError(
            f"no format {wanted!r} of folders{suggestion(wanted, layout_names(host))}"
        )
    layout = layout_named(wanted, host)
    said = layout.objections(layers)
    if said:
        raise UnsupportedError(refusal(layout.name, said))
    return layout, []


def refusal(name: str, objections: Sequence[str]) -> str:
    """Return the message of a format that cannot express a network."""
    rest = len(objections) - SHOWN
    more = [f"and {rest} more"] if rest > 0 else []
    return "\n".join(
        [
            f"format {name!r} cannot express this:",
            *objections[:SHOWN],
            *more,
            f"or choose another format: {OWN!r} holds everything, for qframe alone",
        ]
    )


def objections_of(
    layers: Sequence[LayerOutline], of_layer: Callable[[LayerOutline], Iterable[str]]
) -> list[str]:
    """Return what there is against layers, each reason once, with the layers that it is about."""
    return by_layers((layer.info.name, reason) for layer in layers for reason in of_layer(layer))


def said_of_extras(layer: LayerOutline, known: frozenset[str] = frozenset()) -> list[str]:
    """Return objections to what a layer has besides codes, but for what a layout knows."""
    return [f"{EXTRAS[extra]}; {_INSTEAD[extra]}" for extra in sorted(layer.extras - known)]


_INSTEAD: Mapping[str, str] = {
    "scale": "no norm and no layer before it can divide instead; ignore it, or take another method",
    "rotation": "take a method without rotations",
    "kept columns": "take a method that keeps none",
    "threshold": "take a method that has none: threshold=0",
    "group index": "use actorder: static",
}
