"""Blocks that are done, as tensors and plain values: what a stopped run hands to the next one.

Of a layer there is kept what it computes with in the calibration pass, and what is stored where
that is something else. From these the next run has the same layer, bit for bit, and so the same
inputs of all later ones: they are not kept, but computed again through the finished layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qframe.contracts import Event, InputGroup, LayerOutline
from qframe.errors import UnfinishedError
from qframe.folds import Division, Folded
from qframe.ranks import ALONE, Ranks
from qframe.report.layers import LayerReport
from qframe.solve import Solved
from qframe.stored import StoredLayer
from qframe.unfinished import Unfinished

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneGroup:
    """All that came of an input group.

    layers       by name
    statistics   that are kept of it
    folded       what divides by the scale of its input; None where nothing does
    left         why nothing does, where there is a scale
    events       of its solving
    """

    layers: Mapping[str, Solved]
    statistics: Mapping[str, torch.Tensor]
    folded: Folded | None
    left: str | None
    events: Sequence[Event]


@dataclass(slots=True)
class DoneBlock:
    """The groups of a block in the order in which they came, and the events beside theirs.

    learned   of a rounder that learned the block
    judged    of the verdicts on its layers
    """

    name: str
    groups: dict[str, DoneGroup] = field(default_factory=dict)
    learned: list[Event] = field(default_factory=list)
    judged: list[Event] = field(default_factory=list)


class Ledger:
    """Takes down what is done, block by block, and gives back what an earlier run had done.

    kept       where it is kept; None for nowhere
    outlines   layer name -> what it is
    ranks      those that are given it back; the first has it
    """

    def __init__(
        self,
        kept: Unfinished | None,
        outlines: Mapping[str, LayerOutline],
        ranks: Ranks = ALONE,
    ) -> None:
        self._kept, self._outlines, self._ranks = kept, outlines, ranks
        self._found: DoneBlock | None = None  # the block that was given back last

    def learned(self, layer: str) -> list[Event] | None:
        """Return the events of learning the block of a layer; None where that is to be done."""
        found = self._block_of(layer)
        return None if found is None else found.learned

    def group(self, group: InputGroup) -> tuple[DoneGroup, list[Event]] | None:
        """Return a group that is done, and what its verdicts said; None where it is to be done.

        The first group of a block comes with what the verdicts on all its layers said.
        """
        found = self._block_of(group.name)
        if found is None:
            return None
        done = found.groups.get(group.name)
        names = [layer.name for layer in group.layers]
        if done is None or list(done.layers) != names:
            there = [list(each.layers) for each in found.groups.values()]
            raise UnfinishedError(
                f"layers {names} read one input, but in the run that was stopped block "
                f"{found.name!r} had {there}; please report this network, and begin anew with "
                f"--restart"
            )
        first = next(iter(found.groups)) == group.name
        return done, found.judged if first else []

    def keep(self, block: DoneBlock, judged: Sequence[Event]) -> None:
        """Keep a block whose reports are complete, unless it is kept. Raises OutputError.

        judged   what the verdicts on its layers said
        """
        if self._kept is None or not block.groups or self._kept.has(next(iter(block.groups))):
            return
        block.judged = list(judged)
        self._kept.add(block.name, *_written(block))

    def _block_of(self, layer: str) -> DoneBlock | None:
        found = self._found
        if found is not None and any(layer in group.layers for group in found.groups.values()):
            return found
        self._found = found = None  # let it go before the next one is read
        there = None if self._kept is None else self._kept.block(layer)
        tensors, record = ({}, None) if there is None else there
        tensors, record = self._ranks.exchange(f"kept of {layer}", tensors, record)[0]
        if record is not None:
            self._found = _read(tensors, record, self._outlines)
        return self._found


# As tensors and plain values --------------------------------------------------------------------


def _written(block: DoneBlock) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a block, and everything else that `_read` makes it of."""
    tensors: Tensors = {}
    groups = [plain_group(tensors, group) for group in block.groups.values()]
    return tensors, {
        "name": block.name,
        "layers": [name for group in block.groups.values() for name in group.layers],
        "groups": groups,
        "learned": plain_events(block.learned),
        "judged": plain_events(block.judged),
    }


def _read(
    tensors: Tensors, record: Mapping[str, Any], outlines: Mapping[str, LayerOutline]
) -> DoneBlock:
    """Return the block that `_written` has made these of."""
    block = DoneBlock(
        record["name"], learned=as_events(record["learned"]), judged=as_events(record["judged"])
    )
    for each in record["groups"]:
        group = as_group(tensors, each, outlines)
        block.groups[next(iter(group.layers))] = group
    return block


