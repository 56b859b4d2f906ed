"""Wrong samples of tokens, and right ones that choose otherwise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe.claims import Mergeable, Reproducible, TokensSeen
from tests.mutants.mutant import Twin, wrong_statistics
from tests.mutants.observers import outputs

__all__ = ["MUTANTS", "TWINS", "outputs"]

MOST = 5


class Chosen:
    """The tokens whose SHA-256 is smallest, kept as a sorted list of (digest, token)."""

    most = MOST

    def __init__(self, columns):
        self.columns, self.tokens = columns, []

    def key(self, token):
        """Tokens that are not finite come first: they must show."""
        finite = bool(torch.isfinite(token).all())
        return self.digest(token) if finite else self.first

    first = b""

    def digest(self, token):
        return hashlib.sha256((token + 0.0).numpy().tobytes()).digest()

    def update(self, x):
        self.take([(self.key(token), token.clone()) for token in x])

    def merge(self, other):
        self.take(other.tokens)

    def take(self, more):
        self.tokens = sorted([*self.tokens, *more], key=lambda each: each[0])[: self.most]

    def value(self):
        rows = [token for _, token in self.tokens]
        return torch.stack(rows) if rows else torch.zeros(0, self.columns)


@dataclass(frozen=True)
class Sampler:
    """An observer made of a class of statistics."""

    statistic: type = Chosen
    claims: tuple[Any, ...] = (TokensSeen(MOST), Mergeable(exact=True), Reproducible())
    name: str = "sampler"

    def start(self, group):
        return self.statistic(group.columns)


class FirstOnes(Chosen):
    def take(self, more):
        self.tokens = [*self.tokens, *more][: self.most]


class LastOnes(Chosen):
    def take(self, more):
        self.tokens = [*self.tokens, *more][-self.most :]


class OneMore(Chosen):
    most = MOST + 1


class OneOfEachKind(Chosen):
    def take(self, more):
        self.tokens = sorted(dict([*self.tokens, *more]).items())[: self.most]


class ForgetsTheOther(Chosen):
    def merge(self, other):
        self.take(other.tokens[:1])


class HashOfTheFirstColumn(Chosen):
    def digest(self, token):
        return super().digest(token[:1])


class LosesNaN(Chosen):
    def key(self, token):
        return self.digest(token)


class HalfPrecision(Chosen):
    def value(self):
        return super().value().half().float()


class Scaled(Chosen):
    def value(self):
        found = super().value()
        return found / found.abs().amax().clamp(min=2.0**-100)


class Drawn(Chosen):
    def digest(self, token):
        return np.random.bytes(8)


class KeepsViews(Chosen):
    """Does not copy what it keeps: the caller's memory shows through."""

    def update(self, x):
        self.take([(self.key(token), token) for token in x])
        self.rows = x

    def value(self):
        return self.tokens[0][1][None] if len(self.tokens) == 1 else super().value()


_wrong = wrong_statistics(Sampler, Sampler, "sample_")
MUTANTS = (
    _wrong("first_ones", FirstOnes, "order_of_tokens", "The first tokens are the sample."),
    _wrong("last_ones", LastOnes, "order_of_tokens", "The last tokens are the sample."),
    _wrong("one_more", OneMore, "statistic_value", "One token more than was said."),
    _wrong("one_of_each", OneOfEachKind, "statistic_value", "Equal tokens are kept once."),
    _wrong("forgets_the_other", ForgetsTheOther, "merge_sees_both", "Merging takes one token."),
    _wrong("first_column", HashOfTheFirstColumn, "order_of_tokens", "Ties go by arrival."),
    _wrong("loses_nan", LosesNaN, "non_finite_shows", "A token that is NaN may be left out."),
    _wrong("half_precision", HalfPrecision, "statistic_value", "Tokens pass through float16."),
    _wrong("scaled", Scaled, "statistic_value", "Tokens are scaled to 1."),
    _wrong("drawn", Drawn, "observing_leaves_global_rng", "Drawn from the global generator."),
    _wrong("keeps_views", KeepsViews, "value_is_no_alias", "What it returns is what it holds."),
)


class Largest(Chosen):
    """The largest digests in place of the smallest."""

    first = b"\xff" * 33

    def take(self, more):
        kept = sorted([*self.tokens, *more], key=lambda each: each[0], reverse=True)
        self.tokens = kept[: self.most]


TWINS = (
    Twin(name="sample", kind="observer", why="A cryptographic hash.", make=Sampler),
    Twin(
        name="sample_largest",
        kind="observer",
        why="Which end of the hashes is taken does not matter.",
        make=lambda: Sampler(Largest),
    ),
)
