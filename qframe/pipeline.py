"""The data's way, in one function: weights -> calibration -> outliers -> rounding -> packing.

`quantize` checks everything that can be checked beforehand, walks through the network
(`qframe.walk`), where each group of layers is observed, rewritten, rounded and packed
(`qframe.solve`), and writes the folder (`qframe.checkpoint`) with its report.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qframe import parallel
from qframe.allocation import Allocation
from qframe.budget import activation_budget
from qframe.calibration import CalibrationData, prepare
from qframe.candidates import Candidates, candidates_of
from qframe.checkpoint import CheckpointWriter, check_output
from qframe.contracts import Event, LayerOutline, Layout
from qframe.errors import CalibrationError, FallbackError, RecipeError, UnsupportedError
from qframe.fingerprints import sha256
from qframe.freed import hand_back_large, tidy_up
from qframe.host import Host
from qframe.kept_blocks import Ledger
from qframe.kept_decision import as_decision, plain_decision
from qframe.layouts import OwnLayout, choose
from qframe.manifest import MANIFEST
from qframe.memory import calibrates, stored_tensors
from qframe.mixed import decide
from qframe.model import Network, left_weights
from qframe.out_of_memory import Where, memory_named
from qframe.ranks import Ranks, check_same, first, together
from qframe.recipe import Method, Plan, Recipe, check_supported, kv_quantizer, parse_method, resolve
from qframe.report.layers import Coverage, RunReport
from qframe.run_records import storage_of, write_records
from qframe.scheme import Scheme
from qframe.solve import Solver
from qframe.spilling import Spill
from qframe.stored_model import outline_of
from qframe.unfinished import State, Unfinished, unfinished
from qframe.verification import check_written
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
    state: State = "new",
    verify: bool = True,
    threads: int | None = None,
    max_memory: int | None = None,
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
    state         what to do where an earlier run into `out` was stopped: "new", refuse; "resume",
                  go on where it was, to the same bytes; "restart", delete what it had done. "none":
                  refuse, and keep nothing of this run either
    verify        read the folder once more before it gets its name, and compare it with what was
                  to be written
    threads       how many; the result does not depend on it. Default: all cores
    max_memory    bytes that the run may take, libraries included: activations that wait go to the
                  disk where they would take more. The result does not depend on it. None: no limit
    progress      called after each block

    Where a launcher such as torchrun has started several processes, each of which calls this, they
    do one run together (`qframe.ranks`): the first one writes the folder, to the same bytes as one
    process alone.

    Raises RecipeError, UnsupportedError, PluginError, WeightsError, ModelError, CalibrationError
    or OutputError before any work is done, MemoryLimitError then where max_memory is too little, or
    when memory runs out; NonFiniteError, FallbackError or CertificateError when numbers go wrong;
    VerifyError when files are not what was written; RanksError when another process of the run has
    failed. No output is left behind then; blocks that
    were done are kept beside it (`qframe.unfinished`).
    """
    started = time.perf_counter()
    hand_back_large()
    with together() as ranks:
        job = plan_job(model, recipe, host, format=format)
        in_memory = job.network.folder is None
        if not in_memory and out is None:
            raise RecipeError("quantizing a folder needs a folder for the result: out=...")
        threads = threads or parallel.default_threads()

        if max_memory is not None:
            # Raises before any work is done.
            activation_budget(job, calibration, max_memory, threads)

        def run() -> _Run:
            return _Run(job, calibration, threads, max_memory, progress, started, ranks)

        sizes: Mapping[str, int] = {}
        if out is None or ranks.rank > 0:
            report = run().walk(None, None)
        else:
            if state != "resume":
                check_output(Path(out), overwrite=overwrite)
            with unfinished(Path(out), state) as kept:
                overwrite = overwrite or kept.placed
                check_output(Path(out), overwrite=overwrite)
                strict = format is not None
                report, sizes = run().write(
                    Path(out), kept, strict=strict, overwrite=overwrite, verify=verify
                )
    return Result(
        report=report,
        folder=Path(out) if out else None,
        module=job.network.module if in_memory else None,
        sizes=sizes,
    )


