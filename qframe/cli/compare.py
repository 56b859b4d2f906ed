"""`qframe compare`: methods times schemes, resumably, in one table and one page."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import INTERRUPTED, Debug, Json, Threads
from qframe.cli.flags import RecipeFlags, parse_settings, takes_recipe_flags
from qframe.cli.progress import progress_shown
from qframe.cli.screen import finite, note, print_error, print_json, print_plain, print_result, warn
from qframe.errors import RecipeError
from qframe.recipe import Recipe
from qframe.scheme import PRESETS, Scheme

if TYPE_CHECKING:
    from qframe.comparison.matrix import Comparison

_MATRIX, _EVALUATION = "Matrix", "Evaluation"


@functools.partial(takes_recipe_flags, without=("method", "scheme", "keep_statistics"))
def compare(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A Hugging Face folder: config.json, *.safetensors."),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder of results: new, or one to go on with."),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD[:KEY=VALUE,...]",
            help="rtn, gptq, awq+gptq, ... with options of its own: gptq:actorder=group. Repeat.",
            rich_help_panel=_MATRIX,
        ),
    ] = None,
    schemes: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            metavar="SCHEME[:KEY=VALUE,...]",
            help=f"One of {', '.join(PRESETS)}, with fields that differ: W4A16:group_size=32. "
            "Repeat.",
            rich_help_panel=_MATRIX,
        ),
    ] = None,
    flags: RecipeFlags,
    text: Annotated[
        str,
        typer.Option(
            "--eval-dataset",
            help="Text to score, as for --dataset; topics means the half of Python's "
            "documentation that calibration never sees.",
            rich_help_panel=_EVALUATION,
        ),
    ] = "topics",
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=2,
            help="Tokens that are scored together. Default: 512.",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="At most this many windows. Default: 24.",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    reference_disk: Annotated[
        float | None,
        typer.Option(
            "--reference-disk",
            min=0,
            metavar="GB",
            help="What the logits of full precision may take in the folder; those that do not fit "
            "are computed for each cell. Default: 2.",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    no_distributions: Annotated[
        bool,
        typer.Option(
            "--no-distributions", help="Do not look at the distributions of weights and inputs."
        ),
    ] = False,
    threads: Threads = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV on stdout, and nothing else.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods and schemes on a model: a leaderboard, and report.html.

    Example: qframe compare MODEL -m rtn -m gptq -m awq+gptq --scheme W4A16 --scheme W3A16 -o OUT

    Every method is run with every scheme. Finished cells are kept in the folder, so a run that was
    stopped, by whatever, goes on where it was; other options make other cells. A cell that fails
    is a row with its message.

    Exit code: 0 when every cell is done, else that of the gravest failure: 1 internal error, 3
    numbers or bounds, 2 a combination that is not supported.
    """
    if as_json and as_csv:
        raise RecipeError("--json and --csv are both given; choose one")
    try:
        with progress_shown(every=10) as progress:
            progress.step("loading libraries")
            from qframe.comparison import matrix
            from qframe.comparison.reference import DISK_BYTES

            host = flags.to_host()
            base = flags.to_recipe()
            cells = matrix.cells_of(
                _methods(methods or [base.method]), _schemes(schemes, flags, base), base, host
            )
            found = matrix.compare(
                model,
                cells,
                out,
                host=host,
                evaluation=matrix.Evaluation(
                    dataset=text, window=window, limit=limit or matrix.EVALUATION_WINDOWS
                ),
                distributions=not no_distributions,
                disk_bytes=(DISK_BYTES if reference_disk is None else int(1e9 * reference_disk)),
                threads=threads,
                say=progress.step,
                progress=progress.block,
            )
            progress.step("writing the report")
            files = _write(found, out)
    except KeyboardInterrupt:
        print_error("interrupted", "finished cells are kept: the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    for event in found.events:
        warn(f"{event.kind}: {event.message}")
    _show(found, files, as_json=as_json, as_csv=as_csv)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _methods(texts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return METHOD[:KEY=VALUE,...] texts as label -> method and its options."""
    found = {}
    for text in texts:
        method, options = _split(text, "--method")
        found[text] = (method, options)
    return found


def _schemes(texts: Sequence[str] | None, flags: RecipeFlags, base: Recipe) -> dict[str, Scheme]:
    """Return SCHEME[:KEY=VALUE,...] texts as label -> scheme, --group-size and the like applied."""
    if not texts:
        return {base.scheme.describe(): base.scheme}
    found = {}
    for text in texts:
        name, fields = _split(text, "--scheme")
        scheme = dataclasses.replace(flags, scheme=name).to_recipe().scheme
        found[text] = scheme.replace(**fields) if fields else scheme
    return found


def _split(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """Return the name before the colon, and what is set after it."""
    name, colon, rest = text.partition(":")
    return name, parse_settings(rest.split(","), f"{flag} {name}:") if colon else {}


def _write(found: Comparison, out: Path) -> dict[str, Path]:
    """Write the report and the leaderboard into the folder of results."""
    from qframe.comparison.leaderboard import csv_text
    from qframe.comparison.store import Store
    from qframe.report.html import page

    store = Store(out)
    return {
        "report": store.write_text("report.html", page(found)),
        "json": store.write_text("results.json", json.dumps(finite(found.record()), indent=2)),
        "csv": store.write_text("results.csv", csv_text(found.rows)),
    }


def _show(found: Comparison, files: dict[str, Path], *, as_json: bool, as_csv: bool) -> None:
    from qframe.comparison.leaderboard import csv_text
    from qframe.report.leaderboard import leaderboard

    if as_json:
        events = [dataclasses.asdict(event) for event in found.events]
        print_json({**found.record(), "events": events})
        return
    if as_csv:
        print_plain(csv_text(found.rows).rstrip("\n"))
        return
    used = found.calibration
    hashes = ", ".join(f"sha256 {text['sha256'][:12]}" for text in used.get("sources", [used]))
    notes = {
        "calibration": f"{used['windows']} windows of {used['max_seq_length']} tokens of "
        f"{used['name']} ({hashes}), {used['windows_held_out']} held out",
        "report": str(files["report"]),
    }
    if found.others:
        notes["also kept"] = f"{found.others} cells that were made with other options"
    print_result(leaderboard(found.rows, found.reference, found.protocol, notes))
    failed = sum(row.exit_code != 0 for row in found.rows)
    if failed:
        note(f"{failed} of {len(found.rows)} cells failed; exit code {found.exit_code}")
