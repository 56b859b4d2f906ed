"""Operands of the eight-bit operations: activations, products of codes, LLM.int8()."""

from __future__ import annotations

from typing import Any

import numpy as np

from qframe import Scheme
from qframe_conformance import kernel_draws, kinds

Array = np.ndarray[Any, Any]
Operands = dict[str, Any]

LIMIT = 133_144
"""The most columns for which products of codes up to 127 fit an int32 (B5.c)."""


TOKENS = len(kinds.NASTY) + 9


def activations(rng: np.random.Generator, columns: int) -> Operands:
    """Return tokens to be rounded to eight bits, one of each nasty kind."""
    tokens = [np.asarray(kind(rng, (1, columns)), np.float64)[0] for kind in kinds.NASTY]
    below = -rng.random(columns)  # the largest number is the negative one
    below[0] = -2
    unit_ties = rng.integers(-126, 126, columns) + 1 / 2  # scale 1: exact ties
    unit_ties[-1] = 127
    single = np.zeros(columns)
    single[rng.integers(columns)] = -3
    largest = rng.normal(size=columns)
    largest[rng.integers(columns)] = float(np.finfo(np.float32).max)
    tokens += [
        below,
        unit_ties,
        single,
        np.zeros(columns),
        largest,
        rng.normal(size=columns) * 2.0**-120,
        rng.normal(size=columns) * 2.0**-9,
        rng.integers(-9, 10, columns) * 2.0**-149,  # a 127th of it vanishes
        _near_ties(rng, columns),
    ]
    return {"x": np.asarray(tokens, np.float32)}


def _near_ties(rng: np.random.Generator, columns: int) -> Array:
    """Return a token whose numbers are as near to a half of a step as float32 numbers come."""
    scale = np.float32(np.float32(rng.uniform(1, 2)) * np.float32(127)) / np.float32(127)
    token = ((rng.integers(-126, 126, columns) + 1 / 2) * float(scale)).astype(np.float32)
    token[rng.integers(columns)] = scale * np.float32(127)
    return token


def _codes(rng: np.random.Generator, count: int, columns: int, first: int) -> Array:
    """Return codes of several kinds in turn, [count, columns]."""
    half = columns // 2
    large = rng.integers(32, 64, columns) * 2 + 1  # all large, none a power of two
    balanced = large.copy()
    balanced[half : 2 * half] = -balanced[:half]
    balanced[0] = 11
    single = np.zeros(columns, np.int64)
    single[rng.integers(columns)] = 1
    every = (
        rng.integers(-127, 128, columns),
        large,
        balanced,
        np.full(columns, 127),
        single,
        -large,
        np.zeros(columns, np.int64),
    )
    return np.array([every[(i + first) % len(every)] for i in range(count)])


def codes(rng: np.random.Generator, tokens: int, columns: int, rows: int) -> Operands:
    """Return operands of `linear_int8`; scales differ by orders of magnitude."""
    x, w = _codes(rng, tokens, columns, 0), _codes(rng, rows, columns, 1)
    return {
        "x_codes": x.astype(np.int8),
        "x_scale": np.exp2(rng.uniform(-10, 4, tokens)).astype(np.float32),
        "w_codes": w.astype(np.int8),
        "w_scale": np.exp2(rng.uniform(-10, 0, rows)).astype(np.float32),
    }


def groups(
    rng: np.random.Generator, tokens: int, columns: int, rows: int, scheme: Scheme
) -> Operands:
    """Return operands of `linear_int8_groups`; products cancel within groups of some tokens."""
    x = _codes(rng, tokens, columns, 0)
    made = kernel_draws.weight(rng, scheme, rows, columns)
    scale = np.exp2(rng.uniform(-10, 4, tokens)).astype(np.float32)
    return {"x_codes": x.astype(np.int8), "x_scale": scale, **made}


def outliers(rng: np.random.Generator, columns: int, rows: int, threshold: float) -> Operands:
    """Return operands of `linear_int8_outliers`.

    Columns reach the threshold exactly, from above or from below, in a single token; others come
    just short of it. Some tokens hold nothing but outliers, or nothing but small numbers beside.
    Of half the weights the numbers are what their codes stand for.
    """
    top = threshold or 4.0
    short = float(np.nextafter(np.float32(top), np.float32(0)))
    x = np.clip(rng.normal(size=(13, columns)) * top / 4, -short, short)
    x[1] = short * rng.uniform(0.75, 1, columns)  # all large, of one sign
    x[2] *= 2.0**-9
    x[3] = np.where(np.arange(columns) < columns // 2, x[1], -x[1])  # large sums that cancel
    x[12] = _near_ties(rng, columns) * 2.0**-11
    places = rng.permutation(columns)
    kinds_of = ("at", "below", "short", "large", "far", "at", "below")
    for place, kind in zip(places, kinds_of, strict=False):
        token = int(rng.integers(4, 9))
        if kind == "at":
            x[:, place] = rng.uniform(-0.5, 0.5, 13) * short
            x[token, place] = top
        elif kind == "below":
            x[:, place] = np.abs(x[:, place]) / 2
            x[token, place] = -top
        elif kind == "short":
            x[token, place] = short
        elif kind == "large":
            x[:, place] = 30 * top * rng.choice([-1, 1], 13) * rng.uniform(0.5, 1, 13)
        else:
            x[token, place] = -9 * top
    x = x.astype(np.float32)
    outlier = (np.abs(x) >= threshold).any(0) if threshold else np.zeros(columns, bool)
    x[9, ~outlier] = 0
    x[10, ~outlier] = 0
    x[11] = 0
    x[11, ~outlier] = x[0, ~outlier]
    w = rng.normal(size=(rows, columns)) / 8
    w[0] = rng.uniform(0.75, 1, columns)
    w[rows - 1] = 0 if rows > 1 else w[0]
    made = weight(w.astype(np.float32))
    if rng.random() < 0.5:  # a kernel need not keep such a weight beside its codes
        made["weight"] = made["w_codes"] * made["w_scale"][:, None]
    return {"x": x, "threshold": threshold, **made}


def faint(rng: np.random.Generator, columns: int, rows: int, threshold: float) -> Operands:
    """Return operands of `linear_int8_outliers` with tokens next to the ends of float32.

    The scale of some is the smallest number, or next to it; of another all is 0 but for the largest
    number, which meets weights of 0 unless it is an outlier.
    """
    x = rng.integers(-3, 4, (9, columns)) * 2.0**-149
    x[1] *= 40
    x[2] = rng.normal(size=columns)
    x[3] *= 2.0**20
    x[4] = 0
    place = int(rng.integers(columns))
    x[5, place] = float(np.finfo(np.float32).max)
    w = rng.normal(size=(rows, columns)) / 8
    w[:, place] = 0
    return {"x": x.astype(np.float32), "threshold": threshold, **weight(w.astype(np.float32))}


def weight(w: Array) -> Operands:
    """Return a weight [rows, columns] float32 in eight bits, per channel, and as it is."""
    absmax = np.abs(w).max(1, initial=0)
    scale = np.where(absmax > 0, absmax / np.float32(127), 1).astype(np.float32)
    rounded = np.clip(np.rint(w / scale[:, None]), -127, 127)
    return {"w_codes": rounded.astype(np.int8), "w_scale": scale, "weight": w}
