"""Integers of 2 to 8 bits.

Symmetric, full: the codes of two's complement, -2^(b-1) .. 2^(b-1)-1. Symmetric, restricted:
the most negative code is left out, so that the grid is its own mirror image. Asymmetric:
0 .. 2^b - 1, shifted by a zero point.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from qframe import Grid, claims, hookimpl


@dataclass(frozen=True)
class IntegerFormat:
    """Integers of `num_bits` bits; half a step is half the scale."""

    num_bits: int
    name: str = field(init=False)
    type: str = field(init=False, default="int")
    claims = (claims.UniformGrid(),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"int{self.num_bits}")

    def grid(self, *, symmetric: bool, scale_rule: str) -> Grid:
        """Return the codes: signed when symmetric, else from zero."""
        if not symmetric:
            return Grid(0, (1 << self.num_bits) - 1)
        half = 1 << (self.num_bits - 1)
        return Grid(-half if scale_rule == "full" else 1 - half, half - 1)


@hookimpl
def qframe_number_formats() -> Iterable[IntegerFormat]:
    """Register int2 to int8."""
    return [IntegerFormat(bits) for bits in range(2, 9)]
