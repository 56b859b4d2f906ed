"""Mistakes in the plugins for floating-point numbers and codebooks, and right ones otherwise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qframe import Grid
from qframe.claims import FloatingPoint
from qframe_plugins.formats.codebook import NF4, CodebookFormat
from qframe_plugins.formats.floating import FloatingFormat
from tests.mutants.formats import outputs
from tests.mutants.mutant import Mutant, Twin

__all__ = ["MUTANTS", "TWINS", "outputs"]


@dataclass(frozen=True)
class Right(FloatingFormat):
    """fp8_e4m3, as claimed by its standard, whatever the values are."""

    name: str = "fp8_e4m3"
    exponent_bits: int = 4
    mantissa_bits: int = 3
    largest: float = 448.0
    claims = (FloatingPoint(significand=4, min_exponent=-6, largest=448.0),)


class BiasOneMore(Right):
    @property
    def bias(self):
        return 1 << (self.exponent_bits - 1)


class WithoutImplicitOne(Right):
    def decode(self, code):
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        return 2.0 ** (exponent - self.bias) * (1 + mantissa) / 8


class SubnormalStepHalved(Right):
    def decode(self, code):
        value = super().decode(code)
        return value if code >> self.mantissa_bits else value / 2


class NanIsANumber(Right):
    def grid(self, *, symmetric, scale_rule):
        return dataclasses.replace(self, largest=480.0).grid_of_all(symmetric, scale_rule)

    def grid_of_all(self, symmetric, scale_rule):
        return FloatingFormat.grid(self, symmetric=symmetric, scale_rule=scale_rule)


class PositiveOnly(Right):
    def grid(self, *, symmetric, scale_rule):
        made = super().grid(symmetric=symmetric, scale_rule=scale_rule)
        return Grid.of(value for value in made.values if value >= 0)


class ZeroTwice(Right):
    def grid(self, *, symmetric, scale_rule):
        made = super().grid(symmetric=symmetric, scale_rule=scale_rule)
        return Grid(made.qmin - 1, made.qmax, tuple(sorted((*made.values, -0.0))))


def _format(values=NF4, **fields):
    right = CodebookFormat("nf4", 4, NF4)

    @dataclass(frozen=True)
    class Changed(CodebookFormat):
        claims = right.claims

    return Changed(**{"name": "nf4", "num_bits": 4, "values": values, **fields})


class Shifted(CodebookFormat):
    def grid(self, *, symmetric, scale_rule):
        made = super().grid(symmetric=True, scale_rule=scale_rule)
        return Grid(0, made.levels - 1) if self.type == "int" else made


def _ternary(**fields):
    return CodebookFormat("ternary", 2, (-1.0, 0.0, 1.0), **{"type": "int", **fields})


CLAIMED = "grid_is_as_claimed"


def _wrong(name, make, killed_by, bug, correct):
    return Mutant(
        name=name, kind="number format", bug=bug, make=make, correct=correct, killed_by=killed_by
    )


def _nf4():
    return _format()


MUTANTS = (
    _wrong("bias_one_more", BiasOneMore, CLAIMED, "A bias of 2^(e-1): values are halved.", Right),
    _wrong(
        "without_implicit_one",
        WithoutImplicitOne,
        "is_a_grid",
        "The implicit one is added at the wrong place: values do not ascend.",
        Right,
    ),
    _wrong(
        "subnormal_step_halved",
        SubnormalStepHalved,
        CLAIMED,
        "Subnormal numbers take the exponent 0 and not 1.",
        Right,
    ),
    _wrong("nan_is_a_number", NanIsANumber, CLAIMED, "The code of NaN stands for 480.", Right),
    _wrong("positive_only", PositiveOnly, CLAIMED, "The codes with a sign are forgotten.", Right),
    _wrong("zero_twice", ZeroTwice, "is_a_grid", "-0 and 0 are two values.", Right),
    _wrong(
        "nf4_by_rank",
        lambda: _format((*np.linspace(-1, 1, 15).tolist(), 1.0)),
        "is_a_grid",
        "Equal steps with the last one twice.",
        _nf4,
    ),
    _wrong(
        "nf4_of_fp4",
        lambda: _format(tuple(sorted({*(x / 6 for x in (0.5, 1, 2, 3, 4, 6)), 0.0, -1.0}))),
        CLAIMED,
        "The values of fp4 in place of quantiles, as bnb_4bit_quant_type says.",
        _nf4,
    ),
    _wrong(
        "nf4_rounded",
        lambda: _format(tuple(float(np.float32(round(x, 4))) for x in NF4)),
        CLAIMED,
        "Four decimals of each value.",
        _nf4,
    ),
    _wrong(
        "nf4_of_three_bits",
        lambda: _format(num_bits=3),
        "is_a_grid",
        "Sixteen values for three bits.",
        _nf4,
    ),
    _wrong(
        "nf4_named_int4",
        lambda: _format(name="int4"),
        "name_says_what_it_is",
        "A float under the name of an integer.",
        _nf4,
    ),
    _wrong(
        "ternary_from_zero",
        lambda: Shifted("ternary", 2, (-1.0, 0.0, 1.0), "int"),
        CLAIMED,
        "Codes 0, 1, 2 stand for themselves, as they are stored.",
        _ternary,
    ),
    _wrong(
        "int_with_values",
        lambda: _Listed("ternary", 2, (-1.0, 0.0, 1.0), "int"),
        "integers_are_codes",
        "A format of integers whose codes stand for other ones.",
        _ternary,
    ),
)


class _Listed(CodebookFormat):
    def grid(self, *, symmetric, scale_rule):
        return Grid(0, len(self.values) - 1, self.values)


class ByMlDtypes(Right):
    def grid(self, *, symmetric, scale_rule):
        super().grid(symmetric=symmetric, scale_rule=scale_rule)
        every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return Grid.of(np.unique(every[np.isfinite(every)]))


def _right(name, make, why):
    return Twin(name=name, kind="number format", why=why, make=make)


TWINS = (
    _right("by_ml_dtypes", ByMlDtypes, "The values of ml_dtypes' codes."),
    _right("nf4_plugin", _nf4, "The plugin's own nf4."),
    _right("ternary_of_values", lambda: _ternary(type="float"), "Ternary as listed values."),
)
