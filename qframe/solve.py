"""Steps 2 to 5 for one input group: observe, rewrite, round, pack, certify, and measure.

An input group is the unit of the work: its layers read one input tensor, so they share their
statistics and their rewrite.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from qframe import parallel, rounding
from qframe.activations import InputQuantizer
from qframe.certificates import Certificate, Evidence, check_certificates, function_preserved
from qframe.contracts import (
    Event,
    Grid,
    InputGroup,
    Observer,
    QuantizedWeight,
    RewriteProblem,
    RoundingProblem,
    Statistic,
)
from qframe.errors import (
    HessianError,
    PluginError,
    UncalibratedLayerError,
)
from qframe.fallbacks import FALLBACK, OVERFIT, Fallbacks, claims_about, massive_token
from qframe.folds import Fold, FoldedNorm
from qframe.hessian import MISMATCH, SECOND_MOMENTS
from qframe.host import Host, option_names
from qframe.judging import Court
from qframe.manifest import ORDER, fingerprint
from qframe.packing import PackedWeight
from qframe.recipe import Method, Recipe
from qframe.report.layers import LayerReport
from qframe.report.measure import Drift, OutputErrors, clipped_share, input_errors, sqnr_db
from qframe.scheme import ActivationScheme, Scheme
from qframe.stored import StoredLayer, kept_weight
from qframe.transforms import InputTransform
from qframe.weights import check_finite

log = logging.getLogger("qframe")

_Known = dict[str, Statistic]  # observer name -> what it has seen


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """The inputs of one group, [tokens, columns] float32 each: fitted on, and held out.

    original   those of the same tokens in the network that is not quantized, where asked for
    """

    fitted: tuple[torch.Tensor, ...] = ()
    held_out: tuple[torch.Tensor, ...] = ()
    original: GroupInputs | None = None

    @classmethod
    def collect(
        cls,
        group: InputGroup,
        inputs: Mapping[int, torch.Tensor],
        fitted: int,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        originals: Mapping[int, torch.Tensor] | None = None,
    ) -> GroupInputs:
        """Flatten and check activations by input number; from `fitted` on they are held out.

        dtype       in which the layers' products take them: what a layer is fitted on is its input
                    as it really multiplies it
        originals   the same of the network that is not quantized

        Raises NonFiniteError naming the layer.
        """
        numbers = sorted(inputs)
        checked = parallel.spread(lambda i: _tokens(inputs[i], group, dtype), numbers, threads)
        flat = dict(zip(numbers, checked, strict=True))
        return cls(
            tuple(x for i, x in flat.items() if i < fitted),
            tuple(x for i, x in flat.items() if i >= fitted),
            None if originals is None else cls.collect(group, originals, fitted, dtype, threads),
        )

    def transformed(self, transform: InputTransform) -> GroupInputs:
        """Return what a rewritten layer sees."""
        return GroupInputs(
            tuple(transform.apply(x) for x in self.fitted),
            tuple(transform.apply(x) for x in self.held_out),
            None if self.original is None else self.original.transformed(transform),
        )

    def pairs(self) -> GroupInputs:
        """Return inputs and beside them the original ones, [tokens, 2 columns]; empty without."""
        if self.original is None:
            return GroupInputs()
        return GroupInputs(
            _beside(self.fitted, self.original.fitted),
            _beside(self.held_out, self.original.held_out),
        )


@dataclass(frozen=True, slots=True)
class Solved:
    """A layer after quantization: what is stored, what it computes with, what is reported.

    running      the same as `stored` for the input as it comes in the calibration pass, where no
                 norm divides by a scale
    multiplied   what the layer multiplies with, [rows, columns] float32
    effective    the same for plain inputs, were they not rounded
    """

    stored: StoredLayer
    running: StoredLayer
    multiplied: torch.Tensor
    effective: torch.Tensor
    report: LayerReport


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is needed to complete a layer's report."""

    evidence: Evidence
    original: torch.Tensor
    effective: torch.Tensor
    running: StoredLayer
    errors: OutputErrors
    report: LayerReport


