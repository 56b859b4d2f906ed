"""Operands of the other operations: transforms, norms, attention on codes, second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qframe import KVScheme
from qframe.packing import pack_codes
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


def norm(rng: np.random.Generator, columns: int) -> Operands:
    """Return tokens of a norm: ordinary, faint, loud, none, single ones, columns of all sizes."""
    single = np.zeros(columns)
    single[rng.integers(columns)] = 100
    outlier = rng.normal(size=columns)
    outlier[rng.integers(columns)] *= 1000
    tokens = [
        rng.normal(size=columns),
        rng.normal(size=columns) * 1e-3,  # where eps matters
        rng.normal(size=columns) * 1e-20,  # where it is all
        rng.normal(size=columns) * 1e12,
        rng.normal(size=columns) + 10,  # its mean is no variance
        outlier,
        single,
        np.zeros(columns),
        rng.normal(size=columns) * 2.0 ** rng.integers(-12, 13, columns),
    ]
    weight = rng.normal(size=columns)
    weight[rng.integers(columns)] = 0
    return {
        "x": np.asarray(tokens, np.float32),
        "weight": weight.astype(np.float32),
        "eps": float(rng.choice([1e-5, 1e-6, 1e-12, 0.25])),
    }


def attention(
    rng: np.random.Generator,
    heads: Sequence[int],
    tokens: int,
    width: int,
    k_scheme: KVScheme,
    v_scheme: KVScheme,
) -> Operands:
    """Return queries and a cache: ordinary ones, huge logits, none at all, one token that wins.

    heads   (heads, kv heads)
    """
    batch, (query_heads, kv_heads) = 5, heads
    q = rng.normal(size=(batch, query_heads, width))
    q[1] *= 80  # exp overflows unless the largest logit is taken off
    q[2] = 0  # every token weighs the same
    operands: Operands = {}
    for letter, scheme in (("k", k_scheme), ("v", v_scheme)):
        grid = scheme.grid
        count = -(-tokens // scheme.step) * scheme.step  # of a group that was cropped, all
        codes = rng.integers(grid.qmin, grid.qmax + 1, (batch, kv_heads, count, width))
        if letter == "k":
            codes[3] = grid.qmin
            codes[3, :, rng.integers(tokens)] = grid.qmax
            if tokens > 1:  # the last token, and the first, matter most
                codes[4, :, [0, tokens - 1]] = grid.qmax
        shape = scheme.scale_shape((batch, kv_heads, tokens, width))
        scale = np.exp(rng.normal(size=shape)) / (1 << scheme.num_bits)
        offset = rng.normal(size=shape) - scale * (grid.qmax + grid.qmin + 1) / 2
        operands[f"{letter}_words"] = packed(codes - grid.qmin, scheme)
        operands[f"{letter}_scale"] = scale.astype(np.float32)
        offset = np.zeros(shape) if scheme.symmetric else offset
        operands[f"{letter}_offset"] = offset.astype(np.float32)
        operands[f"{letter}_scheme"] = scheme
    q[3] = np.abs(q[3]) * 16
    if tokens > 1:
        q[4] = np.abs(q[4])
    return {"q": q.astype(np.float32), **operands, "tokens": tokens}


def newest(
    rng: np.random.Generator, heads: Sequence[int], tokens: int, width: int, scaling: float
) -> Operands:
    """Return a newest token, and those before: ordinary, huge logits, none, itself the loudest.

    heads   (heads, kv heads)
    """
    batch, (query_heads, kv_heads) = 4, heads
    q, k, v = (rng.normal(size=(batch, n, width)) for n in (query_heads, kv_heads, kv_heads))
    q[1] *= 80 / scaling / width  # exp overflows unless the largest logit is taken off
    q[2] = 0  # every token weighs the same
    k[3] = 8 * k[3]
    angles = rng.uniform(-np.pi, np.pi, (batch, width // 2))
    angles[0, ::2] = 0
    keys, values = rng.normal(size=(2, batch, kv_heads, tokens, width)) + rng.normal(size=width)
    operands = {"q": q, "k": k, "v": v}
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        operands[name] = np.concatenate([function(angles)] * 2, -1)
    operands |= {"keys": keys, "values": values}
    return {**{n: a.astype(np.float32) for n, a in operands.items()}, "scaling": scaling}


def packed(codes: npt.NDArray[np.int64], scheme: KVScheme) -> npt.NDArray[np.int32]:
    """Return codes [batch, heads, tokens, head_dim] as the words of `attention_kv`."""
    batch, heads, tokens, width = codes.shape
    rows = codes
    if scheme.axis == "channel":
        cut = codes.reshape(batch, heads, tokens // scheme.step, scheme.step, width)
        rows = cut.swapaxes(3, 4).reshape(batch, heads, -1, scheme.step)
    flat = torch.from_numpy(np.ascontiguousarray(rows.reshape(-1, rows.shape[-1])))
    words = pack_codes(flat, scheme.num_bits).numpy()
    return np.asarray(words.reshape(*rows.shape[:-1], words.shape[-1]))


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
