"""`qframe verify`: is a quantized folder what was written, and do its bounds still hold?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.flags import discover
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result

if TYPE_CHECKING:
    from qframe.verification import VerifyReport


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that qframe quantize wrote.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="The full-precision folder it was made of: certificates are computed once more.",
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
    """
    with progress_shown() as progress:
        progress.step("loading libraries")
        from qframe.verification import verify as run

        host = discover(plugin or (), ())
        report = run(folder, reference, host=host, threads=threads, say=progress.step)
    if as_json:
        print_json(report.record())
    else:
        _show(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _show(report: VerifyReport) -> None:
    from qframe.report.table import stacked
    from qframe.report.verification import verification_parts

    print_result(stacked(*verification_parts(report)))
