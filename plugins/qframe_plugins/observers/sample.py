"""Some of the tokens themselves: what a search is tried on that no sum of products can tell.

Which tokens is decided by their bits, not by their place: those with the smallest hashes. So parts
that were seen elsewhere can be merged, and the sample is that of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import InputGroup, claims, hookimpl

if TYPE_CHECKING:
    import torch

_AT_ONCE = 256  # tokens that are hashed at a time
_SEED = 20_260_101  # of the hash, the same for everyone


class Sample:
    """The tokens with the smallest hashes, at most so many. Merging is exact."""

    def __init__(self, columns: int, tokens: int) -> None:
        import numpy as np
        import torch

        odd = np.random.default_rng(_SEED).integers(-(2**62), 2**62, columns) * 2 + 1
        self._factors, self._most = torch.from_numpy(odd), tokens
        self._rows, self._hashes = torch.zeros(0, columns), torch.zeros(0, dtype=torch.int64)

    def update(self, x: torch.Tensor) -> None:
        """Take in activations x [tokens, columns]."""
        for part in x.split(_AT_ONCE):
            self._take(part, self._hash(part))

    def merge(self, other: Sample) -> None:
        """Take in what `other` has seen."""
        self._take(other._rows, other._hashes)

    def value(self) -> torch.Tensor:
        """Return the tokens, [tokens, columns] float32, by rising hash."""
        return self._rows.clone()

    def _take(self, rows: torch.Tensor, hashes: torch.Tensor) -> None:
        import torch

        hashes = torch.cat([self._hashes, hashes])
        chosen = torch.argsort(hashes, stable=True)[: self._most]
        self._rows, self._hashes = torch.cat([self._rows, rows])[chosen], hashes[chosen]

    def _hash(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number for each token that its bits alone decide, int64; sums wrap around.

        The smallest of all for tokens that are not finite: those must show.
        """
        import torch

        bits = (x + 0.0).contiguous().view(torch.int32).to(torch.int64)  # + 0.0: no zero has a sign
        mixed = (bits * self._factors).sum(1)
        hashes = (mixed ^ (mixed >> 29)) * 0x3C6EF372FE94F82B  # low bits, which differ, go up
        return torch.where(torch.isfinite(x).all(1), hashes, torch.iinfo(torch.int64).min)


@dataclass(frozen=True)
class SampleObserver:
    """Observe some of the tokens.

    tokens   how many at most
    """

    tokens: Annotated[int, Field(ge=1)] = 256

    name: str = field(init=False, default="sample")

    @property
    def claims(self) -> tuple[object, ...]:
        """Which tokens does not depend on their order."""
        return (
            claims.TokensSeen(self.tokens),
            claims.Mergeable(exact=True),
            claims.Reproducible(),
        )

    def start(self, group: InputGroup) -> Sample:
        """Return an empty statistic."""
        return Sample(group.columns, self.tokens)


@hookimpl
def qframe_observers() -> Iterable[SampleObserver]:
    """Register sample."""
    return [SampleObserver()]
