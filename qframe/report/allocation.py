"""How bits were given to layers, on one screen: by kind of layer, and how many got how many."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import RenderableType

from qframe.allocation import Allocation, LayerBits
from qframe.report.table import facts, figures, stacked, table, titled

UNITS = {"KL divergence": "nats"}


def allocation_table(found: Allocation, *, all_layers: bool = False) -> RenderableType:
    """Return what was chosen, what it is predicted to cost, and what the same bits cost uniformly.

    all_layers   a row for each layer, else for each kind of it: the last part of its name
    """
    every = sorted({bits for layer in found.layers.values() for bits in layer.losses})
    rows = _single(found) if all_layers else _kinds(found)
    made = table(
        "layer" if all_layers else "kind",
        "bits",
        "share %",
        *(f"at {bits}" for bits in every),
        names=2,
    )
    for name, members in rows.items():
        loss = sum(layer.loss for layer in members)
        at = {bits: [layer.losses.get(bits) for layer in members] for bits in every}
        made.add_row(
            name,
            _bits(members),
            figures(100 * loss / found.predicted if found.predicted else 0.0),
            *(_sum(values) for values in at.values()),
        )
    return stacked(titled(_title(found), made), facts(lines(found)))


def lines(found: Allocation) -> dict[str, str]:
    """Return the allocation in words."""
    counts = ", ".join(f"{count} of {bits} bits" for bits, count in found.counts().items())
    unit = UNITS.get(found.measure, "")
    predicted = f"{figures(found.predicted)} {unit}".rstrip()
    for bits, loss in found.uniform.items():
        if bits == max(found.uniform):
            predicted += f"; with {bits} bits everywhere {figures(loss)} {unit}".rstrip()
    said = {
        "layers": counts,
        "bits": f"{found.average_bits:.4f} per weight, of at most {found.target_bits:g}",
        "predicted": f"{found.measure} {predicted}, to second order and rounded to nearest",
    }
    if found.tried:
        each = ", ".join(
            f"{'*' if way == found.chosen else ''}{way} {figures(loss)}"
            for way, loss in found.tried.items()
        )
        said["tried"] = f"KL with all layers rounded to nearest, nats: {each}; * was taken"
    if found.gap and math.isfinite(found.gap):
        said["gap"] = f"another choice might have had {figures(found.gap)} less"
    return said


def _title(found: Allocation) -> str:
    return (
        f"bits by sensitivity: predicted {found.measure} at each number of bits, of layers alone, "
        f"on {found.tokens:,} tokens"
    )


def _single(found: Allocation) -> Mapping[str, list[LayerBits]]:
    return {name: [layer] for name, layer in found.layers.items()}


def _kinds(found: Allocation) -> Mapping[str, list[LayerBits]]:
    kinds: dict[str, list[LayerBits]] = {}
    for name, layer in found.layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    return kinds


def _bits(members: list[LayerBits]) -> str:
    """Return how many layers got how many bits: "3 x4, 4 x26"; the bits alone of a single one."""
    every = [layer.num_bits for layer in members]
    if len(members) == 1:
        return f"{every[0]}{' (given)' if members[0].why else ''}"
    return ", ".join(f"{bits} x{every.count(bits)}" for bits in sorted(set(every)))


def _sum(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return figures(sum(known)) if len(known) == len(values) else ""
