"""What attention makes of a cache: logits, weights and output, and attention on the codes.

Bounds of the output hide every mistake that is smaller than a step, so they are never used alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from qframe import bounds
from qframe.certificates import Float64
from qframe.claims.kv import FusedAttention, KVHalfStep
from qframe.kv_evidence import KVEvidence, as_float64
from qframe_conformance.checks import SKIPPED, Outcome, check, require, within
from qframe_conformance.engine import Refused
from qframe_conformance.kv_cases import KVCase
from qframe_conformance.kv_subjects import KIND, claim_of, claiming


@dataclass(eq=False)
class Attention:
    """One query token on keys and values, in float64; a key's head serves several of the query's.

    query          [batch, query heads, head_dim]
    keys, values   [batch, query heads, tokens, head_dim]
    """

    query: Float64
    keys: Float64
    values: Float64

    @classmethod
    def of(cls, query: torch.Tensor, keys: Float64, values: Float64) -> Attention:
        """Repeat the heads of keys and values for those of the query."""
        repeats = query.shape[1] // max(keys.shape[1], 1)
        k, v = (np.repeat(each, repeats, axis=1) for each in (keys, values))
        return cls(as_float64(query), k, v)

    @cached_property
    def logits(self) -> Float64:
        """The products q K^T / sqrt(head_dim), [batch, query heads, tokens]."""
        product: Float64 = (self.keys @ self.query[..., None])[..., 0]
        scaled: Float64 = product / np.sqrt(self.query.shape[-1])
        return scaled

    @cached_property
    def weights(self) -> Float64:
        """Softmax of the logits."""
        powers = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        found: Float64 = powers / powers.sum(-1, keepdims=True)
        return found

    @cached_property
    def output(self) -> Float64:
        """The mean of the values, [batch, query heads, head_dim]."""
        found: Float64 = (self.weights[..., None, :] @ self.values)[..., 0, :]
        return found

    @cached_property
    def rounding(self) -> tuple[Float64, Float64]:
        """What float64 takes from the weights, and from the output (B7.e)."""
        given = self.query, self.keys, self.values, self.weights
        return bounds.kv_attention(*given, dtype="float64")


@dataclass(eq=False)
class Attended:
    """Attention before and after quantization, and what each key and value may be off by."""

    exact: Attention
    stored: Attention
    key_error: Float64
    value_error: Float64

    @classmethod
    def of(cls, case: KVCase) -> Attended:
        """Attend, once. Raises Refused where there is no token."""
        if "attended" not in case.shared:
            case.shared["attended"] = cls._of(case)
        found: Attended = case.shared["attended"]
        return found

    @classmethod
    def _of(cls, case: KVCase) -> Attended:
        if case.x.shape[2] == 0:
            raise Refused("there is no token to attend to")
        claim = claim_of(case.quantizer, KVHalfStep)
        (keys, values), repeats = case.pair, case.query.shape[1] // case.x.shape[1]
        errors = (np.repeat(claim.element(each), repeats, axis=1) for each in (keys, values))
        return cls(
            Attention.of(case.query, as_float64(case.keys), as_float64(case.values)),
            Attention.of(case.query, as_float64(keys.read), as_float64(values.read)),
            *errors,
        )


@check(KIND, "objective", "B7.b", unless=claiming(KVHalfStep))
def logits_move_no_further(case: KVCase) -> Outcome:
    """A logit moves by what the keys' steps allow, and not at all for a kept token."""
    both = Attended.of(case)
    query, width = both.exact.query, both.exact.query.shape[-1]
    size = bounds.kv_logits(query, np.abs(both.exact.keys) + np.abs(both.stored.keys))
    own = bounds.gamma(width + 2, bounds.UNIT["float64"]) * size
    allowed = bounds.kv_logits(query, both.key_error) + own
    return within(both.stored.logits - both.exact.logits, allowed, "logit moved", "B7.b")


@check(KIND, "objective", "B7.c", unless=claiming(KVHalfStep))
def weights_move_no_further(case: KVCase) -> Outcome:
    """Attention's weights move by what the logits' bounds allow."""
    both = Attended.of(case)
    logits = bounds.kv_logits(both.exact.query, both.key_error)
    moved = np.abs(both.stored.weights - both.exact.weights).sum(-1)
    own = both.stored.rounding[0] + both.exact.rounding[0]
    return within(moved, bounds.softmax(2 * logits.max(-1)) + own, "sum |p^ - p|", "B7.c")


@check(KIND, "objective", "B7.d", unless=claiming(KVHalfStep))
def output_moves_no_further(case: KVCase) -> Outcome:
    """Attention's output moves by what the steps of keys and values allow."""
    both = Attended.of(case)
    logits = bounds.kv_logits(both.exact.query, both.key_error)
    moved = bounds.softmax(2 * logits.max(-1)) + both.stored.rounding[0] + both.exact.rounding[0]
    allowed = bounds.kv_output(both.stored.weights, both.value_error, moved, both.exact.values)
    own = both.stored.rounding[1] + both.exact.rounding[1]
    return within(both.stored.output - both.exact.output, allowed + own, "|o^ - o|", "B7.d")


@check(KIND, "objective", "B7.e", unless=claiming(FusedAttention))
def attends_to_what_is_read(case: KVCase) -> Outcome:
    """Attention on the codes agrees with what is read, up to rounding."""
    if case.x.shape[2] == 0:
        return SKIPPED
    claim = claim_of(case.quantizer, FusedAttention)
    pair, tokens = case.pair, case.x.shape[2]
    output = case.quantizer.attend(case.query.clone(), *case.stores)
    require(
        isinstance(output, torch.Tensor)
        and output.dtype == torch.float32
        and output.shape == case.query.shape,
        "attend must return float32 of the shape of the query",
    )
    exact = Attention.of(case.query, *(as_float64(each.read) for each in pair))
    repeats = case.query.shape[1] // case.x.shape[1]
    # A value is rounded when it is read, and once more in the kernel's own way.
    errors = tuple(np.repeat(2 * decoding(each), repeats, axis=1) for each in pair)
    _, allowed = bounds.kv_attention(
        exact.query,
        exact.keys,
        exact.values,
        exact.weights,
        elements=(errors[0], errors[1]),
        dtype=claim.dtype,
        rescalings=tokens if claim.online else 0,
    )
    own = exact.rounding[1]
    return within(as_float64(output) - exact.output, allowed + own, "|o^ - o|", "B7.e")


def decoding(evidence: KVEvidence) -> Float64:
    """Return what each number that is read may be off from scale * code + offset."""
    allowed = np.zeros(tuple(evidence.read.shape))
    for part in evidence.parts:
        where = slice(part.start, part.start + part.x.shape[2])
        allowed[:, :, where] = bounds.kv_decode(part.scale, part.codes, part.offset, evidence.dtype)
    return allowed
