"""What an observer promises of its statistics.

A claim about the value of a statistic has `name`, `theorem` and `certify(seen, value)`, so a
plugin may bring a statistic of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.certificates import Certificate
from qframe.contracts import Grid

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a statistic has seen.

    columns   of what was seen: for an observer of pairs, inputs and beside them the original ones
    batches   [tokens, columns] float32 each, one for every update
    merges    how many statistics were merged into this one
    copies    how often it has seen all of them
    """

    columns: int
    batches: tuple[Float32, ...]
    merges: int = 0
    copies: int = 1

    @property
    def parts(self) -> int:
        """In how many parts the tokens came."""
        return len(self.batches) + self.merges

    def tokens(self) -> Float64:
        """Return all tokens once, [tokens, columns] float64."""
        return np.concatenate([np.zeros((0, self.columns)), *self.batches])


@runtime_checkable
class StatisticClaim(Protocol):
    """A claim about the value of a statistic, which can be certified."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def theorem(self) -> str:
        """Its number in docs/bounds.md."""
        ...

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare `Statistic.value()` with what was seen."""
        ...


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """B12.a: the value is H = (2/n) sum over tokens of x x^T, [columns, columns] float64.

    It is symmetric bit for bit, and zero where nothing was seen.

    run   the most tokens that are summed in float32 before float64 takes over; 0: none are
    """

    run: int = 0
    name = "second moments"
    theorem = "B12.a"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare with the sum in float64."""
        found = np.asarray(value)
        if note := _otherwise(found, np.float64, (seen.columns, seen.columns)):
            return self._certificate(np.inf, note=note)
        if not np.array_equal(found, found.T, equal_nan=True):
            return self._certificate(np.inf, note="the value is not symmetric")
        x = seen.tokens()
        n = max(len(x), 1)
        size = np.abs(x)
        magnitude = (2 / n) * (size.T @ size)
        allowed = bounds.hessian_sum(magnitude, len(x), self.run, seen.parts)
        own = bounds.accumulate(magnitude, len(x) + 2, bounds.UNIT["float64"])
        ratio, flat = bounds.worst(found - (2 / n) * (x.T @ x), allowed + own)
        return self._certificate(ratio, (flat // seen.columns, flat % seen.columns))

    def _certificate(
        self, ratio: float, place: tuple[int, ...] = (), note: str = ""
    ) -> Certificate:
        return Certificate(
            claim=self.name, theorem=self.theorem, ratio=ratio, place=place, note=note
        )


@dataclass(frozen=True, slots=True)
class CrossMoments:
    """B12.h: the value is M = (2/n) sum over tokens of (y - x) x^T, [columns, columns] float64.

    x are inputs, y the original ones beside them. It is zero where nothing was seen.

    run   the most tokens that are summed in float32 before float64 takes over; 0: none are
    """

    run: int = 0
    name = "cross moments"
    theorem = "B12.h"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare with the sum in float64."""
        found, columns = np.asarray(value), seen.columns // 2
        if note := _otherwise(found, np.float64, (columns, columns)):
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        x, y = np.split(seen.tokens(), 2, axis=1)
        n, gap = max(len(x), 1), y - x
        magnitude = (2 / n) * (np.abs(gap).T @ np.abs(x))
        allowed = bounds.cross_sum(magnitude, len(x), self.run, seen.parts)
        own = bounds.accumulate(magnitude, len(x) + 3, bounds.UNIT["float64"])
        ratio, flat = bounds.worst(found - (2 / n) * (gap.T @ x), allowed + own)
        place = (flat // columns, flat % columns)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, place=place)


@dataclass(frozen=True, slots=True)
class ChannelAbsmax:
    """B12.c: the value is max |x| over tokens, [columns] float32, exactly; zero for no tokens."""

    name = "channel absmax"
    theorem = "B12.c"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare without any allowance: a maximum rounds nothing."""
        found = np.asarray(value)
        if note := _otherwise(found, np.float32, (seen.columns,)):
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        error = found - np.abs(seen.tokens()).max(0, initial=0)
        ratio, flat = bounds.worst(error, 0.0)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, place=(flat,))


@dataclass(frozen=True, slots=True)
class Reach:
    """B12.d: the value is a quantile of |x| over tokens and columns, [1] float32.

    It is 0 or more, and 0 where nothing was seen.

    share   of all inputs that are not above it; with 1 it is the largest of them, exactly
    step    how far above the quantile it may lie, relative: histograms know no more
    """

    share: float = 1.0
    step: float = 0.0
    name = "reach"
    theorem = "B12.d"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare with the quantile, whose neighbours are known exactly."""
        found = np.asarray(value)
        if note := _otherwise(found, np.float32, (1,)):
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        size = np.sort(np.abs(seen.tokens()), axis=None)
        wanted, most = bounds.quantile(size, self.share, self.step)
        if wanted == most:
            ratio = bounds.ratio(found[0] - wanted, 0.0)
        elif found[0] < wanted:
            ratio = np.inf
        else:
            ratio = bounds.ratio(found[0] - wanted, most - wanted)
        note = f"{float(found[0]):.9g}, expected {wanted:.9g} to {most:.9g}"
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, note=note)


