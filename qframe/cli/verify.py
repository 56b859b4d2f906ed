"""`qframe verify`: is a quantized folder what was written, and do its bounds still hold?

A folder or file that qframe did not write has no manifest to hold it against; it is audited
(`qframe.audit`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.flags import discover
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result

if TYPE_CHECKING:
    from qframe.audit_report import AuditReport
    from qframe.host import Host
    from qframe.verification import VerifyReport


def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="A quantized folder: one that qframe wrote, or of others in a layout it knows; or "
            "a GGUF file.",
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="The full-precision folder it was made of: certificates are computed once more, "
            "and every weight of somebody else's folder is compared.",
        ),
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="A Python file with the method. Repeat."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify a quantized folder: hashes, structure, and certificates.

    Example: qframe verify OUT --reference MODEL

    Exit code 4: it is not what was written. 3: a bound that the method claims does not hold.
    Hashes find accidents; only --reference finds someone who changes codes and hashes anew.

    A folder that others wrote has neither hashes nor certificates. It is audited: whether each
    layer can be unpacked and looks like one that was quantized on purpose. Exit code 4: it is not.
    """
    with progress_shown() as progress:
        progress.step("loading libraries")
        from qframe.manifest import MANIFEST

        host = discover(plugin or (), ())
        ours = (folder / MANIFEST).is_file() or not folder.exists()
        run = _verified if ours else _audited
        report, show = run(folder, reference, host, threads, progress.step)
    if as_json:
        print_json(report.record())
    else:
        show()
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _verified(
    folder: Path,
    reference: Path | None,
    host: Host,
    threads: int | None,
    say: Callable[[str], None],
) -> tuple[VerifyReport, Callable[[], None]]:
    """Return what was found of a folder of qframe, and how to show it."""
    from qframe.verification import verify as run

    report = run(folder, reference, host=host, threads=threads, say=say)
    return report, lambda: _show(report)


def _audited(
    folder: Path,
    reference: Path | None,
    host: Host,
    threads: int | None,
    say: Callable[[str], None],
) -> tuple[AuditReport, Callable[[], None]]:
    """Return the same of somebody else's folder."""
    from qframe.audit import audit

    report = audit(folder, reference, host=host, threads=threads, say=say)
    return report, lambda: _show_audit(report)


def _show(report: VerifyReport) -> None:
    from qframe.report.table import stacked
    from qframe.report.verification import verification_parts

    print_result(stacked(*verification_parts(report)))


def _show_audit(report: AuditReport) -> None:
    from qframe.report.audit import audit_parts
    from qframe.report.table import stacked

    print_result(stacked(*audit_parts(report)))
