"""Which codes a scheme has: what its number formats say."""

from __future__ import annotations

import dataclasses
from typing import Any

from qframe.contracts import Grid, Observer
from qframe.host import Host, option_names
from qframe.scheme import ActivationScheme, Scheme


def grid_of(host: Host, scheme: Scheme) -> Grid:
    """Return the codes that a scheme's number format has."""
    number_format = host.get("number format", scheme.format_name)
    grid: Grid = number_format.grid(symmetric=scheme.symmetric, scale_rule=scheme.scale_rule)
    return grid


def input_grid_of(host: Host, scheme: Scheme) -> Grid | None:
    """Return the codes of activations: their format's symmetric grid; None where there are none."""
    if scheme.input_activations is None:
        return None
    number_format = host.get("number format", scheme.input_activations.format_name)
    grid: Grid = number_format.grid(symmetric=True, scale_rule="restricted")
    return grid


def reach_observer(host: Host, scheme: ActivationScheme, grid: Grid) -> Observer:
    """Return the observer that a stored scale comes from; one with a field `grid` gets the codes.

    grid   of the scheme
    """
    observer: Any = host.get("observer", str(scheme.static_observer))
    if "grid" in option_names(observer):
        observer = dataclasses.replace(observer, grid=grid)
    found: Observer = observer
    return found
