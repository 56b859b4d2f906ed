"""Checks of number formats: which values exist, and what rounding to them may cost.

A format has four grids at most, symmetric or not, by either scale rule, so every scenario is one
of these uses. What is drawn are numbers to be rounded: any, midpoints and their neighbours, and
numbers beyond the range.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qframe import Grid
from qframe.claims import claims_of, has_claim
from qframe.claims.formats import GridClaim, GridUse, values_of
from qframe.errors import QframeError
from qframe_conformance.checks import SKIPPED, Outcome, Violation, certified, check, require
from qframe_conformance.engine import Refused, Scenario
from qframe_conformance.kinds import Float64, nudged
from qframe_conformance.report import Counterexample

KIND = "number format"
USES = tuple(itertools.product((True, False), ("full", "restricted")))
PROBES = 64  # of each kind


# Cases ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class FormatCase:
    """One use of a format, and numbers to be rounded."""

    number_format: Any
    symmetric: bool
    scale_rule: str
    seed: int = 0

    def ask(self, symmetric: bool, scale_rule: str) -> Any:
        """Return a grid. Raises Refused where the format cannot be used like that."""
        try:
            return self.number_format.grid(symmetric=symmetric, scale_rule=scale_rule)
        except QframeError as error:
            raise Refused(str(error)) from error

    @cached_property
    def answer(self) -> Any:
        """What the format returned."""
        return self.ask(self.symmetric, self.scale_rule)

    @cached_property
    def grid(self) -> Grid:
        """The grid. Raises Refused where it is none: that is for the check `is_a_grid` alone."""
        wrong = fault(self.answer, self.number_format.num_bits)
        if wrong:
            raise Refused(wrong)
        made: Grid = self.answer
        return made

    @cached_property
    def use(self) -> GridUse:
        """What claims are certified on."""
        rng = np.random.default_rng(self.seed)
        return GridUse(
            grid=self.grid,
            num_bits=self.number_format.num_bits,
            symmetric=self.symmetric,
            scale_rule=self.scale_rule,
            probes=probes(rng, values_of(self.grid)),
        )

    def counterexample(self, check: str) -> Counterexample:
        """Return the use as plain Python; `plugin` is defined before it."""
        text = f"""\
from qframe_conformance import replay
from qframe_conformance.format_checks import FormatCase

case = FormatCase(plugin, symmetric={self.symmetric}, scale_rule={self.scale_rule!r})
case.seed = {self.seed}
print(replay({check!r}, case))
"""
        return Counterexample(snippet=text)


def probes(rng: np.random.Generator, values: Float64) -> Float64:
    """Return numbers to be rounded to `values`, ascending.

    The values themselves, all midpoints, the float32 numbers next to both, uniform and
    logarithmic numbers, and numbers beyond the range.
    """
    middles = (values[1:] + values[:-1]) / 2
    reach = max(abs(values[0]), abs(values[-1]))
    smallest = np.abs(middles).min(initial=reach, where=middles != 0)
    span = np.log2(reach) - np.log2(smallest) + 2
    some = rng.choice(np.concatenate([values, middles]), PROBES)
    signs = rng.choice([-1.0, 1.0], PROBES)
    return np.concatenate(
        [
            values,
            middles,
            nudged(rng, some).astype(np.float64),
            rng.uniform(-reach, reach, PROBES),
            signs * reach * 2.0 ** -rng.uniform(0, span, PROBES),
            signs * reach * rng.uniform(1, 2, PROBES),
        ]
    )


def fault(made: Any, num_bits: int) -> str:
    """Return how a result breaks the promise of `Grid`, "" if it does not."""
    if not isinstance(made, Grid):
        return f"returned {type(made).__name__}, expected qframe.Grid"
    for name in ("qmin", "qmax"):
        if type(getattr(made, name)) is not int:
            return f"{name} is a {type(getattr(made, name)).__name__}, expected int"
    if not 2 <= made.levels <= 1 << num_bits:
        return f"{made.levels} codes, expected from 2 to {1 << num_bits}, for {num_bits} bits"
    if made.values is None:
        return ""
    if not isinstance(made.values, tuple) or len(made.values) != made.levels:
        return f"values should be a tuple of {made.levels} numbers, one for each code"
    if not all(type(value) is float for value in made.values):
        return "values should be Python floats"
    values = np.array(made.values)
    if not np.isfinite(values).all():
        return "values should be finite"
    if not (values[1:] > values[:-1]).all():
        place = int(np.argmin(values[1:] > values[:-1]))
        return f"values should ascend, but {values[place + 1]} follows {values[place]}"
    return ""


# Scenarios ------------------------------------------------------------------------------------


def scenarios(number_format: Any) -> list[Scenario]:
    """Return the four uses of a format."""
    return [
        Scenario(
            f"{'symmetric' if symmetric else 'asymmetric'}-{rule}",
            st.builds(
                FormatCase,
                st.just(number_format),
                st.just(symmetric),
                st.just(rule),
                st.integers(0, 2**32),
            ),
            (symmetric, rule),
        )
        for symmetric, rule in USES
    ]


# Structure ------------------------------------------------------------------------------------


@check(KIND, "structure")
def name_says_what_it_is(case: FormatCase) -> Outcome:
    """The name is a word for a scheme's `format`; one like int4 says type and bits. 1 to 8 bits."""
    this = case.number_format
    require(this.type in ("int", "float"), f"type={this.type!r}, expected 'int' or 'float'")
    require(
        type(this.num_bits) is int and 1 <= this.num_bits <= 8,
        f"num_bits={this.num_bits!r}, expected an int from 1 to 8",
    )
    wanted = f"{this.type}{this.num_bits}"
    if re.fullmatch(r"u?(int|float)\d*", str(this.name)):
        require(this.name == wanted, f"name={this.name!r}, but schemes ask for {wanted!r}")
    require(
        isinstance(this.name, str) and re.fullmatch(r"[a-z]\w*", this.name),
        f"name={this.name!r} cannot be a scheme's format: give a lower-case word",
    )
    return None


