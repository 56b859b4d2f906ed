"""`qframe quantize`: a model folder in, a quantized folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json, Threads, words_of
from qframe.cli.flags import RecipeFlags, takes_recipe_flags
from qframe.cli.interrupts import interruptible, resumable, said
from qframe.cli.progress import progress_shown
from qframe.cli.screen import note, print_json, print_result
from qframe.cli.sizes import parse_size
from qframe.errors import OutputError, RecipeError
from qframe.launcher import launched

if TYPE_CHECKING:
    from qframe.host import Host
    from qframe.pipeline import Result
    from qframe.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face folder: config.json, *.safetensors."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="How the folder stores layers; qframe plugins lists the layouts. Default: "
        "compressed-tensors where it can express everything, else qframe.",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="What the run may take in memory, such as 8GB: activations that wait go to the disk "
        "where they would take more. The output does not depend on it. Default: no limit.",
        show_default=False,
    ),
]
AllLayers = Annotated[
    bool, typer.Option("--all-layers", help="Show every layer, however many there are.")
]


_UNFINISHED = "A run that was stopped"


@takes_recipe_flags
def quantize(
    ctx: typer.Context,
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
    format: Format = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where a run into OUT was stopped, to the same bytes.",
            rich_help_panel=_UNFINISHED,
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Delete what it had done, and begin anew.",
            rich_help_panel=_UNFINISHED,
        ),
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Do not read the folder once more, to compare it with what was made.",
        ),
    ] = False,
    flags: RecipeFlags,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    all_layers: AllLayers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model folder.

    Example: qframe quantize MODEL -m gptq --scheme W4A16 --group-size 64 -o OUT

    The output is a folder in the layout of the Hugging Face Hub, with the recipe, the report and
    the hashes of its files; qframe.load reads it. A run that fails leaves no output; the blocks
    that it had finished are kept beside OUT, and --resume goes on from there.

    Several processes do it together, to the same bytes: torchrun --nproc-per-node 2 -m qframe
    quantize ...
    """
    if resume and restart:
        raise RecipeError("--resume and --restart are both given; choose one")
    recipe, host = flags.to_recipe(), flags.to_host()
    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    is_first = launched()[0] == 0
    if dry_run and not is_first:
        return
    if dry_run:
        _dry_run(
            model,
            recipe,
            host,
            out,
            overwrite,
            format=format,
            threads=threads,
            max_memory=limit,
            all_layers=all_layers,
            as_json=as_json,
        )
        return
    if out is None:
        raise RecipeError("give the folder to write with -o OUT, or --dry-run for the plan alone")
    if report is not None:
        _prepare_report_folder(report)
    started = time.perf_counter()
    with interruptible(), resumable(out, words_of(ctx)), progress_shown() as progress:
        progress.step("loading libraries")
        from qframe.pipeline import quantize as run
        from qframe.unfinished import kept_blocks

        if resume:
            kept = kept_blocks(out)
            anew = "there is nothing to resume: the run begins anew"
            progress.step(anew if kept is None else f"{said(kept)} kept from before")
        measuring = ", measuring sensitivities" if recipe.target_bits is not None else ""
        progress.step(f"reading the model and the text{measuring}")
        result = run(
            model,
            recipe,
            out=out,
            host=host,
            format=format,
            overwrite=overwrite,
            state="resume" if resume else "restart" if restart else "new",
            verify=not no_verify,
            threads=threads,
            max_memory=limit,
            progress=progress.block,
        )
    if not is_first:
        return
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
    format: str | None,
    threads: int | None,
    max_memory: int | None,
    all_layers: bool,
    as_json: bool,
) -> None:
    from qframe import parallel
    from qframe.budget import activation_budget
    from qframe.checkpoint import check_output
    from qframe.cli.plan import plan_record, plan_screen
    from qframe.memory import calibrates
    from qframe.pipeline import plan_job

    job = plan_job(model, recipe, host, format=format)
    if out is not None:
        check_output(out, overwrite=overwrite)
    if calibrates(job) or job.candidates is not None:
        for dataset in recipe.calibration.datasets:
            _check_dataset(dataset)
    threads = threads or parallel.default_threads()
    budget = None
    if max_memory is not None:
        budget = activation_budget(job, None, max_memory, threads)
    if as_json:
        print_json(plan_record(job, threads, budget))
        return
    print_result(plan_screen(job, threads, budget, all_layers=all_layers))
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
    from qframe.memory import readable_bytes, weight_bytes
    from qframe.report.allocation import allocation_table
    from qframe.report.certificates import certificate_table, certificate_text
    from qframe.report.table import coverage_text, facts, run_summary, stacked

    total, weights = sum(result.sizes.values()), weight_bytes(result.sizes)
    lines = {
        "coverage": coverage_text(result.report.coverage),
        "certificates": certificate_text(result.report.layers),
        "output": f"{out}: {readable_bytes(total)}, of which weights {readable_bytes(weights)}; "
        f"{_bits_per_weight(result):.3f} bits per quantized weight",
        "format": result.report.storage,
        "time": f"{seconds:.1f} s",
    }
    if result.report.folding is not None:
        lines["scales"] = result.report.folding.line()
    if report is not None:
        lines["report"] = f"{report / 'report.json'}, {report / 'report.csv'}"
    layers, allocation = result.report.layers, result.report.allocation
    print_result(
        stacked(
            None if allocation is None else allocation_table(allocation, all_layers=all_layers),
            run_summary(result.report, all_layers=all_layers),
            certificate_table({layer.name: layer.certificates for layer in layers}),
            facts(lines),
        )
    )
