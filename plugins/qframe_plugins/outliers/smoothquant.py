"""SmoothQuant: move outliers from the activations to the weights, half way.

Source: Xiao et al., SmoothQuant, ICML 2023, arXiv:2211.10438, eq. (4):
input_scale_j = max |x_j|^alpha / max |w_j|^(1 - alpha), the maxima over tokens, and over the rows
of all layers that read the input.
Error:  none before rounding, but for one of float32 (docs/bounds.md, B4.a). It serves schemes whose
activations are rounded too; with weights alone it only makes them harder to round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import Capabilities, Rewrite, RewriteProblem, claims, hookimpl
from qframe.errors import NonFiniteError

if TYPE_CHECKING:
    import numpy as np

RANGE = 2.0**40  # scales beyond are of no use, and might overflow with the next handler's


@dataclass(frozen=True)
class SmoothQuant:
    """Divide the inputs of a channel by what makes them and its weights equally large.

    alpha   how far the outliers move: 0 leaves them to the activations, 1 to the weights
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    name: str = field(init=False, default="smoothquant")
    needs: frozenset[str] = field(init=False, default=frozenset({"absmax"}))
    capabilities: Capabilities = field(init=False, default=Capabilities.any_format())
    claims = (claims.FunctionPreserving(), claims.RowOrderFree(), claims.SignSymmetric())

    def rewrite(self, problem: RewriteProblem, rng: np.random.Generator) -> Rewrite:
        """Return the layers times the scale. Needs statistics["absmax"].

        A channel without inputs, or without weights, stays as it is.

        Raises NonFiniteError for a maximum that is not finite.
        """
        import torch

        x = problem.statistics["absmax"].double()
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"layer {problem.name!r}: its inputs are not finite; look at the network before it"
            )
        rows = torch.cat(list(problem.weights.values()))
        w = rows.abs().amax(0).double() if len(rows) else torch.zeros_like(x)
        alive = (x > 0) & (w > 0)
        ratio = torch.where(alive, x, 1.0) ** self.alpha / torch.where(alive, w, 1.0) ** (
            1 - self.alpha
        )
        return problem.scaled(ratio.clamp(1 / RANGE, RANGE).float())


@hookimpl
def qframe_outlier_handlers() -> Iterable[SmoothQuant]:
    """Register smoothquant."""
    return [SmoothQuant()]
