"""What a check is: one promise, stated so that a single drawn case can break it.

A check is a function of a case (`engine.Case`). It returns None when an exact promise held, or
the largest error over what is allowed, or raises `Violation`. `SKIPPED` says that this case has
nothing to do with the promise. Which checks run is decided by what a plugin declares, never by
its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qframe import bounds
from qframe.certificates import Certificate

Level = Literal["structure", "algebra", "bound", "objective", "serialization", "determinism"]
LEVELS: Final = ("structure", "determinism", "serialization", "algebra", "bound", "objective")
FIRST_SUITE: Final = "1.0"


class Violation(Exception):  # noqa: N818 - it is not an error of the program
    """A promise was broken: how, and by how much."""

    def __init__(self, message: str, *, ratio: float = float("inf"), theorem: str = "") -> None:
        super().__init__(message)
        self.ratio = ratio
        self.theorem = theorem


class _Skipped:
    def __repr__(self) -> str:
        return "SKIPPED"


SKIPPED: Final = _Skipped()
"""What a check returns for a case to which its promise does not apply."""

Outcome = float | None | _Skipped


@dataclass(frozen=True, slots=True)
class Check:
    """One promise.

    name       what it is called in reports, e.g. "half_step"
    kind       the kind of plugin, as in `qframe.host.KINDS`
    level      which sort of promise it is
    theorem    its number in docs/bounds.md, "" for what needs no proof
    promise    one sentence
    since      the version of the suite that brought it; one that is pinned lower leaves it out
    function   takes a case; see above
    objection  takes the plugin and a scenario's subject; returns why the check has nothing to
               say there, or None
    """

    name: str
    kind: str
    level: Level
    theorem: str
    promise: str
    function: Callable[[Any], Outcome]
    objection: Callable[[Any, Any], str | None]
    since: str = FIRST_SUITE


_CHECKS: dict[str, list[Check]] = {}


def _always(plugin: Any, subject: Any) -> None:
    """Object to nothing."""


def check(
    kind: str,
    level: Level,
    theorem: str = "",
    unless: Callable[[Any, Any], str | None] = _always,
    since: str = FIRST_SUITE,
) -> Callable[[Callable[[Any], Outcome]], Callable[[Any], Outcome]]:
    """Register a check; the function's name is its name, its first line of docstring the promise.

    unless   returns why the check does not apply to (plugin, subject of the scenario), or None
    since    the version of the suite that it came with
    """

    def register(function: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
        promise = (function.__doc__ or "").strip().splitlines()[0]
        made = Check(function.__name__, kind, level, theorem, promise, function, unless, since)
        _CHECKS.setdefault(kind, []).append(made)
        return function

    return register


def checks_of(kind: str) -> tuple[Check, ...]:
    """Return the checks of a kind, by level and then as they stand in the source."""
    return tuple(sorted(_CHECKS.get(kind, ()), key=lambda c: LEVELS.index(c.level)))


# What checks say ------------------------------------------------------------------------------


def require(condition: object, message: str) -> None:
    """Raise Violation unless the condition holds."""
    if not condition:
        raise Violation(message)


def within(error: npt.ArrayLike, allowed: npt.ArrayLike, what: str, theorem: str = "") -> float:
    """Return the largest error / allowed; raise Violation when it is above 1.

    what   the error in words or symbols: "|w - s (c - z)|"
    """
    ratio, flat = bounds.worst(error, allowed)
    if ratio <= 1:
        return ratio
    errors, limits = np.broadcast_arrays(np.asarray(error), np.asarray(allowed))
    place = [int(i) for i in np.unravel_index(flat, errors.shape)]
    raise Violation(
        f"{what} = {float(errors.flat[flat]):.9g} at {place}, allowed "
        f"{float(limits.flat[flat]):.9g}",
        ratio=ratio,
        theorem=theorem,
    )


def certified(certificate: Certificate, what: str = "") -> float:
    """Return the ratio of a certificate; raise Violation where it does not hold.

    what   of which the certificate is, where the case does not tell
    """
    if certificate.holds:
        return certificate.ratio
    said = f"{certificate.claim}, {certificate.figures}"
    raise Violation(
        f"{what}: {said}" if what else said, ratio=certificate.ratio, theorem=certificate.theorem
    )


def same_bits(a: Any, b: Any, what: str) -> None:
    """Raise Violation unless two tensors or arrays have the same shape, dtype and bits."""
    first, second = (np.asarray(x) for x in (a, b))
    alike = first.shape == second.shape and first.dtype == second.dtype
    if alike and first.tobytes() == second.tobytes():
        return
    require(
        alike,
        f"{what}: {second.dtype} {list(second.shape)}, expected {first.dtype} {list(first.shape)}",
    )
    differs = np.flatnonzero(
        np.ascontiguousarray(first).reshape(-1).view(np.uint8)
        != np.ascontiguousarray(second).reshape(-1).view(np.uint8)
    )
    if differs.size:
        flat = int(differs[0]) // first.itemsize
        place = [int(i) for i in np.unravel_index(flat, first.shape)]
        raise Violation(
            f"{what}: {second.reshape(-1)[flat]} at {place}, expected {first.reshape(-1)[flat]}"
        )
