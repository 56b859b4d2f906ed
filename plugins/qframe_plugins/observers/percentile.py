"""How far a stored scale has to reach so that it clips only a given share of the inputs.

Source: Wu et al., Integer Quantization for Deep Learning Inference, 2020, arXiv:2004.09602, section
3.2: a few inputs that are clipped cost less than a coarse step for all others.
Error:  the percentile itself is found up to the width of a bin, 2^-7 of it, and never below
(docs/bounds.md, B12.d).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import InputGroup, claims, hookimpl
from qframe_plugins.observers.histogram import STEP, Histogram

if TYPE_CHECKING:
    import torch


class PercentileStatistic(Histogram):
    """A histogram that is asked for one percentile."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self._share = percentile / 100

    def value(self) -> torch.Tensor:
        """Return the percentile, [1] float32, zero where nothing was seen."""
        return self.reach(self._share)


@dataclass(frozen=True)
class Percentile:
    """Observe a percentile of the magnitudes of all inputs.

    percentile   per cent of the inputs that are not clipped
    """

    percentile: Annotated[float, Field(gt=0, le=100)] = 99.99

    name: str = field(init=False, default="percentile")
    finds_reach: bool = field(init=False, default=True)

    @property
    def claims(self) -> tuple[object, ...]:
        """A quantile, up to the width of a bin."""
        return (
            claims.Reach(share=self.percentile / 100, step=STEP),
            claims.Mergeable(exact=True),
            claims.SignBlind(),
            claims.Reproducible(),
        )

    def start(self, group: InputGroup) -> PercentileStatistic:
        """Return an empty statistic."""
        return PercentileStatistic(self.percentile)


@hookimpl
def qframe_observers() -> Iterable[Percentile]:
    """Register percentile."""
    return [Percentile()]
