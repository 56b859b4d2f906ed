"""The data's way, in one place: weights -> statistics -> rewrite -> codes -> packed -> report.

`quantize` walks through the network block by block. With calibration data the walk is the
network's own forward pass (`qframe.calibration`): before a layer runs, its inputs are observed,
its weight is rewritten, rounded and packed, and the pass goes on with the quantized weight.
Without, each block is loaded, quantized and written in turn. In memory are one block, its
statistics and the activations.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qframe
from qframe import parallel, rounding
from qframe.calibration import Arrival, CalibrationData, Lockstep, Stop, layer_input, prepare
from qframe.checkpoint import (
    MANIFEST_VERSION,
    CheckpointWriter,
    check_output,
    quantized_config,
)
from qframe.contracts import (
    Event,
    Grid,
    InputGroup,
    LayerInfo,
    QuantizedWeight,
    RoundingProblem,
    Statistic,
)
from qframe.errors import (
    CalibrationError,
    FallbackError,
    HessianError,
    ModelError,
    NonFiniteError,
    UncalibratedLayerError,
)
from qframe.host import Host
from qframe.model import (
    Network,
    QuantizedLinear,
    left_weights,
    replace_module,
    set_weight,
)
from qframe.packing import PackedWeight
from qframe.recipe import Method, Plan, Recipe, check_supported, parse_method, resolve
from qframe.report.layers import Coverage, LayerReport, RunReport
from qframe.scheme import Scheme
from qframe.weights import ModelFolder, check_finite

log = logging.getLogger("qframe")

ERROR_OBSERVER = "hessian"  # second moments of the inputs: what output errors are measured with
ROWS_AT_ONCE = 256  # of a weight, in products whose bits must not depend on the thread count


@dataclass(frozen=True, slots=True)
class Progress:
    """Told to the caller when a block is done."""

    block: str
    done: int
    blocks: int
    layers: Sequence[LayerReport]
    seconds: float


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


def quantize(
    model: str | Path | nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    calibration: CalibrationData | None = None,
    host: Host | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Quantize a network.

    model         a Hugging Face folder, or a module (which is copied, not changed)
    recipe        a Recipe, its fields, or a file
    out           the folder to write; may be None for a module
    calibration   inputs for a module, or in place of recipe.calibration for a folder
    threads       how many; the result does not depend on it. Default: all cores

    Raises RecipeError, UnsupportedError, WeightsError, ModelError, CalibrationError, OutputError
    before any work is done; NonFiniteError, FallbackError when numbers go wrong; nothing is
    left behind then.
    """
    started = time.perf_counter()
    recipe = _as_recipe(recipe)
    host = host or Host.discover()
    method = parse_method(host, recipe)
    network = _as_network(model)
    plan = resolve(recipe, network.layers)
    check_supported(method, plan, host)
    coverage = _coverage(network, plan)
    if coverage.matrix_fraction < recipe.min_coverage:
        raise ModelError(
            f"only {100 * coverage.matrix_fraction:.1f} % of the weights in linear layers would "
            f"be quantized, below min_coverage={recipe.min_coverage:g}; {coverage.line()}"
        )
    if isinstance(model, nn.Module):
        if method.needs and calibration is None:
            raise CalibrationError(
                f"method {recipe.method!r} needs calibration inputs; give calibration="
                f"CalibrationData.from_tensors(batches)"
            )
    elif out is None:
        raise CalibrationError("quantizing a folder needs an output folder: out=...")
    if out is not None:
        check_output(Path(out), overwrite=overwrite)
    if calibration is None and method.needs and network.folder is not None:
        calibration = prepare(network.folder.path, recipe.calibration)

    run = _Run(network, recipe, method, plan, host, threads or parallel.default_threads(), progress)
    if out is None:
        with parallel.one_torch_thread():
            run.walk(calibration, None)
        sizes: dict[str, int] = {}
    else:
        with CheckpointWriter(Path(out), overwrite=overwrite) as writer:
            with parallel.one_torch_thread():
                run.walk(calibration, writer)
            report = run.report(coverage, calibration, started)
            sizes = _finish(writer, run, report)
    report = run.report(coverage, calibration, started)
    module = network.module if isinstance(model, nn.Module) else None
    return Result(report=report, folder=Path(out) if out else None, module=module, sizes=sizes)


