"""Wrong number formats, and right ones that do it otherwise.

The floating-point formats are those of the OCP specifications: e4m3 and e5m2 (8-bit floating
point, 2023), e2m1 (microscaling, 2023). nf4 is the codebook of Dettmers et al., QLoRA,
arXiv:2305.14314.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from qframe import Grid
from qframe.claims import Codebook, FloatingPoint, UniformGrid
from qframe.errors import UnsupportedError
from qframe_plugins.formats.codebook import NF4
from tests.mutants.mutant import Mutant, Twin

E4M3 = FloatingPoint(significand=4, min_exponent=-6, largest=448.0)
E5M2 = FloatingPoint(significand=3, min_exponent=-14, largest=57344.0)
E2M1 = FloatingPoint(significand=2, min_exponent=0, largest=6.0)


def grid_of(values):
    values = tuple(float(value) for value in values)
    return Grid(0, len(values) - 1, values)


def floats(exponent_bits, mantissa_bits, bias, largest, *, flush=False):
    """Return all finite values of a format, ascending, by decoding every code that it has."""
    found = set()
    codes = itertools.product((1, -1), range(1 << exponent_bits), range(1 << mantissa_bits))
    for sign, exponent, mantissa in codes:
        fraction = mantissa / (1 << mantissa_bits)
        if exponent == 0:
            value = 0.0 if flush else 2.0 ** (1 - bias) * fraction
        else:
            value = 2.0 ** (exponent - bias) * (1 + fraction)
        if value <= largest:
            found.add(sign * value + 0.0)
    return sorted(found)


# The right ones -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A format whose values are the same for every use; symmetric use only."""

    values: tuple[float, ...]
    claims: tuple[Any, ...]
    type: str = "float"
    num_bits: int = 8

    @property
    def name(self):
        return f"{self.type}{self.num_bits}"

    def grid(self, *, symmetric, scale_rule):
        if not symmetric:
            raise UnsupportedError(f"{self.name} has no zero point; use symmetric=True")
        return grid_of(self.values)


@dataclass(frozen=True)
class Integers:
    """Integers of `num_bits` bits."""

    num_bits: int = 4
    type: str = "int"
    claims: tuple[Any, ...] = (UniformGrid(),)

    @property
    def name(self):
        return f"{self.type}{self.num_bits}"

    def grid(self, *, symmetric, scale_rule):
        half = 1 << (self.num_bits - 1)
        if not symmetric:
            return self.unsigned(half)
        return self.full(half) if scale_rule == "full" else self.restricted(half)

    def unsigned(self, half):
        return Grid(0, 2 * half - 1)

    def full(self, half):
        return Grid(-half, half - 1)

    def restricted(self, half):
        return Grid(1 - half, half - 1)


def e4m3():
    return Listed(tuple(floats(4, 3, 7, 448.0)), (E4M3,))


def e5m2():
    return Listed(tuple(floats(5, 2, 15, 57344.0)), (E5M2,))


def e2m1():
    return Listed(tuple(floats(2, 1, 1, 6.0)), (E2M1,), num_bits=4)


def nf4():
    return Listed(NF4, (Codebook(NF4),), num_bits=4)


# Mutants --------------------------------------------------------------------------------------


class QmaxOffByOne(Integers):
    def full(self, half):
        return Grid(-half, half - 2)


class OneLevelTooMany(Integers):
    def full(self, half):
        return Grid(-half, half)


class RestrictedIsFull(Integers):
    def restricted(self, half):
        return self.full(half)


class RestrictedLosesTheTop(Integers):
    def restricted(self, half):
        return Grid(-half, half - 2)


class UnsignedIsSigned(Integers):
    def unsigned(self, half):
        return Grid(-half, half - 1)


class UnsignedFromOne(Integers):
    def unsigned(self, half):
        return Grid(1, 2 * half - 1)


class RuleForAsymmetric(Integers):
    def grid(self, *, symmetric, scale_rule):
        if not symmetric and scale_rule == "restricted":
            return Grid(0, (1 << self.num_bits) - 2)
        return super().grid(symmetric=symmetric, scale_rule=scale_rule)


class NumpyCodes(Integers):
    def full(self, half):
        return Grid(np.int64(-half), np.int64(half - 1))


class Misnamed(Integers):
    @property
    def name(self):
        return f"uint{self.num_bits}"


class Counted(Integers):
    """Every other grid lacks a level."""

    def grid(self, *, symmetric, scale_rule):
        made = super().grid(symmetric=symmetric, scale_rule=scale_rule)
        calls = self.__dict__.setdefault("calls", [])
        calls.append(made)
        return made if len(calls) % 2 else Grid(made.qmin, made.qmax - 1)


