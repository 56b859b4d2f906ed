"""What a KV cache holds, beside what went into it: the evidence for its claims.

As in `qframe.certificates`, all of it is float64, computed from what is stored and from what was
appended, and never from what a quantizer says of itself. The claims are in `qframe.claims.kv`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from qframe import bounds
from qframe.certificates import Certificate, Float64, Place
from qframe.contracts import KVBlock, KVStore
from qframe.kv_scheme import KVScheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class KVPart:
    """The tokens of one block, in float64, [batch, heads, tokens, head_dim] each.

    start            the first of the tokens
    x                what was appended
    codes, scale, offset   what is stored, for each number
    read             what is given back
    """

    start: int
    x: Float64
    codes: Float64
    scale: Float64
    offset: Float64
    read: Float64


@dataclass(frozen=True, kw_only=True)
class KVEvidence:
    """What went into a store and is still in it, and what the store makes of it.

    x         [batch, heads, tokens, head_dim], as it was appended
    blocks    `KVStore.blocks()`
    read      `KVStore.read()`, in the dtype of x
    """

    scheme: KVScheme
    x: torch.Tensor
    blocks: Sequence[KVBlock]
    read: torch.Tensor

    @classmethod
    def of(cls, scheme: KVScheme, x: torch.Tensor, store: KVStore) -> KVEvidence:
        """Ask a store."""
        return cls(scheme=scheme, x=x, blocks=tuple(store.blocks()), read=store.read())

    @property
    def dtype(self) -> str:
        """The dtype of what is read, e.g. "float16"."""
        return str(self.read.dtype).removeprefix("torch.")

    @cached_property
    def parts(self) -> list[KVPart]:
        """The blocks with tokens in them, as arrays."""
        x, read, found = as_float64(self.x), as_float64(self.read), []
        for block in self.blocks:
            where = slice(block.start, block.stop)
            if block.codes.numel():
                shape = tuple(block.codes.shape)
                found.append(
                    KVPart(
                        start=block.start,
                        x=x[:, :, where],
                        codes=block.codes.numpy().astype(np.float64),
                        scale=expand(as_float64(block.scale), self.scheme, shape),
                        offset=expand(as_float64(block.offset), self.scheme, shape),
                        read=read[:, :, where],
                    )
                )
        return found

    def worst(self, judge: Callable[[KVPart], tuple[Float64, Float64]]) -> tuple[float, Place]:
        """Return the largest error / allowed of all blocks: (ratio, [batch, head, token, channel]).

        judge   returns (error, allowed) of a part, elementwise
        """
        found: tuple[float, Place] = (0.0, ())
        for part in self.parts:
            ratio, flat = bounds.worst(*judge(part))
            if not found[1] or ratio > found[0]:
                b, h, t, c = (int(i) for i in np.unravel_index(flat, part.x.shape))
                found = ratio, (b, h, part.start + t, c)
        return found


def as_float64(x: torch.Tensor) -> Float64:
    """Return a tensor of any float dtype as float64."""
    return x.double().numpy()


def expand(per_group: Float64, scheme: KVScheme, shape: tuple[int, ...]) -> Float64:
    """Return what each number of a block has from its group.

    per_group   scales or offsets, `KVScheme.scale_shape`
    shape       of the codes, [batch, heads, tokens, head_dim]
    """
    if scheme.axis == "token":
        width = scheme.group_size or max(shape[3], 1)
        return np.repeat(per_group, width, axis=3)[..., : shape[3]]
    return np.repeat(per_group, scheme.step, axis=2)[:, :, : shape[2]]


def ranges(x: Float64, scheme: KVScheme) -> tuple[Float64, Float64]:
    """Return the smallest and largest number of each group of a block, `KVScheme.scale_shape`.

    x   [batch, heads, tokens, head_dim], at least one of it
    """
    axis = 3 if scheme.axis == "token" else 2
    width = (scheme.group_size or x.shape[3]) if axis == 3 else scheme.step
    starts = np.arange(0, x.shape[axis], width)
    low, high = (f.reduceat(x, starts, axis=axis) for f in (np.minimum, np.maximum))
    return low, high


@runtime_checkable
class KVClaim(Protocol):
    """A claim about a store, which can be certified from what went in and what is in it."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def theorem(self) -> str:
        """Its number in docs/bounds.md."""
        ...

    def certify(self, evidence: KVEvidence) -> Certificate:
        """Compare what is stored with what is allowed."""
        ...
