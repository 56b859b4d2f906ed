"""The data's way, in one function: weights -> calibration -> outliers -> rounding -> packing.

`quantize` checks everything that can be checked beforehand, walks through the network
(`qframe.walk`), where each group of layers is observed, rewritten, rounded and packed
(`qframe.solve`), and writes the folder (`qframe.checkpoint`) with its report.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qframe
from qframe import parallel
from qframe.allocation import Allocation
from qframe.calibration import CalibrationData, prepare
from qframe.candidates import Candidates, candidates_of
from qframe.checkpoint import CheckpointWriter, check_output, quantized_config
from qframe.contracts import EXTRAS, Event, LayerOutline, Layout
from qframe.errors import CalibrationError, FallbackError, RecipeError
from qframe.host import Host
from qframe.layouts import OWN, USUAL, OwnLayout, choose
from qframe.manifest import MANIFEST_VERSION, DivisionRecord, layer_record
from qframe.memory import calibrates
from qframe.mixed import decide
from qframe.model import Network, left_weights
from qframe.recipe import Method, Plan, Recipe, check_supported, kv_quantizer, parse_method, resolve
from qframe.report.layers import Coverage, RunReport
from qframe.scheme import Scheme
from qframe.solve import Solver
from qframe.stored_model import outline_of
from qframe.walk import Progress, Walk
from qframe.weights import ModelFolder


@dataclass(kw_only=True)
class Result:
    """What `quantize` returns.

    report   one record per layer, coverage, events
    folder   the folder that was written, or None
    module   the quantized network, for a module that was given in memory, else None
    sizes    file name -> bytes of the written folder
    """

    report: RunReport
    folder: Path | None
    module: nn.Module | None
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Job:
    """A request that passed every check that needs no work.

    layout       how the folder will store its layers
    not_usual    why that is not the usual layout; nothing where it is, or where one was asked for
    candidates   the schemes that layers may get, where the recipe has a target of bits: what the
                 plan says of them holds until they are chosen
    """

    network: Network
    recipe: Recipe
    method: Method
    plan: Plan
    coverage: Coverage
    host: Host
    layout: Layout = field(default_factory=OwnLayout)
    not_usual: Sequence[str] = ()
    candidates: Candidates | None = None

    def outlines(self) -> dict[str, LayerOutline]:
        """Return what each layer will be, as far as that is known before."""
        return {name: self.outline(name, scheme) for name, scheme in self.plan.schemes.items()}

    def possible(self) -> list[LayerOutline]:
        """Return the same with all schemes that a layer may still get."""
        if self.candidates is None:
            return list(self.outlines().values())
        schemes = self.candidates.schemes.items()
        return [self.outline(name, scheme) for name, some in schemes for scheme in some]

    def outline(self, name: str, scheme: Scheme) -> LayerOutline:
        """Return what a layer would be with a scheme."""
        extras = self.method.extras
        if scheme.strategy != "group":
            extras -= {"group index"}
        return outline_of(self.host, self.network.layers[name], scheme, extras)


def plan_job(
    model: str | Path | nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    host: Host | None = None,
    *,
    format: str | None = None,
) -> Job:
    """Resolve a recipe for a network, reading only the config and the headers of its files.

    format   the layout of the folder to write; None for the usual one where it can express all

    Raises RecipeError, UnsupportedError, PluginError, WeightsError or ModelError.
    """
    recipe = _as_recipe(recipe)
    host = host or Host.discover()
    method = parse_method(host, recipe)
    if recipe.kv_cache_scheme is not None:
        kv_quantizer(recipe.kv_cache_scheme, host)  # raises for what it cannot do
    network = _as_network(model)
    plan = resolve(recipe, network.layers)
    check_supported(method, plan, host)
    if recipe.carried_dtype is not None:
        network.cast(getattr(torch, recipe.carried_dtype), plan.schemes)
    if recipe.keep_statistics and not method.rounder.needs:
        raise RecipeError(
            f"keep_statistics: method {recipe.method!r} rounds without statistics, so there is "
            f"nothing to keep; its certificates can be recomputed from the weights alone"
        )
    coverage = measure_coverage(network, plan)
    if coverage.matrix_fraction < recipe.min_coverage:
        raise RecipeError(
            f"only {100 * coverage.matrix_fraction:.1f} % of the weights in linear layers would "
            f"be quantized, below min_coverage={recipe.min_coverage:g}; {coverage.line()}"
        )
    job = Job(network, recipe, method, plan, coverage, host)
    job = dataclasses.replace(job, candidates=candidates_of(job))
    if network.folder is None and format is None:
        return job
    layout, not_usual = choose(format, job.possible(), host)
    return dataclasses.replace(job, layout=layout, not_usual=not_usual)


def quantize(
    model: str | Path | nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    calibration: CalibrationData | None = None,
    host: Host | None = None,
    format: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Quantize a network.

    model         a Hugging Face folder, or a module (which is copied, not changed)
    recipe        a Recipe, its fields, or a file
    out           the folder to write; may be None for a module
    calibration   inputs for a module, or in place of recipe.calibration for a folder. A method
                  that needs none is still measured on them when they, or recipe.calibration,
                  are given. With target_bits some of them measure how sensitive layers are
    format        how the folder stores its layers: the name of a layout, which must be able to
                  express everything. None: as compressed-tensors does, where that can, or as qframe
                  does. A module in memory has no config.json that others could read, and is stored
                  as qframe does
    threads       how many; the result does not depend on it. Default: all cores
    progress      called after each block

    Raises RecipeError, UnsupportedError, PluginError, WeightsError, ModelError, CalibrationError
    or OutputError before any work is done, MemoryLimitError before sensitivities are measured;
    NonFiniteError, FallbackError or CertificateError when numbers go wrong. No output is left
    behind then.
    """
    started = time.perf_counter()
    job = plan_job(model, recipe, host, format=format)
    in_memory = job.network.folder is None
    if not in_memory and out is None:
        raise RecipeError("quantizing a folder needs a folder for the result: out=...")
    if out is not None:
        check_output(Path(out), overwrite=overwrite)
    threads = threads or parallel.default_threads()
    shown = calibration is not None or calibrates(job)
    if calibration is None and (shown or job.candidates is not None):
        calibration = _default_calibration(job)
    events = shortfall(calibration)
    allocation: Allocation | None = None
    if job.candidates is not None and calibration is not None:
        plan, allocation, said = decide(job, job.candidates, calibration, threads)
        job = dataclasses.replace(job, plan=plan)
        events.extend(said)
    if not shown:
        calibration = None

    outlines = job.outlines()
    solver = Solver(job.recipe, job.method, job.host, threads)
    solver.events.extend(events)

    def walk(writer: CheckpointWriter | None) -> RunReport:
        way = Walk(job.network, job.plan, outlines, solver, writer, progress)
        with parallel.one_torch_thread(), solver:
            if calibration is None:
                way.without_data()
            else:
                dtype = compute_dtype(job.recipe.calibration.compute_dtype)
                way.with_data(calibration, threads=threads, dtype=dtype)
        report = RunReport(
            layers=[way.reports[name] for name in job.plan.schemes],
            events=solver.events,
            coverage=job.coverage,
            calibration=None if calibration is None else dict(calibration.source),
            allocation=allocation,
            folding=way.folding(),
            divisions=way.divisions,
            seconds={"total": time.perf_counter() - started},
        )
        check_fallbacks(report, job.recipe)
        return report

    if out is None:
        report, sizes = walk(None), {}
    else:
        strict = format is not None
        with CheckpointWriter(Path(out), job.layout, strict=strict, overwrite=overwrite) as writer:
            report = walk(writer)
            outlines = writer.with_extras(outlines)
            report.storage = storage_of(job, outlines)
            sizes = _write_records(writer, job, outlines, report)
    return Result(
        report=report,
        folder=Path(out) if out else None,
        module=job.network.module if in_memory else None,
        sizes=sizes,
    )


