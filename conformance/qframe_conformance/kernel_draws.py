"""Operands of the operations on weights: `dequantize` and `linear_weight_only`.

One call holds tokens and rows of many kinds side by side, so that a run meets them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qframe import Scheme

Array = np.ndarray[Any, Any]
Operands = dict[str, Any]

COLUMNS = (7, 1, 2, 17, 33, 65, 131, 257)
ROWS = (3, 1, 8, 17, 33, 131)
GROUPS = (3, 1, 7, 32, 64)


def weight(rng: np.random.Generator, scheme: Scheme, rows: int, columns: int) -> Operands:
    """Return a quantized weight: rows with scales that are powers of two, of 16 and of 32 bits."""
    levels = 1 << scheme.num_bits
    lowest = -levels // 2 if scheme.symmetric else 0
    codes = rng.integers(lowest, lowest + levels, (rows, columns))
    codes[:, rng.integers(columns)] = lowest + levels - 1
    codes[:, rng.integers(columns)] = lowest
    shape = scheme.scale_shape(rows, columns)
    scale = np.exp(rng.normal(size=shape)).astype(np.float32) / 8
    kinds = (np.arange(shape[0]) + rng.integers(3)) % 3
    scale[kinds == 0] = 2.0 ** rng.integers(-4, 0, shape)[kinds == 0]
    scale[kinds == 1] = scale[kinds == 1].astype(np.float16)
    zero = np.zeros(shape, np.int64)
    if not scheme.symmetric:
        zero = rng.integers(lowest, lowest + levels, shape)
        zero[:, rng.integers(shape[1])] = lowest + levels - 1
        if int(rng.integers(2)):  # zero points need not be codes
            zero += rng.choice(np.array([-700, -3, 0, 3, 700]), shape)
    return {
        "codes": codes.astype(np.int16),
        "scale": scale,
        "zero_point": zero.astype(np.int16),
        "group_index": (np.arange(columns) // scheme.group_width(columns)).astype(np.int32),
    }


def activations(rng: np.random.Generator, columns: int, width: int) -> Array:
    """Return tokens for a weight whose groups have `width` columns, [17, columns] float32.

    Ordinary ones, integers, tokens of one sign, some that cancel, tokens from tiny to huge, zeros,
    a 1 among numbers just below half its last bit, and tokens that are 1 in a single place.
    """
    cancels = rng.normal(size=columns)
    cancels[1::2] = -cancels[0 : columns - columns % 2 : 2]
    lost = np.full(columns, np.nextafter(np.float32(2.0**-24), np.float32(0)))
    lost[0] = 1
    tokens = [
        rng.normal(size=columns),
        rng.integers(-8, 9, columns),
        rng.integers(-8, 9, columns),
        rng.integers(0, 9, columns),
        1 / 2 + rng.random(columns),
        cancels,
        rng.normal(size=columns) * 2.0 ** rng.integers(-12, 13, columns),
        np.zeros(columns),
        lost,
    ]
    last_group = (columns - 1) // width * width
    places = [0, columns - 1, width - 1, width, last_group, *rng.integers(0, columns, 3)]
    single = np.zeros((8, columns))
    single[np.arange(8), np.clip(places, 0, columns - 1)] = 1
    return np.concatenate([tokens, single]).astype(np.float32)


def linear(
    rng: np.random.Generator, tokens: int, columns: int, rows: int, scheme: Scheme
) -> Operands:
    """Return operands of `linear_weight_only` for any number of tokens, of any kinds."""
    width = scheme.group_width(columns)
    found = np.concatenate([activations(rng, columns, width) for _ in range(-(-tokens // 17))])
    chosen = rng.permutation(len(found))[:tokens]
    return {"x": found[chosen], **weight(rng, scheme, rows, columns)}


HALVES = (101, 1001)
"""Three times these lies half way between two numbers of bfloat16, and of float16; up is even."""

HALF_STEP, LOST_STEP = 2.0**6, 2.0**-24
"""What they are multiples of, and numbers that are lost where they are added to three of them."""


def halves(
    rng: np.random.Generator, tokens: int, columns: int, rows: int, scheme: Scheme
) -> Operands:
    """Return operands of `linear_weight_only` whose outputs of 16 bits are rounded at a half.

    All that is added to three times the largest number of a token is too small to change it, but a
    sum that is cut, or rounded down, ends below the half: the output is another one.
    """
    shape = scheme.scale_shape(rows, columns)
    codes = rng.integers(1, 8, (rows, columns))
    codes[:, rng.integers(columns)] = (1 << scheme.num_bits) - 1  # which as few bits do not hold
    x = np.full((tokens, columns), -LOST_STEP)
    largest = rng.integers(0, columns, tokens)
    codes[:, largest] = 3
    x[np.arange(tokens), largest] = HALF_STEP * np.resize(rng.permutation(HALVES), tokens)
    return {
        "x": (x * rng.choice([-1, 1], (tokens, 1))).astype(np.float32),
        "codes": codes.astype(np.int16),
        "scale": np.full(shape, 2.0 ** rng.integers(-6, -3), np.float32),
        "zero_point": np.zeros(shape, np.int16),
        "group_index": (np.arange(columns) // scheme.group_width(columns)).astype(np.int32),
    }


def shuffled_groups(rng: np.random.Generator, operands: Operands) -> Operands:
    """Return the weight with groups of scattered columns, as GPTQ's activation order makes them."""
    return {**operands, "group_index": rng.permutation(operands["group_index"])}