@dataclass(frozen=True, slots=True)
class Counts:
    """B12.e: the value counts |x| over tokens and columns by the upper bits, [32768] int64."""

    name = "counts"
    theorem = "B12.e"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare without any allowance."""
        found = np.asarray(value)
        if note := _otherwise(found, np.int64, (1 << 15,)):
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        error = found - seen.copies * bounds.magnitudes(seen.tokens(), 1 << 15, 16)
        ratio, flat = bounds.worst(error, 0.0)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, place=(flat,))


@dataclass(frozen=True, slots=True)
class LeastError:
    """B12.f: clipped at the value, the inputs' codes lose no more than at other reaches.

    The value is above 0 where any input is, and never above the largest.

    grid     of the codes, symmetric
    step     the width of the bins in which the inputs were counted, relative
    shares   which parts of the largest input are among the reaches that are compared
    """

    grid: Grid
    step: float
    shares: tuple[float, ...] = (1.0,)
    name = "least error"
    theorem = "B12.f"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare the roots of the squared errors, in float64."""
        found = np.asarray(value)
        if note := _otherwise(found, np.float32, (1,)):
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        size = np.abs(seen.tokens()).ravel()
        largest = np.float32(size.max(initial=0.0))
        if not (0 < found[0] <= largest or found[0] == largest):
            note = f"{float(found[0]):.9g} does not lie between 0 and the largest input"
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        least = min(self._root(size, largest * np.float32(share)) for share in self.shares)
        allowed = least + 2 * bounds.binned_search(size, self.step)
        ratio = bounds.ratio(self._root(size, found[0]), allowed)
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio)

    def _root(self, size: Float64, reach: np.float32) -> float:
        """Return the root of the squared error of magnitudes."""
        import torch

        from qframe.activations import InputQuantizer, scale_of
        from qframe.scheme import ActivationScheme

        static = ActivationScheme(strategy="tensor", dynamic=False)
        scale = scale_of(torch.tensor([reach]), self.grid)
        x = torch.from_numpy(size.astype(np.float32))
        values = InputQuantizer(static, self.grid, scale).apply(x).double().numpy()
        return float(np.sqrt(((size - values) ** 2).sum()))


@dataclass(frozen=True, slots=True)
class TokensSeen:
    """B12.g: the value is a sample of the tokens, [k, columns] float32; all of them while k allows.

    Each has been seen at least as often as it is there.

    most   tokens of the sample
    """

    most: int
    name = "tokens seen"
    theorem = "B12.g"

    def certify(self, seen: Seen, value: Any) -> Certificate:
        """Compare token by token, without any allowance."""
        found, tokens = np.asarray(value), seen.tokens().astype(np.float32)
        shape = (min(len(tokens), self.most), seen.columns)
        if note := _otherwise(found, np.float32, shape):
            return Certificate(claim=self.name, theorem=self.theorem, ratio=np.inf, note=note)
        counts = Counter((row + np.float32(0)).tobytes() for row in tokens)
        counts.subtract((row + np.float32(0)).tobytes() for row in found)
        extra = sum(-count for count in counts.values() if count < 0)
        note = f"{extra} of its tokens have not been seen" if extra else ""
        ratio = np.inf if extra else 0.0
        return Certificate(claim=self.name, theorem=self.theorem, ratio=ratio, note=note)


def _otherwise(found: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> str:
    """Say what a value is instead of what it should be; "" where it is as it should be."""
    if found.dtype == dtype and found.shape == shape:
        return ""
    return f"the value is {found.dtype} {list(found.shape)}, not {dtype.__name__} {list(shape)}"