def measure_coverage(network: Network, plan: Plan) -> Coverage:
    """Count how much of the network the plan quantizes, and why the rest is left."""
    quantized = sum(network.layers[name].size for name in plan.schemes)
    others = left_weights(network.module)
    experts = sum(
        network.module.get_parameter(name).numel() for name in others if "3-D" in others[name]
    )
    # An output layer that is the embedding is no matrix of its own, unless it is quantized.
    matrices = sum(
        layer.size
        for layer in network.layers.values()
        if layer.name in plan.schemes or not network.is_tied(layer.name)
    )
    return Coverage(
        parameters=sum(p.numel() for p in network.module.parameters()),
        parameters_quantized=quantized,
        matrix_fraction=quantized / max(matrices + experts, 1),
        left={**plan.left, **others},
    )


def shortfall(calibration: CalibrationData | None) -> list[Event]:
    """Return an event when the text gave fewer windows than the recipe wanted."""
    source = {} if calibration is None else calibration.source
    wanted = source.get("windows_wanted", 0)
    if source.get("windows", wanted) >= wanted:
        return []
    message = (
        f"{wanted} windows of {source['max_seq_length']} tokens wanted, {source['windows']} found "
        f"in {source['tokens_in_text']} tokens of {source['name']!r} "
        f"({source['windows_held_out']} more are held out)"
    )
    return [Event(kind="less calibration text", layer="", message=message)]


