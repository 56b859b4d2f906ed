"""Theorems that a rounder claims of its codes: each claim certifies the layer itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qframe import claims
from qframe.certificates import LayerClaim
from qframe.claims import claims_of
from qframe_conformance.checks import SKIPPED, Outcome, certified, check
from qframe_conformance.rounder_cases import RounderCase
from qframe_conformance.rounder_subjects import claimed, layers

KNOWN = (
    claims.HalfStep,
    claims.Radius,
    claims.SchemeScale,
    claims.Covers,
    claims.Babai,
    claims.CompensatedScale,
    claims.NoWorseThan,
    claims.OutputBound,
    claims.FittedScale,
    claims.NoWorsePower,
)


def _certify(case: RounderCase, found: Iterable[LayerClaim]) -> Outcome:
    """Certify claims; return the largest error over what is allowed."""
    ratios = [
        certified(claim.certify(case.evidence))
        for claim in found
        if claim.objection(case.scheme) is None
    ]
    return max(ratios) if ratios else SKIPPED


def _of_class(case: RounderCase, kind: type[Any]) -> Outcome:
    return _certify(case, (each for each in claims_of(case.rounder) if isinstance(each, kind)))


@check("rounder", "bound", "B1.b", unless=layers(claimed(claims.HalfStep)))
def half_step(case: RounderCase) -> Outcome:
    """Every code is the nearest one to its weight, at most half a step away."""
    return _of_class(case, claims.HalfStep)


@check("rounder", "bound", "B10.a", unless=layers(claimed(claims.Radius)))
def radius(case: RounderCase) -> Outcome:
    """No weight moves by more steps than are claimed, but for what the range takes off it."""
    return _of_class(case, claims.Radius)


@check("rounder", "bound", "B1.c", unless=layers(claimed(claims.SchemeScale)))
def scheme_scale(case: RounderCase) -> Outcome:
    """Scales are those of the scheme's rule, taken from the original weights."""
    return _of_class(case, claims.SchemeScale)


@check("rounder", "bound", "B1.f", unless=layers(claimed(claims.Covers)))
def coverage(case: RounderCase) -> Outcome:
    """The codes of a group reach as far as its weights do, but for half a step."""
    return _of_class(case, claims.Covers)


@check("rounder", "bound", "B3.b", unless=layers(claimed(claims.Babai)))
def gptq_residual(case: RounderCase) -> Outcome:
    """Every code is the nearest one to its compensated weight."""
    return _of_class(case, claims.Babai)


@check("rounder", "bound", "B3.f", unless=layers(claimed(claims.CompensatedScale)))
def compensated_scale(case: RounderCase) -> Outcome:
    """Scales follow the scheme's rule on the weights as compensated when their group begins."""
    return _of_class(case, claims.CompensatedScale)


@check("rounder", "bound", "B10.d", unless=layers(claimed(claims.FittedScale)))
def fitted_scale(case: RounderCase) -> Outcome:
    """Each scale is the number of its dtype that fits its codes best."""
    return _of_class(case, claims.FittedScale)


@check("rounder", "bound", "B10.b", unless=layers(claimed(claims.OutputBound)))
def output_bound(case: RounderCase) -> Outcome:
    """The output error of a row is at most so many times what half steps can do."""
    return _of_class(case, claims.OutputBound)


@check("rounder", "objective", "B10.c", unless=layers(claimed(claims.NoWorseThan)))
def no_worse_than_nearest(case: RounderCase) -> Outcome:
    """No row has a larger objective than with rounding to nearest."""
    return _of_class(case, claims.NoWorseThan)


@check("rounder", "objective", "B10.e", unless=layers(claimed(claims.NoWorsePower)))
def no_worse_power(case: RounderCase) -> Outcome:
    """No row has a larger sum of powers of errors than with rounding to nearest."""
    return _of_class(case, claims.NoWorsePower)


def _unless_own(rounder: object, subject: object) -> str | None:
    return None if _own(rounder) else "no theorem of its own is claimed"


def _own(rounder: object) -> list[LayerClaim]:
    """Return the claims about layers that the suite has no check for."""
    return [
        claim
        for claim in claims_of(rounder)
        if isinstance(claim, LayerClaim) and not isinstance(claim, KNOWN)
    ]


@check("rounder", "bound", unless=layers(_unless_own))
def own_claims(case: RounderCase) -> Outcome:
    """Theorems that the rounder brings itself hold."""
    return _certify(case, _own(case.rounder))
