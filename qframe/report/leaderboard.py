"""A comparison as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qframe.comparison.leaderboard import DONE, Row
from qframe.evaluation import Protocol
from qframe.memory import readable_bytes
from qframe.report.table import BAD, FAINT, GOOD, facts, figures, percent, stacked, table, times

PARETO = "*"  # marks a Pareto-optimal cell


def leaderboard(
    rows: Sequence[Row],
    reference: Mapping[str, Any],
    protocol: Protocol,
    notes: Mapping[str, str],
) -> RenderableType:
    """Return the leaderboard with what failed and the protocol.

    reference   of full precision, as the store holds it
    notes       more lines, by what they are about
    """
    score = reference["score"]
    full = (
        f"perplexity {figures(float(score['perplexity']), 5)} ± "
        f"{figures(float(score['perplexity_stderr']))}, "
        f"weights {readable_bytes(reference['bytes']['weights'])}"
    )
    legend = (
        f"{PARETO} Pareto-optimal: no cell has fewer bits and less KL. KL in nats from full "
        f"precision; ppl: perplexity; top-1: percent; gain is RTN's KL over the method's, with the "
        f"same scheme; s: of quantizing; memory: of the process, at its peak; certs: certificates; "
        f"fb: layers that fell back."
    )
    schemes = {row.scheme: row.described for row in rows if row.scheme != row.described}
    lines = {"full precision": full, **schemes, "protocol": protocol.line(), **notes}
    return stacked(_table(rows), Text(legend, style=FAINT), _failures(rows), facts(lines))


def certificates_text(row: Row) -> str:
    """Return how a cell's certificates stand."""
    if row.status != DONE:
        return ""
    if not row.certificates:
        return "none"
    if row.violated:
        return f"{row.violated} of {row.certificates} violated"
    return f"{row.certificates} hold"


def _table(rows: Sequence[Row]) -> Table:
    columns: dict[str, Callable[[Row], str | Text]] = {
        "": lambda r: Text(PARETO if r.pareto else "", style=GOOD),
        "KL mean": lambda r: Text(figures(r.kl_mean), style=GOOD if r.pareto else ""),
        "KL p99": lambda r: figures(r.kl_p99),
        "ppl": lambda r: figures(r.perplexity, 5),
        "top-1": lambda r: percent(r.top1),
        "gain": lambda r: times(r.gain),
        "bits": lambda r: "" if r.bits_per_weight is None else f"{r.bits_per_weight:.3f}",
        "weights": lambda r: "" if r.weights_bytes is None else readable_bytes(r.weights_bytes),
        "s": lambda r: "" if r.seconds is None else figures(r.seconds),
        "memory": lambda r: "" if r.peak_memory is None else readable_bytes(r.peak_memory),
        "certs": lambda r: Text(_short(r), style=BAD if r.violated else ""),
        "fb": lambda r: Text(str(r.fallbacks), style=BAD) if r.fallbacks else "",
    }
    made = table("method", *columns)
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].scheme != row.scheme:
            if number:
                made.add_section()
            made.add_row(Text(row.scheme, style="bold"))
        name = f"{row.number} {row.method}"
        if row.status == DONE:
            made.add_row(name, *(cell(row) for cell in columns.values()))
        else:
            made.add_row(name, "", Text("failed", style=BAD))
    return made


def _short(row: Row) -> str:
    return f"{row.violated} broken" if row.violated else certificates_text(row)


def _failures(rows: Sequence[Row]) -> RenderableType | None:
    """Return the messages of what failed, or None."""
    failed = [row for row in rows if row.status != DONE]
    if not failed:
        return None
    title = f"{len(failed)} of {len(rows)} cells failed"
    lines = facts({f"{row.number} {row.label}": row.message for row in failed})
    return Group(Text(title, style=BAD), lines)
