"""AutoRound, for one layer at a time: learn which way to round, and where to clip, by sign descent.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, arXiv:2309.05516. A
weight gets the code clip(rint(w / s + v) + z), eq. (3), with an offset v in [-1/2, 1/2] of its own
and a scale s of a range whose ends are clipped by shares of their own. Both are moved by the sign
of the gradient of the output error, rounding having slope 1, and the best that was met is kept
(algorithm 1).
Error:  the output error of a row is at most that of round-to-nearest (docs/bounds.md, B10.c), and
        without a correction no weight moves by more than a step (B10.a).

Where this departs from the paper:
  * the error is that of the layer on all calibration tokens, and not that of a block on some of
    them (`autoround_block`); so rows are learned apart, each keeps its own best, and no random
    numbers are needed;
  * the descent moves all offsets at once, by ever smaller steps, and ends where many a code alone
    could still be bettered. Sweeps do that, code by code, with the ranges that were learned
    (coordinate descent: Behdin et al., QuantEase, arXiv:2309.01885), for codes that an offset can
    give;
  * as there, inputs are those in the quantized network and outputs should be those in the original
    one: what is learned for is Qronos's aim, W + W M H^-1, which `correction` takes a share of
    (B3.h). With 0 it is the weight. Where rounding the weight to nearest comes closer to the aim
    than all that was learned, a row is rounded to nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe.errors import HessianError, UncalibratedLayerError
from qframe_plugins.rounders.gptq import Factor
from qframe_plugins.rounders.qronos import aim_of, relative_change

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class AutoRound:
    """Learn offsets and ranges by signed gradient descent on the layer's output error.

    iterations      steps of the descent
    learning_rate   of the first step, in steps of the grid and shares of the range; it falls
                    linearly to 0. None: 1 / iterations, with which an offset can just reach 1/2
    sweeps          how often each code, in turn, is then made the best one as the others are
    correction      share of what is needed to make up for the layers before
    dampening_frac  share of the mean of diag(H) that is added to the diagonal to find that: what
                    few tokens tell of the inputs pulls less. Up to 1 it is tenfold where that fails
    """

    iterations: Annotated[int, Field(ge=0)] = 200
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    sweeps: Annotated[int, Field(ge=0)] = 10
    correction: Annotated[float, Field(ge=0, le=1)] = 0.5
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.1

    name: str = field(init=False, default="autoround")
    capabilities: Capabilities = field(
        init=False, default=Capabilities(strategies=frozenset({"channel", "group"}))
    )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian, and how far inputs have moved where that is made up for."""
        return frozenset({"hessian", "mismatch"} if self.correction else {"hessian"})

    @property
    def claims(self) -> tuple[object, ...]:
        """No row loses more than rounded to nearest; without an aim weights move by a step."""
        if not self.correction:
            loses = claims.NoWorseThan("output", sums="float32")
            return loses, claims.Radius(steps=1), claims.SignSymmetric()
        aim = claims.NoWorseThan(
            "output", correction=self.correction, dampening_frac=self.dampening_frac
        )
        return aim, claims.SignSymmetric()

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the learned codes. Needs statistics["hessian"], [columns, columns].

        With a correction also ["mismatch"]. Raises UncalibratedLayerError without tokens,
        NonFiniteError for a weight that is not finite, HessianError for a Hessian that is not, or
        where no damping makes it positive definite.
        """
        import torch

        from qframe import rounding
        from qframe.weights import check_finite

        if problem.tokens == 0:
            raise UncalibratedLayerError(
                f"layer {problem.name!r} saw no calibration tokens, which {self.name} needs; give "
                f"it another method with an override, or text that reaches it"
            )
        check_finite(problem.weight, f"layer {problem.name!r}: its weight")
        if not bool(torch.isfinite(problem.statistics["hessian"]).all()):
            raise HessianError(
                f"layer {problem.name!r}: the Hessian of its inputs is not finite; look at the "
                f"network before it"
            )
        nearest = rounding.to_nearest(problem)
        if not self.correction:
            return self._learned(problem, nearest)
        factor = Factor.of(problem, self.name, self.dampening_frac, 1.0, False)
        aim = aim_of(problem, factor.hessian, factor.damp, self.correction)
        aimed = dataclasses.replace(problem, weight=aim)
        found = self._learned(aimed, rounding.to_nearest(aimed))
        moved = relative_change(problem.weight, aim)
        return dataclasses.replace(
            closer(aimed, found, nearest),
            info={"damp": factor.damp, "correction": self.correction, "moved": moved},
            events=factor.events,
        )

    def _learned(self, problem: RoundingProblem, start: QuantizedWeight) -> QuantizedWeight:
        """Return what is learned from a start."""
        import torch

        from qframe_plugins.kernels.numba_cpu.autoround import learn

        scheme, grid = problem.scheme, problem.grid
        made = learn(
            problem.weight.numpy(),
            problem.statistics["hessian"].numpy(),
            start.codes.numpy(),
            start.scale.numpy(),
            start.zero_point.numpy(),
            scheme.group_width(problem.weight.shape[1]),
            grid.qmin,
            grid.qmax,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
            iterations=self.iterations,
            rate=self.learning_rate or 1 / max(self.iterations, 1),
            sweeps=self.sweeps,
        )
        codes, scale, zero_point = map(torch.from_numpy, made)
        return QuantizedWeight(
            codes=codes, scale=scale, zero_point=zero_point, group_index=start.group_index
        )


def closer(
    problem: RoundingProblem, one: QuantizedWeight, other: QuantizedWeight
) -> QuantizedWeight:
    """Return of each row what has less output error; `one` where both have as much."""
    import torch

    from qframe import parallel, rounding

    hessian, weight = problem.statistics["hessian"].double(), problem.weight.double()
    with parallel.one_torch_thread():
        errors = [weight - rounding.dequantize(each) for each in (one, other)]
        first, second = (((error @ hessian) * error).sum(1) for error in errors)
    better = (second < first)[:, None]
    codes, scale, zero_point = (
        torch.where(better, getattr(other, name), getattr(one, name))
        for name in ("codes", "scale", "zero_point")
    )
    return dataclasses.replace(one, codes=codes, scale=scale, zero_point=zero_point)


@hookimpl
def qframe_rounders() -> Iterable[AutoRound]:
    """Register autoround."""
    return [AutoRound()]
