"""What a KV-cache quantizer promises of its stores: theorems about tokens that went in.

They are checked by the conformance suite, and on any cache of which the tokens are still known
(`qframe.kv_evidence`). A store that claims nothing still meets what holds for all: tokens are codes
or as they came, crop and select change no token that stays, lanes do not mix, and bytes are as
promised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qframe import bounds
from qframe.certificates import Certificate, Float64, Place
from qframe.kv_evidence import KVEvidence, KVPart, as_float64, ranges
from qframe.kv_scheme import KVScheme
from qframe.reference_ops import hadamard_matrix
from qframe.transforms import block_of

Dtype = Literal["float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class KVHalfStep:
    """B7.a: every code is the nearest one to its number, and stands for scale * code + offset.

    roundings   of the quotient (x - offset) / scale: 1 for a division, 2 for a product with
                fl(1 / scale)
    dtype       of the encoder's arithmetic
    """

    roundings: int = 1
    dtype: Dtype = "float32"
    name = "kv half step"
    theorem = "B7.a"

    def certify(self, evidence: KVEvidence) -> Certificate:
        """Compare each number with what its code stands for."""
        grid = evidence.scheme.grid
        gamma = bounds.gamma(self.roundings + 1, bounds.UNIT[self.dtype])

        def judge(part: KVPart) -> tuple[Float64, Float64]:
            weight = part.x - part.offset
            delta = part.scale * part.codes - weight
            return bounds.nearest(delta, part.codes, part.scale, grid, gamma * np.abs(weight))

        ratio, place = evidence.worst(judge)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, place=place)

    def certify_values(self, evidence: KVEvidence) -> Certificate:
        """Compare what is read with what the codes stand for."""

        def judge(part: KVPart) -> tuple[Float64, Float64]:
            error = part.read - (part.scale * part.codes + part.offset)
            allowed = bounds.kv_decode(part.scale, part.codes, part.offset, evidence.dtype)
            return error, allowed

        ratio, place = evidence.worst(judge)
        return Certificate(claim="kv values", theorem=self.theorem, ratio=ratio, place=place)

    def element(self, evidence: KVEvidence) -> Float64:
        """Return what each number that is read may be off by, [batch, heads, tokens, head_dim]."""
        allowed = np.zeros(tuple(evidence.read.shape))
        for part in evidence.parts:
            stored = bounds.kv_element(
                part.x, part.scale, part.offset, evidence.scheme.grid, self.roundings, self.dtype
            )
            value = bounds.kv_decode(part.scale, part.codes, part.offset, evidence.dtype)
            allowed[:, :, part.start : part.start + part.x.shape[2]] = stored + value
        return allowed


@dataclass(frozen=True, slots=True)
class KVRotatedHalfStep(KVHalfStep):
    """B7.h: codes are the nearest to x H / n, and what is read is that, times H.

    H is Hadamard's matrix (Sylvester's) over blocks of n channels, n the largest power of two that
    divides head_dim; both products are made by butterflies in float32.
    """

    name = "kv rotated half step"
    theorem = "B7.h"

    def certify(self, evidence: KVEvidence) -> Certificate:
        """Compare each rotated number with what its code stands for."""
        grid = evidence.scheme.grid
        gamma = bounds.gamma(self.roundings + 1, bounds.UNIT[self.dtype])

        def judge(part: KVPart) -> tuple[Float64, Float64]:
            rotated, lost = self._rotated(part)
            weight = rotated - part.offset
            delta = part.scale * part.codes - weight
            slack = gamma * np.abs(weight) + lost
            return bounds.nearest(delta, part.codes, part.scale, grid, slack)

        ratio, place = evidence.worst(judge)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, place=place)

    def certify_values(self, evidence: KVEvidence) -> Certificate:
        """Compare what is read with what the codes stand for, turned back."""

        def judge(part: KVPart) -> tuple[Float64, Float64]:
            stored = part.scale * part.codes + part.offset
            return part.read - hadamard(stored), self._turned(part, evidence.dtype)

        ratio, place = evidence.worst(judge)
        return Certificate(claim="kv values", theorem=self.theorem, ratio=ratio, place=place)

    def element(self, evidence: KVEvidence) -> Float64:
        """Return what each number that is read may be off by, [batch, heads, tokens, head_dim]."""
        allowed = np.zeros(tuple(evidence.read.shape))
        for part in evidence.parts:
            rotated, lost = self._rotated(part)
            stored = bounds.kv_element(
                rotated, part.scale, part.offset, evidence.scheme.grid, self.roundings, self.dtype
            )
            where = slice(part.start, part.start + part.x.shape[2])
            turned = hadamard(stored + lost, signs=False)
            allowed[:, :, where] = turned + self._turned(part, evidence.dtype)
        return allowed

    def _rotated(self, part: KVPart) -> tuple[Float64, Float64]:
        """Return x H / n, and what its computation may be off by."""
        n = block_of(part.x.shape[-1])
        size = hadamard(np.abs(part.x), signs=False) / n
        return hadamard(part.x) / n, bounds.kv_butterflies(size, n)

    def _turned(self, part: KVPart, dtype: str) -> Float64:
        """Return what (s c + m) H may be off by where it is read."""
        n = block_of(part.x.shape[-1])
        stored = part.scale * part.codes + part.offset
        own = bounds.kv_decode(part.scale, part.codes, part.offset)
        size = hadamard(np.abs(stored) + own, signs=False)
        lost = hadamard(own, signs=False) + bounds.kv_butterflies(size, n)
        return bounds.kv_returned(hadamard(stored), lost, dtype)


def hadamard(x: Float64, *, signs: bool = True) -> Float64:
    """Return x H over blocks of `block_of` channels; without `signs`, all of H is 1."""
    n = block_of(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], -1, n)
    matrix = hadamard_matrix(n) if signs else np.ones((n, n))
    turned: Float64 = (blocks @ matrix).reshape(x.shape)
    return turned


@dataclass(frozen=True, slots=True)
class KVScale:
    """B7.f: scales and offsets are those of the smallest and largest number of each group.

    It says nothing of groups that were cropped: what is gone counted as well.

    holds_zero   the offset is a whole number of steps, so that 0 has a code; the range of a group
                 then goes to 0 at least
    """

    holds_zero: bool = False
    name = "kv scale"
    theorem = "B7.f"

    def certify(self, evidence: KVEvidence) -> Certificate:
        """Compare scales and offsets of all groups with what was in them."""
        found: tuple[float, Place] = (0.0, ())
        for part, block in zip(
            evidence.parts, (b for b in evidence.blocks if b.codes.numel()), strict=True
        ):
            scale, offset = as_float64(block.scale), as_float64(block.offset)
            for error, allowed in self._judge(part, evidence.scheme, scale, offset):
                ratio, flat = bounds.worst(error, allowed)
                if not found[1] or ratio > found[0]:
                    b, h, i, j = (int(i) for i in np.unravel_index(flat, scale.shape))
                    token = i if evidence.scheme.axis == "token" else i * evidence.scheme.step
                    found = ratio, (b, h, part.start + token, j)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=found[0], place=found[1])

    def _judge(
        self, part: KVPart, scheme: KVScheme, scale: Float64, offset: Float64
    ) -> list[tuple[Float64, Float64]]:
        """Return (error, allowed) of scales, and of offsets."""
        grid, (lo, hi) = scheme.grid, ranges(part.x, scheme)
        levels = grid.qmax - grid.qmin
        if scheme.symmetric:
            ideal, moved = bounds.ideal_scale(lo, hi, grid, symmetric=True), None
        elif self.holds_zero:
            ideal = bounds.ideal_scale(lo, hi, grid, symmetric=False)
            low = np.minimum(lo, 0)
            lacking = levels * (bounds.gamma(2) * ideal + bounds.ETA["float32"])  # as in B1.f
            slack = scale / 2 + lacking + bounds.gamma(3) * (np.abs(low) + np.abs(offset))
            moved = (offset - low, slack)
        else:
            ideal = (hi - offset) / levels
            lowest, highest = bounds.kv_offset(lo, scheme.scale_dtype)
            moved = (offset - highest, np.where(offset > highest, 0, highest - lowest))
        lowest, highest = bounds.scale_rule(ideal, scheme.scale_dtype)
        flat = ideal == 0  # a group without a range has scale 1, exactly
        target = np.where(flat, 1, ideal)
        allowed = np.where(scale < ideal, ideal - lowest, highest - ideal)
        judged = [(scale - target, np.where(flat, 0, allowed))]
        return judged if moved is None else [*judged, moved]


@dataclass(frozen=True, slots=True)
class ExactWindow:
    """B7.g: the last tokens, and the sinks, are kept as they came; which ones, exactly.

    flush   "group": a group is quantized as soon as `residual_length` newer tokens are kept.
            "residual": all that is kept, once that is `residual_length` tokens (KIVI's keys), in
            whole groups
    """

    flush: Literal["group", "residual"] = "group"
    name = "exact window"
    theorem = "B7.g"

    def chunk(self, scheme: KVScheme) -> int:
        """Return how many tokens are quantized together."""
        if self.flush == "group":
            return scheme.step
        return max(-(-scheme.residual_length // scheme.step), 1) * scheme.step

    def kept(self, scheme: KVScheme) -> int:
        """Return how many tokens are kept at least."""
        return scheme.residual_length if self.flush == "group" else 0

    def stop(self, scheme: KVScheme, length: int) -> int:
        """Return where the codes end after `length` tokens were appended to an empty store."""
        chunk, begin = self.chunk(scheme), min(scheme.sink_tokens, length)
        return begin + max(length - begin - self.kept(scheme), 0) // chunk * chunk

    def certify(self, evidence: KVEvidence) -> Certificate:
        """Compare the blocks of a store that was only appended to with what must be codes."""
        length, scheme = int(evidence.read.shape[2]), evidence.scheme
        wanted = set(range(min(scheme.sink_tokens, length), self.stop(scheme, length)))
        codes = {t for block in evidence.blocks for t in range(block.start, block.stop)}
        wrong = sorted(wanted ^ codes)
        if not wrong:
            return Certificate(claim=self.name, theorem=self.theorem, ratio=0.0)
        token, state = wrong[0], "codes" if wrong[0] in codes else "kept"
        return Certificate(
            claim=self.name,
            theorem=self.theorem,
            ratio=math.inf,
            place=(token,),
            note=f"token {token} of {length} must not be {state}",
        )


# What the suite alone can check ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Streaming:
    """B7.g: in whatever pieces tokens come, codes, scales and offsets are the same, bit for bit.

    So a token, once it is codes, never changes: it is quantized from what came, and once.
    """

    name = "streaming"
    theorem = "B7.g"


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """B7.g: codes take `num_bits`, rows padded to 32 bits at most (`KVScheme.nbytes`)."""

    name = "packed codes"
    theorem = "B7.g"


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """B7.e: the method `attend` (`KVAttention`) agrees with what is read, up to rounding.

    dtype    of its arithmetic
    online   the largest logit is not known in advance: weights are scaled down when one comes
    """

    dtype: Dtype = "float32"
    online: bool = False
    name = "fused attention"
    theorem = "B7.e"
