"""`qframe crosscheck`: all kernels of an operation held against float64 and one another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json
from qframe.cli.progress import progress_shown
from qframe.cli.screen import note, print_json, print_plain, print_result
from qframe.errors import RecipeError
from qframe_conformance.command import NOT_AS_CLAIMED

if TYPE_CHECKING:
    from qframe_conformance.crosscheck import Outcome, Row
    from qframe_conformance.report import Report


def crosscheck(
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="OP", help="Repeat. Default: all.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="BACKEND", help="Repeat. Default: all."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", metavar="ARCH", help="Of backends that have several. Repeat. Default: all."
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option("--profile", metavar="fast|default|thorough", help="How much is tried."),
    ] = "fast",
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="Also load this Python file. Repeat."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="DIR", help="Write counterexamples as scripts."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Kernels at a time. Default: one for each core."),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Run all here, for a debugger; a kernel that hangs or crashes takes qframe along.",
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option("--time-limit", min=0, help="Seconds for one drawn case. Default: 300."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold every kernel of every operation, on every backend and target, against the others.

    Example: qframe crosscheck --op linear_int8

    Kernels run in processes of their own. Exit code 0 when all that could be run holds, and 4 when
    not. What could not be run is listed, with the reason.
    """
    if in_process and (processes is not None or seconds is not None):
        raise RecipeError("--processes and --time-limit do not go with --in-process")
    with progress_shown() as progress:
        progress.step("loading libraries")
        from qframe.host import Host
        from qframe.parallel import default_threads
        from qframe_conformance.crosscheck import Apart
        from qframe_conformance.crosscheck import crosscheck as run
        from qframe_conformance.side_by_side import SECONDS

        apart = Apart(
            files=[str(file) for file in plugin or ()],
            processes=processes or default_threads(),
            seconds=SECONDS if seconds is None else seconds,
        )
        found = run(
            Host.discover(plugin or ()),
            ops=op or None,
            backends=backend or None,
            targets=target or None,
            profile=profile,
            seed=seed,
            progress=progress.step,
            apart=None if in_process else apart,
        )
    if save is not None:
        for row in found.rows:
            if row.report is not None and not row.report.ok:
                place = save / f"{row.op}-{row.label}".replace(" ", "-")
                for script in row.report.save(place):
                    note(f"wrote {script}")
    if as_json:
        print_json(_plain(found))
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(NOT_AS_CLAIMED)


def _plain(found: Outcome) -> dict[str, Any]:
    rows = [
        {
            "op": row.op,
            "backend": row.backend,
            "target": row.target,
            "why": row.why,
            "report": None if row.report is None else row.report.to_dict(),
        }
        for row in found.rows
    ]
    verdicts = {
        name: [{"holds": each.holds, "verdict": str(each)} for each in said]
        for name, said in found.verdicts.items()
    }
    return {
        "ok": found.ok,
        "seconds": round(found.seconds, 1),
        "kernels": rows,
        "verdicts": verdicts,
        "absent": dict(found.absent),
    }


def _print(found: Outcome) -> None:
    from rich.text import Text

    from qframe.report.table import BAD, FAINT, figures, stacked, table

    ran = [(row, row.report) for row in found.rows if row.report is not None]
    made = table("operation", "backend", "checks", "failed", "error/allowed", "theorem", names=2)
    title = ""
    for row, report in ran:
        theorem, worst = max(report.worst().items(), key=lambda item: item[1], default=("", None))
        made.add_row(
            "" if row.op == title else row.op,
            row.label,
            str(report.ran),
            str(len(report.failures)),
            figures(worst),
            theorem,
            style="" if report.ok else BAD,
        )
        title = row.op
    missing = table("not run", "why", names=2)
    for why, rows in _by_reason(found).items():
        missing.add_row(", ".join(rows), why, style=FAINT)
    parts: list[Any] = [made, missing if missing.row_count else None]
    parts += [_failure(row, report) for row, report in ran if not report.ok]
    parts += [Text(str(each), style=BAD) for each in found.broken]
    print_result(stacked(*parts))
    print_plain("")
    for name, said in found.verdicts.items():
        print_plain(f"{name}: {sum(each.holds for each in said)} of {len(said)} hold")
    held = sum(report.ok for _, report in ran)
    print_plain(f"kernels: {held} of {len(ran)} hold, in {found.seconds:.0f} s")


def _by_reason(found: Outcome) -> dict[str, list[str]]:
    """Return reason -> what it keeps from running."""
    grouped: dict[str, list[str]] = {}
    for row in found.rows:
        if row.report is None:
            labels = grouped.setdefault(row.why, [])
            if row.label not in labels:
                labels.append(row.label)
    for name, why in found.absent.items():
        grouped.setdefault(why, []).append(name)
    return grouped


def _failure(row: Row, report: Report) -> Any:
    """Return what the suite says of a kernel that fails."""
    from qframe.report.table import titled
    from qframe_conformance.summary import renderable

    return titled(f"{row.op} {row.label}", renderable(report))
