"""AWQ: make salient input channels larger before rounding, and divide the input by as much.

Source: Lin et al., AWQ, MLSys 2024, arXiv:2306.00978, section 3.2. A weight that is multiplied by
s > 1 loses 1/s of what it lost, as long as its group keeps its range (eq. 2); so channels with
large activations get s = m^alpha (eq. 5), m being their magnitude, and alpha is searched for by the
error of the output (eq. 4).
Error:  none before rounding, but for one of float32: W' = W s is exact where s is a power of two.
After rounding to nearest no more than without (docs/bounds.md, B4.c), since alpha = 0 is tried too.

Where the paper leaves a choice: m is the root mean square of a channel, which comes from the same
second moments as the error; the error is that of all calibration tokens, tr(E H E^T); one scale
serves all layers that read the input. The published code also searches for the range of each group:
here that is the scheme's observer, "mse".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import Capabilities, Rewrite, RewriteProblem, RoundingProblem, claims, hookimpl
from qframe.errors import NonFiniteError

if TYPE_CHECKING:
    import numpy as np
    import torch

PART = 64  # rows that are rounded at a time
QUIETEST = 2.0**-12  # of the loudest channel: those below count as this loud


@dataclass(frozen=True)
class AWQ:
    """Scale channels by magnitude^alpha, with the alpha that loses least after rounding.

    candidates   how many alphas are tried: 0, 1/candidates, 2/candidates, ... below 1
    """

    candidates: Annotated[int, Field(ge=1)] = 20

    name: str = field(init=False, default="awq")
    needs: frozenset[str] = field(init=False, default=frozenset({"hessian"}))
    capabilities: Capabilities = field(init=False, default=Capabilities.any_format())

    @property
    def claims(self) -> tuple[object, ...]:
        """A search with scale 1 in it; it finds something where there are candidates."""
        found = (
            claims.FunctionPreserving(),
            claims.NoWorseThanUnscaled(sums="float32"),
            claims.ScaleEquivariant(),
            claims.SignSymmetric(),
        )
        # Planted channels are 2^8 times as loud, and alpha = 1/4 makes them 4 times as large.
        if self.candidates % 4 == 0:
            return (*found, claims.ProtectsSalient(gain=4, sums="float32"))
        return found

    def rewrite(self, problem: RewriteProblem, rng: np.random.Generator) -> Rewrite:
        """Return the layers times the best scale. Needs statistics["hessian"].

        Raises NonFiniteError for a Hessian that is not finite.
        """
        import torch

        from qframe.hessian import unit

        hessian = problem.statistics["hessian"]
        if not bool(torch.isfinite(hessian).all()):
            raise NonFiniteError(
                f"layer {problem.name!r}: the Hessian of its inputs is not finite; look at the "
                f"network before it"
            )
        layers, magnitude = problem.layers.values(), _magnitude(hessian)
        alphas = (k / self.candidates for k in range(self.candidates))
        scales = [problem.foldable(_normalized(magnitude**alpha)) for alpha in alphas]
        losses = _losses(
            [part for layer in layers for part in _parts(layer)], scales, unit(hessian)
        )
        best = scales[min(range(len(scales)), key=losses.__getitem__)]  # the first of equals
        return problem.scaled(best)


def _magnitude(hessian: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each input channel, [columns] float64, positive."""
    import torch

    root = (hessian.diagonal() / 2).sqrt()
    loudest = root.max()
    return root.clamp(min=loudest * QUIETEST) if loudest > 0 else torch.ones_like(root)


def _normalized(scale: torch.Tensor) -> torch.Tensor:
    """Return the scale with largest times smallest = 1, [columns] float32."""
    return (scale / (scale.max() * scale.min()).sqrt()).float()


def _parts(layer: RoundingProblem) -> list[RoundingProblem]:
    """Return the layer in parts that are rounded alone, each a few rows that the caches hold."""
    if layer.scheme.strategy == "tensor":
        return [layer]
    return [replace(layer, weight=rows) for rows in layer.weight.split(PART)]


def _losses(
    parts: list[RoundingProblem], scales: list[torch.Tensor], hessian: torch.Tensor
) -> list[float]:
    """Return tr(E H E^T) of all parts for each scale, E = W - Q(W s) / s.

    Sums are float32 within a part, and float64 over parts in their order, whatever the threads.
    """
    from qframe import parallel

    def lost(part: RoundingProblem) -> list[float]:
        return [_loss(part, scale, hessian) for scale in scales]

    with parallel.one_torch_thread():
        found = parallel.spread(lost, parts, parallel.default_threads())
    return [sum(losses) for losses in zip(*found, strict=True)] if found else [0.0] * len(scales)


def _loss(part: RoundingProblem, scale: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return tr(E H E^T) of a part; inf where W s has no Q."""
    from qframe import rounding
    from qframe.hessian import energy

    try:
        nearest = rounding.to_nearest(replace(part, weight=part.weight * scale))
    except NonFiniteError:  # a scale that its dtype cannot hold: no candidate
        return float("inf")
    return energy(part.weight - rounding.dequantize(nearest) / scale, hessian)


@hookimpl
def qframe_outlier_handlers() -> Iterable[AWQ]:
    """Register awq."""
    return [AWQ()]
