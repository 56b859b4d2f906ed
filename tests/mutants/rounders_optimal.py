"""Wrong searches for the best scale, and right ones that do it otherwise (docs/bounds.md, B10.d).

All claim what qframe's optimal_rtn claims.
"""

from __future__ import annotations

import numpy as np
import torch

from qframe import Capabilities, QuantizedWeight, claims, rounding
from qframe.errors import NonFiniteError
from qframe_plugins.rounders.optimal_rtn import OptimalRTN
from tests.mutants.rounder_reference import mutants, outputs, twins

__all__ = ["MUTANTS", "TWINS", "outputs"]


class Sweep:
    """The sweep over breakpoints in NumPy, group by group: qframe's own, without its shortcuts."""

    name = "sweep"
    needs = frozenset()
    capabilities = Capabilities(num_bits=frozenset({2}), strategies=frozenset({"group"}))
    claims = OptimalRTN.claims

    def round(self, problem, rng):
        scheme, grid = problem.scheme.replace(observer="minmax"), problem.grid
        if not bool(torch.isfinite(problem.weight).all()):
            raise NonFiniteError(f"layer {problem.name!r}: a weight is not finite")
        start = rounding.fit_scales(problem.weight, scheme, grid, name=problem.name)
        index = rounding.group_index(problem.weight.shape[1], scheme)
        scale, zero = (each.double().numpy() for each in start)
        codes = torch.empty(problem.weight.shape, dtype=torch.int16)
        for row, group in np.ndindex(*scale.shape):
            own = index.numpy() == group
            w = np.float64(problem.weight[row].numpy()[own])
            s, z = self.best(w, scale[row, group], zero[row, group], scheme, grid)
            scale[row, group], zero[row, group] = s, z
            codes[row, torch.from_numpy(own)] = torch.from_numpy(
                np.int16(self.steps(w, s, grid.qmin - z, grid.qmax - z) + z)
            )
        return QuantizedWeight(
            codes=codes,
            scale=torch.from_numpy(np.float32(scale)),
            zero_point=torch.from_numpy(np.int16(zero)),
            group_index=index,
        )

    def best(self, w, scale, zero, scheme, grid):
        """Return the scale and zero point of least error."""
        found = scale, zero
        [least] = self.losses(w, np.array([scale]), grid.qmin - zero, grid.qmax - zero)
        for z in self.zeros(zero, scheme, grid):
            low, high = grid.qmin - z, grid.qmax - z
            trials = self.trials(w, low, high, scheme.scale_dtype)
            for s, loss in zip(trials, self.losses(w, trials, low, high), strict=True):
                if self.better(loss, least):
                    found, least = (s, z), loss
        return found

    def zeros(self, zero, scheme, grid):
        """Return the zero points to try."""
        return [0] if scheme.symmetric else range(grid.qmin, grid.qmax + 1)

    def trials(self, w, low, high, dtype):
        """Return the scales next to the lowest point of every piece."""
        reach = np.where(w > 0, high, -low)
        ends = [np.abs(w) / (k + 0.5) for k in range(int(high - low))]
        ends = [end[(k < reach) & (w != 0)] for k, end in enumerate(ends)]
        ends = np.unique(np.concatenate([[0.0], *ends]))
        if len(ends) == 1:
            return np.empty(0)
        tops = np.append(ends[1:], 4 * ends[-1])
        middle = (ends + tops) / 2  # codes do not change within a piece
        steps = self.steps(w[:, None], middle, low, high)
        products, squares = (w[:, None] * steps).sum(0), (steps**2).sum(0)
        used = squares > 0
        lowest = np.clip(self.fit(products[used], squares[used]), ends[used], tops[used])
        return self.stored(lowest, dtype)

    def fit(self, products, squares):
        """Return the real scales that fit the codes of the pieces best."""
        return products / squares

    def stored(self, scale, dtype):
        """Return the numbers of a dtype on either side of real scales."""
        with np.errstate(over="ignore", under="ignore"):
            nearest = np.float32(scale)
            above = np.where(nearest < scale, np.nextafter(nearest, np.float32(np.inf)), nearest)
        up = rounding.round_up(torch.from_numpy(np.float32(above)), dtype).numpy()
        if dtype == "float16":
            with np.errstate(over="ignore"):
                down = np.nextafter(np.float16(up), np.float16(0)).astype(np.float64)
        else:
            bits = up.view(np.int32) - np.int32(1 if dtype == "float32" else 1 << 16)
            down = bits.view(np.float32).astype(np.float64)
        both = np.unique(np.concatenate([np.float64(up), down]))
        return both[(both > 0) & np.isfinite(both)][::-1]

    def steps(self, w, s, low, high):
        """Return the nearest steps in [low, high]."""
        return np.clip(np.rint(w / s), low, high)

    def losses(self, w, trials, low, high):
        """Return the squared error of a group for each scale, a list."""
        gaps = w[:, None] - trials * self.steps(w[:, None], trials, low, high)
        return np.cumsum(self.squares(gaps, trials), 0)[-1].tolist()

    def squares(self, gaps, trials):
        """Return what counts of errors."""
        return gaps**2

    def better(self, loss, least):
        """Return whether a scale is to be taken."""
        return loss < least


