"""Codebooks: formats whose values are a list.

nf4       the 16 quantiles of the normal distribution of Dettmers et al., QLoRA, NeurIPS 2023,
          arXiv:2305.14314, appendix E
ternary   -1, 0 and 1, as in BitNet b1.58 (Ma et al., 2024, arXiv:2402.17764). Its codes stand for
          themselves, so that any method for integers serves it
Error:    half of the gap between two neighbours (docs/bounds.md, B2.b).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qframe import Grid, claims, hookimpl
from qframe.errors import UnsupportedError

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The printed decimals are those of float32 numbers, exactly."""


@dataclass(frozen=True)
class CodebookFormat:
    """A list of values, the same for every use; symmetric use only."""

    name: str
    num_bits: int
    values: tuple[float, ...]
    type: str = field(default="float")

    @property
    def claims(self) -> tuple[claims.Codebook]:
        """The values are these."""
        return (claims.Codebook(self.values),)

    def grid(self, *, symmetric: bool, scale_rule: str) -> Grid:
        """Return the values; code 0 stands for 0."""
        if not symmetric:
            raise UnsupportedError(f"{self.name} has no zero point; use symmetric: true")
        grid = Grid.of(self.values)
        return grid if self.type == "float" else Grid(grid.qmin, grid.qmax)


@hookimpl
def qframe_number_formats() -> Iterable[CodebookFormat]:
    """Register nf4 and ternary."""
    return [
        CodebookFormat("nf4", 4, NF4),
        CodebookFormat("ternary", 2, (-1.0, 0.0, 1.0), "int"),
    ]
