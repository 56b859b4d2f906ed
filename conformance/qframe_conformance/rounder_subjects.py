"""What a check of rounders is about: for `check(..., unless=...)`, and which layers it looks at."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import wraps
from typing import Any

from qframe import Scheme
from qframe.claims import has_claim
from qframe_conformance.checks import SKIPPED, Outcome

Objection = Callable[[Any, Any], str | None]


def about(special: str) -> Objection:
    """Return the objection of a check that is about one special scenario alone."""

    def objection(rounder: Any, subject: Any) -> str | None:
        return None if subject == special else f"it is about the scenario {special!r} alone"

    return objection


def layers(*also: Objection) -> Objection:
    """Return the objection of a check about layers; `also` may object too."""

    def objection(rounder: Any, subject: Any) -> str | None:
        return None if isinstance(subject, Scheme) else "it is about layers of one scheme"

    return either(objection, *also)


def either(*objections: Objection) -> Objection:
    """Return what the first of several that objects says."""

    def objection(rounder: Any, subject: Any) -> str | None:
        return next(filter(None, (each(rounder, subject) for each in objections)), None)

    return objection


def unless_deterministic(rounder: Any, subject: Any) -> str | None:
    """Object to rounders that do not repeat themselves."""
    if rounder.capabilities.deterministic:
        return None
    return "capabilities say that it is not deterministic"


def unless_calibrated(rounder: Any, subject: Any) -> str | None:
    """Object to rounders that need no statistics."""
    return None if rounder.needs else "the rounder needs no statistics"


def claimed(kind: type) -> Objection:
    """Return the objection of a check of one class of claims."""

    def objection(rounder: Any, subject: Any) -> str | None:
        return None if has_claim(rounder, kind) else f"{kind.__name__} is not claimed"

    return objection


def every_third(function: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
    """Let a check that calls the rounder again look at every third layer.

    It saves most of the calls; the other layers are those of other checks. Which ones they are
    follows from their seed, so a layer that failed fails again.
    """
    name = function.__name__.encode()

    @wraps(function)
    def looked(case: Any) -> Outcome:
        return SKIPPED if zlib.crc32(name, case.seed % 2**32) % 3 else function(case)

    return looked
