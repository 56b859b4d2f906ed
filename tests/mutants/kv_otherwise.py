"""KV-cache quantizers that are right, and do it otherwise than `kv_reference`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from qframe import Capabilities
from qframe.claims.kv import ExactWindow, FusedAttention, PackedCodes, Streaming
from tests.mutants.kv_reference import Quantizer, Store


class Kivi(Store):
    flush = "residual"


class Doubles(Store):
    work = np.float64


class Reciprocal(Store):
    def encode(self, x, scale, offset):
        inverse = np.float32(1) / scale
        usual = np.isfinite(inverse)  # the smallest scales have no reciprocal
        steps = np.where(usual, (x - offset) * np.where(usual, inverse, 0), (x - offset) / scale)
        return np.clip(np.rint(steps), self.grid.qmin, self.grid.qmax).astype(np.int16)


class WholeZeroPoint(Store):
    """The offset is a whole number of steps, so that 0 has a code."""

    def fit(self, lo, hi):
        scale, _ = super().fit(np.minimum(lo, 0), np.maximum(hi, 0))
        zero = np.clip(np.rint(-np.minimum(lo, 0) / scale), 0, self.levels())
        return scale, -scale * np.float32(zero)

    def lowest(self, lo):
        return lo

    def offset_dtype(self):
        return "float32"


class WholeZeroPoints(Quantizer):
    def nbytes(self, scheme, shape, itemsize):
        coded = ExactWindow().stop(scheme, shape[2]) - min(scheme.sink_tokens, shape[2])
        offsets = math.prod(scheme.scale_shape((*shape[:2], coded, shape[3])))
        more = 4 - torch.zeros(1, dtype=getattr(torch, scheme.scale_dtype)).element_size()
        return super().nbytes(scheme, shape, itemsize) + more * offsets


class HalfUp(Store):
    def round(self, steps):
        near = np.rint(steps)
        return np.where(steps - np.floor(steps) == 0.5, np.ceil(steps), near)


class EveryFlushItsOwn(Store):
    def continues(self, last):
        return False


class DecodesInDoubles(Store):
    def value(self, codes, scale, offset):
        value = np.float64(scale) * codes + offset
        return value.astype(np.float32)


class Aligned(Store):
    """After a crop, the first group is short, so that the next begins where groups always do."""

    def missing(self):
        return -(self.coded - self.sinks.shape[2]) % self.step

    def ready(self):
        missing, waiting = self.missing(), self.recent.shape[2] - self.kept()
        return 0 if waiting < missing else missing + (waiting - missing) // self.step * self.step

    def add(self, part):
        missing = self.missing()
        for piece in (part[:, :, :missing], part[:, :, missing:]):
            if piece.shape[2]:
                super().add(piece)

    def pack(self, codes):
        short = -codes.shape[2] % self.step
        return super().pack(np.pad(codes, ((0, 0), (0, 0), (0, short), (0, 0)), mode="edge"))


class Online(Quantizer):
    """Attention token by token, as FlashAttention does it."""

    def attend(self, query, keys, values):
        k, v = (self.seen(store) for store in (keys, values))
        heads = self.heads(query.shape[1], k.shape[1])
        k, v = k[:, heads], v[:, heads]
        largest = torch.full(query.shape[:2], -torch.inf)
        total, output = torch.zeros(query.shape[:2]), torch.zeros_like(query)
        for t in range(k.shape[2]):
            logit = (k[:, :, t] * query).sum(-1) / math.sqrt(query.shape[-1])
            new = torch.maximum(largest, logit)
            old, power = torch.exp(largest - new), torch.exp(logit - new)
            total = total * old + power
            output = output * old[..., None] + power[..., None] * v[:, :, t]
            largest = new
        return output / total[..., None]


class Buffer:
    """Tokens as they came, in a buffer that doubles: nothing is quantized, nothing is claimed."""

    def __init__(self):
        self.data, self.length = None, 0

    @property
    def nbytes(self):
        return 0 if self.data is None else self.data.nbytes

    def append(self, x):
        Store.refuse(self, x)
        self.data = x[:, :, :0].clone() if self.data is None else self.data
        length = self.length + x.shape[2]
        if length > self.data.shape[2]:
            larger = x.new_zeros(*x.shape[:2], 1 << (length - 1).bit_length(), x.shape[3])
            larger[:, :, : self.length] = self.data[:, :, : self.length]
            self.data = larger
        self.data[:, :, self.length : length] = x
        self.length = length

    @property
    def sinks(self):
        return self.data

    def read(self):
        return self.data[:, :, : self.length].clone()

    def blocks(self):
        return ()

    def crop(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} of {self.length} tokens")
        self.length = length

    def select(self, indices):
        if not 0 <= int(indices.min()) <= int(indices.max()) < len(self.data):
            raise ValueError(f"select {indices.tolist()}")
        self.data = self.data[indices]


@dataclass(frozen=True)
class Uncompressed:
    """A quantizer that quantizes nothing."""

    name: str = "uncompressed"
    capabilities: ClassVar = Capabilities(strategies=frozenset({"token", "channel"}))

    def start(self, kind, scheme, rng):
        return Buffer()

    def nbytes(self, scheme, shape, itemsize):
        batch, heads, tokens, head_dim = shape
        capacity = 1 << (tokens - 1).bit_length() if tokens else 0
        return batch * heads * capacity * head_dim * itemsize


class RotatedStore(Store):
    """Changes the signs of channels before, and back after; codes are of what is between."""

    def __init__(self, scheme, rng):
        super().__init__(scheme)
        self.rng = rng

    def signs(self):
        rng = np.random.default_rng(self.rng.bit_generator.seed_seq.entropy)
        return np.where(rng.random(self.head_dim) < 1 / 2, -1, 1).astype(np.float32)

    def quantized(self, part, start):
        return super().quantized(part.float() * torch.from_numpy(self.signs()), start)

    def decode(self, run):
        return super().decode(run) * torch.from_numpy(self.signs()).to(self.sinks.dtype)


@dataclass(frozen=True)
class Rotated(Quantizer):
    """Codes are not those of what is read, so neither half a step nor a scale is claimed."""

    claims: tuple = (ExactWindow(), Streaming(), PackedCodes(), FusedAttention())

    def start(self, kind, scheme, rng):
        return RotatedStore(scheme, rng)