@check(KIND, "structure")
def is_a_grid(case: FormatCase) -> Outcome:
    """A grid has as many values as codes, ascending and finite, and no more than bits can tell."""
    wrong = fault(case.answer, case.number_format.num_bits)
    require(not wrong, wrong)
    return None


@check(KIND, "structure")
def integers_are_codes(case: FormatCase) -> Outcome:
    """Codes of type "int" stand for themselves, as methods for integers take them."""
    if case.number_format.type != "int":
        return SKIPPED
    codes = np.arange(case.grid.qmin, case.grid.qmax + 1)
    values = values_of(case.grid)
    require(
        np.array_equal(values, codes),
        f"codes from {codes[0]} stand for values from {values[0]}: the type should be 'float'",
    )
    return None


@check(KIND, "structure")
def has_an_exact_zero(case: FormatCase) -> Outcome:
    """0 is one of the values: what is pruned stays pruned, and padding is harmless."""
    require(0.0 in values_of(case.grid), "0 is none of the values")
    return None


@check(KIND, "structure")
def values_are_float32(case: FormatCase) -> Outcome:
    """Every value is a float32, so that decoding rounds nothing but the product with the scale."""
    values = values_of(case.grid)
    lost = values[values != values.astype(np.float32)]
    require(not lost.size, f"{lost.size} values are no float32, such as {lost[:1]}")
    return None


# Determinism ----------------------------------------------------------------------------------


@check(KIND, "determinism")
def grid_is_stable(case: FormatCase) -> Outcome:
    """The same use gives the same grid, whatever was asked for in between."""
    first = case.grid
    for symmetric, rule in USES:
        try:
            case.ask(symmetric, rule)
        except Refused:
            continue
    again = case.ask(case.symmetric, case.scale_rule)
    require(again == first, f"asked once more, the grid is {again}, not {first}")
    return None


@check(KIND, "determinism")
def refusal_is_stable(case: FormatCase) -> Outcome:
    """A use that is refused is refused each time, by a typed error."""
    try:
        case.ask(case.symmetric, case.scale_rule)
    except Refused:
        try:
            case.ask(case.symmetric, case.scale_rule)
        except Refused:
            return None
        raise Violation("a use that was refused is possible the second time") from None
    return SKIPPED


# Bounds ---------------------------------------------------------------------------------------


def _unless_claimed(number_format: Any, subject: Any) -> str | None:
    if not has_claim(number_format, GridClaim):
        return "which values there are, is not claimed"
    return None


@check(KIND, "bound", "B2.b", unless=_unless_claimed)
def grid_is_as_claimed(case: FormatCase) -> Outcome:
    """The values are the claimed ones, all and no others, and rounding moves nothing further."""
    return max(
        certified(claim.certify(case.use))
        for claim in claims_of(case.number_format)
        if isinstance(claim, GridClaim)
    )
