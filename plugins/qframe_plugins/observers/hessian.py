"""The Hessian of a layer's squared output error, H = (2/n) sum over tokens of x x^T.

For a weight change d the layer's output error is ||X d||^2 / n = d^T H d / 2: GPTQ and its
relatives round against it. Sums are float32 within a tile of tokens and float64 between tiles,
in a fixed order, so the bits do not depend on the thread count.

Source: Frantar and Alistarh, OBC, NeurIPS 2022, section 3; GPTQ, arXiv:2210.17323, eq. (1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import InputGroup, claims, hookimpl

if TYPE_CHECKING:
    import torch


class HessianStatistic:
    """The sum of x x^T and the number of tokens. Merging adds."""

    def __init__(self, columns: int) -> None:
        import torch

        self._sum = torch.zeros(columns, columns, dtype=torch.float64)
        self._tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Take in activations x [tokens, columns]."""
        from qframe_plugins.kernels.numba_cpu import hessian

        hessian.accumulate(self._sum.numpy(), x.numpy())
        self._tokens += len(x)

    def merge(self, other: HessianStatistic) -> None:
        """Take in what `other` has seen."""
        self._sum += other._sum
        self._tokens += other._tokens

    def value(self) -> torch.Tensor:
        """Return H = (2/n) sum x x^T, [columns, columns] float64, symmetric; zero for n = 0."""
        from qframe_plugins.kernels.numba_cpu import hessian

        full = self._sum.clone()
        hessian.symmetrize(full.numpy())
        return full.mul_(2 / self._tokens) if self._tokens else full


@dataclass(frozen=True)
class HessianObserver:
    """Observe the second moments of the inputs."""

    name: str = field(init=False, default="hessian")
    claims = (
        claims.SecondMoments(run=256),
        claims.Mergeable(),
        claims.SignBlind(),
        claims.Reproducible(),
    )

    def start(self, group: InputGroup) -> HessianStatistic:
        """Return an empty statistic."""
        return HessianStatistic(group.columns)


@hookimpl
def qframe_observers() -> Iterable[HessianObserver]:
    """Register hessian."""
    return [HessianObserver()]
