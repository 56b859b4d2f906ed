"""The command line: one file per command, and everything heavy imported inside the commands.

Exit codes: 0 done, 1 an error nobody foresaw (or `doctor` found a problem), 2 a request that
cannot be carried out as asked, 3 numbers that are not right, 4 a checkpoint or a plugin that is not
what it claims to be, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

PROGRAM = "qframe"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line on `args` (default: those of the process), and exit."""
    import typer.main

    from qframe.cli.app import app

    typer.main.get_command(app)(args=args, prog_name=PROGRAM)
