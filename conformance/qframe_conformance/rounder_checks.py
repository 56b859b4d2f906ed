"""The checks of rounders, in five parts, and the layers that they are tried on.

    rounder_declarations   what a rounder says of itself
    rounder_contract       what every rounder owes: structure, determinism, storage
    rounder_algebra        what follows from what codes mean, and exact symmetries that are claimed
    rounder_claims         theorems that are claimed, each certified
    rounder_blocks         what those owe that learn the layers of a block together

Which of them apply follows from capabilities and claims. `rounder_layers` draws the layers.
"""

from __future__ import annotations

from qframe_conformance import (
    rounder_algebra,
    rounder_blocks,
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
    "rounder_blocks",
    "rounder_claims",
    "rounder_contract",
    "rounder_declarations",
    "scenarios",
]
