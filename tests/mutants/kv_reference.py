"""A KV-cache quantizer, slow and obvious: what the wrong and the other right ones are made from.

Keys and values as in KIVI (Liu et al., ICML 2024, arXiv:2402.02750), with the scale rule of
docs/bounds.md, B7.f. Everything that a mutant may get wrong is a method of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe import Capabilities, KVBlock
from qframe.claims.kv import (
    ExactWindow,
    FusedAttention,
    KVHalfStep,
    KVScale,
    PackedCodes,
    Streaming,
)
from qframe.errors import NonFiniteError
from qframe.packing import pack_codes, unpack_codes

CLAIMS = (KVHalfStep(), KVScale(), ExactWindow(), Streaming(), PackedCodes(), FusedAttention())
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def down(x, dtype):
    """Return the largest number of a storage dtype that is <= x, as float32."""
    x = np.float32(x)
    if dtype == "float16":
        near = x.astype(np.float16)
        lower = np.nextafter(near, np.float16(-np.inf))
        return np.where(np.float32(near) > x, lower, near).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        away = (bits & 0xFFFF != 0) & (x < 0)
        return ((bits & 0xFFFF0000) + np.where(away, 0x10000, 0).astype(np.uint32)).view(np.float32)
    return x


def up(x, dtype):
    """Return the smallest number of a storage dtype that is >= x, as float32."""
    return -down(-np.float32(x), dtype)


TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass
class Run:
    """Neighbouring tokens that are codes.

    words    [batch, heads, tokens or groups, rows of codes, words] int32
    scale    as in `KVBlock`, in the scale dtype
    offset   like scale; None for symmetric schemes
    """

    start: int
    tokens: int
    words: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def tensors(self):
        return [t for t in (self.words, self.scale, self.offset) if t is not None]

    def mapped(self, change, tokens=None):
        """Return the run with each tensor changed."""
        offset = None if self.offset is None else change(self.offset)
        tokens = self.tokens if tokens is None else tokens
        return Run(self.start, tokens, change(self.words), change(self.scale), offset)


class Store:
    """Sinks, runs of codes, and the tokens of the window."""

    flush = "group"
    work = np.float32  # the encoder's arithmetic

    def __init__(self, scheme):
        self.scheme, self.grid, self.step = scheme, scheme.grid, scheme.step
        self.sinks: Any = None
        self.recent: Any = None
        self.runs: list[Run] = []

    # What is in it

    @property
    def length(self):
        return 0 if self.sinks is None else self.coded + self.recent.shape[2]

    @property
    def coded(self):
        """Where the codes end."""
        return self.sinks.shape[2] + sum(run.tokens for run in self.runs)

    @property
    def nbytes(self):
        kept = [] if self.sinks is None else [self.sinks, self.recent]
        return sum(t.nbytes for t in [*kept, *(t for run in self.runs for t in run.tensors())])

    # Appending

    def append(self, x):
        self.refuse(x)
        if self.sinks is None:
            self.sinks = self.recent = x[:, :, :0].clone()
        sinks = max(self.sink_tokens() - self.length, 0)
        self.sinks = torch.cat((self.sinks, x[:, :, :sinks]), dim=2)
        self.recent = torch.cat((self.recent, x[:, :, sinks:]), dim=2)
        ready = self.ready()
        if ready:
            part, self.recent = self.recent[:, :, :ready], self.recent[:, :, ready:].clone()
            self.add(part)

    def refuse(self, x):
        if x.dim() != 4 or x.dtype not in FLOATS:
            raise ValueError(f"append {x.dtype} {list(x.shape)}: not four axes of a known dtype")
        if self.sinks is not None:
            same = x.shape[:2] == self.sinks.shape[:2] and x.shape[3] == self.sinks.shape[3]
            if not same or x.dtype != self.sinks.dtype:
                raise ValueError(f"append {x.dtype} {list(x.shape)}: not as before")
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("append: a number is not finite; mend the model that made it")

    def sink_tokens(self):
        return self.scheme.sink_tokens

    def chunk(self):
        """How many tokens are quantized together."""
        if self.flush == "group":
            return self.step
        return max(math.ceil(self.scheme.residual_length / self.step), 1) * self.step

    def kept(self):
        """How many tokens are kept at least."""
        return self.scheme.residual_length if self.flush == "group" else 0

    def ready(self):
        """How many tokens of the window are to be quantized now."""
        return max(self.recent.shape[2] - self.kept(), 0) // self.chunk() * self.chunk()

    def add(self, part):
        """Quantize tokens, and put them behind the runs."""
        run = self.quantized(part, self.coded)
        if not (self.runs and self.continues(self.runs[-1])):
            self.runs.append(run)
            return
        last = self.runs[-1]
        joined = [
            torch.cat(pair, dim=2) for pair in zip(last.tensors(), run.tensors(), strict=True)
        ]
        offset = joined[2] if len(joined) == 3 else None
        self.runs[-1] = Run(last.start, last.tokens + run.tokens, joined[0], joined[1], offset)

    def continues(self, last):
        """Whether a run may grow: not when its last group was cropped."""
        return last.tokens % self.step == 0

    # Codes

    def quantized(self, part, start):
        x = part.float().numpy()
        scale, offset = self.fit(*self.ranges(x))
        codes = self.encode(x, self.spread(scale, x.shape), self.spread(offset, x.shape))
        dtype = getattr(torch, self.scheme.scale_dtype)
        stored = torch.from_numpy(np.ascontiguousarray(scale)).to(dtype)
        shift = torch.from_numpy(np.ascontiguousarray(offset))
        shift = shift.to(getattr(torch, self.offset_dtype()))
        shift = None if self.scheme.symmetric else shift
        return Run(start, x.shape[2], self.pack(codes), stored, shift)

    def ranges(self, x):
        """Return the smallest and largest number of each group."""
        axis, width = self.axis(x.shape)
        starts = range(0, x.shape[axis], width)
        return tuple(f.reduceat(x, starts, axis=axis) for f in (np.minimum, np.maximum))

    def axis(self, shape):
        """Return the axis along which numbers share a scale, and how many do."""
        if self.scheme.axis == "channel":
            return 2, self.step
        return 3, self.scheme.group_size or shape[3]

    def levels(self):
        return self.grid.qmax - self.grid.qmin

    def fit(self, lo, hi):
        """Return scale and offset, float32 numbers of the scale dtype."""
        dtype = self.scheme.scale_dtype
        if self.scheme.symmetric:
            extent, offset = np.maximum(np.abs(lo), np.abs(hi)), np.zeros_like(lo)
            scale = self.work(extent) / self.work(self.levels() / 2)
        else:
            offset = self.lowest(lo)
            extent = self.work(hi) - self.work(offset)
            scale = extent / self.work(self.levels())
        scale = self.stored_scale(np.float32(scale), dtype)
        scale = np.where((scale == 0) & (extent > 0), np.float32(TINY[dtype]), scale)
        return np.where(extent == 0, np.float32(1), scale), offset

    def offset_dtype(self):
        return self.scheme.scale_dtype

    def lowest(self, lo):
        return down(lo, self.scheme.scale_dtype)

    def stored_scale(self, scale, dtype):
        return up(scale, dtype)

    def spread(self, per_group, shape):
        """Return per-group numbers for each number."""
        axis, width = self.axis(shape)
        whole = np.repeat(per_group, width, axis=axis)
        return whole[:, :, : shape[2], : shape[3]]

    def encode(self, x, scale, offset):
        steps = (self.work(x) - self.work(offset)) / self.work(scale)
        return np.clip(self.round(steps), self.grid.qmin, self.grid.qmax).astype(np.int16)

    def round(self, steps):
        return np.rint(steps)

    def pack(self, codes):
        """Return the words of codes [batch, heads, tokens, head_dim]: a row shares its scales."""
        batch, heads, _, head_dim = codes.shape
        if self.scheme.axis == "channel":
            groups = codes.reshape(batch, heads, -1, self.step, head_dim).swapaxes(3, 4)
        else:
            groups = codes[:, :, :, None]
        rows = np.ascontiguousarray(groups).reshape(-1, groups.shape[-1]) - self.grid.qmin
        words = pack_codes(torch.from_numpy(rows), self.scheme.num_bits)
        return words.reshape(*groups.shape[:-1], words.shape[1])

    def codes(self, run):
        """Return the codes of a run, [batch, heads, tokens, head_dim] int16."""
        batch, heads, units, rows, words = run.words.shape
        width = self.step if self.scheme.axis == "channel" else self.head_dim
        flat = unpack_codes(run.words.reshape(-1, words), self.scheme.num_bits, width).numpy()
        codes = flat.reshape(batch, heads, units, rows, width).astype(np.int16) + self.grid.qmin
        if self.scheme.axis == "channel":
            codes = codes.swapaxes(3, 4)
        return codes.reshape(batch, heads, -1, self.head_dim)[:, :, : run.tokens].astype(np.int16)

    @property
    def head_dim(self):
        return self.sinks.shape[3]

    # Reading

    def read(self):
        parts = [self.decode(run) for run in self.runs]
        return torch.cat((self.sinks, *parts, self.recent), dim=2)

    def decode(self, run):
        codes = self.codes(run)
        scale, offset = (self.spread(each, codes.shape) for each in self.scale_and_offset(run))
        return torch.from_numpy(self.value(codes, scale, offset)).to(self.sinks.dtype)

    def scale_and_offset(self, run):
        scale = run.scale.float().numpy()
        return scale, np.zeros_like(scale) if run.offset is None else run.offset.float().numpy()

    def value(self, codes, scale, offset):
        return np.float32(codes) * scale + offset

    def blocks(self):
        found = []
        for run in self.runs:
            codes = torch.from_numpy(self.codes(run))
            scale, offset = (torch.from_numpy(e.copy()) for e in self.scale_and_offset(run))
            found.append(KVBlock(start=run.start, codes=codes, scale=scale, offset=offset))
        return found

    # What caches do

    def crop(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} of {self.length} tokens")
        if self.sinks is None:
            return
        recent = max(length - self.coded, 0)
        self.recent = self.recent[:, :, :recent].clone()
        self.runs = [
            self.cropped(run, length - run.start) for run in self.runs if run.start < length
        ]
        self.sinks = self.sinks[:, :, :length].clone()

    def cropped(self, run, tokens):
        if tokens >= run.tokens:
            return run
        units = math.ceil(tokens / self.step)
        return run.mapped(lambda t: t[:, :, :units].clone(), tokens)

    def select(self, indices):
        batch = 0 if self.sinks is None else self.sinks.shape[0]
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < batch:
            raise ValueError(f"select {indices.tolist()} of a batch of {batch}")
        self.sinks, self.recent = self.sinks[indices], self.recent[indices]
        self.runs = [self.selected(run, indices) for run in self.runs]

    def selected(self, run, indices):
        return run.mapped(lambda t: t[indices])


@dataclass(frozen=True)
class Quantizer:
    """A KV-cache quantizer made of a class of stores."""

    store: type = Store
    claims: tuple[Any, ...] = CLAIMS
    axes: tuple[str, ...] = ("token", "channel")
    symmetric: frozenset[bool] = frozenset({False, True})
    name: str = "reference"

    @property
    def capabilities(self):
        return Capabilities(
            num_bits=frozenset(range(2, 9)),
            strategies=frozenset(self.axes),
            symmetric=self.symmetric,
        )

    def start(self, kind, scheme, rng):
        return self.store(scheme)

    def nbytes(self, scheme, shape, itemsize):
        window = next(c for c in self.claims if isinstance(c, ExactWindow))
        coded = window.stop(scheme, shape[2]) - min(scheme.sink_tokens, shape[2])
        return scheme.nbytes(shape, itemsize, coded)

    # Attention

    def attend(self, query, keys, values):
        k, v = (self.seen(store) for store in (keys, values))
        heads = self.heads(query.shape[1], k.shape[1])
        k, v = k[:, heads], v[:, heads]
        logits = self.scaled((k @ query[..., None])[..., 0], query.shape[-1])
        return (self.softmax(logits)[:, :, None] @ v)[:, :, 0]

    def seen(self, store):
        return store.read().float()

    def heads(self, query_heads, heads):
        """Return which head each query head reads."""
        return torch.arange(query_heads) // (query_heads // heads)

    def scaled(self, products, head_dim):
        return products / math.sqrt(head_dim)

    def softmax(self, logits):
        powers = torch.exp(logits - logits.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True)