class UntypedRefusal(Listed):
    def grid(self, *, symmetric, scale_rule):
        if not symmetric:
            raise ValueError("no zero point")
        return grid_of(self.values)


class Pairs(Listed):
    def grid(self, *, symmetric, scale_rule):
        return list(self.values)


def _changed(right, change, **settings):
    """Return a maker of a format of which the values are changed, and what is claimed is not."""

    def make():
        this = right()
        values = tuple(change(list(this.values)))
        return Listed(values, this.claims, num_bits=this.num_bits, **settings)

    return make


def _wrong(name, make, killed_by, bug, correct=Integers):
    return Mutant(
        name=name, kind="number format", bug=bug, make=make, correct=correct, killed_by=killed_by
    )


CLAIMED = "grid_is_as_claimed"
GRID = "is_a_grid"

MUTANTS = (
    _wrong(
        "e4m3_largest_480",
        lambda: Listed(tuple(floats(4, 3, 7, 480.0)), (E4M3,)),
        CLAIMED,
        "The code of NaN is taken for 480, as in formats that have infinities.",
        e4m3,
    ),
    _wrong(
        "e4m3_largest_240",
        lambda: Listed(tuple(floats(4, 3, 7, 240.0)), (E4M3,)),
        CLAIMED,
        "The variant without the top exponent (fnuz hardware) under e4m3's name.",
        e4m3,
    ),
    _wrong(
        "e4m3_bias_8",
        lambda: Listed(tuple(floats(4, 3, 8, 448.0)), (E4M3,)),
        CLAIMED,
        "A bias of 8 halves every value.",
        e4m3,
    ),
    _wrong(
        "e4m3_subnormals_flushed",
        lambda: Listed(tuple(floats(4, 3, 7, 448.0, flush=True)), (E4M3,)),
        CLAIMED,
        "Subnormal numbers are missing.",
        e4m3,
    ),
    _wrong(
        "e4m3_is_e5m2",
        lambda: Listed(e5m2().values, (E4M3,)),
        CLAIMED,
        "The two 8-bit formats are mixed up.",
        e4m3,
    ),
    _wrong(
        "e5m2_is_e4m3",
        lambda: Listed(e4m3().values, (E5M2,)),
        CLAIMED,
        "The two 8-bit formats are mixed up.",
        e5m2,
    ),
    _wrong(
        "e5m2_with_infinity",
        _changed(e5m2, lambda v: [*v, float("inf")]),
        GRID,
        "The code of infinity is a value.",
        e5m2,
    ),
    _wrong(
        "e4m3_with_nan",
        _changed(e4m3, lambda v: [*v, float("nan")]),
        GRID,
        "The code of NaN is a value.",
        e4m3,
    ),
    _wrong(
        "e2m1_saturates_at_4",
        _changed(e2m1, lambda v: [x for x in v if abs(x) <= 4]),
        CLAIMED,
        "The largest number is missing.",
        e2m1,
    ),
    _wrong(
        "e2m1_of_integers",
        lambda: Listed(tuple(map(float, range(-6, 7))), (E2M1,), num_bits=4),
        CLAIMED,
        "Integers up to 6: 5 is no number of e2m1, 0.5 is one.",
        e2m1,
    ),
    _wrong(
        "e2m1_counts_two_zeros",
        _changed(e2m1, lambda v: [*v[:7], -0.0, *v[7:]]),
        GRID,
        "-0 is counted as a value of its own.",
        e2m1,
    ),
    _wrong(
        "e2m1_without_zero",
        _changed(e2m1, lambda v: [x for x in v if x]),
        "has_an_exact_zero",
        "No code stands for 0.",
        e2m1,
    ),
    _wrong(
        "e2m1_by_code",
        _changed(e2m1, lambda v: [*v[7:], *v[:7]]),
        GRID,
        "Values in the order of their codes, sign bit first.",
        e2m1,
    ),
    _wrong(
        "nf4_mirrored",
        _changed(nf4, lambda v: [-x for x in reversed(v)]),
        CLAIMED,
        "The codebook with the other sign: it is not its own mirror image.",
        nf4,
    ),
    _wrong(
        "nf4_floor_entries",
        _changed(nf4, lambda v: [*v[:8], *((a + b) / 2 for a, b in itertools.pairwise(v[7:]))]),
        CLAIMED,
        "Midpoints, at which one would round, in place of the entries.",
        nf4,
    ),
    _wrong(
        "nf4_in_float64",
        lambda: Listed((*NF4[:8], 0.1, *NF4[9:]), (), num_bits=4),
        "values_are_float32",
        "A value that no float32 tensor can hold.",
        nf4,
    ),
    _wrong(
        "nf4_entry_twice",
        _changed(nf4, lambda v: [*v[:9], v[8], *v[10:]]),
        GRID,
        "An entry is there twice, another one missing.",
        nf4,
    ),
    _wrong(
        "nf4_shifted_entry",
        _changed(nf4, lambda v: [*v[:3], float(np.nextafter(np.float32(v[3]), 0)), *v[4:]]),
        CLAIMED,
        "One entry is off by its last bit.",
        nf4,
    ),
    _wrong(
        "one_value_short",
        lambda: _Short(NF4, (Codebook(NF4),), num_bits=4),
        GRID,
        "More codes than values: the last code is an IndexError for the user.",
        nf4,
    ),
    _wrong("qmax_off_by_one", QmaxOffByOne, CLAIMED, "The largest code is left out."),
    _wrong("one_level_too_many", OneLevelTooMany, GRID, "2^b + 1 codes do not fit b bits."),
    _wrong(
        "restricted_is_full",
        RestrictedIsFull,
        CLAIMED,
        "The scale rule is ignored: the restricted grid is not its own mirror image.",
    ),
    _wrong(
        "restricted_loses_the_top",
        RestrictedLosesTheTop,
        CLAIMED,
        "The highest code is left out in place of the lowest.",
    ),
    _wrong(
        "unsigned_is_signed",
        UnsignedIsSigned,
        CLAIMED,
        "Asymmetric codes are signed, where zero points are stored unsigned.",
    ),
    _wrong(
        "unsigned_from_one",
        UnsignedFromOne,
        CLAIMED,
        "Stored zero points minus one, as in GPTQ's first format, leak into the codes.",
    ),
    _wrong(
        "rule_for_asymmetric",
        RuleForAsymmetric,
        CLAIMED,
        "The scale rule, which is about symmetric grids, takes a level from asymmetric ones.",
    ),
    _wrong("numpy_codes", NumpyCodes, GRID, "NumPy integers overflow where int does not."),
    _wrong("misnamed", Misnamed, "name_says_what_it_is", "No scheme will ever ask for uint4."),
    _wrong(
        "depends_on_calls",
        Counted,
        "grid_is_stable",
        "Something is used up: grids depend on how often they were asked for.",
    ),
    _wrong(
        "untyped_refusal",
        lambda: UntypedRefusal(NF4, (Codebook(NF4),), num_bits=4),
        GRID,
        "A ValueError for a use that is not supported.",
        nf4,
    ),
    _wrong(
        "returns_a_list", lambda: Pairs(NF4, (), num_bits=4), GRID, "Values without codes.", nf4
    ),
)


