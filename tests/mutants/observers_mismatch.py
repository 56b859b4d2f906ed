"""Wrong ways to sum up how far inputs have moved, and right ones (docs/bounds.md, B12.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe.claims import CrossMoments, Mergeable, Reproducible, SignBlind
from tests.mutants.mutant import Twin, wrong_statistics
from tests.mutants.observers import outputs

__all__ = ["MUTANTS", "TWINS", "outputs"]


class Moved:
    """(2/n) sum (y - x) x^T in float64, all at once."""

    def __init__(self, columns):
        self.columns, self.total, self.count = columns, self.zeros(columns), 0

    def zeros(self, columns):
        return torch.zeros(columns, columns, dtype=torch.float64)

    def update(self, x):
        here, there = x.double().chunk(2, 1)
        self.total = self.total + self.products(here, there)
        self.count += len(x)

    def products(self, x, y):
        # Not by BLAS: with some, the last bits depend on the number of threads.
        return torch.from_numpy(np.einsum("ti,tj->ij", (y - x).numpy(), x.numpy()))

    def merge(self, other):
        self.total = self.total + other.total
        self.count += other.count

    def value(self):
        return self.total.double() * (2 / max(self.count, 1))


@dataclass(frozen=True)
class Watcher:
    """An observer made of a class of statistics."""

    statistic: type = Moved
    claims: tuple[Any, ...] = (CrossMoments(run=256), Mergeable(), SignBlind(), Reproducible())
    name: str = "watcher"
    pairs = True

    def start(self, group):
        return self.statistic(group.columns)


class Transposed(Moved):
    def products(self, x, y):
        return x.T @ (y - x)


class OtherSign(Moved):
    def products(self, x, y):
        return (x - y).T @ x


class OfTheOriginal(Moved):
    def products(self, x, y):
        return (y - x).T @ y


class NotTheDifference(Moved):
    def products(self, x, y):
        return y.T @ x


class HalvesSwapped(Moved):
    def products(self, x, y):
        return (x - y).T @ y


class NoMean(Moved):
    def value(self):
        return self.total.double()


class NotTwice(Moved):
    def value(self):
        return self.total.double() / max(self.count, 1)


class LastBatch(Moved):
    def update(self, x):
        here, there = x.double().chunk(2, 1)
        self.total, self.count = self.products(here, there), len(x)


class MergeForgetsCounts(Moved):
    def merge(self, other):
        self.total = self.total + other.total
        self.count = max(self.count, other.count)


class LongRuns(Moved):
    """Sums all tokens in float32."""

    def zeros(self, columns):
        return torch.zeros(columns, columns)

    def products(self, x, y):
        found = self.zeros(self.columns)
        for one, other in zip(x.float(), y.float(), strict=True):
            found = found + torch.outer(other - one, one)
        return found


class HalfPrecision(Moved):
    def products(self, x, y):
        return super().products(x.bfloat16().double(), y.bfloat16().double())


class DifferenceOfProducts(Moved):
    """Sums y x^T and x x^T apart, in float32, and subtracts: what has not moved is noise."""

    def products(self, x, y):
        return (y.float().T @ x.float() - x.float().T @ x.float()).double()


class OneByOne(Moved):
    def products(self, x, y):
        found = self.zeros(self.columns)
        for one, other in zip(x, y, strict=True):
            found = found + torch.outer(other - one, one)
        return found


_wrong = wrong_statistics(Watcher, Watcher, "mismatch_")
VALUE = "statistic_value"
MUTANTS = (
    _wrong("transposed", Transposed, VALUE, "x (y - x)^T is summed."),
    _wrong("other_sign", OtherSign, VALUE, "(x - y) x^T is summed."),
    _wrong("of_the_original", OfTheOriginal, VALUE, "(y - x) y^T is summed."),
    _wrong("not_the_difference", NotTheDifference, VALUE, "y x^T is summed."),
    _wrong("halves_swapped", HalvesSwapped, VALUE, "The original inputs are taken to come first."),
    _wrong("no_mean", NoMean, VALUE, "The sum is not divided by the number of tokens."),
    _wrong("not_twice", NotTwice, VALUE, "The mean, while H is twice a mean."),
    _wrong("last_batch", LastBatch, VALUE, "Every update starts again."),
    _wrong("merge_counts", MergeForgetsCounts, "merge_sees_both", "Tokens of one part count."),
    _wrong("long_runs", LongRuns, "order_of_tokens", "All tokens are summed in float32."),
    _wrong("half_precision", HalfPrecision, VALUE, "Products of bfloat16 numbers."),
    _wrong("difference_of_products", DifferenceOfProducts, VALUE, "y x^T - x x^T in float32."),
)
TWINS = (
    Twin(
        name="moved_in_float64",
        kind="observer",
        why="Everything is summed in float64.",
        make=Watcher,
    ),
    Twin(
        name="moved_one_by_one",
        kind="observer",
        why="Token by token, in float64.",
        make=lambda: Watcher(OneByOne),
    ),
)
