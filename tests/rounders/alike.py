"""What the tests of several rounders ask of what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numba
import torch

from qframe import QuantizedWeight, RoundingProblem


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two layers have the same codes, scales, groups and order, bit for bit."""
    names = ["codes", "scale", "zero_point", "group_index"]
    if one.order is not None or other.order is not None:
        names.append("order")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def depends_on_rows_alone(
    run: Callable[[RoundingProblem], QuantizedWeight], drawn: RoundingProblem, rows: Sequence[int]
) -> bool:
    """Whether the bits of some rows depend neither on threads nor on the other rows."""
    made = run(drawn)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        single = run(drawn)
    finally:
        numba.set_num_threads(threads)
    chosen = torch.tensor(rows)
    alone = run(dataclasses.replace(drawn, weight=drawn.weight[chosen]))
    return (
        same(made, single)
        and torch.equal(alone.codes, made.codes[chosen])
        and torch.equal(alone.scale, made.scale[chosen])
    )
