"""RTN: round every weight to the nearest code of its group. No calibration.

Source: the baseline of every paper on the matter, e.g. Frantar et al., GPTQ, ICLR 2023,
arXiv:2210.17323.
Error:  |w - scale (code - zero_point)| <= scale / 2 for every weight that is not clipped, and
nothing is clipped with the minmax observer (docs/bounds.md, B1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RTN:
    """Round to nearest; where the scale comes from is the scheme's observer."""

    name: str = field(init=False, default="rtn")
    needs: frozenset[str] = field(init=False, default=frozenset())
    capabilities: Capabilities = field(init=False, default=Capabilities.any_format())
    by_rows = True
    claims = (
        claims.HalfStep(),
        claims.SchemeScale(),
        claims.Covers(),
        claims.ScaleEquivariant(),
        claims.SignSymmetric(),
        claims.Idempotent(),
    )

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the nearest codes."""
        from qframe import rounding

        return rounding.to_nearest(problem)


@hookimpl
def qframe_rounders() -> Iterable[RTN]:
    """Register rtn."""
    return [RTN()]