@dataclass(slots=True)
class _Rewrites:
    """What outlier handlers put aside: weights in 16 bits, by layer; a norm; what they tell."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    info: dict[str, float | int | str] = field(default_factory=dict)
    norm: FoldedNorm | None = None


@dataclass(frozen=True, slots=True)
class SolvedGroup:
    """The layers of an input group by name, and what is kept of their statistics by name.

    norm   that divides by the scale of their input, None where none does
    """

    layers: Mapping[str, Solved]
    statistics: Mapping[str, torch.Tensor]
    norm: FoldedNorm | None = None

    @property
    def scaled(self) -> bool:
        """Whether handlers scaled the input."""
        transforms = [solved.running.transform for solved in self.layers.values()]
        return any(t is not None and t.scale is not None for t in transforms)


class Solver:
    """Quantizes input groups by the recipe, and keeps the events; use as a context manager."""

    def __init__(self, recipe: Recipe, method: Method, host: Host, threads: int) -> None:
        self._recipe, self._method, self._host, self.threads = recipe, method, host, threads
        self.folds = recipe.fold_scales and method.scales  # whether norms are worth looking for
        self._court = Court(threads)
        self.events: list[Event] = []
        self._falls = Fallbacks(recipe, self.events)

    @property
    def pairs(self) -> bool:
        """Whether the method asks for inputs in the original network, beside those it gets."""
        return any(self._host.is_pairs(name) for name in self._method.needs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._court.__exit__(*error)

    def solve(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        inputs: GroupInputs,
        fold: Fold | None = None,
    ) -> SolvedGroup:
        """Quantize the layers of a group; their reports are complete after `settle`.

        weights   layer name -> [rows, columns] float32
        inputs    empty for a data-free run
        fold      the norm that takes up a scale of the input; None for none
        """
        clock = time.perf_counter()
        plain, beside = inputs, inputs.pairs()
        seen = self._look(group, inputs, beside)
        errors = self._output_errors(group, beside, seen)
        rewritten, transform, rewrites = self._rewrite(
            group, weights, schemes, inputs, seen[0], fold
        )
        if transform is not None:
            inputs = inputs.transformed(transform)
            beside = inputs.pairs()
        needs = self._method.rounder.needs
        known = seen if transform is None else ({}, {})
        statistics = self._statistics(needs, group, inputs.fitted, beside.fitted, known[0])
        held_out: dict[str, Any] = {}
        if inputs.held_out:
            held_out = self._statistics(needs, group, inputs.held_out, beside.held_out, known[1])
        quantizers = self._input_quantizers(group, schemes, inputs)
        self.events.extend(massive_token(group.name, inputs.fitted))
        shared_seconds = (time.perf_counter() - clock) / len(group.layers)

        solved: dict[str, Solved] = {}
        shared: dict[Any, Any] = {}  # what certificates of the group have in common
        kept: dict[str, torch.Tensor] = {}
        if self._recipe.keep_statistics:
            kept = {
                f"{group.name}.{name}": value
                for name, value in statistics.items()
                if isinstance(value, torch.Tensor)
            }
        for layer in group.layers:
            scheme, original = schemes[layer.name], weights[layer.name]
            problem = RoundingProblem(
                name=layer.name,
                weight=rewritten[layer.name],
                scheme=scheme,
                grid=grid_of(self._host, scheme),
                input_grid=input_grid_of(self._host, scheme),
                statistics=statistics,
                tokens=_count(inputs.fitted),
                held_out=held_out,
            )
            clock = time.perf_counter()
            quantized, used = self._round(problem)
            kept_in_16_bits = rewrites.kept.get(layer.name)
            nearest = self._falls.overfit(
                problem, quantized, original, transform, kept_in_16_bits, errors
            )
            if nearest is not None:
                quantized, used = nearest, OVERFIT
            round_seconds = time.perf_counter() - clock

            clock = time.perf_counter()
            packed = PackedWeight.pack(quantized, scheme, problem.grid, name=layer.name)
            rounded = dataclasses.replace(
                packed.unpack(),
                order=quantized.order,
                info=quantized.info,
                events=quantized.events,
            )
            running = StoredLayer(
                packed,
                transform,
                kept_in_16_bits,
                quantizers[scheme.input_activations] if scheme.input_activations else None,
            )
            stored = running
            if transform is not None and rewrites.norm is not None:
                stored = dataclasses.replace(running, transform=transform.folded())
            multiplied = running.with_kept(rounding.dequantize(rounded))
            effective = running.plain(multiplied)
            check_finite(effective, f"layer {layer.name!r}: the quantized weight")
            report = LayerReport(
                name=layer.name,
                method=used,
                scheme=scheme.describe(),
                rows=layer.rows,
                columns=layer.columns,
                bits_per_weight=stored.bits / max(layer.size, 1),
                tokens=problem.tokens,
                tokens_held_out=_count(inputs.held_out),
                info=dict(quantized.info),
                inputs={
                    **rewrites.info,
                    **input_errors(running, original, multiplied, plain.fitted),
                },
                input_group=group.name,
                folded=None if rewrites.norm is None else rewrites.norm.name,
                seconds={
                    "calibrate": shared_seconds,
                    "round": round_seconds,
                    "pack": time.perf_counter() - clock,
                },
            )
            evidence = Evidence(problem, rounded, shared)
            judged = _Judged(evidence, original, effective, running, errors, report)
            self._court.hear(partial(self._judge, judged))
            if kept and quantized.order is not None:
                kept[f"{layer.name}.{ORDER}"] = quantized.order.to(torch.int32)
            self.events.extend(quantized.events)
            solved[layer.name] = Solved(stored, running, multiplied, effective, report)
        return SolvedGroup(solved, kept, rewrites.norm)

    def settle(self, still_waiting: int = 0) -> None:
        """Wait until the reports of all layers but the last few are complete.

        Raises CertificateError when a layer breaks a bound that its method claims to keep.
        """
        events = self._court.settle(still_waiting)
        for event in events:
            log.warning("%s: %s", event.layer, event.message)
        self.events.extend(events)

    def _judge(self, judged: _Judged) -> list[Event]:
        """Complete the report of a layer: what it lost, and whether it keeps its claims."""
        clock = time.perf_counter()
        report, problem = judged.report, judged.evidence.problem
        original, effective = judged.original, judged.effective
        report.source = fingerprint(original)
        if judged.running.transform is not None:
            report.rewritten = fingerprint(problem.weight)
        if judged.running.transform is None:
            change = torch.from_numpy(judged.evidence.change())
        else:
            change = effective - original
        report.sqnr_db = sqnr_db(original, change)
        low, high = (torch.from_numpy(ends).float() for ends in judged.evidence.ranges())
        report.clipped = clipped_share(
            problem.weight, judged.evidence.quantized, problem.grid, (low, high)
        )
        if judged.errors.moments:
            nearest = rounding.to_nearest(dataclasses.replace(problem, weight=original))
            found = judged.errors.relative(original, (effective, rounding.dequantize(nearest)))
            report.error, report.rtn_error = found[0]
            if len(found) > 1:
                report.held_out_error, report.rtn_held_out_error = found[1]
        report.seconds["measure"] = time.perf_counter() - clock

        clock = time.perf_counter()
        report.certificates, events = self._certify(
            judged.evidence, report.method, original, judged.running
        )
        report.seconds["certify"] = time.perf_counter() - clock
        return events

    def _certify(
        self,
        evidence: Evidence,
        method: str,
        original: torch.Tensor,
        running: StoredLayer,
    ) -> tuple[tuple[Certificate, ...], list[Event]]:
        """Hold a layer, as it is stored, against what its method claims."""
        problem = evidence.problem
        certificates: tuple[Certificate, ...] = ()
        if running.transform is not None:
            certificates = (
                function_preserved(
                    original,
                    problem.weight,
                    running.transform,
                    running.kept,
                    handlers=len(self._method.handlers),
                ),
            )
        certificates += evidence.certificates(claims_about(self._method.rounder, method))
        violated = [certificate for certificate in certificates if not certificate.holds]
        if self._recipe.on_violated_certificate == "error":
            check_certificates(problem.name, violated)
        return certificates, [
            Event(kind="certificate violated", layer=problem.name, message=str(certificate))
            for certificate in violated
        ]

    def _look(
        self, group: InputGroup, inputs: GroupInputs, beside: GroupInputs
    ) -> tuple[_Known, _Known]:
        """Observe what output errors are measured with, in the fitted and in the held-out inputs.

        beside   `inputs.pairs()`

        That is nothing where there are no such inputs, or no such observer.
        """
        found: tuple[_Known, _Known] = ({}, {})
        names = self._host.names("observer")
        both = (inputs.fitted, beside.fitted), (inputs.held_out, beside.held_out)
        for known, (chunks, pairs) in zip(found, both, strict=True):
            if chunks and SECOND_MOMENTS in names:
                known[SECOND_MOMENTS] = self._observe(SECOND_MOMENTS, group, chunks)
                if pairs and MISMATCH in names:
                    known[MISMATCH] = self._observe(MISMATCH, group, pairs)
        return found

    def _output_errors(
        self, group: InputGroup, beside: GroupInputs, seen: tuple[_Known, _Known]
    ) -> OutputErrors:
        """Return what measures output errors: on the fitted inputs, and on those held out."""
        moments, drifts = [], []
        for known, chunks in zip(seen, (beside.fitted, beside.held_out), strict=True):
            if SECOND_MOMENTS in known:
                moments.append(known[SECOND_MOMENTS].value().to(torch.float32))
            if MISMATCH in known:
                gaps = tuple(y - x for x, y in (pair.split(group.columns, 1) for pair in chunks))
                moved = self._observe(SECOND_MOMENTS, group, gaps).value()
                cross = known[MISMATCH].value()
                drifts.append(Drift(cross.to(torch.float32), moved.to(torch.float32)))
        return OutputErrors(moments, drifts)

    def _statistics(
        self,
        needs: Iterable[str],
        group: InputGroup,
        chunks: tuple[torch.Tensor, ...],
        pairs: tuple[torch.Tensor, ...],
        known: _Known,
    ) -> dict[str, Any]:
        """Return the values of the statistics that are needed, each observed once.

        pairs   the same chunks, with the original network's inputs beside
        known   those of these chunks that have been observed already
        """
        found = {}
        for name in sorted(needs):
            if name not in known:
                seen = pairs if self._host.is_pairs(name) else chunks
                found[name] = self._observe(name, group, seen).value()
            else:
                found[name] = known[name].value()
        return found

    def _observe(self, name: str, group: InputGroup, chunks: tuple[torch.Tensor, ...]) -> Statistic:
        return _observe(self._host.get("observer", name), group, chunks)

    def _rewrite(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        inputs: GroupInputs,
        known: _Known,
        fold: Fold | None,
    ) -> tuple[Mapping[str, torch.Tensor], InputTransform | None, _Rewrites]:
        """Let the outlier handlers rewrite the group, one after another.

        known   statistics of the fitted inputs that have been observed already
        fold    as for `solve`

        A handler that needs statistics is not asked where no token reached the group. Where a norm
        is to divide by the scale, the scale becomes one that its dtype can take up, before the
        next handler sees what is left.
        """
        originals = weights
        total: InputTransform | None = None
        aside = _Rewrites()
        for handler in self._method.handlers:
            if handler.needs and not _count(inputs.fitted):
                for name in weights:
                    self._falls.record(
                        UncalibratedLayerError(
                            f"layer {name!r}: no calibration token reached it, and {handler.name} "
                            f"needs {', '.join(sorted(handler.needs))}"
                        ),
                        name,
                        "not rewritten",
                    )
                continue
            seen = inputs if total is None else inputs.transformed(total)
            statistics = self._statistics(
                handler.needs,
                group,
                seen.fitted,
                seen.pairs().fitted,
                known if total is None else {},
            )
            problem = RewriteProblem(
                layers={
                    name: RoundingProblem(
                        name=name,
                        weight=weight,
                        scheme=schemes[name],
                        grid=grid_of(self._host, schemes[name]),
                        input_grid=input_grid_of(self._host, schemes[name]),
                        statistics=statistics,
                        tokens=_count(seen.fitted),
                    )
                    for name, weight in weights.items()
                }
            )
            rewrite = handler.rewrite(problem, self._rng(group.name))
            check_finite(rewrite.input_scale, f"{handler.name}: input_scale of {group.name!r}")
            before = None if total is None else total.scale
            total = (total or InputTransform()).then(rewrite, handler.name)
            rewritten = rewrite.weights
            if fold is not None and total.scale is not None and total.scale is not before:
                aside.norm = fold.folded(total.scale)
                total = dataclasses.replace(total, scale=aside.norm.scale)
                weights = {name: total.whole(weight) for name, weight in originals.items()}
                rewritten = {name: total.rest(weight) for name, weight in weights.items()}
            if rewrite.kept is not None:
                kept = {n: kept_weight(w, rewrite.kept, n) for n, w in weights.items()}
                aside.kept.update(kept)
            aside.info.update(rewrite.info)
            weights = rewritten
        return weights, total, aside

    def _input_quantizers(
        self, group: InputGroup, schemes: Mapping[str, Scheme], inputs: GroupInputs
    ) -> dict[ActivationScheme, InputQuantizer]:
        """Return a quantizer for each way in which layers of the group quantize their inputs.

        Raises UncalibratedLayerError where a stored scale has no inputs to come from.
        """
        found: dict[ActivationScheme, InputQuantizer] = {}
        for layer in group.layers:
            scheme = schemes[layer.name].input_activations
            grid = input_grid_of(self._host, schemes[layer.name])
            if scheme is None or grid is None or scheme in found:
                continue
            reach: torch.Tensor | None = None
            if scheme.static_observer is not None:
                if not _count(inputs.fitted):
                    raise UncalibratedLayerError(
                        f"layer {layer.name!r}: no calibration token reached it, and its "
                        f"activations have a scale that is stored (dynamic: false); quantize them "
                        f"with dynamic: true, or ignore the layer"
                    )
                observer = reach_observer(self._host, scheme, grid)
                reach = _observe(observer, group, inputs.fitted).value()
                check_finite(reach, f"observer {observer.name!r}: the inputs of {group.name!r}")
            found[scheme] = InputQuantizer.calibrated(scheme, grid, reach)
        return found

    def _round(self, problem: RoundingProblem) -> tuple[QuantizedWeight, str]:
        """Round one layer; where that is impossible, round to nearest and record the fallback."""
        rounder = self._method.rounder
        before = problem.weight._version
        try:
            quantized = rounder.round(problem, self._rng(problem.name))
        except (UncalibratedLayerError, HessianError) as error:
            self._falls.record(error, problem.name, "rounded to nearest instead")
            return rounding.to_nearest(problem), FALLBACK
        if not isinstance(quantized, QuantizedWeight):
            raise PluginError(
                f"rounder {rounder.name!r} returned {type(quantized).__name__} for layer "
                f"{problem.name!r}, expected QuantizedWeight"
            )
        if problem.weight._version != before:
            raise PluginError(
                f"rounder {rounder.name!r} changed problem.weight of layer {problem.name!r} in "
                f"place; work on a copy"
            )
        return quantized, self._recipe.method

    def _rng(self, layer: str) -> np.random.Generator:
        """Return the generator of a layer: it depends on the seed and the name alone."""
        return np.random.default_rng([self._recipe.seed, zlib.crc32(layer.encode())])


def grid_of(host: Host, scheme: Scheme) -> Grid:
    """Return the codes that a scheme's number format has."""
    number_format = host.get("number format", scheme.format_name)
    grid: Grid = number_format.grid(symmetric=scheme.symmetric, scale_rule=scheme.scale_rule)
    return grid


