"""AutoRound, for one layer at a time: learn which way to round, and where to clip, by sign descent.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, arXiv:2309.05516. A
weight gets the code clip(rint(w / s + v) + z), eq. (3), with an offset v in [-1/2, 1/2] of its own
and a scale s of a range whose ends are clipped by shares of their own. Both are moved by the sign
of the gradient of the output error, rounding having slope 1, and the best that was met is kept
(algorithm 1).
Error:  the output error of a row is at most that of round-to-nearest (docs/bounds.md, B10.c), and
        no weight moves by more than a step (B10.a).

Where this departs from the paper: the error is that of the layer on all calibration tokens, and not
that of a block on some of them; so rows are learned apart, each keeps its own best, and no random
numbers are needed. As there, inputs are those in the quantized network, X, and outputs should be
those in the original one, Y W^T: with H = (2/n) X^T X, M = (2/n) (Y - X)^T X and E = W - Q

    ||Y W^T - X Q^T||^2 = (tr(E H E^T) + 2 tr(W M E^T)) n / 2 + const,

of whose second term `correction` takes a share. With 0 it is the error on X alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe.errors import HessianError, UncalibratedLayerError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class AutoRound:
    """Learn offsets and ranges by signed gradient descent on the layer's output error.

    iterations      steps of the descent
    learning_rate   of the first step, in steps of the grid and shares of the range; it falls
                    linearly to 0. None: 1 / iterations, with which an offset can just reach 1/2
    correction      share of what is needed to make up for the layers before
    """

    iterations: Annotated[int, Field(ge=0)] = 200
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    correction: Annotated[float, Field(ge=0, le=1)] = 0.0

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
        """No row loses more than rounded to nearest; weights move by a step at most."""
        loses = claims.NoWorseThan("output", sums="float32", correction=self.correction)
        return loses, claims.Radius(steps=1), claims.SignSymmetric()

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the learned codes. Needs statistics["hessian"], [columns, columns].

        Raises UncalibratedLayerError without tokens, NonFiniteError for a weight that is not
        finite, HessianError for a Hessian that is not.
        """
        import torch

        from qframe import rounding
        from qframe.weights import check_finite
        from qframe_plugins.kernels.numba_cpu.autoround import learn

        weight, scheme, grid = problem.weight, problem.scheme, problem.grid
        if problem.tokens == 0:
            raise UncalibratedLayerError(
                f"layer {problem.name!r} saw no calibration tokens, which autoround needs; give it "
                f"another method with an override, or text that reaches it"
            )
        check_finite(weight, f"layer {problem.name!r}: its weight")
        hessian = problem.statistics["hessian"]
        if not bool(torch.isfinite(hessian).all()):
            raise HessianError(
                f"layer {problem.name!r}: the Hessian of its inputs is not finite; look at the "
                f"network before it"
            )
        start = rounding.to_nearest(problem)
        made = learn(
            weight.numpy(),
            hessian.numpy(),
            start.codes.numpy(),
            start.scale.numpy(),
            start.zero_point.numpy(),
            scheme.group_width(weight.shape[1]),
            grid.qmin,
            grid.qmax,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
            iterations=self.iterations,
            rate=self.learning_rate or 1 / max(self.iterations, 1),
            pull=self._pull(problem),
        )
        codes, scale, zero_point = map(torch.from_numpy, made)
        return QuantizedWeight(
            codes=codes, scale=scale, zero_point=zero_point, group_index=start.group_index
        )

    def _pull(self, problem: RoundingProblem) -> npt.NDArray[np.float64] | None:
        """Return correction W M, [rows, columns]; None where nothing is made up for."""
        from qframe import parallel
        from qframe.weights import check_finite

        if not self.correction:
            return None
        with parallel.one_torch_thread():
            pull = problem.weight.double() @ problem.statistics["mismatch"].double()
        check_finite(pull, f"layer {problem.name!r}: what makes up for the layers before")
        found: npt.NDArray[np.float64] = (self.correction * pull).numpy()
        return found


@hookimpl
def qframe_rounders() -> Iterable[AutoRound]:
    """Register autoround."""
    return [AutoRound()]
