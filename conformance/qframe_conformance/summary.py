"""A report for readers: one row for each check, then what failed and how to see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qframe.report.table import figures, some
from qframe_conformance.report import TESTED, Record, Report
from qframe_conformance.reproduce import body, script

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100  # of the text
ABOUT = "it is about "  # begins objections that say to which scenarios a check belongs
FOREIGN = "it says nothing about "  # begins those that say so of all that this plugin does
NOT_APPLICABLE = "not applicable: "
SNIPPETS = 3  # failures that are shown as Python; all of them are written by `Report.save`


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One check on all scenarios.

    tested, failed   scenarios
    examples         cases on which the promise was tested
    ratio            the largest error / allowed; None for exact promises
    result           what became of it, in words
    """

    check: str
    theorem: str
    tested: int
    failed: int
    examples: int
    ratio: float | None
    result: str


def by_check(report: Report) -> list[CheckRow]:
    """Return a row for each check, in the order in which they ran."""
    grouped: dict[str, list[Record]] = {}
    for record in report.records:
        grouped.setdefault(record.check, []).append(record)
    return [_row(check, records) for check, records in grouped.items()]


def _row(check: str, records: Sequence[Record]) -> CheckRow:
    tested = [record for record in records if record.status in TESTED]
    ratios = [record.ratio for record in tested if record.ratio is not None]
    bad = [record for record in records if record.bad]
    return CheckRow(
        check=check,
        theorem=records[0].theorem,
        tested=len(tested),
        failed=len(bad),
        examples=sum(record.examples for record in tested),
        ratio=max(ratios, default=None),
        result=_result(records, bad, tested),
    )


def _result(records: Sequence[Record], bad: Sequence[Record], tested: Sequence[Record]) -> str:
    if bad:
        return bad[0].status.upper()
    expected = [record for record in records if record.status == "expected failure"]
    if expected:
        return f"expected failure: {expected[0].message}"
    if tested:
        return "held"
    if any(record.status == "not drawn" for record in records):
        return "no drawn case had to do with it"
    # That a check belongs to one scenario is why it is silent in the others, and no news.
    reasons = sorted((r.message for r in records), key=lambda reason: reason.startswith(ABOUT))
    return NOT_APPLICABLE + reasons[0]


# Text -----------------------------------------------------------------------------------------


def renderable(report: Report) -> RenderableType:
    """Return what rich prints: checks, theorems, failures; all but the last line, `Report.line`."""
    from qframe.report.table import stacked

    rows = by_check(report)
    tested = [row for row in rows if row.tested or row.failed]
    parts = [
        _checks(tested),
        _theorems(report),
        _silent([row for row in rows if row not in tested]),
    ]
    shown: set[str] = set()
    for row in tested:
        bad = [record for record in report.failures if record.check == row.check]
        if bad:
            parts.append(_failure(bad, row, report.code if len(shown) < SNIPPETS else None))
            shown.add(row.check)
    return stacked(*parts)


def _checks(rows: Sequence[CheckRow]) -> RenderableType | None:
    """Return the checks that had something to say."""
    from qframe.report.table import BAD, table

    if not rows:
        return None
    made = table("check", "theorem", names=2)
    for column in ("scenarios", "cases", "error/allowed"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("", overflow="fold")
    for row in rows:
        where = f" in {row.failed} of {row.tested} scenarios" if row.failed else ""
        made.add_row(
            row.check,
            row.theorem,
            str(row.tested),
            str(row.examples),
            figures(row.ratio),
            row.result + where,
            style=BAD if row.failed else "",
        )
    return made


def _silent(rows: Sequence[CheckRow]) -> RenderableType | None:
    """Return the checks that had nothing to say, and why."""
    from qframe.report.table import FAINT, table

    reasons = {row.check: row.result.removeprefix(NOT_APPLICABLE) for row in rows}
    reasons = {check: why for check, why in reasons.items() if not why.startswith(FOREIGN)}
    if not reasons:
        return None
    made = table("not tested", "why", names=2)
    for check, why in reasons.items():
        made.add_row(check, why, style=FAINT)
    return made


def _theorems(report: Report) -> RenderableType | None:
    """Return how near each theorem's bound came."""
    from qframe.report.table import BAD, table, titled

    tightest = report.tightest()
    if not tightest:
        return None
    made = table("theorem", names=1)
    made.add_column("error/allowed", justify="right", no_wrap=True)
    made.add_column("check", overflow="fold")
    made.add_column("scenario", overflow="fold")
    for theorem, record in tightest.items():
        style = BAD if record.bad else ""
        made.add_row(theorem, figures(record.ratio), record.check, record.scenario, style=style)
    return titled("the largest error/allowed of each theorem", made)


def _failure(bad: Sequence[Record], row: CheckRow, code: str | None) -> RenderableType:
    """Return what one check found, with its smallest counterexample.

    code   makes the plugin; None: no counterexample is shown
    """
    from rich.console import Group
    from rich.text import Text

    from qframe.report.table import BAD

    first = _clearest(bad)
    theorem = f" ({first.theorem})" if first.theorem else ""
    lines = [
        Text(f"{first.status.upper()} {row.check}{theorem}: {first.promise}", style=BAD),
        Text(f"  in {some(_named(bad))}"),
        *(Text(f"  {line}") for line in first.message.splitlines()),
    ]
    if code is not None and first.counterexample is not None:
        program = body(script(first, code)).splitlines()
        # Python must not be broken where the screen ends.
        program = [f"    {line}".rstrip() for line in ("", *program)]
        lines += [Text(line, no_wrap=True, overflow="ignore") for line in program]
    return Group(*lines)


def _named(records: Sequence[Record]) -> list[str]:
    first = _clearest(records)
    return [first.scenario, *(r.scenario for r in records if r is not first)]


def _clearest(records: Sequence[Record]) -> Record:
    """Return the record with the smallest counterexample."""

    def size(record: Record) -> float:
        if record.counterexample is None:
            return float("inf")
        arrays = record.counterexample.arrays.values()
        return float(sum(getattr(array, "size", 0) for array in arrays))

    return min(records, key=size)


def as_text(report: Report) -> str:
    """Return the report as text without colours."""
    from rich.console import Console

    console = Console(width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(renderable(report), crop=False)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([*lines, "", report.line()])


def as_markdown(report: Report) -> str:
    """Return the report as Markdown: a table with a row for each check, and the failures."""
    lines = [
        f"# {report.kind} `{report.plugin}`",
        "",
        report.line(),
        "",
        "| check | theorem | scenarios | cases | error/allowed | result |",
        "|---|---|---|---|---|---|",
    ]
    for row in by_check(report):
        cells = (
            f"`{row.check}`",
            row.theorem,
            row.tested,
            row.examples,
            figures(row.ratio),
            row.result,
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    for record in report.failures:
        lines += ["", f"## {record.id}", "", record.promise, "", record.message]
        if record.counterexample is not None:
            lines += ["", "```python", script(record, report.code).rstrip(), "```"]
    return "\n".join(lines) + "\n"