class _Short(Listed):
    def grid(self, *, symmetric, scale_rule):
        return Grid(0, len(self.values), self.values)


# Twins ----------------------------------------------------------------------------------------


class Spelled(Integers):
    """Says its values one by one."""

    def full(self, half):
        return Grid(-half, half - 1, tuple(map(float, range(-half, half))))


def ternary():
    """Return {-1, 0, 1}, of which two bits could tell four: BitNet b1.58, arXiv:2402.17764."""
    values = (-1.0, 0.0, 1.0)
    return Listed(values, (Codebook(values),), num_bits=2)


def powers_of_two():
    """Return a logarithmic format, a codebook that nobody has heard of, and claim nothing."""
    positive = [2.0**k for k in range(-6, 1)]
    return Listed(tuple([*(-x for x in reversed(positive)), 0.0, *positive]), (), num_bits=4)


def _right(name, make, why):
    return Twin(name=name, kind="number format", why=why, make=make)


TWINS = (
    _right("e4m3", e4m3, "All values of e4m3, by decoding every code."),
    _right("e5m2", e5m2, "All values of e5m2."),
    _right("e2m1", e2m1, "All values of e2m1; its zeros are one value."),
    _right("nf4", nf4, "A codebook that is not symmetric, for symmetric schemes."),
    _right("int8", lambda: Integers(8), "Integers, with another class behind them."),
    _right("int2", lambda: Integers(2), "Restricted, three levels are left of two bits."),
    _right("spelled", Spelled, "Integers as a list of values."),
    _right("ternary", ternary, "Fewer values than bits could tell."),
    _right("powers_of_two", powers_of_two, "A black box: nothing is claimed."),
)


# What a unit test looks at --------------------------------------------------------------------


def outputs(plugin):
    """Return ordinary numbers rounded to the nearest value, with the largest at the end."""
    grid = plugin.grid(symmetric=True, scale_rule="full")
    values = getattr(grid, "values", None)
    if values is None:
        values = range(int(grid.qmin), int(grid.qmax) + 1) if isinstance(grid, Grid) else grid
    levels = np.sort(np.array(list(values), np.float64))
    x = np.random.default_rng(0).normal(size=256)
    step = np.abs(x).max() / np.abs(levels[np.isfinite(levels)]).max()
    nearest = np.abs(x[:, None] / step - levels).argmin(1)
    return [levels[nearest] * step]
