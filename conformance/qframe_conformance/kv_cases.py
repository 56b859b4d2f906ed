"""What a KV-cache quantizer is tried on: keys, values, the pieces in which they come, and a life.

A lane is one head of one sequence, and every lane of a case is of another nasty kind, so that one
store meets many. A *life* is a list of operations: appends, crops and selections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from qframe.contracts import KVBlock
from qframe.errors import QframeError
from qframe.kv_evidence import KVEvidence
from qframe.kv_scheme import KVScheme
from qframe_conformance.checks import require
from qframe_conformance.engine import Refused
from qframe_conformance.randomness import random_states
from qframe_conformance.report import Counterexample

Operation = tuple[Literal["append", "crop", "select"], int]
"""append so many tokens; crop to so many, or by so many where negative; select by this seed."""


# Cases ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class KVCase:
    """Keys and values, and what a quantizer made of them.

    keys, values   [batch, heads, tokens, head_dim]
    pieces         how many tokens are appended at a time; their sum is the number of tokens
    query          [batch, query heads, head_dim] float32
    kind           "key" or "value": which of the two the checks of a single store look at
    life           what happens to a store after its tokens were appended
    seed           of the quantizer's generator, and of what life brings
    shared         what checks have in common, by name
    """

    quantizer: Any
    scheme: KVScheme
    keys: torch.Tensor
    values: torch.Tensor
    pieces: tuple[int, ...]
    query: torch.Tensor
    kind: str = "key"
    life: tuple[Operation, ...] = ()
    seed: int = 0
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def x(self) -> torch.Tensor:
        """What is stored."""
        return self.keys if self.kind == "key" else self.values

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Its [batch, heads, tokens, head_dim]."""
        batch, heads, tokens, head_dim = self.x.shape
        return batch, heads, tokens, head_dim

    def start(self, kind: str | None = None) -> Any:
        """Return an empty store."""
        rng = np.random.default_rng(self.seed)
        return self.quantizer.start(kind or self.kind, self.scheme, rng)

    def fill(
        self, x: torch.Tensor, pieces: Sequence[int] | None = None, kind: str | None = None
    ) -> Any:
        """Return a store to which x was appended. Raises Refused for a typed error."""
        try:
            store, at = self.start(kind), 0
            for tokens in self.pieces if pieces is None else pieces:
                store.append(x[:, :, at : at + tokens].clone())
                at += tokens
        except QframeError as error:
            raise Refused(str(error)) from error
        return store

    def whole(self) -> Any:
        """Return a store to which all tokens were appended at once."""
        return self.fill(self.x, (self.x.shape[2],))

    @cached_property
    def store(self) -> Any:
        """The store with all tokens, and read once."""
        before = random_states()
        store = self.fill(self.x)
        store.read()
        self.shared["randomness"] = before, random_states()
        return store

    @cached_property
    def evidence(self) -> KVEvidence:
        """What is in the store. Raises Refused where that is not what `KVStore` promises."""
        return sound(self.scheme, self.x, self.store)

    @cached_property
    def pair(self) -> tuple[KVEvidence, KVEvidence]:
        """What is in a store of the keys, and in one of the values."""
        return self._other("key"), self._other("value")

    @cached_property
    def stores(self) -> tuple[Any, Any]:
        """A store of the keys, and one of the values."""
        if self.kind == "key":
            return self.store, self.fill(self.values, kind="value")
        return self.fill(self.keys, kind="key"), self.store

    def _other(self, kind: str) -> KVEvidence:
        if kind == self.kind:
            return self.evidence
        key, value = self.stores
        if kind == "key":
            return sound(self.scheme, self.keys, key)
        return sound(self.scheme, self.values, value)

    def counterexample(self, check: str) -> Counterexample:
        """Return the case as plain Python; `plugin` and `arrays` are defined before it."""
        dtype = str(self.keys.dtype)
        arrays = {name: getattr(self, name).float().numpy() for name in ("keys", "values", "query")}
        fields = ", ".join(
            f"{key}={value!r}"
            for key, value in self.scheme.model_dump(exclude_defaults=True).items()
        )
        text = f"""\
import torch

from qframe import KVScheme
from qframe_conformance import replay
from qframe_conformance.kv_cases import KVCase

case = KVCase(
    plugin,
    scheme=KVScheme({fields}),
    keys=torch.from_numpy(arrays["keys"]).to({dtype}),
    values=torch.from_numpy(arrays["values"]).to({dtype}),
    pieces={self.pieces!r},
    query=torch.from_numpy(arrays["query"]),
    kind={self.kind!r},
    life={self.life!r},
    seed={self.seed},
)
print(replay({check!r}, case))
"""
        return Counterexample(snippet=text, arrays=arrays)


