"""Layers that ranks have solved, each some, put together: every rank has all of them then."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qframe.contracts import Event, InputGroup, LayerOutline
from qframe.kept_blocks import DoneGroup, as_events, as_group, plain_events, plain_group
from qframe.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a group.

    done     with those layers that it has solved, and events that are no layer's
    events   of its layers
    orders   of its layers, as `SolvedGroup` has them
    """

    done: DoneGroup
    events: Mapping[str, Sequence[Event]]
    orders: Mapping[str, torch.Tensor]

    def whole(self) -> DoneGroup:
        """Return the group, where this rank has solved all its layers."""
        return _together(self.done, {name: self for name in self.done.layers})


def whole_groups(
    ranks: Ranks,
    groups: Sequence[InputGroup],
    owners: Mapping[str, int],
    own: Mapping[str, Part],
    outlines: Mapping[str, LayerOutline],
) -> list[DoneGroup]:
    """Return groups with the layers of all ranks.

    owners   layer -> the rank that has solved it
    own      group -> what this rank has of it; nothing where it was not concerned
    """
    tensors: dict[str, torch.Tensor] = {}
    record = {name: _plain(tensors, part) for name, part in own.items()}
    every = ranks.exchange(f"the layers of {groups[0].name}", tensors, record)
    return [_whole(ranks, group, owners, own.get(group.name), every, outlines) for group in groups]


def _whole(
    ranks: Ranks,
    group: InputGroup,
    owners: Mapping[str, int],
    own: Part | None,
    every: Sequence[tuple[dict[str, torch.Tensor], Any]],
    outlines: Mapping[str, LayerOutline],
) -> DoneGroup:
    parts = {
        rank: own if rank == ranks.rank and own is not None else _part(*each, group.name, outlines)
        for rank, each in enumerate(every)
        if group.name in each[1]
    }
    done = next(iter(parts.values())).done if own is None else own.done
    return _together(done, {layer.name: parts[owners[layer.name]] for layer in group.layers})


def _together(done: DoneGroup, parts: Mapping[str, Part]) -> DoneGroup:
    """Return a group with each layer from the part that has it, in their order."""
    statistics, events = dict(done.statistics), list(done.events)
    for layer, part in parts.items():
        orders = part.orders.items()
        statistics.update({n: order for n, order in orders if n.startswith(f"{layer}.")})
        events.extend(part.events[layer])
    layers = {layer: part.done.layers[layer] for layer, part in parts.items()}
    return dataclasses.replace(done, layers=layers, statistics=statistics, events=events)


def _plain(tensors: dict[str, torch.Tensor], part: Part) -> dict[str, Any]:
    """Add tensors to others; return everything else that `_part` makes the same of."""
    # Ranks that share inputs have the same statistics, and the same norm divides.
    done = dataclasses.replace(part.done, statistics={}, folded=None)
    orders = {}
    for name, order in part.orders.items():
        orders[name] = f"order.{len(tensors)}"
        tensors[orders[name]] = order
    return {
        "done": plain_group(tensors, done),
        "events": {name: plain_events(events) for name, events in part.events.items()},
        "orders": orders,
    }


def _part(
    tensors: dict[str, torch.Tensor],
    record: Mapping[str, Any],
    group: str,
    outlines: Mapping[str, LayerOutline],
) -> Part:
    found = record[group]
    return Part(
        as_group(tensors, found["done"], outlines),
        {name: as_events(events) for name, events in found["events"].items()},
        {name: tensors[place] for name, place in found["orders"].items()},
    )
