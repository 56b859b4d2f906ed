"""What judges of kernels compare: an error, and what a theorem allows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qframe import bounds

Float64: TypeAlias = npt.NDArray[np.float64]
Operands: TypeAlias = Mapping[str, Any]
Answer: TypeAlias = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One error and what is allowed of it; they broadcast against one another.

    what   the error in words
    """

    what: str
    error: Float64
    allowed: Float64

    @property
    def ratio(self) -> float:
        """The largest error over what is allowed: right if and only if at most 1."""
        return bounds.worst(self.error, self.allowed)[0]


Judged: TypeAlias = dict[str, Comparison]


def difference(answer: npt.ArrayLike, expected: Float64) -> Float64:
    """Return answer - expected; where that is not finite, 0 if neither is, else infinity."""
    got = np.asarray(answer, np.float64)
    strange = ~np.isfinite(expected)
    if not strange.any():
        return got - expected
    return np.where(strange, np.where(np.isfinite(got), np.inf, 0), got - expected)


def checked(allowed: Float64, length: int) -> Float64:
    """Return what is allowed, with the error of the oracle's own sums of `length` products.

    Every bound grants three float32 roundings of the magnitude; of this a float64 sum is at most
    the share gamma_(2 length + 16) / gamma_3. Where the oracle is not finite nothing is allowed.
    """
    own = bounds.gamma(2 * length + 16, bounds.UNIT["float64"]) / bounds.gamma(3)
    return np.where(np.isnan(allowed), 0, allowed * (1 + own))


def only_where(mask: npt.NDArray[np.bool_], error: Float64) -> Float64:
    """Return the error where a theorem has something to say, else 0."""
    return np.where(mask, error, 0)


def integer_tokens(x: Float64) -> npt.NDArray[np.bool_]:
    """Return which tokens are integers of eight bits, so that no multiplier rounds them."""
    return np.asarray(((x == np.rint(x)) & (np.abs(x) <= 2.0**8)).all(1))


def powers_of_two(scale: Float64) -> npt.NDArray[np.bool_]:
    """Return which numbers are powers of two."""
    return np.asarray(np.frexp(scale)[0] == 1 / 2)


def representable(numbers: Float64) -> npt.NDArray[np.bool_]:
    """Return which numbers are float32 numbers."""
    return np.asarray(numbers == numbers.astype(np.float32))
