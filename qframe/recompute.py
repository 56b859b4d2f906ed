"""Certificates computed once more: from the folder, the reference model, and what was kept.

The claims come from the plugin that the manifest names. Those that need no calibration data are
computed from the weights; the others from the statistics that `keep_statistics` stored, which are
taken as they are. A certificate that cannot be computed is listed with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qframe.certificates import Certificate, Evidence, applicable, function_preserved
from qframe.contracts import Event, QuantizedWeight, RoundingProblem
from qframe.dividers import Dividers
from qframe.errors import QframeError, UncalibratedLayerError
from qframe.fallbacks import FALLBACK, HOST_EVENTS, OVERFIT, claims_about
from qframe.fingerprints import Origin, fingerprint
from qframe.hessian import MISMATCH, SECOND_MOMENTS
from qframe.host import Host
from qframe.layouts import layout_named
from qframe.manifest import ORDER, Manifest
from qframe.model import Network
from qframe.recipe import Method, parse_method
from qframe.transforms import InputTransform
from qframe.weights import ModelFolder

if TYPE_CHECKING:
    from qframe.verification import FoundLayer, VerifyReport

Names = set[tuple[str, str]]  # of claims: (name, theorem)


def recompute(
    report: VerifyReport,
    manifest: Manifest,
    layers: Mapping[str, FoundLayer],
    source: ModelFolder,
    kept: ModelFolder,
    reference: str | Path | nn.Module,
    host: Host,
    threads: int,
) -> None:
    """Compute certificates once more, and take down in `report` what comes of it.

    layers   those that could be unpacked
    source   the folder
    kept     the statistics in the folder

    It ends at the first weight of the reference that no layer can have been made of.
    """
    if isinstance(reference, nn.Module):
        report.reference, network = type(reference).__name__, Network(reference)
    else:
        folder = ModelFolder(reference)
        report.reference, network = str(folder.path), Network.from_folder(folder)
    dtype = manifest.recipe.carried_dtype
    if dtype is not None:
        network.cast(getattr(torch, dtype), manifest.layers)
    dividers = Dividers(report, manifest, source, network)
    bench = _Bench(report, manifest, kept, dividers, host, threads)
    for name, layer in layers.items():
        wrong = _other_source(network, name, layer)
        if wrong:
            report.add(
                "reference", wrong, f"layer {name!r} was made of something else; stopped here"
            )
            return
        bench.certify(name, layer, network.weight(name))
        network.release(network.module.get_submodule(name))
    _check_carried(report, manifest, network, dividers, host)


def _other_source(network: Network, name: str, layer: FoundLayer) -> str:
    """Return the name of the reference's tensor if the layer was not made of it, else ""."""
    if name not in network.layers:
        return f"{name}.weight"
    weight = network.weight(name)
    same = tuple(weight.shape) == (layer.record.rows, layer.record.columns)
    if same and network.is_made_of(name, Origin(layer.record.source_dtype, layer.record.source)):
        return ""
    return network.stored_name(f"{name}.weight".lstrip("."))


def _check_carried(
    report: VerifyReport, manifest: Manifest, network: Network, dividers: Dividers, host: Host
) -> None:
    """Compare every tensor that is no part of a quantized layer with the reference's."""
    parts = layout_named(manifest.layout, host).parts
    own = {f"{layer}.{part}".lstrip(".") for layer in manifest.layers for part in parts}
    own |= dividers.tensors  # which have been looked at, and are not the reference's
    there: Collection[str]
    read: Callable[[str], torch.Tensor]
    if network.folder is not None:
        there, read = network.folder.tensors, network.folder.raw
    else:
        state = network.module.state_dict()
        there, read = state, state.__getitem__
    carried = [name for name in manifest.tensors if name not in own]
    for name in carried:
        if name not in there:
            report.add("reference", name, "is not in the reference")
            continue
        report.carried += 1
        if fingerprint(network.carried(name, read(name))) != manifest.tensors[name].blake3:
            report.add("tensor", name, "differs from the reference's")
    replaced = {network.stored_name(f"{layer}.weight".lstrip(".")) for layer in manifest.layers}
    for name in there:
        if name not in manifest.tensors and name not in replaced:
            report.add("tensor", name, "of the reference was left out")