# What a store promises ------------------------------------------------------------------------


def sound(scheme: KVScheme, x: torch.Tensor, store: Any) -> KVEvidence:
    """Return what a store holds; raise Refused where that is not in its form.

    Whether it is, is for the checks `reads_all_tokens` and `shows_its_codes` alone.
    """
    try:
        evidence = KVEvidence.of(scheme, x, store)
        well_read(evidence)
        well_formed(evidence)
    except Exception as error:
        raise Refused(str(error)) from error
    return evidence


def well_read(evidence: KVEvidence) -> None:
    """Raise Violation unless what is read has the shape and dtype of what was appended."""
    read, x = evidence.read, evidence.x
    require(isinstance(read, torch.Tensor), f"read() returned {type(read).__name__}")
    require(
        read.shape == x.shape and read.dtype == x.dtype,
        f"read() returned {read.dtype} {list(read.shape)}, appended were {x.dtype} {list(x.shape)}",
    )
    require(bool(torch.isfinite(read).all()), "read() returned a NaN or an infinity")


def well_formed(evidence: KVEvidence) -> None:
    """Raise Violation unless blocks are what `KVBlock` promises, from left to right."""
    batch, heads, length, head_dim = evidence.x.shape
    at = 0
    for block in evidence.blocks:
        require(isinstance(block, KVBlock), f"blocks() has a {type(block).__name__}")
        require(
            block.codes.dim() == 4 and block.codes.dtype == torch.int16,
            f"codes are {block.codes.dtype} {list(block.codes.shape)}",
        )
        require(
            at <= block.start and block.stop <= length,
            f"a block of tokens {block.start}..{block.stop} comes after {at}, of {length} tokens",
        )
        at = block.stop
        shape = (batch, heads, block.stop - block.start, head_dim)
        require(tuple(block.codes.shape) == shape, f"codes {list(block.codes.shape)} of {shape}")
        _well_formed_block(block, evidence.scheme, shape)


def _well_formed_block(block: KVBlock, scheme: KVScheme, shape: tuple[int, int, int, int]) -> None:
    grid, wanted = scheme.grid, scheme.scale_shape(shape)
    if block.codes.numel():
        low, high = int(block.codes.min()), int(block.codes.max())
        require(
            grid.qmin <= low and high <= grid.qmax,
            f"codes lie in [{low}, {high}], not in [{grid.qmin}, {grid.qmax}]",
        )
    for name in ("scale", "offset"):
        given = getattr(block, name)
        require(
            tuple(given.shape) == wanted and given.dtype == torch.float32,
            f"{name} is {given.dtype} {list(given.shape)}, expected float32 {list(wanted)}",
        )
        require(bool(torch.isfinite(given).all()), f"{name} has a NaN or an infinity")
    require(bool((block.scale > 0).all()), "a scale is not positive")
    dtype = getattr(torch, scheme.scale_dtype)
    require(
        torch.equal(block.scale.to(dtype).float(), block.scale),
        f"a scale is not a number of scale_dtype={scheme.scale_dtype!r}",
    )
    if scheme.symmetric:
        require(bool((block.offset == 0).all()), "a symmetric scheme has an offset that is not 0")


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as integers, which NumPy has for every dtype."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
