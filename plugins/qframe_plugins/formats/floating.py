"""Floating-point numbers of 4, 6 and 8 bits.

Sources: OCP, 8-bit Floating Point Specification (OFP8) 1.0, 2023: E4M3 and E5M2; OCP,
Microscaling Formats (MX) Specification 1.0, 2023: E2M1, E2M3 and E3M2. Exponents of all ones hold
numbers, but for the one code of NaN and its sign in E4M3, and all of them in E5M2 (infinities and
NaNs). NaN and infinities are no values, and the two zeros are one.
Error:   at most 2^-p / (1 + 2^-p) of a number in the normal range, p bits of significand
(docs/bounds.md, B2.a).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qframe import Grid, claims, hookimpl
from qframe.errors import UnsupportedError


@dataclass(frozen=True)
class FloatingFormat:
    """A sign, `exponent_bits` and `mantissa_bits`, and the largest finite number."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    type: str = field(init=False, default="float")

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from a stored exponent."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def claims(self) -> tuple[claims.FloatingPoint]:
        """The values are those of IEEE 754's rules with these parameters."""
        return (claims.FloatingPoint(self.mantissa_bits + 1, 1 - self.bias, self.largest),)

    def grid(self, *, symmetric: bool, scale_rule: str) -> Grid:
        """Return the values. The k-th positive one has the stored bits k and the code k here."""
        if not symmetric:
            raise UnsupportedError(f"{self.name} has no zero point; use symmetric: true")
        codes = range(1, 1 << (self.num_bits - 1))
        positive = [value for value in map(self.decode, codes) if value <= self.largest]
        return Grid.of([*(-value for value in reversed(positive)), 0.0, *positive])

    def decode(self, code: int) -> float:
        """Return the number of a code without its sign."""
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        step = 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)
        return step * (mantissa + (1 << self.mantissa_bits if exponent else 0))


@hookimpl
def qframe_number_formats() -> Iterable[FloatingFormat]:
    """Register the element formats of OFP8 and MX."""
    return [
        FloatingFormat("fp8_e4m3", 4, 3, 448.0),
        FloatingFormat("fp8_e5m2", 5, 2, 57344.0),
        FloatingFormat("fp6_e2m3", 2, 3, 7.5),
        FloatingFormat("fp6_e3m2", 3, 2, 28.0),
        FloatingFormat("fp4_e2m1", 2, 1, 6.0),
    ]