class _Bench:
    """Certifies one layer after another; those of one input group share their statistics."""

    def __init__(
        self,
        report: VerifyReport,
        manifest: Manifest,
        kept: ModelFolder,
        dividers: Dividers,
        host: Host,
        threads: int,
    ) -> None:
        self._report, self._manifest, self._kept, self._dividers = report, manifest, kept, dividers
        self._threads = threads
        self._group = ""
        self._statistics: dict[str, Any] = {}
        self._shared: dict[Any, Any] = {}
        self._method, self._missing = _method(report, manifest, host)

    def certify(self, name: str, layer: FoundLayer, weight: torch.Tensor) -> None:
        """Compute the certificates of a layer once more.

        weight   the original one, [rows, columns] float32
        """
        found: list[Certificate] = []
        stored = self._dividers.undivided(name, layer.stored)
        if stored is None:
            self._leave(name, set(), "its rows do not say what they were divided by")
            return
        layer = dataclasses.replace(layer, stored=stored)
        transform, divider = layer.stored.transform, layer.record.folded
        if divider is not None:
            scale = self._dividers.scale(divider)
            if scale is None:
                why = f"the norm {divider!r} does not say what it was divided by"
                self._leave(name, set(), why)
                return
            transform = dataclasses.replace(transform or InputTransform(), scale=scale)
        if transform is not None:
            rewritten = transform.rewrite(weight)
            if fingerprint(rewritten) != layer.record.rewritten:
                why = "the rewritten weight is not W transformed, bit for bit, nor stored"
                if divider is not None:
                    self._dividers.blame(divider, name)
                self._leave(name, set(), why)
                return
            handlers = sum(p.kind == "outlier handler" for p in self._manifest.plugins)
            kept = layer.stored.kept
            found.append(function_preserved(weight, rewritten, transform, kept, handlers=handlers))
            weight = rewritten
        if self._method is None and layer.record.method not in (FALLBACK, OVERFIT):
            self._leave(name, _names(found), self._missing)
        else:
            found += self._claimed(name, layer, weight, _names(found))
        self._report.recomputed[name] = tuple(found)
        for certificate in found:
            if not certificate.holds:
                self._report.add("certificate", name, f"recomputed: {certificate}")

    def _claimed(
        self, name: str, layer: FoundLayer, weight: torch.Tensor, known: Names
    ) -> list[Certificate]:
        """Return what becomes of the claims of the layer's method."""
        rounder = None if self._method is None else self._method.rounder
        claims = applicable(claims_about(rounder, layer.record.method), layer.record.scheme)
        evidence = self._evidence(name, layer, weight)
        found = []
        for claim in claims:
            try:
                found.append(claim.certify(evidence))
            except UncalibratedLayerError:
                pass  # has no statistics: it is read only
            except QframeError as error:
                self._report.add("certificate", name, f"{claim.name} ({claim.theorem}): {error}")
        wanted = known | {(claim.name, claim.theorem) for claim in claims}
        recorded = _names(self._report.recorded[name])
        for claim_name, theorem in sorted(wanted ^ recorded):
            state = "was recorded, but is not claimed" if wanted < recorded else "was not recorded"
            self._report.add("certificate", name, f"{claim_name} ({theorem}) {state}")
        self._leave(name, known | _names(found), "its calibration statistics were not kept")
        return found

    def _leave(self, name: str, done: Names, why: str) -> None:
        """Take down what was recorded and not computed once more."""
        from qframe.verification import Unchecked

        self._report.unchecked += [
            Unchecked(layer=name, claim=c.claim, theorem=c.theorem, why=why)
            for c in self._report.recorded[name]
            if (c.claim, c.theorem) not in done
        ]

    def _evidence(self, name: str, layer: FoundLayer, weight: torch.Tensor) -> Evidence:
        """Return the layer as it was when it was rounded."""
        record = layer.record
        if record.input_group != self._group:
            self._group, self._shared = record.input_group, {}
            self._statistics = self._kept_statistics(record.input_group, record.columns)
        problem = RoundingProblem(
            name=name,
            weight=weight,
            scheme=record.scheme,
            grid=record.grid.grid(),
            statistics=self._statistics,
            tokens=record.tokens,
        )
        return Evidence(problem, self._quantized(name, layer), self._shared, self._threads)

    def _quantized(self, name: str, layer: FoundLayer) -> QuantizedWeight:
        order = None
        if f"{name}.{ORDER}" in self._manifest.statistics:
            order = self._read(f"{name}.{ORDER}", (layer.record.columns,))
        events = tuple(
            Event(kind=event.kind, layer=name, message=event.message)
            for event in self._manifest.events
            if event.layer == name and event.kind not in HOST_EVENTS
        )
        return dataclasses.replace(
            layer.stored.packed.unpack(), order=order, info=layer.record.info, events=events
        )

    def _kept_statistics(self, group: str, columns: int) -> dict[str, Any]:
        """Return the statistics of an input group, by observer."""
        found = {}
        for name in self._manifest.statistics:
            owner, _, observer = name.rpartition(".")
            if owner == group and observer != ORDER:
                square = observer in (SECOND_MOMENTS, MISMATCH)
                shape = (columns, columns) if square else None
                value = self._read(name, shape)
                if value is not None:
                    found[observer] = value
        return found

    def _read(self, name: str, shape: tuple[int, ...] | None) -> torch.Tensor | None:
        """Return a kept tensor; None where it is not there or is not what it should be."""
        try:
            tensor = self._kept.read(name) if name in self._kept.tensors else None
        except QframeError as error:
            self._report.add("tensor", name, str(error))
            return None
        if tensor is not None and shape is not None and tuple(tensor.shape) != shape:
            self._report.add("tensor", name, f"is {list(tensor.shape)}, expected {list(shape)}")
            return None
        return tensor


def _names(certificates: Iterable[Certificate]) -> Names:
    return {(certificate.claim, certificate.theorem) for certificate in certificates}


def _method(report: VerifyReport, manifest: Manifest, host: Host) -> tuple[Method | None, str]:
    """Return the method with its options, or (None, why not); note other versions."""
    try:
        method = parse_method(host, manifest.recipe)
    except QframeError as error:
        made = next((p for p in manifest.plugins if p.kind == "rounder"), None)
        source = f"; it came from {made.source} {made.version}" if made is not None else ""
        return (
            None,
            f"the plugin of method {manifest.recipe.method!r} is not here{source} ({error})",
        )
    for plugin in manifest.plugins:
        if plugin.kind == "rounder":
            version = host.origin(plugin.kind, plugin.name).version
            if version != plugin.version:
                report.notes.append(
                    f"{plugin.kind} {plugin.name!r} is of {plugin.source} {version} here; the "
                    f"folder was written with {plugin.version}"
                )
    return method, ""
