"""How far a stored scale has to reach so that rounding and clipping together lose least.

Source: the clipping search of Banner et al., Post training 4-bit quantization, NeurIPS 2019,
arXiv:1810.05723, section 3, with the inputs' own histogram in place of a distribution.
Error:  no more than with the largest input as reach, or with a half or a quarter of it
(docs/bounds.md, B12.f).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Grid, InputGroup, claims, hookimpl
from qframe_plugins.observers.histogram import STEP, Histogram, middles

if TYPE_CHECKING:
    import torch

EIGHT_BITS = Grid(-127, 127)
CANDIDATES = 100  # reaches that are tried: the largest input, 99 % of it, ... 1 %


class LeastErrorStatistic(Histogram):
    """A histogram that is asked for the reach with the least squared error.

    grid   of the codes
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self._grid = grid

    def value(self) -> torch.Tensor:
        """Return the reach, [1] float32, zero where nothing but zeros was seen."""
        import torch

        largest = self.largest
        if not bool(torch.isfinite(largest)) or not bool(largest):
            return largest
        seen = torch.nonzero(self._counts)[:, 0]
        x, counts = middles()[seen].minimum(largest), self._counts[seen].double()
        reaches = largest * torch.tensor([1 - k / CANDIDATES for k in range(CANDIDATES)])
        losses = (counts * self._lost(x, reaches[:, None]).square()).sum(1)
        return reaches[losses == losses.min()][:1]  # the first of equals

    def _lost(self, x: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """Return what rounding changes at each x for each reach, [reaches, x] float64."""
        from qframe.activations import InputQuantizer, scale_of
        from qframe.scheme import ActivationScheme

        static = ActivationScheme(strategy="tensor", dynamic=False)
        codes = InputQuantizer(static, self._grid, scale_of(reach, self._grid))
        return (x - codes.apply(x)).double()


@dataclass(frozen=True)
class LeastError:
    """Observe the reach at which the inputs' codes lose least.

    grid   of the codes; the host gives that of the scheme
    """

    grid: Grid = EIGHT_BITS

    name: str = field(init=False, default="mse")
    finds_reach: bool = field(init=False, default=True)

    @property
    def claims(self) -> tuple[object, ...]:
        """A search that has these parts of the largest input among its candidates."""
        return (
            claims.LeastError(grid=self.grid, step=STEP, shares=(1.0, 0.5, 0.25)),
            claims.Mergeable(exact=True),
            claims.SignBlind(),
            claims.Reproducible(),
        )

    def start(self, group: InputGroup) -> LeastErrorStatistic:
        """Return an empty statistic."""
        return LeastErrorStatistic(self.grid)


@hookimpl
def qframe_observers() -> Iterable[LeastError]:
    """Register mse."""
    return [LeastError()]
