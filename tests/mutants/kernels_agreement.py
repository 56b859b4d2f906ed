"""Kernels that are wrong by less than rounding allows, or otherwise in another order of threads."""

from __future__ import annotations

import numpy as np

from tests.mutants.kernels_int8 import Int8, outputs
from tests.mutants.kernels_small import F32, cut, mutant, twin

__all__ = ["MUTANTS", "TWINS", "outputs"]


class Ordered(Int8):
    """A kernel with variants: the columns are added in another order."""

    def __init__(self, order=slice(None)):
        self.order = order

    @property
    def variants(self):
        return {"reverse": type(self)(slice(None, None, -1))}

    def accumulate(self, x, w):
        return x[:, self.order] @ w[:, self.order].T


def in_float32(self, x, w):
    """Return sums in float32, in which the order of columns shows."""
    total = np.zeros((len(x), len(w)), F32)
    for column in range(x.shape[1])[self.order]:
        total += (x[:, column, None] * w[:, column]).astype(F32)
    return total


def off_by_a_bit(y):
    """Return numbers of which every 64th is the next one."""
    flat = y.reshape(-1).copy()
    flat[::64] = np.nextafter(flat[::64], F32(np.inf))
    return flat.reshape(y.shape)


MUTANTS = (
    mutant(
        Int8,
        "sum_is_cut",
        "the sum is cut to float32 and not rounded: less than three roundings allow",
        "integers_exactly",
        compute=lambda self, x, a, w, b: self.rescale(
            cut(self.accumulate(x.astype(np.float64), w.astype(np.float64))), a, b
        ),
    ),
    mutant(
        Int8,
        "last_bit",
        "every 64th number is wrong in the last bit",
        "integers_exactly",
        result=lambda self, y: off_by_a_bit(y),
    ),
    mutant(
        Ordered,
        "race",
        "which thread stores last decides of the last bit",
        "variants_agree",
        result=lambda self, y: y if self.order.step is None else np.nextafter(y, F32(0)),
    ),
    mutant(
        Ordered,
        "sums_by_order",
        "long sums in float32 depend on the order of threads",
        "variants_agree",
        accumulate=in_float32,
    ),
)
TWINS = (twin(Ordered, "ordered", "sums of integers do not depend on the order of threads"),)
