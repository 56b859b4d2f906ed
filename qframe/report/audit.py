"""What an audit found, on one screen: a verdict for each check, and the layers behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from qframe.audit_report import RULES
from qframe.report.table import BAD, GOOD, WARN, facts, figures, percent, some, table, titled

if TYPE_CHECKING:
    from qframe.audit_report import AuditReport, LayerFigures

SHOWN = 12  # findings
COMPARED = ("reference", "rounding", "single codes")  # checks that need the original


def audit_parts(report: AuditReport) -> list[RenderableType | None]:
    """Return what to put under one another."""
    return [
        _findings(report),
        _checks(report),
        _kinds(report),
        facts(_lines(report)),
        _verdict(report),
    ]


def _findings(report: AuditReport) -> RenderableType | None:
    """Return what is wrong or strange, errors first, or None."""
    if not report.findings:
        return None
    made = table("", "layer", "check", "what", names=4)
    ordered = [*report.errors(), *(f for f in report.findings if f.severity == "warning")]
    for finding in ordered[:SHOWN]:
        style = BAD if finding.severity == "error" else WARN
        made.add_row(
            Text(finding.severity, style=style), finding.layer, finding.check, finding.message
        )
    rest = len(ordered) - SHOWN
    if rest > 0:
        made.add_row("", f"and {rest} more", "", "--json has them all")
    return titled("findings", made)


def _checks(report: AuditReport) -> RenderableType:
    """Return a row for every check: what it asks for, and its verdict."""
    made = table("check", "asks that", "verdict", names=3)
    compared = report.reference is not None
    for check, rule in RULES.items():
        found = [finding for finding in report.findings if finding.check == check]
        if check in COMPARED and not compared:
            made.add_row(check, rule, "not asked: no --reference")
        elif not found:
            made.add_row(check, rule, Text("holds", style=GOOD))
        else:
            wrong = any(finding.severity == "error" for finding in found)
            names = some(list(dict.fromkeys(finding.layer for finding in found)))
            made.add_row(check, rule, Text(names, style=BAD if wrong else WARN))
    return titled("checks", made)


def _kinds(report: AuditReport) -> RenderableType | None:
    """Return a row for every way in which layers are stored: the figures of its worst layers.

    None without the original. Codes that are all nearest are B1.b, B2.d; half steps say how far the
    farthest weight is in what those allow. The error is ||W - Q|| / ||W||, how many times that of
    rounding to nearest, and squared, how many times the least that any scales allow.
    """
    if report.reference is None or not report.layers:
        return None
    made = table(*_COLUMNS, names=1)
    for kind in sorted({layer.scheme for layer in report.layers.values()}):
        every = [layer for layer in report.layers.values() if layer.scheme == kind]
        exact = sum(layer.farther == 0 for layer in every)
        made.add_row(
            kind,
            str(len(every)),
            str(exact),
            *(
                figures(_most(every, figure)) or "-"
                for figure in (
                    lambda f: f.half_steps,
                    lambda f: f.error,
                    lambda f: f.above_nearest,
                    lambda f: f.above_least,
                )
            ),
        )
    return titled("compared with the original: the worst layer", made)


_COLUMNS = (
    "stored as",
    "layers",
    "all nearest",
    "half steps",
    "error",
    "x nearest",
    "x least",
)


def _lines(report: AuditReport) -> dict[str, str]:
    """Return what was looked at, and the worst figures."""
    every = report.layers.values()
    total = len(report.layers) + report.unreadable
    found = {
        "folder": f"{report.folder}: {report.layout}, {total} quantized layers, "
        f"{report.carried} other tensors; no manifest of qframe, so nothing is known of its making",
    }
    if not every:
        return found
    found |= {
        "schemes": "; ".join(sorted({layer.scheme for layer in every})),
        "codes": f"at most {percent(_most(every, lambda f: f.at_ends))} % of a layer at the ends, "
        f"at most {percent(_most(every, lambda f: f.dead))} % of its groups all 0",
    }
    if report.reference is not None:
        exact = sum(layer.farther == 0 for layer in every)
        found["rounding"] = (
            f"{exact} of {total} layers have the nearest code everywhere (B1.b); the farthest "
            f"weight is {figures(_most(every, lambda f: f.half_steps))} half steps from its own"
        )
        unknown = {layer.scheme for layer in every if layer.above_least is None}
        if unknown:
            found["not known"] = f"the least that any scales allow: {some(sorted(unknown))}"
    return found


def _verdict(report: AuditReport) -> Text:
    """Return the last line."""
    if report.errors():
        return Text("this is not a sound checkpoint", style=BAD)
    if report.findings:
        return Text("it can be unpacked whole; something about it is strange", style=WARN)
    return Text("sound, as far as can be told", style=GOOD)


def _most(
    layers: Iterable[LayerFigures], figure: Callable[[LayerFigures], float | None]
) -> float | None:
    return max((found for layer in layers if (found := figure(layer)) is not None), default=None)