class _Run:
    """The state of one walk through a network."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        method: Method,
        plan: Plan,
        host: Host,
        threads: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.network, self.recipe, self.method, self.plan = network, recipe, method, plan
        self.host, self.threads, self._progress = host, threads, progress
        self.events: list[Event] = []
        self.reports: dict[str, LayerReport] = {}
        self._packed: dict[str, tuple[PackedWeight, torch.Tensor | None]] = {}
        self._written: set[str] = set()
        self._groups: dict[str, InputGroup] = {}
        self._seen_structures: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
        self._inputs: dict[str, Mapping[int, torch.Tensor]] = {}
        self._block = ""
        self._done_blocks = 0
        self._block_started = time.perf_counter()

    # The two ways through the network ---------------------------------------------------------

    def walk(self, calibration: CalibrationData | None, writer: CheckpointWriter | None) -> None:
        """Quantize every layer of the plan, and write what is done."""
        self._writer = writer
        if calibration is None:
            for layer in self.plan.schemes:
                self._enter(self.network.block_of(layer))
                self._quantize_group(InputGroup(layers=(self.network.layers[layer],)), {}, 0)
        else:
            self._calibrated(calibration)
        self._leave()
        self._write_rest()
        self._check_fallbacks()

    def _calibrated(self, data: CalibrationData) -> None:
        fitted = len(data.inputs)
        dtype = _compute_dtype(self.recipe.calibration.compute_dtype)
        steps = Lockstep(self.network.module, threads=self.threads, dtype=dtype)
        for name, block in self.network.blocks.items():
            steps.watch(Stop("block", name), block)
            for layer in self.plan.schemes:
                if self.network.block_of(layer) == name:
                    steps.watch(Stop("layer", layer), self.network.module.get_submodule(layer))
        for layer in self.plan.schemes:
            if not self.network.block_of(layer) and "" not in self.network.blocks:
                steps.watch(Stop("layer", layer), self.network.module.get_submodule(layer))
        loader = _load_on_demand(self.network)

        def on_stop(stop: Stop, arrivals: Mapping[int, Arrival]) -> bool:
            if stop.kind == "block":
                self._enter(stop.name)
                self._find_groups(stop.name, steps, arrivals)
            elif stop.name in self.reports:
                self._check_shared(stop.name, arrivals)
            else:
                group = self._groups.get(
                    stop.name, InputGroup(layers=(self.network.layers[stop.name],))
                )
                inputs = {i: layer_input(a.args, a.kwargs) for i, a in arrivals.items()}
                self._inputs = {layer.name: inputs for layer in group.layers}
                self._quantize_group(group, inputs, fitted)
            return len(self.reports) < len(self.plan.schemes)

        kwargs = {"use_cache": False} if self.network.folder is not None else {}
        try:
            steps.run([*data.inputs, *data.held_out], _accepted(self.network.module, kwargs), on_stop)
        finally:
            for handle in loader:
                handle.remove()
        for layer in self.plan.schemes:  # layers that no token reached
            if layer not in self.reports:
                self._enter(self.network.block_of(layer))
                self._quantize_group(InputGroup(layers=(self.network.layers[layer],)), {}, 0)

    def _find_groups(self, name: str, steps: Lockstep, arrivals: Mapping[int, Arrival]) -> None:
        """Learn which layers of a block share an input, by watching the block once.

        Blocks of the same make have the same groups, so one is watched for each make.
        """
        prefix = f"{name}." if name else ""
        block = self.network.blocks[name]
        inside = {
            layer.name.removeprefix(prefix): layer
            for layer in self.network.layers.values()
            if layer.name.startswith(prefix) and layer.name in self.plan.schemes
        }
        make = (
            type(block).__name__,
            *((short, layer.rows, layer.columns) for short, layer in inside.items()),
        )
        if make not in self._seen_structures:
            calls = steps.record(block, next(iter(arrivals.values())))
            shared: dict[int, list[str]] = {}
            for layer, x in calls:  # `calls` keeps the inputs alive, so identities are distinct
                members = shared.setdefault(id(x), [])
                if layer.removeprefix(prefix) not in members:
                    members.append(layer.removeprefix(prefix))
            self._seen_structures[make] = [tuple(members) for members in shared.values()]
        for members in self._seen_structures[make]:
            group = InputGroup(layers=tuple(inside[short] for short in members))
            for short in members:
                self._groups[f"{prefix}{short}"] = group

    def _check_shared(self, layer: str, arrivals: Mapping[int, Arrival]) -> None:
        """Make sure that a layer quantized with its group really reads the group's input."""
        inputs = self._inputs.pop(layer, None)
        if inputs is None:
            self.events.append(
                Event(
                    kind="called again",
                    layer=layer,
                    message="the layer runs several times; its first inputs were used",
                )
            )
            return
        for i, arrival in arrivals.items():
            if layer_input(arrival.args, arrival.kwargs) is not inputs.get(i):
                raise ModelError(
                    f"layer {layer!r} was taken to share its input with a layer before it, but "
                    f"it reads another tensor in this block; please report this network"
                )

    # One group of layers ----------------------------------------------------------------------

    def _quantize_group(
        self, group: InputGroup, inputs: Mapping[int, torch.Tensor], fitted: int
    ) -> None:
        """Observe, rewrite, round, pack, and measure the layers of one input group.

        inputs   by input number; numbers from `fitted` on are held out
        """
        clock = time.perf_counter()
        chunks = {i: _tokens(x, group) for i, x in sorted(inputs.items())}
        observers = set(self.method.needs)
        if inputs and ERROR_OBSERVER in self.host.names("observer"):
            observers.add(ERROR_OBSERVER)
        seen = {name: self._observe(name, group, chunks, fitted) for name in sorted(observers)}
        statistics = {name: s[0].value() for name, s in seen.items()}
        tokens = sum(len(x) for i, x in chunks.items() if i < fitted)
        held_tokens = sum(len(x) for i, x in chunks.items() if i >= fitted)
        moments = None
        if ERROR_OBSERVER in seen and tokens:
            moments = [seen[ERROR_OBSERVER][0].value().to(torch.float32)]
            if held_tokens:
                moments.append(seen[ERROR_OBSERVER][1].value().to(torch.float32))
        calibrate_seconds = (time.perf_counter() - clock) / len(group.layers)

        originals = {layer.name: self._weight(layer) for layer in group.layers}
        weights, input_scale = self._rewrite(group, originals, statistics)
        for layer in group.layers:
            scheme = self.plan.schemes[layer.name]
            clock = time.perf_counter()
            problem = RoundingProblem(
                name=layer.name,
                weight=weights[layer.name],
                scheme=scheme,
                grid=self._grid(scheme),
                statistics={k: v for k, v in statistics.items() if k in self.method.needs},
                tokens=tokens,
            )
            quantized, used = self._round(problem)
            round_seconds = time.perf_counter() - clock
            clock = time.perf_counter()
            packed = PackedWeight.pack(quantized, scheme, problem.grid)
            self._packed[layer.name] = (packed, input_scale)
            effective = rounding.dequantize(quantized)
            if input_scale is not None:
                effective = effective / input_scale
            check_finite(effective, f"layer {layer.name!r}: the quantized weight")
            report = LayerReport(
                name=layer.name,
                method=used,
                scheme=scheme.describe(),
                rows=layer.rows,
                columns=layer.columns,
                bits_per_weight=packed.bits / layer.size,
                tokens=tokens,
                tokens_held_out=held_tokens,
                info=dict(quantized.info),
            )
            self._measure(report, originals[layer.name], effective, quantized, problem, moments)
            report.seconds = {
                "calibrate": calibrate_seconds,
                "round": round_seconds,
                "pack_and_measure": time.perf_counter() - clock,
            }
            self.events.extend(quantized.events)
            self.reports[layer.name] = report
            if inputs:
                set_weight(self.network.module.get_submodule(layer.name), effective)

    def _observe(
        self, name: str, group: InputGroup, chunks: Mapping[int, torch.Tensor], fitted: int
    ) -> tuple[Statistic, Statistic]:
        """Return a statistic of the calibration tokens, and one of the held-out tokens."""
        observer = self.host.get("observer", name)
        seen: tuple[Statistic, Statistic] = (observer.start(group), observer.start(group))
        for i, x in chunks.items():
            if i < fitted or name == ERROR_OBSERVER:
                seen[i >= fitted].update(x)
        return seen

    def _weight(self, layer: LayerInfo) -> torch.Tensor:
        if self.network.is_tied(layer.name):
            self.events.append(
                Event(kind="untied", layer=layer.name,
                      message="its weight was shared with another module, which keeps it as it was")
            )
        return self.network.weight(layer.name)

    def _rewrite(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        statistics: Mapping[str, Any],
    ) -> tuple[Mapping[str, torch.Tensor], torch.Tensor | None]:
        """Let the outlier handlers rewrite the group; return the weights and the input scale."""
        input_scale = None
        for handler in self.method.handlers:
            needed = {name: statistics[name] for name in handler.needs}
            scheme = self.plan.schemes[group.name]
            rewrite = handler.rewrite(group, weights, needed, scheme, self._rng(group.name))
            weights = rewrite.weights
            scale = rewrite.input_scale
            input_scale = scale if input_scale is None else input_scale * scale
        return weights, input_scale

    def _round(self, problem: RoundingProblem) -> tuple[QuantizedWeight, str]:
        """Round one layer; where that is impossible, round to nearest and record the fallback."""
        try:
            quantized = self.method.rounder.round(problem, self._rng(problem.name))
            check_quantized(quantized, problem, self.method.rounder.name)
            return quantized, self.recipe.method
        except (UncalibratedLayerError, HessianError) as error:
            if self.recipe.on_fallback == "error":
                raise
            event = Event(kind="fallback", layer=problem.name,
                          message=f"rounded to nearest instead: {error}")
            self.events.append(event)
            log.warning("%s: %s", event.layer, event.message)
            return _to_nearest(problem), "round to nearest (fallback)"

    def _measure(
        self,
        report: LayerReport,
        original: torch.Tensor,
        effective: torch.Tensor,
        quantized: QuantizedWeight,
        problem: RoundingProblem,
        moments: Sequence[torch.Tensor] | None,
    ) -> None:
        """Fill in errors: of the weights, and of the outputs on both kinds of tokens."""
        difference = original - effective
        signal = float(original.square().sum(dtype=torch.float64))
        noise = float(difference.square().sum(dtype=torch.float64))
        report.sqnr_db = (
            float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))
        )
        report.clipped = _clipped(problem.weight, quantized, problem.grid)
        if moments is None:
            return
        nearest = rounding.dequantize(_to_nearest(replace_weight(problem, original)))
        for moment, (mine, rtn) in zip(
            moments, (("error", "rtn_error"), ("held_out_error", "rtn_held_out_error")), strict=False
        ):
            whole = self._energy(original, moment)
            for attribute, delta in ((mine, difference), (rtn, original - nearest)):
                energy = self._energy(delta, moment)
                relative = float(np.sqrt(energy / whole)) if whole > 0 else 0.0
                setattr(report, attribute, relative)

    def _energy(self, delta: torch.Tensor, moment: torch.Tensor) -> float:
        """Return tr(delta H delta^T), summed over fixed pieces of rows."""
        pieces = delta.split(ROWS_AT_ONCE)
        sums = parallel.spread(
            lambda rows: float(((rows @ moment) * rows).sum(dtype=torch.float64)),
            pieces,
            self.threads,
        )
        return max(sum(sums), 0.0)

    def _grid(self, scheme: Scheme) -> Grid:
        number_format = self.host.get("number format", scheme.format_name)
        grid: Grid = number_format.grid(symmetric=scheme.symmetric, scale_rule=scheme.scale_rule)
        return grid

    def _rng(self, layer: str) -> np.random.Generator:
        """Return the generator of a layer: it depends on the seed and the name alone."""
        return np.random.default_rng([self.recipe.seed, zlib.crc32(layer.encode())])

    # Blocks come and go -----------------------------------------------------------------------

    def _enter(self, block: str) -> None:
        """Finish the block before, if it is another one, and load this one."""
        if block == self._block and self._inside(block):
            return
        self._leave()
        self._block = block
        self._block_started = time.perf_counter()
        if block:
            self.network.load(self.network.blocks[block], recurse=True)

    def _inside(self, block: str) -> bool:
        return any(self.network.block_of(name) == block for name in self._packed)

    def _leave(self) -> None:
        """Write the layers that are done, and free their block."""
        if not self._packed:
            return
        names = list(self._packed)
        for name, (packed, input_scale) in self._packed.items():
            self._write_layer(name, packed, input_scale)
        self._packed = {}
        self._inputs = {}
        if self._block:
            self.network.release(self.network.blocks[self._block])
        self._done_blocks += 1
        if self._progress is not None:
            self._progress(
                Progress(
                    self._block or "the network",
                    self._done_blocks,
                    len({self.network.block_of(n) for n in self.plan.schemes}),
                    [self.reports[name] for name in names],
                    time.perf_counter() - self._block_started,
                )
            )

    def _write_layer(
        self, name: str, packed: PackedWeight, input_scale: torch.Tensor | None
    ) -> None:
        prefix = f"{name}." if name else ""
        if self._writer is not None:
            tensors = {f"{prefix}{key}": value for key, value in packed.tensors().items()}
            if input_scale is not None:
                tensors[f"{prefix}input_scale"] = input_scale
            self._writer.add(tensors)
        if not self.network.is_tied(name):
            self._written.add(self.network.stored_name(f"{prefix}weight"))
        if self.network.folder is None:
            module = self.network.module
            old = module.get_submodule(name)
            bias = old._parameters.get("bias")
            new = QuantizedLinear(packed, None if bias is None else bias.data, input_scale)
            self.network.module = replace_module(module, name, new)

    def _write_rest(self) -> None:
        """Carry over every tensor that no quantized layer stands for."""
        if self._writer is None:
            return
        if self.network.folder is not None:
            for name in self.network.folder.tensors:
                if name not in self._written:
                    self._writer.add({name: self.network.folder.read(name)})
        else:
            quantized = tuple(f"{name}." if name else "" for name in self.plan.schemes)
            for name, tensor in self.network.module.state_dict().items():
                if not name.startswith(quantized) or name.rpartition(".")[2] == "bias":
                    self._writer.add({name: tensor.clone()})

    def _check_fallbacks(self) -> None:
        fallen = [event for event in self.events if event.kind == "fallback"]
        share = len(fallen) / len(self.plan.schemes)
        if share > self.recipe.max_fallback_frac:
            raise FallbackError(
                f"{len(fallen)} of {len(self.plan.schemes)} layers fell back to rounding to "
                f"nearest, more than max_fallback_frac={self.recipe.max_fallback_frac:g}; first: "
                f"{fallen[0].layer}: {fallen[0].message}"
            )

    def report(
        self, coverage: Coverage, calibration: CalibrationData | None, started: float
    ) -> RunReport:
        """Return the report of the whole run, layers in the network's order."""
        layers = [self.reports[name] for name in self.plan.schemes]
        return RunReport(
            layers=layers,
            events=self.events,
            coverage=coverage,
            calibration=None if calibration is None else dict(calibration.source),
            seconds={"total": time.perf_counter() - started},
        )