def check_fallbacks(report: RunReport, recipe: Recipe) -> None:
    """Raise FallbackError when more layers fell back than the recipe allows."""
    events = report.fallbacks()
    fallen = {event.layer for event in events}  # a layer may be neither rewritten nor solved
    if len(fallen) > recipe.max_fallback_frac * len(report.layers):
        raise FallbackError(
            f"{len(fallen)} of {len(report.layers)} layers got a weaker method than was asked for, "
            f"more than max_fallback_frac={recipe.max_fallback_frac:g} allows; the first is "
            f"{events[0].layer}: {events[0].message}"
        )


def storage_of(job: Job, outlines: Mapping[str, LayerOutline]) -> str:
    """Return in a line how the folder stores its layers, and who reads it."""
    extras = {name: layer.extras for name, layer in outlines.items() if layer.extras}
    if job.layout.name != OWN and extras:
        name, found = next(iter(extras.items()))
        return (
            f"{job.layout.name}, and more, for qframe alone: of {len(extras)} layers, {name} ..., "
            f"{EXTRAS[min(found)]}"
        )
    if not job.not_usual:
        return f"{job.layout.name}, for {job.layout.readers}"
    return f"{job.layout.name}, for qframe alone; {USUAL} cannot: {job.not_usual[0]}"


def _write_records(
    writer: CheckpointWriter, job: Job, outlines: Mapping[str, LayerOutline], report: RunReport
) -> dict[str, int]:
    """Write everything that is not a tensor, and give the folder its name."""
    folder = job.network.folder
    if folder is not None:
        left = [info for name, info in job.network.layers.items() if name not in outlines]
        layers, kv_cache = list(outlines.values()), job.recipe.kv_cache_scheme
        config = quantized_config(folder.config, job.layout, layers, left, kv_cache)
        if any(event.kind == "untied" for event in report.events):
            config["tie_word_embeddings"] = False
        writer.copy_side_files(folder, config)
        writer.add_side_files(layers, left)
    writer.write_text("qframe_report.json", report.to_json(timings=False))
    writer.write_text("quant_log.csv", report.to_csv(timings=False))
    return writer.finish(
        {
            "manifest_version": MANIFEST_VERSION,
            "qframe": qframe.__version__,
            "layout": job.layout.name,
            "recipe": job.recipe.model_dump(mode="json"),
            "plugins": plugins_used(job),
            "calibration": report.calibration,
            "events": [dataclasses.asdict(event) for event in report.events],
            "layers": {
                layer.name: layer_record(layer, outlines[layer.name]) for layer in report.layers
            },
            "divisions": {n: DivisionRecord.of(each) for n, each in report.divisions.items()},
        }
    )


def plugins_used(job: Job) -> list[dict[str, str]]:
    """Return which plugin provided each object of the run, with its version."""
    schemes = job.plan.schemes.values()
    inputs = {scheme.input_activations for scheme in schemes}
    formats = {s.format_name for s in schemes} | {s.format_name for s in inputs if s}
    used = [
        *((("layout", job.layout.name),) if job.layout.name != OWN else ()),
        ("rounder", job.method.rounder.name),
        *(("outlier handler", handler.name) for handler in job.method.handlers),
        *(("observer", name) for name in sorted(job.method.needs | job.plan.observers)),
        *(("number format", name) for name in sorted(formats)),
    ]
    if job.recipe.kv_cache_scheme is not None:
        used.append(("kv cache", job.recipe.kv_cache_scheme.method))
    records = []
    for kind, name in used:
        record = job.host.origin(kind, name)
        source = Path(record.source).name  # of a single file, where it lies is no one's business
        records.append(
            {
                "kind": kind,
                "name": name,
                "plugin": record.name,
                "source": source,
                "version": record.version,
            }
        )
    return records


def _default_calibration(job: Job) -> CalibrationData:
    if job.network.folder is None:
        raise CalibrationError(
            f"{'target_bits' if job.candidates else f'method {job.recipe.method!r}'} needs "
            f"calibration inputs: "
            f"calibration=CalibrationData.from_tensors(batches)"
        )
    return prepare(job.network.folder.path, job.recipe.calibration)


def compute_dtype(name: str) -> torch.dtype:
    """Return the dtype of matrix products that a recipe's compute_dtype means on this machine."""
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.parse(recipe, "recipe")
    return Recipe.from_file(recipe)


def _as_network(model: str | Path | nn.Module) -> Network:
    if isinstance(model, nn.Module):
        return Network(copy.deepcopy(model).eval().requires_grad_(False))
    return Network.from_folder(ModelFolder(model))


__all__ = ["Job", "Progress", "Result", "plan_job", "quantize"]