def input_grid_of(host: Host, scheme: Scheme) -> Grid | None:
    """Return the codes of activations: their format's symmetric grid; None where there are none."""
    if scheme.input_activations is None:
        return None
    number_format = host.get("number format", scheme.input_activations.format_name)
    grid: Grid = number_format.grid(symmetric=True, scale_rule="restricted")
    return grid


def reach_observer(host: Host, scheme: ActivationScheme, grid: Grid) -> Observer:
    """Return the observer that a stored scale comes from; one with a field `grid` gets the codes.

    grid   of the scheme
    """
    observer: Any = host.get("observer", str(scheme.static_observer))
    if "grid" in option_names(observer):
        observer = dataclasses.replace(observer, grid=grid)
    found: Observer = observer
    return found


def _observe(observer: Observer, group: InputGroup, chunks: tuple[torch.Tensor, ...]) -> Statistic:
    statistic = observer.start(group)
    for x in chunks:
        statistic.update(x)
    return statistic


def _tokens(x: torch.Tensor, group: InputGroup, dtype: torch.dtype) -> torch.Tensor:
    """Return activations as [tokens, columns] float32, rounded to the dtype of the products."""
    flat = x.detach().reshape(-1, group.columns)
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat.to(dtype).to(torch.float32).contiguous()


def _beside(
    here: tuple[torch.Tensor, ...], there: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(both, 1) for both in zip(here, there, strict=True))


def _count(chunks: tuple[torch.Tensor, ...]) -> int:
    return sum(len(x) for x in chunks)
