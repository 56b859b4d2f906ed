"""A statistic of chunks that several ranks have: each observes its own, and all are merged.

Chunks of a slot (`qframe.ranks`) are observed one after another, and slots are merged in their
order, on one rank as on many: a sum of floats has the same bits then, though it is not associative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

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

    fresh     one that has seen nothing, which `restore` starts from: what is the same there is left
    tensors   gets those, under names that begin with `place`
    """
    record: dict[str, Any] = {}
    for name, attribute in _attributes(value).items():
        known = _attributes(fresh).get(name)
        where = f"{place}.{name}"
        if isinstance(attribute, torch.Tensor):
            tensors[where] = attribute
            record[name] = {"tensor": where}
        elif isinstance(attribute, _PLAIN):
            record[name] = {"value": attribute}
        elif type(known) is not type(attribute) or (_constant(attribute) and known != attribute):
            raise PluginError(
                f"observer {observer!r}: its statistic has an attribute {name!r} of type "
                f"{type(attribute).__name__}, which cannot be sent to another rank; make it a "
                f"tensor, a number or a text, or run on one rank"
            )
        elif not _constant(attribute):
            inside = taken_down(attribute, known, tensors, where, observer)
            if inside:
                record[name] = {"inside": inside}
    return record


def restore(fresh: Any, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a statistic that has seen nothing what `taken_down` has taken down."""
    for name, entry in record.items():
        if "tensor" in entry:
            setattr(fresh, name, tensors[entry["tensor"]])
        elif "value" in entry:
            setattr(fresh, name, entry["value"])
        else:
            restore(getattr(fresh, name), entry["inside"], tensors)


def _constant(value: Any) -> bool:
    """Return whether a value is never changed, so that a statistic that is new has the same."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return getattr(parameters, "frozen", False) or not _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, {} for what has none."""
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) or ()]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}
