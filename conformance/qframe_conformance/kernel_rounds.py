"""Calls for kernels whose threads come in blocks: more than a block takes at once.

A block goes round its loops several times, the last time not in full, and stands beside others.
Every shape is a family of its own, so that each run meets all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qframe import KVScheme, Scheme
from qframe_conformance import kernel_draws, kernel_draws_int8, kernel_draws_other

Draw = Callable[[np.random.Generator], dict[str, Any]]
Beyond = tuple[str, tuple[int, ...], Any, Draw]  # the family, `OpCall.shape`, the scheme, operands

W8A8 = Scheme(num_bits=8, strategy="channel", scale_rule="restricted")


def of(op: str) -> Iterator[Beyond]:
    """Yield the calls of an operation."""
    yield from _OF.get(op, lambda: iter(()))()


WEIGHTS = (
    ("few, rounds", 4, 64, (6, 1056, 20)),
    ("few, rounds of 8 bits", 8, 96, (6, 1056, 21)),
    ("one, rounds", 4, 32, (1, 1056, 67)),
    ("one, rounds of 8 bits", 8, 64, (1, 1088, 69)),
    ("few, odd groups", 4, 7, (7, 65, 21)),
    ("few, odd groups of 8 bits", 8, 17, (5, 65, 21)),
    ("one, odd groups", 4, 7, (1, 131, 38)),
    ("one, odd groups of 8 bits", 8, 3, (1, 65, 38)),
    ("one, a step of 8 bits", 8, 64, (1, 32, 67)),
    ("one, whole fours of 8 bits", 8, 32, (1, 64, 36)),
    ("many, tiles", 4, 32, (34, 64, 68)),
    ("many, odd tiles", 4, 16, (35, 65, 67)),
    ("many, tiles of 8 bits", 8, 64, (36, 64, 66)),
)
"""(family, bits, group_size, (tokens, columns, rows))"""

HALVES = (
    ("few, halves", 4, 64, (6, 1056, 22)),
    ("few, halves of 8 bits", 8, 96, (6, 1056, 23)),
    ("one, halves", 4, 32, (1, 1056, 33)),
    ("one, halves of 8 bits", 8, 64, (1, 1088, 35)),
    ("many, halves", 4, 32, (33, 64, 69)),
    ("many, halves of 8 bits", 8, 64, (39, 64, 65)),
)
"""The same, where outputs of 16 bits are rounded at a half."""

AS_DRAWN = frozenset(name for name, *_ in HALVES)
"""Families whose tokens are what they are for, so that none of them is made louder or fainter."""


def _weight_only() -> Iterator[Beyond]:
    for families, draw in ((WEIGHTS, kernel_draws.linear), (HALVES, kernel_draws.halves)):
        for name, bits, size, shape in families:
            scheme = Scheme(num_bits=bits, symmetric=False, group_size=size)
            yield name, shape, scheme, _draw(draw, *shape, scheme)


def _activations() -> Iterator[Beyond]:
    for name, columns in (("rounds", 1100), ("odd rounds", 645)):
        shape = kernel_draws_int8.TOKENS, columns
        yield name, shape, W8A8, _draw(kernel_draws_int8.activations, columns)


def _int8() -> Iterator[Beyond]:
    shapes = (("few", 7, 161, 21), ("few, in place", 6, 256, 18), ("nearly two tiles", 60, 64, 20))
    for name, *shape in shapes:
        yield name, tuple(shape), W8A8, _draw(kernel_draws_int8.codes, *shape)


GROUPS = (
    ("tiles", 4, 32, (34, 64, 68)),
    ("odd tiles", 4, 7, (35, 65, 67)),
    ("tiles of 8 bits", 8, 16, (33, 48, 73)),
)
"""(family, bits, group_size, (tokens, columns, rows))"""


def _groups() -> Iterator[Beyond]:
    for name, bits, size, shape in GROUPS:
        scheme = Scheme(num_bits=bits, symmetric=False, group_size=size)
        yield name, shape, scheme, _draw(kernel_draws_int8.groups, *shape, scheme)


def _outliers() -> Iterator[Beyond]:
    for name, columns, threshold in (("faint", 7, 0.0), ("faint rounds", 645, 6.0)):
        draw = _draw(kernel_draws_int8.faint, columns, 5, threshold)
        yield name, (9, columns, 5), W8A8, draw


def _hadamard() -> Iterator[Beyond]:
    sizes = (
        ("one by one", 1, 1100),
        ("rounds", 2048, 1),
        ("spans", 64, 17),
        ("small spans", 16, 70),
        ("two rounds", 64, 5),
        ("three rounds", 64, 11),
        ("pairs", 512, 3),
    )
    for name, block, blocks in sizes:
        draw = _draw(kernel_draws_other.hadamard, block * blocks, block)
        yield name, (9, block * blocks, block), None, draw


def _attention() -> Iterator[Beyond]:
    axes: tuple[Any, ...] = ("token", "channel")
    every = list(itertools.product(axes, axes))
    found: list[tuple[Any, Any, str, int, int, int | None]]
    found = [(*pair, "wide", 140, 160, 20) for pair in every]
    found += [(*pair, "whole rows", 140, 40, None) for pair in every]
    found += [("token", "channel", f"{count} pieces", 512 * count - 80, 3, 64) for count in (4, 9)]
    for keys, values, name, tokens, width, size in found:
        k, v = (_of_three_bits(axis, size) for axis in (keys, values))
        draw = _draw(kernel_draws_other.attention, (1, 1), tokens, width, k, v)
        yield f"{name}, {keys} {values}", (5, 1, 1, tokens, width), (k, v), draw


def _of_three_bits(axis: Any, size: int | None) -> KVScheme:
    """Return the scheme whose codes lie in two words, now and then."""
    size = 128 if size is None and axis == "channel" else size
    return KVScheme(num_bits=3, axis=axis, group_size=size, symmetric=False)


def _newest() -> Iterator[Beyond]:
    sizes = (
        ("pieces", (2, 1), 1100, 16),
        ("wide", (1, 1), 140, 160),
        ("nearly wide", (1, 1), 130, 66),
        ("4 pieces", (1, 1), 2000, 6),
        ("9 pieces", (1, 1), 4200, 6),
        ("three threads", (1, 1), 140, 40),
        ("four threads", (1, 1), 140, 32),
    )
    for name, heads, tokens, width in sizes:
        draw = _draw(kernel_draws_other.newest, heads, tokens, width, width**-0.5)
        yield name, (4, *heads, tokens, width), None, draw


def _moments() -> Iterator[Beyond]:
    for name, whole in (("runs", False), ("runs of integers", True)):
        yield name, (290, 70), None, _draw(kernel_draws_other.moments, 290, 70, whole=whole)


def _draw(function: Callable[..., Any], *args: Any, **options: Any) -> Draw:
    return lambda rng: function(rng, *args, **options)


_OF: dict[str, Callable[[], Iterator[Beyond]]] = {
    "linear_weight_only": _weight_only,
    "quantize_activations": _activations,
    "linear_int8": _int8,
    "linear_int8_groups": _groups,
    "linear_int8_outliers": _outliers,
    "hadamard": _hadamard,
    "attention_kv": _attention,
    "attention_rotary": _newest,
    "hessian_update": _moments,
}
