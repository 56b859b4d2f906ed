"""Which layers of a block read one input, and what could divide that: found by watching it run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qframe import feeder_search, fold_search
from qframe.calibration import Arrival, Lockstep
from qframe.contracts import InputGroup
from qframe.fold_search import Source
from qframe.folds import Fold
from qframe.model import Network
from qframe.ranks import ALONE, Ranks

Candidate = Fold | Source | str
"""The norm, or the layer, that may divide by the scale of an input; or why nothing can."""

Members = list[tuple[tuple[str, ...], Source]]
"""Layers that share an input, and where it comes from, for each input; names within the block."""


class Groups:
    """Finds the input groups of blocks, when their chunks are at the door.

    layers   names of those that are quantized
    folds    whether it is worth looking into what could divide
    ranks    those that share the chunks; the one with the first looks, and tells the others
    """

    def __init__(
        self, network: Network, layers: Iterable[str], *, folds: bool, ranks: Ranks = ALONE
    ) -> None:
        self._network, self._layers = network, list(layers)
        self._folds, self._ranks = folds, ranks
        self._makes: dict[tuple[Any, ...], Members] = {}
        self._searched: set[str] = set()  # blocks whose groups are known
        self._groups: dict[str, InputGroup] = {}
        # name of a group -> its norm, or the layer before it, or why it has none
        self._candidates: dict[str, Candidate] = {}

    def of(self, layer: str) -> InputGroup:
        """Return the group of a layer: of no others, unless some were found."""
        return self._groups.get(layer) or InputGroup(layers=(self._network.layers[layer],))

    def outside(self, layer: str) -> None:
        """Say that a layer is in no block."""
        self._candidates[layer] = fold_search.OUTSIDE

    def candidate(self, group: str) -> Candidate:
        """Return what can divide by a scale of a group's input, once."""
        return self._candidates.pop(group, fold_search.UNSEEN)

    def find(self, name: str, steps: Lockstep, arrivals: Mapping[int, Arrival]) -> None:
        """Learn which layers of a block share an input, by watching the block run once.

        Blocks of the same make have the same groups, so one of each make is watched. Where their
        inputs come from norms, every block is tried: what folds must be right for each.
        """
        if name in self._searched:
            return
        self._searched.add(name)
        prefix = f"{name}." if name else ""
        block = self._network.blocks[name]
        inside = [layer for layer in self._layers if layer.startswith(prefix)]
        shapes = [self._network.layers[layer] for layer in inside]
        sizes = (
            (layer.removeprefix(prefix), i.rows, i.columns)
            for layer, i in zip(inside, shapes, strict=True)
        )
        parts = ((short, type(part)) for short, part in block.named_modules())
        make = (type(block), *sizes, *parts)
        known = self._makes.get(make)

        place, own = f"who looks at {name}", min(arrivals, default=None)
        lowest = [number for _, number in self._ranks.exchange(place, {}, own)]
        looking = min((n, rank) for rank, n in enumerate(lowest) if n is not None)[1]
        tensors: dict[str, torch.Tensor] = {}
        record: dict[str, Any] = {}
        if looking == self._ranks.rank:
            found = self._look(name, steps, arrivals[lowest[looking]], known)
            record = _plain(tensors, *found)
        if self._ranks.size > 1:
            every = self._ranks.exchange(f"the groups of {name}", tensors, record)
            if looking != self._ranks.rank:
                found = _restored(*every[looking])
        self._makes[make], candidates = found
        self._candidates |= candidates
        for group in self._full(prefix, self._makes[make]):
            for layer in group.layers:
                self._groups[layer.name] = group

    def _look(
        self, name: str, steps: Lockstep, arrival: Arrival, known: Members | None
    ) -> tuple[Members, dict[str, Candidate]]:
        """Return the groups of a block, and what can divide for each, by its full name.

        known   the groups, where a block of the same make has been watched
        """
        prefix = f"{name}." if name else ""
        block = self._network.blocks[name]
        run: fold_search.Run | None = None
        if known is None:
            run = fold_search.look(steps, block, arrival, digests=self._folds)
            known = _shared(run, prefix)
            if self._folds:
                known = [
                    (members, source)
                    if source.name
                    else (members, self._feeder(block, steps, arrival, run, members, prefix))
                    for members, source in known
                ]
        if not self._folds:
            return known, {}
        groups = zip(self._full(prefix, known), (source for _, source in known), strict=True)
        return known, fold_search.find(self._network, name, steps, arrival, list(groups), run)

    def _full(self, prefix: str, known: Members) -> list[InputGroup]:
        layers = self._network.layers
        return [
            InputGroup(layers=tuple(layers[f"{prefix}{short}"] for short in members))
            for members, _ in known
        ]

    def _feeder(
        self,
        block: nn.Module,
        steps: Lockstep,
        arrival: Arrival,
        run: fold_search.Run,
        members: Sequence[str],
        prefix: str,
    ) -> Source:
        """Return the layer of a block whose rows are the channels of a group's input."""
        full = [f"{prefix}{short}" for short in members]
        return feeder_search.feeder(steps, block, arrival, run, full, self._layers, prefix)


def _shared(run: fold_search.Run, prefix: str) -> Members:
    """Return which layers read the very same input, and the norm that it comes from."""
    # `run` keeps the inputs alive, so identities are distinct.
    shared: dict[int, tuple[str, list[str]]] = {}
    for layer, x in run.inputs:
        _, users = shared.setdefault(id(x), (run.source(x), []))
        users.append(layer.removeprefix(prefix))
    seen: set[str] = set()
    groups = []
    for norm, users in shared.values():  # one that runs twice belongs to its first
        fresh = tuple(m for m in dict.fromkeys(users) if m not in seen)
        seen.update(fresh)
        groups.append((fresh, Source(norm)))
    return [(group, source) for group, source in groups if group]


# As tensors and plain values --------------------------------------------------------------------


def _plain(
    tensors: dict[str, torch.Tensor], members: Members, candidates: Mapping[str, Candidate]
) -> dict[str, Any]:
    """Add tensors to others; return everything else that `_restored` makes the same of."""
    return {
        "members": [[list(names), _plain_one(tensors, source)] for names, source in members],
        "candidates": {name: _plain_one(tensors, each) for name, each in candidates.items()},
    }


def _plain_one(tensors: dict[str, torch.Tensor], found: Candidate) -> Any:
    if isinstance(found, str):
        return found
    kind = type(found).__name__
    parts = (
        {"rows": found.rows}
        if isinstance(found, Source)
        else {"weight": found.weight, "bias": found.bias}
    )
    places = {}
    for part, tensor in parts.items():
        places[part] = None if tensor is None else f"{len(tensors)}"
        if tensor is not None:
            tensors[f"{len(tensors)}"] = tensor
    return {"kind": kind, "name": found.name, "parts": places}


def _restored(
    tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> tuple[Members, dict[str, Candidate]]:
    """Return what `_plain` has made these of."""
    members = [
        (tuple(names), _restored_one(tensors, source)) for names, source in record["members"]
    ]
    candidates = {n: _restored_one(tensors, each) for n, each in record["candidates"].items()}
    return members, candidates


def _restored_one(tensors: Mapping[str, torch.Tensor], record: Any) -> Any:
    if isinstance(record, str):
        return record
    parts = {n: None if place is None else tensors[place] for n, place in record["parts"].items()}
    return {"Source": Source, "Fold": Fold}[record["kind"]](record["name"], **parts)
