"""`qframe quantize`: a model folder in, a quantized folder out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.flags import RecipeFlags, takes_recipe_flags
from qframe.cli.screen import note, print_json, print_result, stderr
from qframe.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qframe.host import Host
    from qframe.pipeline import Progress, Result
    from qframe.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face folder: config.json, *.safetensors."),
]
AllLayers = Annotated[
    bool, typer.Option("--all-layers", help="Show every layer, however many there are.")
]


@takes_recipe_flags
def quantize(
    model: Model,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Also write report.json and report.csv."),
    ] = None,
    flags: RecipeFlags,
    threads: Threads = None,
    all_layers: AllLayers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model folder.

    Example: qframe quantize MODEL -m gptq --scheme W4A16 --group-size 64 -o OUT

    The output is a folder in the layout of the Hugging Face Hub, with the recipe, the report and
    the hashes of its files; qframe.load reads it. Nothing is left behind when a run fails.
    """
    recipe, host = flags.to_recipe(), flags.to_host()
    if dry_run:
        _dry_run(model, recipe, host, out, overwrite, all_layers=all_layers, as_json=as_json)
        return
    if out is None:
        raise RecipeError("give the folder to write with -o OUT, or --dry-run for the plan alone")
    if report is not None:
        _prepare_report_folder(report)
    note("loading libraries")
    from qframe.pipeline import quantize as run

    started = time.perf_counter()
    with progress_shown() as progress:
        result = run(
            model,
            recipe,
            out=out,
            host=host,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if report is not None:
        (report / "report.json").write_text(result.report.to_json(), encoding="utf-8")
        (report / "report.csv").write_text(result.report.to_csv(), encoding="utf-8")
    if as_json:
        print_json(_record(result))
        return
    _show(result, out, report, time.perf_counter() - started, all_layers=all_layers)


def _dry_run(
    model: str,
    recipe: Recipe,
    host: Host,
    out: Path | None,
    overwrite: bool,
    *,
    all_layers: bool,
    as_json: bool,
) -> None:
    from qframe.checkpoint import check_output
    from qframe.cli.plan import plan_record, plan_screen
    from qframe.memory import calibrates
    from qframe.pipeline import plan_job

    job = plan_job(model, recipe, host)
    if out is not None:
        check_output(out, overwrite=overwrite)
    if calibrates(job):
        _check_dataset(recipe.calibration.dataset)
    if as_json:
        print_json(plan_record(job))
        return
    print_result(plan_screen(job, all_layers=all_layers))
    note("dry run: nothing was written")


def _check_dataset(dataset: str) -> None:
    """Raise when calibration text is not there; its length is known only once it is read."""
    from qframe.calibration import read_text

    if dataset != "topics" and not dataset.startswith("hf:") and not Path(dataset).exists():
        read_text(dataset)


def _prepare_report_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--report {folder}: cannot make this folder: {error.strerror}") from None


def _record(result: Result) -> dict[str, Any]:
    import json

    return {
        "output": str(result.folder),
        "bytes": dict(result.sizes),
        "bits_per_weight": _bits_per_weight(result),
        "report": json.loads(result.report.to_json()),
    }


def _bits_per_weight(result: Result) -> float:
    """Return the stored bits per quantized weight."""
    layers = result.report.layers
    bits = sum(layer.bits_per_weight * layer.rows * layer.columns for layer in layers)
    return bits / sum(layer.rows * layer.columns for layer in layers)


def _show(
    result: Result, out: Path, report: Path | None, seconds: float, *, all_layers: bool
) -> None:
    from qframe.memory import readable_bytes
    from qframe.report.table import coverage_text, facts, run_summary, stacked

    total = sum(result.sizes.values())
    weights = sum(size for name, size in result.sizes.items() if name.endswith(".safetensors"))
    lines = {
        "coverage": coverage_text(result.report.coverage),
        "output": f"{out}: {readable_bytes(total)}, of which weights {readable_bytes(weights)}; "
        f"{_bits_per_weight(result):.3f} bits per quantized weight",
        "time": f"{seconds:.1f} s",
    }
    if report is not None:
        lines["report"] = f"{report / 'report.json'}, {report / 'report.csv'}"
    print_result(stacked(run_summary(result.report, all_layers=all_layers), facts(lines)))


# Progress ---------------------------------------------------------------------------------------


@contextmanager
def progress_shown() -> Iterator[Callable[[Progress], None]]:
    """Show progress on stderr: a bar on a terminal, a line for each block elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield _Lines().show
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    with Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("reading the model and the text", total=None)

        def show(done: Progress) -> None:
            bar.update(task, description=done.block, completed=done.done, total=done.blocks)

        yield show


class _Lines:
    """Progress as lines of text."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def show(self, done: Progress) -> None:
        """Print one line for a block."""
        from qframe.report.table import percent

        elapsed = time.perf_counter() - self._started
        left = elapsed / done.done * (done.blocks - done.done)
        count = len(done.layers)
        line = f"[{done.done}/{done.blocks}] {done.block}: {count} layer{'s' if count > 1 else ''}"
        line += f", {done.seconds:.1f} s"
        errors = [m.held_out_error for m in done.layers if m.held_out_error is not None]
        if errors:
            line += f", held-out error up to {percent(max(errors))} %"
        fallen = sum("fallback" in layer.method for layer in done.layers)
        if fallen:
            line += f", {fallen} fell back to RTN"
        note(f"{line}; {left:.0f} s left")
