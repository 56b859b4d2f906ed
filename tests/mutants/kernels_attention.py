"""Wrong kernels of attention on codes, and right ones that do it otherwise."""

from __future__ import annotations

import numpy as np
import torch

from qframe import KVScheme, kernels
from qframe.reference_ops import spread_groups, unpacked
from qframe_conformance.kernel_draws_other import packed
from tests.mutants.kernels_small import F32, SmallKernel, bfloat16, mutant, tf32, twin

SCHEME = KVScheme(num_bits=4)


class Attention(SmallKernel):
    op = "attention_kv"

    def compute(self, q, kw, ks, ko, kf, vw, vs, vo, vf, tokens):
        kc, vc = (self.codes(w, f, tokens, q.shape[-1]) for w, f in ((kw, kf), (vw, vf)))
        keys, values = self.values(kc, ks, ko, kf), self.values(vc, vs, vo, vf)
        keys, values = (self.shared(each, q.shape[1]) for each in (keys, values))
        logits = (self.logits(q, keys) * self.factor(q.shape[-1])).astype(F32)
        return self.mix(logits, values).astype(F32), self.lse(logits)

    def codes(self, words, scheme, tokens, width):
        return unpacked(words, scheme, tokens, width).astype(F32)

    def lse(self, logits):
        largest = logits.max(-1)
        return largest + np.log(np.exp(logits - largest[..., None]).sum(-1))

    def values(self, codes, scale, offset, scheme):
        s, o = (self.spread(each, scheme, codes.shape) for each in (scale, offset))
        return codes * s + o

    def spread(self, per_group, scheme, shape):
        return spread_groups(per_group, scheme, shape).astype(F32)

    def shared(self, heads, count):
        return np.repeat(heads, count // heads.shape[1], 1)

    def logits(self, q, keys):
        return (keys @ q[..., None])[..., 0]

    def factor(self, width):
        return F32(width**-0.5)

    def mix(self, logits, values):
        powers = np.exp(self.shifted(logits))
        return ((powers / powers.sum(-1, keepdims=True))[..., None, :] @ values)[..., 0, :]

    def shifted(self, logits):
        return logits - logits.max(-1, keepdims=True)


def online(self, logits, values):
    """Token by token with a running maximum; what was added is rescaled when it grows."""
    largest = np.full(logits.shape[:-1], -np.inf, F32)
    total, out = np.zeros_like(largest), np.zeros((*largest.shape, values.shape[-1]), F32)
    for t in range(logits.shape[-1]):
        grown = np.maximum(largest, logits[..., t])
        shrink, power = self.shrink(largest - grown), np.exp(logits[..., t] - grown)
        total = total * shrink + power
        out = out * shrink[..., None] + power[..., None] * values[..., t, :]
        largest = grown
    return out / total[..., None]


def mixed_without_last(self, logits, values):
    keep = slice(None) if logits.shape[-1] == 1 else slice(-1)
    return Attention.mix(self, logits[..., keep], values[..., keep, :])


ATTENTIONS = (
    (
        "no_root_of_the_width",
        "logits are not divided by sqrt(head_dim)",
        {"factor": lambda s, d: F32(1)},
    ),
    ("maximum_not_taken_off", "exp overflows for large logits", {"shifted": lambda s, z: z}),
    (
        "offset_ignored",
        "what code 0 stands for is not added",
        {"values": lambda s, c, a, o, f: c * s.spread(a, f, c.shape)},
    ),
    (
        "scale_of_the_next_group",
        "a group takes its neighbour's scale",
        {
            "values": lambda s, c, a, o, f: Attention.values(
                s, c, np.roll(a, 1, -1 if f.axis == "token" else -2), o, f
            )
        },
    ),
    (
        "heads_taken_in_turn",
        "query head h reads head h mod n, not h // n",
        {"shared": lambda s, heads, n: np.tile(heads, (1, n // heads.shape[1], 1, 1))},
    ),
    ("last_token_dropped", "the newest token is not looked at", {"mix": mixed_without_last}),
    (
        "not_rescaled",
        "what was added before the maximum grew is not rescaled",
        {"mix": online, "shrink": lambda s, d: np.exp(d) ** (d < -1e30)},
    ),
    (
        "weights_in_bf16",
        "softmax weights are bfloat16",
        {"shifted": lambda s, z: bfloat16(Attention.shifted(s, z))},
    ),
    (
        "logits_in_fp16",
        "logits pass through float16",
        {"logits": lambda s, q, k: Attention.logits(s, q, k).astype(np.float16).astype(F32)},
    ),
    (
        "values_of_int8_codes",
        "codes are read as signed bytes",
        {
            "values": lambda s, c, a, o, f: Attention.values(
                s, c.astype(np.int16).astype(np.int8).astype(F32), a, o, f
            )
        },
    ),
    (
        "softmax_not_normalized",
        "weights are not divided by their sum",
        {"mix": lambda s, z, v: (np.exp(s.shifted(z))[..., None, :] @ v)[..., 0, :]},
    ),
)

LOGARITHMS = (
    (
        "lse_without_the_largest",
        "the largest logit is not added to the logarithm of the sum",
        {"lse": lambda s, z: Attention.lse(s, z) - z.max(-1)},
    ),
    (
        "lse_of_two",
        "the logarithm is that of base two",
        {"lse": lambda s, z: Attention.lse(s, z) / F32(np.log(2))},
    ),
    (
        "lse_in_bf16",
        "the logarithm is rounded to bfloat16",
        {"lse": lambda s, z: bfloat16(Attention.lse(s, z))},
    ),
)

PACKINGS = (
    (
        "codes_from_the_top",
        "the first code is read from the highest bits of its word",
        {
            "codes": lambda s, w, f, t, d: Attention.codes(s, _reversed(w, f.num_bits), f, t, d),
        },
    ),
    (
        "codes_without_sign",
        "the lowest code of a symmetric scheme is taken for 0",
        {"codes": lambda s, w, f, t, d: Attention.codes(s, w, f, t, d) - f.grid.qmin},
    ),
)


def _reversed(words, bits):
    if 32 % bits:
        return words
    fields = [(words.view(np.uint32) >> np.uint32(bits * i)) for i in range(32 // bits)]
    mask = np.uint32((1 << bits) - 1)
    turned = sum((f & mask) << np.uint32(32 - bits * (i + 1)) for i, f in enumerate(fields))
    return turned.astype(np.uint32).view(np.int32)


MUTANTS = (
    *(mutant(Attention, *each, "attention_output", **steps) for *each, steps in ATTENTIONS),
    *(mutant(Attention, *each, "attention_output", **steps) for *each, steps in PACKINGS),
    *(mutant(Attention, *each, "attention_denominator", **steps) for *each, steps in LOGARITHMS),
)

TWINS = (
    twin(
        Attention,
        "online_softmax",
        "one pass with a running maximum, as in flash decoding",
        mix=online,
        shrink=lambda self, d: np.exp(d),
    ),
    twin(
        Attention,
        "powers_of_two",
        "exp2 of logits times log2(e)",
        mix=lambda self, z, v: (
            ((p := np.exp2(self.shifted(z * F32(np.log2(np.e)))))[..., None, :] @ v)[..., 0, :]
            / p.sum(-1)[..., None]
        ),
    ),
    twin(
        Attention,
        "tf32_declared",
        "products of 11 bits, and declared",
        logits=lambda self, q, k: (tf32(k) @ tf32(q)[..., None])[..., 0],
        accumulator="tf32",
    ),
)


def outputs(plugin):
    """Ordinary queries, and a cache of four bits per token."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        operands = [torch.from_numpy(rng.normal(size=(2, 4, 16)).astype(F32))]
        for _ in range(2):
            words = packed(rng.integers(0, 16, (2, 2, 40, 16)), SCHEME)
            scale = (rng.random((2, 2, 40, 1)) / 8 + 1 / 16).astype(F32)
            operands += [torch.from_numpy(each) for each in (words, scale, -8 * scale)]
            operands.append(SCHEME)
        found += [each.numpy() for each in kernels.run(plugin, [*operands, 40])]
    return found
