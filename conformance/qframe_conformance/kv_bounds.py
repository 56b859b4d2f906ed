"""What is stored, held against theorems: window, codes, values, scales, each on its own."""

from __future__ import annotations

from qframe.claims.kv import ExactWindow, KVHalfStep, KVScale
from qframe_conformance.checks import SKIPPED, Outcome, certified, check
from qframe_conformance.kv_cases import KVCase
from qframe_conformance.kv_subjects import KIND, claim_of, claiming


@check(KIND, "bound", "B7.g", unless=claiming(ExactWindow))
def window_is_exact(case: KVCase) -> Outcome:
    """The last tokens and the sinks are kept, and no others."""
    certified(claim_of(case.quantizer, ExactWindow).certify(case.evidence))
    return None


@check(KIND, "bound", "B7.a", unless=claiming(KVHalfStep))
def codes_are_the_nearest(case: KVCase) -> Outcome:
    """No number is further than half a step from what its code stands for."""
    if not case.evidence.parts:
        return SKIPPED
    return certified(claim_of(case.quantizer, KVHalfStep).certify(case.evidence))


@check(KIND, "bound", "B7.a", unless=claiming(KVHalfStep))
def values_are_those_of_codes(case: KVCase) -> Outcome:
    """What is read is scale * code + offset, up to the roundings of that."""
    if not case.evidence.parts:
        return SKIPPED
    return certified(claim_of(case.quantizer, KVHalfStep).certify_values(case.evidence))


@check(KIND, "bound", "B7.f", unless=claiming(KVScale))
def scales_span_their_groups(case: KVCase) -> Outcome:
    """Scale and offset are those of the smallest and largest number of their own group."""
    if not case.evidence.parts:
        return SKIPPED
    return certified(claim_of(case.quantizer, KVScale).certify(case.evidence))