class _Run:
    """A job on its way, with the text that is shown to the network."""

    def __init__(
        self,
        job: Job,
        calibration: CalibrationData | None,
        threads: int,
        max_memory: int | None,
        progress: Callable[[Progress], None] | None,
        started: float,
        ranks: Ranks,
    ) -> None:
        check_ranks(job, ranks)
        self._max_memory = max_memory
        self._shown = calibration is not None or calibrates(job)
        if calibration is None and (self._shown or job.candidates is not None):
            calibration = _default_calibration(job)
        self._job, self._data, self._threads = job, calibration, threads
        self._progress, self._started, self._ranks = progress, started, ranks
        self._identity: dict[str, Any] | None = None
        if ranks.size > 1:
            from qframe.run_identity import run_identity

            self._identity = run_identity(job, calibration, threads)
            check_same(ranks, "what the run depends on", self._identity)

    def write(
        self, out: Path, kept: Unfinished, *, strict: bool, overwrite: bool, verify: bool
    ) -> tuple[RunReport, Mapping[str, int]]:
        """Walk through the network and write the folder; return its files' sizes in bytes."""
        from qframe.comparison.identity import tensors_identity
        from qframe.run_identity import run_identity

        job, identity, folder = self._job, self._identity, self._job.network.folder
        blocks = {job.network.block_of(layer) for layer in job.plan.schemes}
        # What is made of weights alone depends on those that were read for it.
        as_read = self._data is None and folder is not None and not kept.goes_on
        if identity is None and kept.wanted:
            identity = run_identity(job, self._data, self._threads, whole=not as_read)
        known = dict if folder is None else partial(tensors_identity, folder)
        kept.begin(identity, len(blocks), known)
        with CheckpointWriter(
            out,
            job.layout,
            strict=strict,
            overwrite=overwrite,
            work=kept.work,
            expected=stored_tensors(job),
        ) as writer:
            report = self.walk(writer, kept)
            outlines = writer.with_extras(self._job.outlines())
            report.storage = storage_of(self._job, outlines)

            def look(folder: Path) -> None:
                if verify:
                    check_written(folder, self._job.host, self._threads)
                kept.placing(sha256(folder / MANIFEST))

            return report, write_records(writer, self._job, outlines, report, look)

    def walk(self, writer: CheckpointWriter | None, kept: Unfinished | None) -> RunReport:
        """Quantize every layer; return what there is to tell."""
        events = shortfall(self._data)
        where = Where(stage="measuring sensitivities")
        with memory_named(where):
            allocation = self._decide(events, kept)
        data, job = self._data if self._shown else None, self._job
        solver = Solver(job.recipe, job.method, job.host, self._threads, self._ranks)
        solver.events.extend(events)
        solver.where.calibrated = data is not None
        outlines = job.outlines()
        ledger = Ledger(kept, outlines, self._ranks)
        way = Walk(job.network, job.plan, outlines, solver, writer, self._progress, ledger)
        if data is not None:  # weights alone take no more by it
            tidy_up()
        one, several = parallel.one_torch_thread(), parallel.sharing(self._threads)
        with memory_named(solver.where), one, several, solver, way:
            if data is None:
                way.without_data()
            else:
                dtype = compute_dtype(job.recipe.calibration.compute_dtype)
                with self._spills(data, writer, solver.pairs) as spills:
                    way.with_data(data, threads=self._threads, dtype=dtype, spills=spills)
        report = RunReport(
            layers=[way.reports[name] for name in job.plan.schemes],
            events=solver.events,
            coverage=job.coverage,
            calibration=None if data is None else dict(data.source),
            allocation=allocation,
            folding=way.folding(),
            divisions=way.divisions,
            seconds={"total": time.perf_counter() - self._started},
        )
        check_fallbacks(report, job.recipe)
        return report

    @contextmanager
    def _spills(
        self, data: CalibrationData, writer: CheckpointWriter | None, pairs: bool
    ) -> Iterator[tuple[Spill | None, Spill | None]]:
        """Have files for activations where they may not all wait in memory; for both passes."""
        budget = None
        if self._max_memory is not None:
            budget = activation_budget(self._job, data, self._max_memory, self._threads)
        if budget is None:
            yield None, None
            return
        folder = Path(tempfile.gettempdir()) if writer is None else writer.folder
        with Spill(budget >> pairs, folder) as own, Spill(budget >> 1, folder) as others:
            yield own, others

    def _decide(self, events: list[Event], kept: Unfinished | None) -> Allocation | None:
        """Choose the schemes of layers where the recipe has a target of bits."""
        job, data = self._job, self._data
        if job.candidates is None or data is None:
            return None
        candidates = job.candidates

        def plain() -> dict[str, Any]:
            found = None if kept is None else kept.decision
            if found is None:
                found = plain_decision(*decide(job, candidates, data, self._threads))
                if kept is not None:
                    kept.decide(found)
            return found

        plan, allocation, said = as_decision(first(self._ranks, "the schemes of layers", plain))
        self._job = dataclasses.replace(job, plan=plan)
        events.extend(said)
        return allocation


def check_ranks(job: Job, ranks: Ranks) -> None:
    """Raise UnsupportedError for what several ranks cannot do together."""
    if ranks.size == 1:
        return
    if job.method.learns:
        raise UnsupportedError(
            f"method {job.recipe.method!r} learns whole blocks on all of the text, which ranks "
            f"cannot share yet: run it in one process, or use a method that solves layer by layer"
        )
    if job.network.folder is None:
        raise UnsupportedError(
            "a module in memory cannot be quantized by several ranks, each of which has its own; "
            "give the folder of the model"
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
