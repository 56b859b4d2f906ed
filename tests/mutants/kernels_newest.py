"""Wrong kernels of the newest token's attention, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import kernels
from qframe_conformance import kernel_draws_other
from tests.mutants.kernels_small import F32, SmallKernel, bfloat16, mutant, twin


class Newest(SmallKernel):
    op = "attention_rotary"

    def compute(self, q, k, v, cos, sin, keys, values, scaling):
        query, key = self.query(q, cos, sin), self.turned(k, cos, sin)
        every = self.keys(keys, key), self.values(values, v)
        heads, shared = q.shape[1], q.shape[1] // max(k.shape[1], 1)
        all_keys, all_values = (each[:, self.head(heads, shared)] for each in every)
        logits = self.scaled((all_keys @ query[..., None])[..., 0], scaling, q.shape[-1])
        out = (self.weights(logits)[..., None] * all_values).sum(-2, dtype=F32)
        return out.astype(F32), self.stored(key, k).astype(F32)

    def query(self, q, cos, sin):
        return self.turned(q, cos, sin)

    def turned(self, x, cos, sin):
        return x * cos[:, None] + self.other(x) * sin[:, None]

    def other(self, x):
        first, second = np.split(x, 2, -1)
        return np.concatenate([-second, first], -1)

    def keys(self, keys, key):
        return np.concatenate([keys, key[:, :, None]], 2)

    def values(self, values, v):
        return np.concatenate([values, v[:, :, None]], 2)

    def head(self, heads, shared):
        return np.arange(heads) // shared

    def scaled(self, products, scaling, width):
        return products * F32(scaling)

    def weights(self, z):
        powers = np.exp(z - z.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def stored(self, key, k):
        return key


OUTPUT = (
    ("query_not_turned", "the query is not turned", {"query": lambda s, q, c, n: q}),
    (
        "key_not_turned_in_logits",
        "the newest key meets queries as it was",
        {"keys": lambda s, keys, key: np.concatenate([keys, 0 * key[:, :, None]], 2)},
    ),
    (
        "newest_value_forgotten",
        "the newest token has no value",
        {"values": lambda s, values, v: np.concatenate([values, 0 * v[:, :, None]], 2)},
    ),
    (
        "scaling_is_that_of_the_width",
        "logits are divided by the root of the head's width, whatever `scaling` says",
        {"scaled": lambda s, z, scaling, width: z / F32(width**0.5)},
    ),
    (
        "heads_in_turn",
        "query heads read the heads of keys in turn, not in runs",
        {"head": lambda s, heads, shared: np.arange(heads) % (heads // shared)},
    ),
    (
        "largest_not_taken_off",
        "e to logits as they are",
        {"weights": lambda s, z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)},
    ),
    (
        "weights_in_bf16",
        "weights are rounded to bfloat16",
        {"weights": lambda s, z: bfloat16(Newest.weights(s, z))},
    ),
)
KEY = (
    ("key_stored_as_it_was", "the key goes to the cache unturned", {"stored": lambda s, y, k: k}),
    (
        "turned_backwards",
        "halves are turned the other way",
        {"other": lambda s, x: -Newest.other(s, x)},
    ),
    (
        "pairs_of_neighbours",
        "pairs are columns 2 i and 2 i + 1",
        {"other": lambda s, x: np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)},
    ),
    (
        "key_stored_in_bf16",
        "the key that is stored is rounded to bfloat16",
        {"stored": lambda s, y, k: bfloat16(y.astype(F32))},
    ),
)

MUTANTS = tuple(
    mutant(Newest, name, bug, check, **steps)
    for check, mistakes in (("attention_output", OUTPUT), ("positions", KEY))
    for name, bug, steps in mistakes
)

TWINS = (
    twin(
        Newest,
        "scaled_query",
        "the query is scaled, and not the logits",
        query=lambda s, q, c, n: s.turned(q, c, n),
        scaled=lambda s, z, scaling, width: z * F32(scaling / 2) * 2,
    ),
    twin(
        Newest,
        "by_an_angle_in_float64",
        "pairs are turned in float64, and rounded",
        turned=lambda s, x, c, n: (
            x * c.astype(float)[:, None] + s.other(x) * n.astype(float)[:, None]
        ).astype(F32),
    ),
    twin(
        Newest,
        "divided_at_last",
        "what is divided by the sum of powers is the output",
        weights=lambda s, z: (
            np.exp(z - z.max(-1, keepdims=True))
            * (1 / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        ),
    ),
)


def outputs(plugin):
    """Ordinary tokens."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        operands = kernel_draws_other.newest(rng, (4, 2), 9, 16, 0.25)
        operands["q"] = rng.normal(size=(4, 4, 16)).astype(F32)
        given = [torch.from_numpy(o) if isinstance(o, np.ndarray) else o for o in operands.values()]
        found += [each.numpy() for each in kernels.run(plugin, given)]
    return found
