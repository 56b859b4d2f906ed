"""What a layer gets when it cannot be, or had better not be, done as asked: rounding to nearest.

And what is to be known of its calibration beforehand: whether one token outweighs all others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from qframe import claims, rounding
from qframe.contracts import Event, QuantizedWeight, Rounder, RoundingProblem
from qframe.errors import OverfitError, QframeError
from qframe.recipe import Recipe
from qframe.report.measure import OutputErrors
from qframe.transforms import InputTransform

log = logging.getLogger("qframe")

FALLBACK = "round to nearest (fallback)"  # the method of a layer that could not be done as asked
OVERFIT = "round to nearest (overfit)"  # of one that did worse than that on held-out tokens
NEAREST_CLAIMS = (claims.HalfStep(), claims.SchemeScale(), claims.Covers())  # of both
HOST_EVENTS = frozenset(
    {
        "fallback",
        "overfit",
        "massive token",
        "untied",
        "runs again",
        "certificate violated",
        "sensitivity",
    }
)
"""Kinds of events that are not a rounder's own."""


def claims_about(rounder: Rounder | None, method: str) -> tuple[Any, ...]:
    """Return what is claimed of a layer that was done by `method`: the rounder's, or nearest's.

    rounder   None where it is not known; then it claims nothing
    """
    return NEAREST_CLAIMS if method in (FALLBACK, OVERFIT) else claims.claims_of(rounder)


class Fallbacks:
    """Decides by the recipe what happens instead, and adds it to the events of a run."""

    def __init__(self, recipe: Recipe, events: list[Event]) -> None:
        self._recipe, self._events = recipe, events

    def record(self, error: QframeError, layer: str, instead: str) -> None:
        """Record that a layer was not done as asked; raise the error where that must not be."""
        if self._recipe.on_fallback == "error":
            raise error
        self._add(Event(kind="fallback", layer=layer, message=f"{instead}: {error}"))

    def overfit(
        self,
        problem: RoundingProblem,
        quantized: QuantizedWeight,
        original: torch.Tensor,
        transform: InputTransform | None,
        kept: torch.Tensor | None,
        errors: OutputErrors,
    ) -> QuantizedWeight | None:
        """Return the layer rounded to nearest, where that is to be preferred; else None.

        transform, kept   of the input, and the weights that it keeps

        It is where the recipe asks for it, and less is lost of the outputs of held-out tokens.
        Raises OverfitError where the recipe asks for that.
        """
        held_out = errors.held_out()
        if self._recipe.on_overfit == "warn" or not held_out.moments:
            return None
        nearest = rounding.to_nearest(problem)
        values = [rounding.dequantize(each) for each in (quantized, nearest)]
        if transform is not None:
            values = [transform.undo(transform.with_kept(each, kept)) for each in values]
        [(found, plain)] = held_out.relative(original, values)
        if not found > plain:
            return None
        message = (
            f"its output error on held-out tokens is {found:.3%}, and {plain:.3%} when it is "
            f"rounded to nearest"
        )
        self.overfitted(f"layer {problem.name!r}", problem.name, message)
        return nearest

    def overfitted(self, what: str, name: str, message: str) -> None:
        """Record that a layer or block does worse than nearest; raise OverfitError if it must."""
        if self._recipe.on_overfit == "error":
            raise OverfitError(
                f"{what}: {message}; give more calibration text, or text of more kinds, or "
                f"on_overfit='rtn'"
            )
        self._add(Event(kind="overfit", layer=name, message=message))

    def _add(self, event: Event) -> None:
        self._events.append(event)
        log.warning("%s: %s", event.layer, event.message)


def energies(chunks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return of each chunk of inputs [tokens, columns] what `massive_token` looks at, [4] float64.

    The energy of all its tokens, that of the one with most, which one that is, and how many tokens.
    """
    found = []
    for x in chunks:
        each = x.square().sum(1, dtype=torch.float64)
        token = int(each.argmax()) if len(each) else 0
        total, most = (each.cumsum(0)[-1], each[token]) if len(each) else (0.0, 0.0)
        found.append(torch.tensor([total, most, token, len(each)], dtype=torch.float64))
    return found


def massive_token(layer: str, found: Sequence[torch.Tensor]) -> list[Event]:
    """Return an event where one token has most of the energy that a layer is calibrated on.

    layer   the first of those that read the input
    found   the `energies` of all chunks

    That energy is trace(H). Attention sinks are such tokens (Sun et al., Massive Activations,
    arXiv:2402.17762); the layer is then fitted to one token, and hardly to the others.
    """
    total, most, tokens, where = 0.0, 0.0, 0, ""
    for number, (energy, largest, token, count) in enumerate(map(torch.Tensor.tolist, found)):
        total, tokens = total + energy, tokens + round(count)
        if largest > most:
            most, where = largest, f"token {round(token)} of chunk {number}"
    if most <= total / 2:
        return []
    message = (
        f"{where} has {most / total:.0%} of the energy of all {tokens} calibration "
        f"tokens: the layer is fitted to it, and hardly to the others"
    )
    return [Event(kind="massive token", layer=layer, message=message)]
