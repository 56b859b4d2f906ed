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


def rounded_to(numbers: Float64, dtype: str) -> Float64:
    """Return float32 numbers rounded to the nearest of a dtype of `kernels.ACTIVATIONS`."""
    if dtype == "bfloat16":  # the upper half of a float32, which carries the rounding on
        bits = np.asarray(numbers, np.float32).view(np.uint32)
        even = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
        kept = (even & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isnan(numbers), np.nan, kept.astype(np.float64))
    with np.errstate(over="ignore"):
        return np.asarray(numbers, np.float64).astype(dtype).astype(np.float64)


def of_output(
    what: str, answer: npt.ArrayLike, expected: Float64, allowed: Float64, dtype: str
) -> Comparison:
    """Return the comparison of outputs that are `allowed` off before they are rounded to a dtype.

    B9.e: where they may be beyond the largest number, an infinity of the right sign is right;
    where they must be, nothing else is.
    """
    error = difference(answer, expected)
    if dtype == "float32":
        return Comparison(what, error, allowed)
    got = np.asarray(answer, np.float64)
    may, must = bounds.overflows(expected, allowed, dtype)
    infinite = np.isinf(got) & (np.sign(got) == np.sign(expected)) & np.isfinite(expected)
    error = np.where(
        infinite & may, 0, np.where(must & ~infinite & np.isfinite(expected), np.inf, error)
    )
    size = np.where(np.isfinite(expected), expected, 0)
    return Comparison(what, error, bounds.short_output(size, allowed, dtype))


def exactly(
    what: str, mask: npt.NDArray[np.bool_], answer: npt.ArrayLike, expected: Float64, dtype: str
) -> Comparison:
    """Return the comparison of outputs that have no error but that of rounding to 16 bits."""
    wanted = (
        expected if dtype == "float32" else np.where(mask, rounded_to(expected, dtype), expected)
    )
    error = difference(answer, wanted)
    got = np.asarray(answer, np.float64)
    error = np.where(np.isinf(wanted) & (got == wanted), 0, error)
    return Comparison(what, only_where(mask, error), np.zeros_like(expected))


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


def kept_as_operands(values: Float64, inputs: float) -> npt.NDArray[np.bool_]:
    """Return for each row whether operands of an arithmetic hold all of its numbers as they are.

    values   [rows, columns]
    inputs   the unit roundoff that operands are rounded by, 2^-p for p bits; 0 for none
    """
    if inputs == 0:
        return np.ones(len(values), np.bool_)
    digits = np.frexp(np.where(np.isfinite(values), values, 0))[0] / inputs
    return np.asarray((digits == np.rint(digits)).all(1))


def representable(numbers: Float64) -> npt.NDArray[np.bool_]:
    """Return which numbers are float32 numbers."""
    return np.asarray(numbers == numbers.astype(np.float32))
