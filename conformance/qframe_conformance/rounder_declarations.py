"""What a rounder says of itself: its name, capabilities, needs, claims and options."""

from __future__ import annotations

import re
from typing import Any

from qframe import Capabilities, Host, Scheme, hookimpl
from qframe.certificates import LayerClaim
from qframe.claims import claims_of
from qframe.errors import QframeError, UnsupportedError
from qframe.host import option_names
from qframe.recipe import Method, Plan, check_supported
from qframe_conformance.checks import SKIPPED, Outcome, Violation, check, require
from qframe_conformance.rounder_cases import DeclarationCase
from qframe_conformance.rounder_layers import (
    DECLARATIONS,
    STRATEGIES,
    all_schemes,
    is_declared,
)
from qframe_conformance.rounder_subjects import about
from qframe_conformance.strategies import installed_host


@check("rounder", "structure", unless=about(DECLARATIONS))
def declarations(case: DeclarationCase) -> Outcome:
    """Name, needs, capabilities and claims say something that others can use."""
    rounder, host = case.rounder, installed_host()
    require(
        isinstance(rounder.name, str) and re.fullmatch(r"[^\s+]+", rounder.name),
        f"name {rounder.name!r} cannot be typed after -m: give a word without '+'",
    )
    require(isinstance(rounder.needs, frozenset), f"needs is a {type(rounder.needs).__name__}")
    for name in sorted(rounder.needs):
        known = ", ".join(host.names("observer"))
        require(
            name in host.names("observer"), f"needs names the observer {name!r}; known: {known}"
        )
    capabilities = rounder.capabilities
    require(
        isinstance(capabilities, Capabilities),
        f"capabilities is a {type(capabilities).__name__}, expected Capabilities",
    )
    for field, known_words in (
        ("types", {"int", "float"}),
        ("strategies", set(STRATEGIES)),
        ("symmetric", {True, False}),
    ):
        strange = getattr(capabilities, field) - known_words
        require(not strange, f"capabilities.{field} holds {strange}, which no scheme can ask for")
    require(
        any(is_declared(rounder, scheme) for scheme in all_schemes()),
        "capabilities allow no scheme of an installed number format",
    )
    for claim in claims_of(rounder):
        texts = (getattr(claim, "name", None), getattr(claim, "theorem", None))
        require(
            all(isinstance(text, str) and text for text in texts),
            f"claim {claim!r} has no name or no theorem",
        )
        require(
            isinstance(claim, LayerClaim) or not hasattr(claim, "certify"),
            f"claim {claim!r} can be certified, but has no objection(scheme)",
        )
    return None


@check("rounder", "structure", unless=about(DECLARATIONS))
def refusals(case: DeclarationCase) -> Outcome:
    """The host refuses the schemes that the capabilities leave out, and no other."""
    rounder, host = case.rounder, installed_host()
    method = Method(rounder.name, rounder)
    for scheme in all_schemes():
        said = rounder.capabilities.objection(scheme)
        if is_declared(rounder, scheme):
            require(said is None, f"{scheme.describe()} is declared, but objected to: {said}")
        else:
            require(said, f"{scheme.describe()} is not declared, but nothing is said against it")
        _require_refusal(said, method, scheme, host)
    return None


def _require_refusal(said: str | None, method: Method, scheme: Scheme, host: Host) -> None:
    """Raise Violation unless the host says what the capabilities say."""
    try:
        check_supported(method, Plan({"block.up": scheme}, {}), host)
    except UnsupportedError as error:
        require(said is not None, f"the host refuses {scheme.describe()}: {error}")
        require(method.name in str(error), f"the refusal does not name the rounder: {error}")
    else:
        require(said is None, f"the host does not refuse {scheme.describe()}, though: {said}")


@check("rounder", "structure", unless=about(DECLARATIONS))
def options(case: DeclarationCase) -> Outcome:
    """Options set to what they are give an equal rounder that says the same of itself."""
    rounder = case.rounder
    names = option_names(rounder)
    if not names:
        return SKIPPED

    class Registration:
        @hookimpl
        def qframe_rounders(self) -> list[Any]:
            return [rounder]

    host = Host()
    try:
        host.add(Registration(), rounder.name)
        values = {name: getattr(rounder, name) for name in names}
        made = host.configured("rounder", rounder.name, values, "suite")
    except QframeError as error:
        raise Violation(str(error)) from None
    require(made == rounder, f"it became {made!r}")
    for name in ("name", "needs", "capabilities", "claims"):
        mine, its = getattr(rounder, name, None), getattr(made, name, None)
        require(mine == its, f"{name} became {its!r}, expected {mine!r}")
    return None