# Wrong ----------------------------------------------------------------------------------------


class RoundedUp(Sweep):
    """Finds the best real scale and stores it rounded up, as scales that must not clip are."""

    def best(self, w, scale, zero, scheme, grid):
        s, z = super().best(w, scale, zero, scheme.replace(scale_dtype="float32"), grid)
        up = rounding.round_up(torch.tensor([s], dtype=torch.float32), scheme.scale_dtype)
        return float(up), z


class StopsAtFirst(Sweep):
    """Takes the first scale that is better and stops, as a descent from the range does."""

    def best(self, w, scale, zero, scheme, grid):
        self.done = False
        return super().best(w, scale, zero, scheme, grid)

    def better(self, loss, least):
        taken = loss < least and not self.done
        self.done = self.done or taken
        return taken


class NegativeSideForgotten(Sweep):
    """Sums products over positive weights only."""

    def trials(self, w, low, high, dtype):
        return super().trials(np.maximum(w, 0), low, high, dtype)


class SumOfAbsolutes(Sweep):
    """Divides by the sum of |k| where the sum of k^2 belongs."""

    def fit(self, products, squares):
        return products / np.sqrt(squares)


class LeastIsLargest(Sweep):
    """Keeps the scale with the largest error."""

    def better(self, loss, least):
        return loss > least


class CodesOfTheRange(Sweep):
    """Keeps the codes that the range gave, and fits the scale to them: they are nearest no more."""

    def best(self, w, scale, zero, scheme, grid):
        self.kept = None
        steps = self.steps(w, scale, grid.qmin - zero, grid.qmax - zero)
        if not steps.any():
            return scale, zero
        trials = self.stored(np.array([(w @ steps) / (steps @ steps)]), scheme.scale_dtype)
        if not len(trials):
            return scale, zero
        self.kept = steps
        s = min(trials, key=lambda s: float(np.square(w - s * steps).sum()))
        return s, zero

    def steps(self, w, s, low, high):
        kept = getattr(self, "kept", None)
        return super().steps(w, s, low, high) if kept is None else kept


class ClippedNotCounted(Sweep):
    """Leaves out the errors of weights that are clipped, so that clipping costs nothing."""

    def squares(self, gaps, trials):
        return np.where(np.abs(gaps) <= trials, gaps**2, 0)


class SubnormalScalesFlushed(Sweep):
    """Never takes a scale below the smallest normal float16, as flush-to-zero does not."""

    def stored(self, scale, dtype):
        found = super().stored(scale, dtype)
        return found[found >= 2.0**-14]


class LittleIsNothing(Sweep):
    """Allows for rounding on the wrong side: what is better by no more than that is left out."""

    def best(self, w, scale, zero, scheme, grid):
        self.slack = 16 * (len(w) * (grid.qmax - grid.qmin) + len(w) + 8) * 2.0**-53 * float(w @ w)
        return super().best(w, scale, zero, scheme, grid)

    def better(self, loss, least):
        return loss < least - self.slack


# Right ----------------------------------------------------------------------------------------


class FromBelow(Sweep):
    """Meets the scales in rising order: of equal errors another one may win."""

    claims = tuple(c for c in Sweep.claims if not isinstance(c, claims.ScaleEquivariant))

    def stored(self, scale, dtype):
        return super().stored(scale, dtype)[::-1]

    def zeros(self, zero, scheme, grid):
        return list(super().zeros(zero, scheme, grid))[::-1]


KILLED_BY = {
    RoundedUp: "fitted_scale",
    StopsAtFirst: "no_worse_than_nearest",
    NegativeSideForgotten: "fitted_scale",
    SumOfAbsolutes: "fitted_scale",
    LeastIsLargest: "no_worse_than_nearest",
    CodesOfTheRange: "half_step",
    ClippedNotCounted: "no_worse_than_nearest",
    SubnormalScalesFlushed: "fitted_scale",
    LittleIsNothing: "fitted_scale",
}

MUTANTS = mutants(KILLED_BY)
TWINS = twins(
    {
        Sweep: "every piece of every zero point is looked at, in NumPy",
        FromBelow: "of scales with equal errors it keeps another one",
    }
)