def check_quantized(quantized: QuantizedWeight, problem: RoundingProblem, plugin: str) -> None:
    """Raise when a rounder returned something that breaks the contract of QuantizedWeight."""
    rows, columns = problem.weight.shape
    grid = problem.grid
    shape = problem.scheme.scale_shape(rows, columns)
    wrong = None
    if quantized.codes.shape != (rows, columns):
        wrong = f"codes have shape {list(quantized.codes.shape)}, expected {[rows, columns]}"
    elif quantized.codes.is_floating_point():
        wrong = f"codes are {quantized.codes.dtype}, expected int16"
    elif quantized.scale.shape != shape or quantized.zero_point.shape != shape:
        wrong = f"scale has shape {list(quantized.scale.shape)}, expected {list(shape)}"
    elif quantized.group_index.shape != (columns,):
        wrong = f"group_index has shape {list(quantized.group_index.shape)}, expected [{columns}]"
    elif quantized.codes.numel() and (
        int(quantized.codes.min()) < grid.qmin or int(quantized.codes.max()) > grid.qmax
    ):
        wrong = f"codes leave [{grid.qmin}, {grid.qmax}]"
    elif not bool((torch.isfinite(quantized.scale) & (quantized.scale > 0)).all()):
        wrong = "a scale is not positive and finite"
    if wrong:
        raise NonFiniteError(f"layer {problem.name!r}: rounder {plugin!r} returned bad codes: {wrong}")


