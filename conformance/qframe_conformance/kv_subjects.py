"""Which checks of KV-cache quantizers apply: by what is claimed and declared, never by a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from qframe.claims import claims_of

KIND: Final = "kv cache"


def claiming(kind: type) -> Callable[[Any, Any], str | None]:
    """Return an objection for quantizers that do not make a claim."""

    def objection(quantizer: Any, subject: Any) -> str | None:
        return None if claim_of(quantizer, kind) is not None else f"{kind.__name__} is not claimed"

    return objection


def claim_of(quantizer: Any, kind: type) -> Any:
    """Return what a quantizer claims of this kind, or None."""
    return next((claim for claim in claims_of(quantizer) if isinstance(claim, kind)), None)


def capable(capability: str) -> Callable[[Any, Any], str | None]:
    """Return an objection for quantizers that do not declare a capability."""

    def objection(quantizer: Any, subject: Any) -> str | None:
        return None if getattr(quantizer.capabilities, capability) else f"not {capability}"

    return objection
