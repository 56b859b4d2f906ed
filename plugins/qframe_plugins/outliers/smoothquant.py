"""SmoothQuant: move outliers from the activations to the weights, half way or as far as is best.

Source: Xiao et al., SmoothQuant, ICML 2023, arXiv:2211.10438, eq. (4):
input_scale_j = max |x_j|^alpha / max |w_j|^(1 - alpha), the maxima over tokens, and over the rows
of all layers that read the input.
Error:  none before rounding, but for one of float32 (docs/bounds.md, B4.a). It serves schemes whose
activations are rounded too; with weights alone it only makes them harder to round. An alpha that is
searched for loses no more on the sample than no scale at all (B4.h).

The paper finds alpha by hand, for a whole model. "search" finds one for each input: that at which
the outputs of a sample of tokens, inputs and weights rounded, are nearest to what they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qframe import Capabilities, Rewrite, RewriteProblem, claims, hookimpl
from qframe.errors import NonFiniteError

if TYPE_CHECKING:
    import numpy as np
    import torch

RANGE = 2.0**40  # scales beyond are of no use, and might overflow with the next handler's
ALPHAS = tuple(k / 20 for k in range(4, 20))  # 0.2, 0.25, ... 0.95; and no scale at all


@dataclass(frozen=True)
class SmoothQuant:
    """Divide the inputs of a channel by what makes them and its weights equally large.

    alpha   how far the outliers move: 0 leaves them to the activations, 1 to the weights; "search"
            tries what is between
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.5

    name: str = field(init=False, default="smoothquant")
    capabilities: Capabilities = field(init=False, default=Capabilities.any_format())

    @property
    def needs(self) -> frozenset[str]:
        """The largest magnitudes; and tokens, where they decide."""
        return frozenset({"absmax", "sample"} if self.alpha == "search" else {"absmax"})

    @property
    def claims(self) -> tuple[object, ...]:
        """A formula of maxima, or a search with scale 1 in it."""
        if self.alpha == "search":
            return (claims.FunctionPreserving(), claims.NoWorseOnSample(), claims.SignSymmetric())
        return (claims.FunctionPreserving(), claims.RowOrderFree(), claims.SignSymmetric())

    def rewrite(self, problem: RewriteProblem, rng: np.random.Generator) -> Rewrite:
        """Return the layers times the scale. Needs statistics["absmax"], or also ["sample"].

        A channel without inputs, or without weights, stays as it is.

        Raises NonFiniteError for statistics that are not finite.
        """
        import torch

        for name in sorted(self.needs):
            if not bool(torch.isfinite(problem.statistics[name]).all()):
                raise NonFiniteError(
                    f"layer {problem.name!r}: its inputs are not finite; look at the network"
                )
        if self.alpha != "search":
            return problem.scaled(_scale(problem, self.alpha))
        scales = [problem.foldable(_scale(problem, alpha)) for alpha in ALPHAS]
        scales.insert(0, torch.ones_like(scales[0]))
        losses = [_loss(problem, scale) for scale in scales]
        best = min(range(len(scales)), key=losses.__getitem__)  # the first of equals
        info = {"alpha": ALPHAS[best - 1] if best else "none"}
        return replace(problem.scaled(scales[best]), info=info)


def _scale(problem: RewriteProblem, alpha: float) -> torch.Tensor:
    """Return eq. (4), [columns] float32."""
    import torch

    x = problem.statistics["absmax"].double()
    rows = torch.cat(list(problem.weights.values()))
    w = rows.abs().amax(0).double() if len(rows) else torch.zeros_like(x)
    alive = (x > 0) & (w > 0)
    ratio = torch.where(alive, x, 1.0) ** alpha / torch.where(alive, w, 1.0) ** (1 - alpha)
    return ratio.clamp(1 / RANGE, RANGE).float()


def _loss(problem: RewriteProblem, scale: torch.Tensor) -> float:
    """Return the squared error of the sample's outputs, of all layers together, in float64.

    It is infinite where W s has no scale.
    """
    from qframe import activations, parallel

    x = problem.statistics["sample"]
    loss = 0.0
    try:
        with parallel.one_torch_thread():
            for layer in problem.layers.values():
                change = activations.output_change(layer, x, scale)
                loss += float(change.square().sum())
    except NonFiniteError:  # a scale that its dtype cannot hold: no candidate
        return float("inf")
    return loss


@hookimpl
def qframe_outlier_handlers() -> Iterable[SmoothQuant]:
    """Register smoothquant."""
    return [SmoothQuant()]
