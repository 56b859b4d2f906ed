"""`qframe convert`: a quantized folder in another format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from qframe.cli.command import Debug, Json
from qframe.cli.flags import discover
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result


def convert(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A quantized folder, of qframe or of others."),
    ],
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            help="The format: a layout of folders, or another kind of file. qframe plugins lists "
            "both.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder or the file to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace it if it is there.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="A Python file with the format. Repeat."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantized folder in another format, without changing a number.

    Example: qframe convert OUT --to gguf -o model.gguf

    What the format cannot express is an error, and nothing is written then.
    """
    with progress_shown() as progress:
        progress.step("loading libraries")
        from qframe.conversion import convert as run

        host = discover(plugin or (), ())
        done = run(folder, to, out, host=host, overwrite=overwrite, say=progress.step)
    if as_json:
        print_json({"output": str(out), **dataclasses.asdict(done)})
        return
    from qframe.memory import readable_bytes
    from qframe.report.table import facts

    print_result(
        facts(
            {
                "from": f"{folder}: {done.source}, {done.layers} quantized layers",
                "schemes": "; ".join(f"{count} {name}" for name, count in done.schemes.items()),
                "output": f"{out}: {readable_bytes(sum(done.sizes.values()))}",
                "format": f"{done.target}, for {done.readers}",
            }
        )
    )
