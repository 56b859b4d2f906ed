"""What became of a run's claims, in a line and in a table: a row for each claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from qframe.certificates import Certificate
from qframe.report.layers import LayerReport
from qframe.report.table import BAD, table

NOTHING_CLAIMED = "none: the method claims nothing about layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimSummary:
    """What became of one claim on all layers.

    layers     for which there is a certificate
    violated   names of those for which it does not hold
    layer      the one with the largest error over what is allowed
    closest    its certificate
    """

    claim: str
    theorem: str
    layers: int
    violated: tuple[str, ...]
    layer: str
    closest: Certificate


def summarize(certificates: Mapping[str, Sequence[Certificate]]) -> list[ClaimSummary]:
    """Return one summary per claim, in the order in which claims are met.

    certificates   layer name -> what became of its claims
    """
    by_claim: dict[tuple[str, str], list[tuple[str, Certificate]]] = {}
    for layer, found in certificates.items():
        for certificate in found:
            by_claim.setdefault((certificate.claim, certificate.theorem), []).append(
                (layer, certificate)
            )
    summaries = []
    for (claim, theorem), members in by_claim.items():
        layer, closest = max(members, key=lambda member: _badness(member[1]))
        summaries.append(
            ClaimSummary(
                claim=claim,
                theorem=theorem,
                layers=len(members),
                violated=tuple(name for name, certificate in members if not certificate.holds),
                layer=layer,
                closest=closest,
            )
        )
    return summaries


def certificate_text(layers: Iterable[LayerReport]) -> str:
    """Return the line of the report about all certificates of a run."""
    return summary_text({layer.name: layer.certificates for layer in layers})


def summary_text(certificates: Mapping[str, Sequence[Certificate]]) -> str:
    """Return how many certificates hold, and which is closest to its bound."""
    claims = summarize(certificates)
    if not claims:
        return NOTHING_CLAIMED
    total = sum(claim.layers for claim in claims)
    covered = sum(bool(found) for found in certificates.values())
    violated = sum(len(claim.violated) for claim in claims)
    state = f"{violated} of {total} violated" if violated else f"{total} hold"
    first = max(claims, key=lambda claim: _badness(claim.closest))
    return (
        f"{state} on {covered} layers; {'worst' if violated else 'closest to its bound'}: "
        f"{first.claim} ({first.theorem}), {ratio_text(first.closest)} of what is allowed, "
        f"{first.layer}{place_text(first.closest)}"
    )


def certificate_table(certificates: Mapping[str, Sequence[Certificate]]) -> Table | None:
    """Return a row for each claim with the layer that is closest to its bound, or None."""
    claims = summarize(certificates)
    if not claims:
        return None
    made = table("claim", "", "error/allowed", "layers", "where", names=2)
    made.columns[-1].justify = "left"
    made.columns[-1].no_wrap = False
    for claim in claims:
        ratio = Text(ratio_text(claim.closest), style=BAD if claim.violated else "")
        where = f"{claim.layer}{place_text(claim.closest)}"
        if claim.violated:
            count = len(claim.violated)
            where += f"\nviolated on {count} layer{'s' if count > 1 else ''}"
        made.add_row(claim.claim, claim.theorem, ratio, str(claim.layers), where)
    return made


def ratio_text(certificate: Certificate) -> str:
    """Return error / allowed; more figures where a bound is broken by less than four show."""
    text = f"{certificate.ratio:.4f}"
    return text if certificate.holds or text != "1.0000" else f"{certificate.ratio:.9g}"


def place_text(certificate: Certificate) -> str:
    """Return " [row, column]", "" for a certificate about the whole layer."""
    return f" {list(certificate.place)}" if certificate.place else ""


def _badness(certificate: Certificate) -> float:
    """Return the ratio; NaN, which never holds, is the worst."""
    return certificate.ratio if certificate.ratio == certificate.ratio else float("inf")
