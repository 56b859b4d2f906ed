"""`qframe inspect`: what a recipe means for a network, or what a quantized folder holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json
from qframe.cli.flags import RecipeFlags, takes_recipe_flags
from qframe.cli.quantize import AllLayers
from qframe.cli.screen import print_json, print_result
from qframe.errors import RecipeError

if TYPE_CHECKING:
    from qframe.memory import FormatMemory
    from qframe.pipeline import Job


@takes_recipe_flags
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A Hugging Face folder, quantized or not, a config.json alone, or one "
            "*.safetensors or *.gguf file.",
        ),
    ] = None,
    *,
    params: Annotated[
        float | None,
        typer.Option("--params", min=1, help="Instead of a model: so many parameters, e.g. 7e9."),
    ] = None,
    flags: RecipeFlags,
    all_layers: AllLayers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the resolved plan, and the memory of the weights in every format.

    Example: qframe inspect MODEL -m gptq --scheme W4A16 --override 're:.*down_proj:num_bits=8'

    Of a folder only config.json and the headers of its files are read. Of a folder that is
    quantized already, by qframe or by others, it shows how, and what is stored.
    """
    if model is not None and _show_stored(Path(model), flags, as_json=as_json):
        return
    from qframe.memory import memory_of_layers, memory_of_parameters
    from qframe.report.table import memory_table, stacked, titled

    if (model is None) == (params is None):
        raise RecipeError("give a model, or --params for a number of parameters alone")
    if params is not None:
        formats = memory_of_parameters(params)
        title = f"{params:,.0f} weights (channel: rows of {_typical_columns()} columns assumed)"
        if as_json:
            print_json({"parameters": params, "memory": _memory_record(formats)})
        else:
            print_result(stacked(titled(title, memory_table(formats)), _UNITS))
        return
    from qframe import parallel
    from qframe.cli.plan import plan_record, plan_screen

    threads = parallel.default_threads()
    job = plan_of(str(model), flags)
    layers = [job.network.layers[name] for name in job.plan.schemes]
    formats = memory_of_layers(layers)
    if as_json:
        print_json({**plan_record(job, threads), "memory": _memory_record(formats)})
        return
    title = f"the {sum(i.size for i in layers):,} weights of the {len(layers)} layers to quantize"
    print_result(
        stacked(
            plan_screen(job, threads, all_layers=all_layers),
            titled(title, memory_table(formats)),
            _UNITS,
        )
    )


def _show_stored(path: Path, flags: RecipeFlags, *, as_json: bool) -> bool:
    """Show a quantized folder, or a file of weights; return whether it is one."""
    from qframe.cli import stored

    if path.suffix == ".safetensors" and path.is_file():
        if as_json:
            print_json(stored.file_record(path))
        else:
            print_result(stored.file_screen(path))
        return True
    file = path.is_file() and path.name != "config.json"
    if not file and not (path.is_dir() and stored.is_quantized(path)):
        return False
    host = flags.to_host()
    opened = stored.of_a_reader(path, host)
    if opened is not None:
        if as_json:
            print_json(stored.coded_record(path, *opened))
        else:
            print_result(stored.coded_screen(path, *opened))
        return True
    if file:
        return False
    if as_json:
        print_json(stored.stored_record(path, host))
    else:
        print_result(stored.stored_screen(path, host))
    return True


_UNITS = "1 GB is 10^9 bytes; scales take 16 bits, zero points as many as a weight."


def plan_of(model: str, flags: RecipeFlags) -> Job:
    """Return the plan for a folder, or for a config.json without weights beside it."""
    from qframe.pipeline import plan_job

    path = Path(model)
    if path.name != "config.json":
        return plan_job(path, flags.to_recipe(), flags.to_host())
    from qframe.model import build
    from qframe.weights import ModelFolder

    return plan_job(build(ModelFolder(path.parent)), flags.to_recipe(), flags.to_host())


def _typical_columns() -> int:
    from qframe.memory import TYPICAL_COLUMNS

    return TYPICAL_COLUMNS


def _memory_record(formats: list[FormatMemory]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(memory) for memory in formats]