def plain_group(tensors: Tensors, group: DoneGroup) -> dict[str, Any]:
    """Add the tensors of a group to others; return everything else that `as_group` makes it of."""
    return {
        "layers": {name: _layer(tensors, each) for name, each in group.layers.items()},
        "statistics": _put(tensors, "statistics", group.statistics),
        "folded": _fold(tensors, group),
        "left": group.left,
        "events": plain_events(group.events),
    }


def as_group(
    tensors: Tensors, record: Mapping[str, Any], outlines: Mapping[str, LayerOutline]
) -> DoneGroup:
    """Return the group that `plain_group` has made these of."""
    return DoneGroup(
        layers={n: _solved(tensors, each, outlines[n]) for n, each in record["layers"].items()},
        statistics=_get(tensors, record["statistics"]),
        folded=None if record["folded"] is None else _folded(tensors, record["folded"], outlines),
        left=record["left"],
        events=as_events(record["events"]),
    )


def _layer(tensors: Tensors, solved: Solved) -> dict[str, Any]:
    running = _put_layer(tensors, solved.running)
    same = solved.stored is solved.running
    return {
        "running": running,
        "stored": None if same else _put_layer(tensors, solved.stored),
        "report": dataclasses.asdict(solved.report),
    }


def _solved(tensors: Tensors, record: Mapping[str, Any], outline: LayerOutline) -> Solved:
    running = _stored(tensors, record["running"], outline)
    same = record["stored"] is None
    return Solved(
        running if same else _stored(tensors, record["stored"], outline),
        running,
        LayerReport.of(record["report"]),
    )


def _put_layer(tensors: Tensors, layer: StoredLayer) -> dict[str, Any]:
    transform = layer.transform
    return {
        "tensors": _put(tensors, "layer", layer.tensors()),
        "threshold": None if transform is None else transform.threshold,  # in float64
    }


def _stored(tensors: Tensors, record: Mapping[str, Any], outline: LayerOutline) -> StoredLayer:
    layer = StoredLayer.of_outline(_get(tensors, record["tensors"]), outline)
    if layer.transform is None:
        return layer
    transform = dataclasses.replace(layer.transform, threshold=record["threshold"])
    return dataclasses.replace(layer, transform=transform)


def _fold(tensors: Tensors, group: DoneGroup) -> dict[str, Any] | None:
    folded = group.folded
    if folded is None:
        return None
    division = stored = None
    if folded.division is not None and folded.stored is not None:
        parts = {"exponents": folded.division.exponents, "rows": folded.division.rows}
        division, stored = _put(tensors, "fold", parts), _put_layer(tensors, folded.stored)
    return {
        "name": folded.name,
        "scale": _put(tensors, "fold", {"scale": folded.scale}),
        "tensors": _put(tensors, "fold", folded.tensors),
        "division": division,
        "stored": stored,
    }


def _folded(
    tensors: Tensors, record: Mapping[str, Any], outlines: Mapping[str, LayerOutline]
) -> Folded:
    name, division, stored = record["name"], None, None
    if record["division"] is not None:
        division = Division(**_get(tensors, record["division"]))
        stored = _stored(tensors, record["stored"], outlines[name])
    scale = _get(tensors, record["scale"])["scale"]
    return Folded(name, scale, _get(tensors, record["tensors"]), division, stored)


def _put(tensors: Tensors, kind: str, found: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Add tensors under names of their own; return name -> that one, in their order.

    Those with the bits of one that is there already, such as codes of a layer whose scale goes into
    a norm, are not added again.
    """
    places = {}
    for name, tensor in found.items():
        tensor = tensor.detach().contiguous()
        same = (key for key, other in tensors.items() if _same(tensor, other))
        key = next(same, None)
        if key is None:
            key = f"{kind}.{len(tensors)}"
            tensors[key] = tensor
        places[name] = key
    return places


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or views of the same numbers."""
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.numel() > 0
    )


def _get(tensors: Tensors, places: Mapping[str, str]) -> Tensors:
    return {name: tensors[key] for name, key in places.items()}


def plain_events(events: Sequence[Event]) -> list[dict[str, str]]:
    """Return events as plain values."""
    return [dataclasses.asdict(event) for event in events]


def as_events(records: Sequence[Mapping[str, str]]) -> list[Event]:
    """Return the events that `plain_events` has made these of."""
    return [Event(**record) for record in records]
