"""A quantized folder, opened: its layers one at a time, whoever wrote it and in whatever layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qframe.contracts import LayerInfo, LayerOutline, Layout
from qframe.errors import VerifyError, WeightsError
from qframe.grids import grid_of, input_grid_of
from qframe.host import Host
from qframe.layouts import OWN, layout_named, layout_names
from qframe.manifest import MANIFEST, read_manifest, record_of
from qframe.model import build, find_layers
from qframe.scheme import Scheme
from qframe.stored import StoredLayer
from qframe.weights import ModelFolder


@dataclass(frozen=True)
class StoredModel:
    """A quantized folder whose numbers are read when they are asked for.

    source     the folder
    layout     how it stores its layers
    outlines   layer name -> what it is
    manifest   what qframe wrote about it; None for a folder that somebody else wrote
    """

    source: ModelFolder
    layout: Layout
    outlines: Mapping[str, LayerOutline]
    manifest: Mapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: str | Path | ModelFolder, host: Host | None = None) -> StoredModel:
        """Open a quantized folder.

        Raises VerifyError for one that is not quantized, or whose manifest cannot be read;
        WeightsError for one that is quantized in a way that no layout knows.
        """
        source = folder if isinstance(folder, ModelFolder) else ModelFolder(folder)
        if (source.path / MANIFEST).is_file():
            manifest = read_manifest(source)
            layout = layout_named(str(manifest.get("layout")), host)
            return cls(source, layout, outlines_of(source, manifest), manifest)
        host = host or Host.discover()
        for name in host.names("layout"):
            layout = layout_named(name, host)
            found = layout.layers(source)
            if found is not None:
                outlines = {i.name: outline_of(host, i, scheme) for i, scheme in found}
                return cls(source, layout, outlines)
        section = source.config.get("quantization_config")
        if section is None:
            raise VerifyError(
                f"{source.path}: not quantized: there is neither {MANIFEST} nor a "
                f"quantization_config in config.json"
            )
        method = section.get("quant_method") if isinstance(section, dict) else section
        known = ", ".join(name for name in layout_names(host) if name != OWN)
        raise WeightsError(
            f"{source.path}: quantized with quant_method {method!r}, which no layout knows "
            f"(known: {known}); a plugin can add one, with the hook qframe_layouts"
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without what it says of quantization."""
        section = "quantization_config"
        return {key: value for key, value in self.source.config.items() if key != section}

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Return what is stored of a layer, by the names after the layer's."""
        prefix = f"{name}." if name else ""
        return {
            part: self.source.read(f"{prefix}{part}")
            for part in self.layout.parts
            if f"{prefix}{part}" in self.source.tensors
        }

    def layer(self, name: str) -> StoredLayer:
        """Return a quantized layer. Raises WeightsError when tensors are not what they can be."""
        return self.layout.unpack(self.parts(name), self.outlines[name])

    def outline(self, name: str) -> LayerOutline:
        """Return what a layer is, with what it has besides codes: its tensors are read for that."""
        return dataclasses.replace(self.outlines[name], extras=self.layer(name).extras)

    def layers(self) -> Iterator[tuple[str, StoredLayer]]:
        """Yield (layer name, layer) for every quantized layer."""
        for name in self.outlines:
            yield name, self.layer(name)

    def bias(self, name: str) -> torch.Tensor | None:
        """Return the bias of a quantized layer, in the dtype that it has in the file."""
        stored = f"{name}.bias".lstrip(".")
        return self.source.read(stored) if stored in self.source.tensors else None

    def carried(self) -> list[str]:
        """Return the names of all tensors, biases too, that no quantized layer is stored as."""
        own = {f"{name}.{part}".lstrip(".") for name in self.outlines for part in self.layout.parts}
        return [name for name in self.source.tensors if name not in own]

    def network(self) -> nn.Module:
        """Build the unquantized network that config.json describes, without numbers."""
        self.source.config.pop("quantization_config", None)
        return build(self.source)

    def left(self) -> list[LayerInfo]:
        """Return the linear layers of the network that are not quantized."""
        layers = find_layers(self.network())
        return [info for name, info in layers.items() if name not in self.outlines]


def outline_of(
    host: Host, info: LayerInfo, scheme: Scheme, extras: frozenset[str] = frozenset()
) -> LayerOutline:
    """Return what a layer with this scheme is, as the number formats have its codes."""
    return LayerOutline(
        info=info,
        scheme=scheme,
        grid=grid_of(host, scheme),
        input_grid=input_grid_of(host, scheme),
        extras=extras,
    )


def outlines_of(source: ModelFolder, manifest: Mapping[str, Any]) -> dict[str, LayerOutline]:
    """Return layer name -> outline, of a manifest as `read_manifest` returns it."""
    where = source.path / MANIFEST
    layers = manifest.get("layers")
    if not isinstance(layers, dict):
        raise VerifyError(f"{where}: 'layers' must map layer names to records")
    return {
        name: record_of(raw, f"{where}: layer {name!r}").outline(name)
        for name, raw in layers.items()
    }
