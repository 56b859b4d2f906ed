"""The checks of rounders, in four parts, and the layers that they are tried on.

    rounder_declarations   what a rounder says of itself
    rounder_contract       what every rounder owes: structure, determinism, storage
    rounder_algebra        what follows from what codes mean, and exact symmetries that are claimed
    rounder_claims         theorems that are claimed, each certified

Which of them apply follows from capabilities and claims. `rounder_layers` draws the layers.
"""

from __future__ import annotations

from qframe_conformance import (
    rounder_algebra,
    rounder_claims,
    rounder_contract,
    rounder_declarations,
)
from qframe_conformance.rounder_cases import CalibrationCase, DeclarationCase, RounderCase
from qframe_conformance.rounder_layers import scenarios

__all__ = [
    "CalibrationCase",
    "DeclarationCase",
    "RounderCase",
    "rounder_algebra",
    "rounder_claims",
    "rounder_contract",
    "rounder_declarations",
    "scenarios",
]