def replace_weight(problem: RoundingProblem, weight: torch.Tensor) -> RoundingProblem:
    """Return the same problem for another weight."""
    return dataclasses.replace(problem, weight=weight)


def _to_nearest(problem: RoundingProblem) -> QuantizedWeight:
    """Round to nearest: the baseline of every report, and what a layer falls back to."""
    scale, zero_point = rounding.fit_scales(
        problem.weight, problem.scheme, problem.grid, name=problem.name
    )
    index = rounding.group_index(problem.weight.shape[1], problem.scheme)
    codes = rounding.encode(problem.weight, scale, zero_point, index, problem.grid)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero_point, group_index=index)


def _clipped(weight: torch.Tensor, quantized: QuantizedWeight, grid: Grid) -> float:
    """Return the share of weights more than half a step outside the range of the codes."""
    rows = weight.shape[0]
    scale = rounding.expand(quantized.scale, quantized.group_index, rows)
    zero = rounding.expand(quantized.zero_point, quantized.group_index, rows)
    place = weight / scale + zero
    outside = (place > grid.qmax + 0.5) | (place < grid.qmin - 0.5)
    return float(outside.to(torch.float64).mean()) if outside.numel() else 0.0


def _tokens(x: torch.Tensor, group: InputGroup) -> torch.Tensor:
    """Return a layer's input as [tokens, columns] float32, checked to be finite."""
    flat = x.detach().reshape(-1, group.columns).to(torch.float32).contiguous()
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat


