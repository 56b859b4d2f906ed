"""Right ways to round to nearest that are not qframe's: no check may reject them."""

from __future__ import annotations

import numpy as np

from qframe import claims
from tests.mutants.rounder_reference import NEAREST, Nearest, twins


class HalfAway(Nearest):
    def steps(self, weight, scale):
        quotient = weight / scale
        whole = np.trunc(quotient)
        return whole + np.sign(quotient) * (np.abs(quotient - whole) >= np.float32(0.5))


class MagicNumber(Nearest):
    def steps(self, weight, scale):
        magic = np.float32(1.5 * 2**23)
        return (weight / scale + magic) - magic


class Reciprocal(Nearest):
    """Times fl(1 / s), where that is a normal number."""

    claims = (claims.HalfStep(roundings=2), *NEAREST[1:3])

    def steps(self, weight, scale):
        normal = scale >= 2 / np.finfo(np.float32).max
        safe = np.where(normal, scale, np.float32(1))
        product = weight * (np.float32(1) / safe)
        return np.rint(np.where(normal, product, weight / scale))


class ReciprocalScale(Reciprocal):
    """Stores 1 / fl(qmax / absmax), which may miss absmax / qmax by its last bit."""

    claims = (
        claims.HalfStep(roundings=2),
        claims.SchemeScale(),
        claims.Covers(),
        claims.Idempotent(exact=False),
    )

    def scale(self, lo, hi, grid, scheme):
        quotient = super().scale(lo, hi, grid, scheme)
        if not scheme.symmetric:  # hi - lo is rounded already
            return quotient
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(grid.qmax - grid.qmin) / 2 / np.maximum(np.abs(lo), np.abs(hi))
            return np.where(np.isfinite(inverse), np.float32(1) / inverse, quotient)


class Double(Nearest):
    def scale(self, lo, hi, grid, scheme):
        return np.float32(super().scale(np.float64(lo), np.float64(hi), grid, scheme))

    def steps(self, weight, scale):
        return np.rint(np.float64(weight) / np.float64(scale))


class RowByRow(Nearest):
    def steps(self, weight, scale):
        steps = np.empty_like(weight)
        for row in range(len(weight)):
            for first in range(0, weight.shape[1], 3):
                part = row, slice(first, first + 3)
                steps[part] = np.rint(weight[part] / scale[part])
        return steps


class ZeroPointFromTheTop(Nearest):
    def zero(self, lo, hi, scale, grid):
        _, hi = self.range(lo, hi)
        return np.clip(np.rint(grid.qmax - hi / scale), grid.qmin, grid.qmax)


class ZeroPointBefore(Nearest):
    """The sum is rounded to float32 once more, and it says so."""

    claims = (claims.HalfStep(zero_point="before"), *NEAREST[1:])

    def steps(self, weight, scale):
        return weight / scale

    def codes(self, codes, grid):
        return super().codes(np.rint(codes), grid)


class Interleaved(Nearest):
    """Column j belongs to group j mod groups."""

    def index(self, columns, scheme):
        return np.arange(columns, dtype=np.int32) % np.int32(scheme.groups(columns))

    def parts(self, weight, width):
        groups = -(-weight.shape[1] // width)
        return [weight[:, first::groups] for first in range(groups)]

    def searches(self, scheme):
        return False  # the search is for contiguous groups; not to clip is allowed


class PowersOfTwo(Nearest):
    """Scales are rounded up to powers of two, so it does not claim the scheme's."""

    claims = (claims.HalfStep(), claims.Covers(), claims.SignSymmetric())

    def store(self, scale, dtype):
        _, exponent = np.frexp(np.where(scale > 0, scale, np.float32(1)))
        small = -24 if dtype == "float16" else -126
        power = np.ldexp(np.float32(1), np.maximum(exponent, small)).astype(np.float32)
        finite = np.where(scale > 0, power, np.float32(0))
        return np.where(np.isfinite(scale), finite, np.float32(np.inf))


WHY = {
    HalfAway: "ties go away from zero: as near as to even, and as symmetric",
    MagicNumber: "rint by adding and subtracting 1.5 2^23, as code without an instruction does",
    Reciprocal: "multiplies with fl(1 / s), as most GPU code does, and says so: two roundings",
    ReciprocalScale: "makes the scale from its reciprocal, so it gives codes back, but not values",
    Double: "all in float64: nearer to real numbers than asked for",
    RowByRow: "loops over blocks of a row, as compiled code does",
    ZeroPointFromTheTop: "rounds the zero point from the upper end of the range",
    ZeroPointBefore: "adds the zero point before it rounds, as compressed-tensors and HQQ do",
    Interleaved: "groups are of every so many columns, and the group index says so",
    PowersOfTwo: "scales are powers of two, as microscaling has them; they are not claimed",
}

TWINS = twins(WHY)
