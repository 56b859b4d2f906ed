"""A statistic of chunks that several ranks have: each observes its own, and all are merged.

Chunks of a slot (`qframe.ranks`) are observed one after another, and slots are merged in their
order, on one rank as on many: a sum of floats has the same bits then, though it is not associative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch

from qframe.contracts import InputGroup, Observer, Statistic
from qframe.errors import PluginError
from qframe.inputs import Chunks
from qframe.ranks import Ranks

_PLAIN = (bool, int, float, str, type(None))


def observed(observer: Observer, group: InputGroup, chunks: Chunks, ranks: Ranks) -> Statistic:
    """Return what an observer sees in the chunks of all ranks.

    Raises PluginError for a statistic that holds what cannot be sent to another rank.
    """
    parts = _parts(observer, group, chunks)
    if ranks.size > 1 and chunks.lengths:
        parts = _exchanged(observer, group, parts, ranks)
    merged: Statistic | None = None
    for part in parts:
        if merged is None:
            merged = part
        else:
            merged.merge(part)
        del part  # before the next one is made
    return observer.start(group) if merged is None else merged


def _parts(observer: Observer, group: InputGroup, chunks: Chunks) -> Iterator[Statistic]:
    """Yield the statistic of each slot that this rank has."""
    pairs = zip(chunks.slots, chunks.tensors, strict=True)
    for _, members in groupby(pairs, key=lambda pair: pair[0]):
        statistic = observer.start(group)
        for _, x in members:
            statistic.update(x)
        yield statistic
        del statistic


def _exchanged(
    observer: Observer, group: InputGroup, own: Iterator[Statistic], ranks: Ranks
) -> Iterator[Statistic]:
    """Yield the statistics of all slots: a rank has slots that follow one another."""
    tensors: dict[str, torch.Tensor] = {}
    records = [
        taken_down(part, observer.start(group), tensors, f"{number}", observer.name)
        for number, part in enumerate(own)
    ]
    for found, others in ranks.exchange(f"{observer.name} of {group.name}", tensors, records):
        for record in others:
            part = observer.start(group)
            restore(part, record, found)
            yield part


def taken_down(
    value: Any, fresh: Any, tensors: dict[str, torch.Tensor], place: str, observer: str
) -> dict[str, Any]:
    """Return the attributes of a statistic as plain values, its tensors beside.

    fresh     one that has seen nothing, which `restore` starts from; constants are as there
    tensors   gets tensors and arrays, under names that begin with `place`

    Raises PluginError for an attribute that cannot be sent.
    """
    record: dict[str, Any] = {}
    others = _attributes(fresh)
    for name, attribute in _attributes(value).items():
        where, known = f"{place}.{name}", others.get(name)
        found = _plain(attribute, tensors, where)
        if found is not None:
            record[name] = found
        elif type(known) is type(attribute) and not _constant(attribute):
            record[name] = {"inside": taken_down(attribute, known, tensors, where, observer)}
        elif type(known) is not type(attribute) or known != attribute:
            raise PluginError(
                f"observer {observer!r}: its statistic has an attribute {name!r} of type "
                f"{type(attribute).__name__}, which cannot be sent to another rank; make it "
                f"tensors, arrays, numbers or texts, or lists and mappings of such, or run on one "
                f"rank"
            )
    return record


def restore(fresh: Any, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a statistic that has seen nothing what `taken_down` has taken down."""
    for name, entry in record.items():
        if "inside" in entry:
            restore(getattr(fresh, name), entry["inside"], tensors)
        else:
            setattr(fresh, name, _restored(entry, tensors))


def _plain(value: Any, tensors: dict[str, torch.Tensor], place: str) -> dict[str, Any] | None:
    """Return what `_restored` makes the same value of; None for one of another kind."""
    if isinstance(value, _PLAIN):
        return {"value": value}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, (np.ndarray, np.generic)):
        tensors[place] = torch.from_numpy(np.array(value))
        return {"array" if isinstance(value, np.ndarray) else "number": place}
    if type(value) in (list, tuple):
        items = [_plain(each, tensors, f"{place}.{i}") for i, each in enumerate(value)]
        return None if None in items else {type(value).__name__: items}
    if type(value) is dict and all(isinstance(key, _PLAIN) for key in value):
        pairs = [(k, _plain(v, tensors, f"{place}.{i}")) for i, (k, v) in enumerate(value.items())]
        return None if any(each is None for _, each in pairs) else {"dict": pairs}
    return None


def _restored(entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    [(kind, found)] = entry.items()
    match kind:
        case "bytes":
            return bytes.fromhex(found)
        case "tensor":
            return tensors[found]
        case "array":
            return tensors[found].numpy()
        case "number":
            return tensors[found].numpy()[()]
        case "list" | "tuple":
            items = [_restored(each, tensors) for each in found]
            return items if kind == "list" else tuple(items)
        case "dict":
            return {key: _restored(each, tensors) for key, each in found}
    return found


def _constant(value: Any) -> bool:
    """Return whether a value is never changed, so that a statistic that is new has the same."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return getattr(parameters, "frozen", False) or not _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, {} for what has none."""
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) or ()]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}