def _compute_dtype(name: str) -> torch.dtype:
    if name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _accepted(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments that the module's forward takes."""
    import inspect

    parameters = inspect.signature(module.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {k: v for k, v in kwargs.items() if anything or k in parameters}


def _load_on_demand(network: Network) -> list[Any]:
    """Load the parameters of modules outside all blocks when they are about to run."""
    if network.folder is None:
        return []
    inside = {child for block in network.blocks.values() for child in block.modules()}
    return [
        child.register_forward_pre_hook(lambda module, _: network.load(module, recurse=False))
        for child in network.module.modules()
        if child not in inside and any(True for _ in child.parameters(recurse=False))
    ]


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


def _coverage(network: Network, plan: Plan) -> Coverage:
    """Count what the plan quantizes."""
    sizes = {id(p): p.numel() for p in network.module.parameters()}
    quantized = sum(network.layers[name].size for name in plan.schemes)
    others = left_weights(network.module)
    experts = sum(
        network.module.get_parameter(name).numel()
        for name, why in others.items()
        if why.startswith("3-D")
    )
    matrices = sum(layer.size for layer in network.layers.values() if _counts(network, layer, plan))
    return Coverage(
        parameters=sum(sizes.values()),
        parameters_quantized=quantized,
        matrix_fraction=quantized / max(matrices + experts, 1),
        left={**plan.left, **others},
    )


def _counts(network: Network, layer: LayerInfo, plan: Plan) -> bool:
    """A layer whose weight is the embedding's is no matrix of its own unless it is quantized."""
    return layer.name in plan.schemes or not network.is_tied(layer.name)


def _finish(writer: CheckpointWriter, run: _Run, report: RunReport) -> dict[str, int]:
    """Write everything that is not a tensor, and give the folder its name."""
    network, plan = run.network, run.plan
    if network.folder is not None:
        config = quantized_config(network.folder.config, plan.schemes)
        if any(event.kind == "untied" for event in run.events):
            config["tie_word_embeddings"] = False
        writer.copy_side_files(network.folder, config)
    writer.write_text("qframe_report.json", report.to_json(timings=False))
    writer.write_text("quant_log.csv", report.to_csv(timings=False))
    layers = {}
    for layer in report.layers:
        scheme = plan.schemes[layer.name]
        grid = run._grid(scheme)
        layers[layer.name] = {
            "rows": layer.rows,
            "columns": layer.columns,
            "method": layer.method,
            "scheme": scheme.model_dump(),
            "grid": [grid.qmin, grid.qmax, grid.values],
        }
    used = [("rounder", run.method.rounder.name)]
    used += [("outlier handler", handler.name) for handler in run.method.handlers]
    used += [("observer", name) for name in sorted(run.method.needs)]
    used += [("number format", n) for n in sorted({s.format_name for s in plan.schemes.values()})]
    plugins = []
    for kind, name in used:
        record = run.host.origin(kind, name)
        plugins.append(
            {"kind": kind, "name": name, "plugin": record.name, "source": Path(record.source).name,
             "version": record.version}
        )
    return writer.finish(
        {
            "manifest_version": MANIFEST_VERSION,
            "qframe": qframe.__version__,
            "recipe": run.recipe.model_dump(mode="json"),
            "plugins": plugins,
            "calibration": report.calibration,
            "events": [dataclasses.asdict(event) for event in report.events],
            "layers": layers,
        }
    )
