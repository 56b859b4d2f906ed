"""Operands of the other operations: Hadamard transforms, attention on codes, second moments."""

from __future__ import annotations

from typing import Any

import numpy as np

from qframe.reference_ops import hadamard_matrix

Array = np.ndarray[Any, Any]
Operands = dict[str, Any]


def hadamard(rng: np.random.Generator, columns: int, block: int) -> Operands:
    """Return tokens to be rotated: ordinary, integers, outliers, single ones, rows of H."""
    outlier = rng.normal(size=columns)
    outlier[rng.integers(columns)] *= 100
    single = np.zeros((2, columns))
    single[[0, 1], rng.integers(0, columns, 2)] = (100, 1)
    planted = np.tile(hadamard_matrix(block)[rng.integers(0, block, 2)], columns // block)
    tokens = [
        rng.normal(size=columns),
        rng.integers(-100, 101, columns),
        outlier,
        *single,
        *planted,
        np.zeros(columns),
        rng.normal(size=columns) * 2.0 ** rng.integers(-12, 13, columns),
    ]
    return {
        "x": np.asarray(tokens, np.float32),
        "signs": rng.choice([-1.0, 1.0], columns).astype(np.float32),
        "block": block,
    }


def attention(
    rng: np.random.Generator,
    heads: tuple[int, int],
    tokens: int,
    width: int,
    levels: int,
    k_group: tuple[int, int],
    v_group: tuple[int, int],
) -> Operands:
    """Return queries and a cache: ordinary ones, huge logits, none at all, one token that wins.

    heads   (heads, kv heads)
    levels  how many codes there are
    """
    batch, (query_heads, kv_heads) = 5, heads
    q = rng.normal(size=(batch, query_heads, width))
    q[1] *= 80  # exp overflows unless the largest logit is taken off
    q[2] = 0  # every token weighs the same
    operands: Operands = {}
    for letter, group in (("k", k_group), ("v", v_group)):
        shape = (batch, kv_heads, -(-tokens // group[0]), -(-width // group[1]))
        scale = np.exp(rng.normal(size=shape)) / levels
        operands[f"{letter}_codes"] = rng.integers(
            0, levels, (batch, kv_heads, tokens, width)
        ).astype(np.int16)
        operands[f"{letter}_scale"] = scale.astype(np.float32)
        operands[f"{letter}_offset"] = (rng.normal(size=shape) - scale * levels / 2).astype(
            np.float32
        )
        operands[f"{letter}_group"] = group
    codes = operands["k_codes"]
    codes[3] = 0
    codes[3, :, rng.integers(tokens)] = levels - 1
    q[3] = np.abs(q[3]) * 16
    if tokens > 1:
        codes[4, :, -1] = levels - 1  # the last token, and the first, matter most
        codes[4, :, 0] = levels - 1
        q[4] = np.abs(q[4])
    return {"q": q.astype(np.float32), **operands}


def moments(rng: np.random.Generator, tokens: int, columns: int, *, whole: bool) -> Operands:
    """Return activations and second moments to add to; above the diagonal stands a mark.

    whole   all of them are integers
    """
    shape = (tokens, columns)
    if whole:
        x = rng.integers(-100, 101, shape).astype(np.float64)
        before = rng.integers(-1000, 1000, (columns, columns)).astype(np.float64)
    else:
        x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 7, columns)
        before = rng.normal(size=(columns, columns)) * 10
    x[rng.integers(tokens)] = 0
    before[np.triu_indices(columns, 1)] = -7.25
    return {"hessian": before, "x": x.astype(np.float32)}
