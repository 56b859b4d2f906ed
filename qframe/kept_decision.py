"""How bits were given to layers, as plain values: measuring that takes long, and is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qframe.allocation import Allocation, LayerBits
from qframe.contracts import Event
from qframe.errors import UnfinishedError
from qframe.recipe import Plan
from qframe.scheme import Scheme

Decision = tuple[Plan, Allocation, Sequence[Event]]


def plain_decision(plan: Plan, allocation: Allocation, events: Sequence[Event]) -> dict[str, Any]:
    """Return what `as_decision` makes the same of."""
    return {
        "schemes": {name: scheme.model_dump() for name, scheme in plan.schemes.items()},
        "left": dict(plan.left),
        "allocation": dataclasses.asdict(allocation),
        "events": [dataclasses.asdict(event) for event in events],
    }


def as_decision(record: Mapping[str, Any]) -> Decision:
    """Return the decision that came back from a file: JSON has made words of numbers in keys.

    Raises UnfinishedError for what `plain_decision` cannot have returned.
    """
    try:
        return _decision(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnfinishedError(
            f"what an unfinished run has decided cannot be read ({type(error).__name__}: {error}); "
            f"begin anew with --restart"
        ) from None


def _decision(record: Mapping[str, Any]) -> Decision:
    schemes = {name: Scheme.model_validate(each) for name, each in record["schemes"].items()}
    found = dict(record["allocation"])
    found["uniform"] = _by_bits(found["uniform"])
    found["layers"] = {
        name: LayerBits(**{**layer, "losses": _by_bits(layer["losses"])})
        for name, layer in found["layers"].items()
    }
    events = [Event(**event) for event in record["events"]]
    return Plan(schemes, record["left"]), Allocation(**found), events


def _by_bits(losses: Mapping[str, float]) -> dict[int, float]:
    return {int(bits): loss for bits, loss in losses.items()}
