"""Hadamard: rotate weights and inputs by a random orthogonal matrix, so that nothing stands out.

Source: Chee et al., QuIP, NeurIPS 2023, arXiv:2307.13304, section 4 (incoherence processing);
Ashkboos et al., QuaRot, NeurIPS 2024, arXiv:2404.00456 (randomized Hadamard transforms). x Q with
Q = diag(signs) H / sqrt(n) has the length of x, and spreads an outlier over the n columns of its
block; and W' = W Q keeps every product, for Q Q^T = 1.
Error:  none before rounding, but for the roundings of the transform itself (docs/bounds.md, B4.f).
With probability 1 - p no number of a rotated block of length r exceeds r sqrt(2 ln(2 N / p) / n), N
of them being looked at (B8.c).

Where the papers leave a choice: blocks are the largest power of two that divides the columns, 64
for 576 of them. The signs are drawn anew for every input, and stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Capabilities, Rewrite, RewriteProblem, Rotation, claims, hookimpl

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Hadamard:
    """Rotate the columns of a group, and its input, by random signs and Hadamard matrices."""

    name: str = field(init=False, default="hadamard")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(init=False, default=Capabilities.any_format())
    rotates: bool = field(init=False, default=True)
    claims = (
        claims.FunctionPreserving(),
        claims.Incoherent(),
        claims.RowOrderFree(),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
    )

    def rewrite(self, problem: RewriteProblem, rng: np.random.Generator) -> Rewrite:
        """Return the layers rotated. Signs come from `rng`."""
        return problem.rotated(Rotation.drawn(problem.columns, rng))


@hookimpl
def qframe_outlier_handlers() -> Iterable[Hadamard]:
    """Register hadamard."""
    return [Hadamard()]
