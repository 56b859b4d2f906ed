"""Values of any form: the arrays in them, copies, and whether two are the same to the last bit.

What a statistic is worth is any value: a tensor, a pair of arrays, a dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qframe_conformance.checks import Violation, require, same_bits

Leaves = dict[str, npt.NDArray[Any]]


def leaves(value: Any, name: str = "value") -> Leaves:
    """Return the arrays and numbers of a value, by where they stand in it.

    Tensors, arrays, numbers and words, and tuples, lists, mappings and dataclasses of them. Raises
    Violation for anything else: nobody could tell whether two of those are the same.
    """
    return dict(_leaves(value, name))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if isinstance(value, torch.Tensor):
        yield name, value.detach().numpy()
    elif isinstance(value, (np.ndarray, np.generic, bool, int, float, str)):
        yield name, np.asarray(value)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from _leaves(getattr(value, part.name), f"{name}.{part.name}")
    elif value is not None:
        raise Violation(
            f"{name} is a {type(value).__name__}; return tensors, arrays, numbers, or tuples, "
            f"mappings and dataclasses of them"
        )


def copied(value: Any) -> Leaves:
    """Return copies of the leaves of a value."""
    return {name: array.copy() for name, array in leaves(value).items()}


def same_value(wanted: Leaves, value: Any, what: str) -> None:
    """Raise Violation unless a value has the form and bits of another one, which was `copied`.

    Only the sign of a zero says nothing: of 0 and -0 either is the maximum.
    """
    found = leaves(value)
    require(wanted.keys() == found.keys(), f"{what}: {sorted(found)}, expected {sorted(wanted)}")
    for name, array in wanted.items():
        same_bits(_unsigned_zeros(array), _unsigned_zeros(found[name]), f"{what}: {name}")


def _unsigned_zeros(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers with 0 in place of -0."""
    return array + 0 if np.issubdtype(array.dtype, np.inexact) else array


def finite(value: Any) -> bool:
    """Return whether all numbers of a value are finite."""
    return all(
        bool(np.isfinite(array).all())
        for array in leaves(value).values()
        if np.issubdtype(array.dtype, np.inexact)
    )
