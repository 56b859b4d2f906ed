"""Steps 2 to 5 for one input group: observe, rewrite, round, pack, certify, and measure.

An input group is the unit of the work: its layers read one input tensor, so they share their
statistics and their rewrite.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from qframe import panels, rounding
from qframe.certificates import Evidence
from qframe.contracts import (
    Event,
    InputGroup,
    LayerInfo,
    QuantizedWeight,
    RewriteProblem,
    RoundingProblem,
)
from qframe.errors import (
    HessianError,
    PluginError,
    UncalibratedLayerError,
)
from qframe.fallbacks import FALLBACK, OVERFIT, Fallbacks, energies, massive_token
from qframe.fingerprints import Origin
from qframe.folds import Divider, Folded
from qframe.freed import hand_back
from qframe.grids import grid_of, input_grid_of
from qframe.host import Host
from qframe.inputs import GroupInputs
from qframe.judging import Court
from qframe.learning import Learner
from qframe.manifest import ORDER
from qframe.observing import Known, Watch
from qframe.out_of_memory import Where, memory_named
from qframe.packing import PackedWeight
from qframe.ranks import ALONE, Ranks
from qframe.recipe import Method, Recipe
from qframe.report.layers import LayerReport
from qframe.report.measure import TOKENS, input_errors
from qframe.scheme import Scheme
from qframe.stored import StoredLayer, kept_weight
from qframe.transforms import InputTransform
from qframe.verdicts import Found, Judged, tell, verdict, violations
from qframe.weights import check_finite

log = logging.getLogger("qframe")


@dataclass(frozen=True, slots=True)
class Solved:
    """A layer after quantization: what is stored, and what is reported.

    running   the same as `stored` for the input as it comes in the calibration pass, where no
              module before it divides by a scale
    """

    stored: StoredLayer
    running: StoredLayer
    report: LayerReport


@dataclass(slots=True)
class _Rewrites:
    """What handlers put aside: weights in 16 bits, by layer; what divides; what they tell."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    info: dict[str, float | int | str] = field(default_factory=dict)
    folded: Folded | None = None


@dataclass(frozen=True, slots=True)
class SolvedGroup:
    """Those layers of an input group, by name, that this rank has solved.

    statistics   what is kept of those of the group, by name
    orders       layer -> in which order its columns were rounded, where that is kept
    events       layer -> what there is to tell of its rounding
    scaled       whether handlers scaled the input
    folded       what divides by that scale, None where nothing does
    """

    layers: Mapping[str, Solved]
    statistics: Mapping[str, torch.Tensor]
    orders: Mapping[str, torch.Tensor]
    events: Mapping[str, Sequence[Event]]
    scaled: bool
    folded: Folded | None = None


class Solver:
    """Quantizes input groups by the recipe, and keeps the events; use as a context manager.

    ranks   those that share inputs and layers; all solve the same groups, in the same order
    """

    def __init__(
        self, recipe: Recipe, method: Method, host: Host, threads: int, ranks: Ranks = ALONE
    ) -> None:
        self._recipe, self._method, self._host, self.threads = recipe, method, host, threads
        self.ranks = ranks
        self.folds = recipe.fold_scales and method.scales  # whether it is worth looking into what
        self._watch, self._court = Watch(host, ranks), Court(threads)
        self._due: deque[tuple[LayerReport, int | None]] = deque()  # as `wait_for` has them
        self.where = Where()
        self.events: list[Event] = []
        self._falls = Fallbacks(recipe, self.events)
        self.learner = (
            Learner(recipe, method, host, threads, self._falls) if method.learns else None
        )

    @property
    def pairs(self) -> bool:
        """Whether the method asks for inputs in the original network, beside those it gets."""
        needs = self._method.needs
        return self._method.learns or any(self._host.wants_pairs(name) for name in needs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._court.__exit__(*error)

    def make_room(self, inputs: GroupInputs) -> None:
        """Let go what verdicts hold, before the weights of a group come.

        Without inputs rounding goes on while the verdict on the last layer is worked out.
        """
        if inputs.fitted.lengths:
            self._court.catch_up(0)
            hand_back()
        else:
            self._court.catch_up(1)

    def solve(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        origins: Mapping[str, Callable[[], Origin]],
        schemes: Mapping[str, Scheme],
        inputs: GroupInputs,
        divider: Divider | None = None,
        others: Container[str] = (),
    ) -> SolvedGroup:
        """Quantize the layers of a group; `wait_for` their reports, which `settle` completes.

        weights   layer name -> [rows, columns] float32
        origins   layer name -> what tells how that was stored
        inputs    empty for a data-free run
        divider   what takes up a scale of the input; None for nothing
        others    layers that are other ranks'
        """
        clock = time.perf_counter()
        self.where.at(group.name, "taking statistics of its inputs")
        beside = inputs.pairs()
        example = self._example(group, schemes, inputs)
        seen = self._watch.look(group, inputs, beside)
        errors = self._watch.output_errors(group, beside, seen)
        rewritten, transform, rewrites = self._rewrite(
            group, weights, schemes, inputs, seen[0], divider
        )
        self.where.at(group.name, "taking statistics of its inputs")
        if transform is not None:
            inputs = inputs.transformed(transform)
            beside = inputs.pairs()
        needs = self._method.rounder.needs
        known = seen if transform is None else ({}, {})
        statistics = self._watch.statistics(needs, group, inputs.fitted, beside.fitted, known[0])
        held_out: dict[str, Any] = {}
        if inputs.held_out.lengths:
            held_out = self._watch.statistics(
                needs, group, inputs.held_out, beside.held_out, known[1]
            )
        del seen, known  # their sums are as large as the statistics
        quantizers = self._watch.quantizers(group, schemes, inputs)
        energy = inputs.fitted.everywhere(
            self.ranks, f"the energy of {group.name}", energies(inputs.fitted)
        )
        self.events.extend(massive_token(group.name, energy))
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
        orders: dict[str, torch.Tensor] = {}
        events: dict[str, list[Event]] = {}
        for layer in group.layers:
            if layer.name in others:
                continue
            shared_events = len(self.events)
            scheme, original = schemes[layer.name], weights[layer.name]
            problem = RoundingProblem(
                name=layer.name,
                weight=rewritten[layer.name],
                scheme=scheme,
                grid=grid_of(self._host, scheme),
                input_grid=input_grid_of(self._host, scheme),
                statistics=statistics,
                tokens=inputs.fitted.tokens,
                held_out=held_out,
            )
            clock = time.perf_counter()
            self.where.at(layer.name, "rounding it")
            kept_in_16_bits = rewrites.kept.get(layer.name)
            learned = None if self.learner is None else self.learner.take(layer.name)
            if learned is None:
                quantized, used = self._round(problem)
                nearest = self._falls.overfit(
                    problem, quantized, original, transform, kept_in_16_bits, errors
                )
                if nearest is not None:
                    quantized, used = nearest, OVERFIT
                round_seconds = time.perf_counter() - clock
            else:
                quantized, used, round_seconds = learned

            clock = time.perf_counter()
            self.where.at(layer.name, "packing it")
            packed = PackedWeight.pack(quantized, scheme, problem.grid, name=layer.name)
            order, info, told_of = quantized.order, quantized.info, quantized.events
            del quantized, learned  # those that are read again may have the place of its codes
            rounded = dataclasses.replace(packed.unpack(), order=order, info=info, events=told_of)
            running = StoredLayer(
                packed,
                transform,
                kept_in_16_bits,
                quantizers[scheme.input_activations] if scheme.input_activations else None,
            )
            stored = running
            if transform is not None and rewrites.folded is not None:
                stored = dataclasses.replace(running, transform=transform.folded())
            made, told = None, dict(rewrites.info)
            if transform is not None or errors.moments or running.inputs is not None:
                multiplied = running.with_kept(rounding.dequantize(rounded))
                made = running.plain(multiplied)
                check_finite(made, f"layer {layer.name!r}: the quantized weight")
                told |= input_errors(running, original, multiplied, example)
            report = LayerReport(
                name=layer.name,
                method=used,
                scheme=scheme.describe(),
                rows=layer.rows,
                columns=layer.columns,
                bits_per_weight=stored.bits / max(layer.size, 1),
                tokens=problem.tokens,
                tokens_held_out=inputs.held_out.tokens,
                info=dict(rounded.info),
                inputs=told,
                input_group=group.name,
                folded=None if rewrites.folded is None else rewrites.folded.name,
                seconds={
                    "calibrate": shared_seconds,
                    "round": round_seconds,
                    "pack": time.perf_counter() - clock,
                },
            )
            evidence = Evidence(problem, rounded, shared)
            judged = Judged(evidence, original, origins[layer.name], made, running, errors, report)
            self._court.hear(partial(self._judge, judged))
            if kept and rounded.order is not None:
                orders[f"{layer.name}.{ORDER}"] = rounded.order.to(torch.int32)
            events[layer.name] = [*self.events[shared_events:], *rounded.events]
            del self.events[shared_events:]
            solved[layer.name] = Solved(stored, running, report)
        scaled = transform is not None and transform.scale is not None
        return SolvedGroup(solved, kept, orders, events, scaled, rewrites.folded)

    def apart(self, scheme: Scheme) -> bool:
        """Whether a layer without statistics may be quantized panel by panel."""
        return panels.apart(self._method, scheme)

    def solve_by_rows(
        self,
        layers: Sequence[LayerInfo],
        rows: Mapping[str, Callable[[slice], torch.Tensor]],
        origins: Mapping[str, Callable[[], Origin]],
        schemes: Mapping[str, Scheme],
    ) -> dict[str, Solved]:
        """Quantize layers panel by panel; `wait_for` their reports, which `settle` completes.

        rows      layer name -> what returns some rows of it, [rows, columns] float32
        origins   as for `solve`

        Those that have to be quantized whole are not in what is returned.
        """
        sheets = [
            panels.Sheet(
                name=layer.name,
                rows=layer.rows,
                columns=layer.columns,
                scheme=schemes[layer.name],
                grid=grid_of(self._host, schemes[layer.name]),
                read=rows[layer.name],
            )
            for layer in layers
        ]
        self.where.at(layers[0].name, "rounding it")
        made = panels.quantize(sheets, self._method, self._rounded, self.threads)
        solved = {}
        for layer, done in zip(layers, made, strict=True):
            if done is None:
                continue
            stored = StoredLayer(done.packed)
            report = LayerReport(
                name=layer.name,
                method=self._recipe.method,
                scheme=schemes[layer.name].describe(),
                rows=layer.rows,
                columns=layer.columns,
                bits_per_weight=stored.bits / max(layer.size, 1),
                input_group=layer.name,
                certificates=done.found.certificates,
                seconds=done.seconds,
            )
            self._court.hear(partial(self._complete, report, done.found, origins[layer.name]))
            solved[layer.name] = Solved(stored, stored, report)
        return solved

    def _complete(
        self, report: LayerReport, found: Found, origin: Callable[[], Origin]
    ) -> list[Event]:
        """Complete the report of a layer that was quantized panel by panel."""
        tell(report, origin(), found.signal, found.noise, found.clipped)
        return violations(report, self._recipe)

    def _example(
        self, group: InputGroup, schemes: Mapping[str, Scheme], inputs: GroupInputs
    ) -> torch.Tensor | None:
        """Return some of the inputs, where layers quantize theirs; None where there are none."""
        quantize = any(schemes[layer.name].input_activations for layer in group.layers)
        if not quantize or not inputs.fitted.tokens:
            return None
        return inputs.fitted.sample(TOKENS, self.ranks, f"inputs of {group.name}")

    def wait_for(self, report: LayerReport, owner: int) -> None:
        """Say which rank completes the report of a layer of the group that was solved last."""
        self._due.append((report, owner))
        if owner != self.ranks.rank:
            self._court.hear(list)

    def take_over(
        self, reports: Sequence[LayerReport], events: Sequence[Event], judged: Sequence[Event]
    ) -> None:
        """Take over the events of a group that an earlier run has solved.

        reports   of its layers, complete
        judged    events of verdicts, which are told when it is the turn of those on its layers
        """
        self.events.extend(events)
        for number, report in enumerate(reports):
            self._due.append((report, None))
            self._court.hear(partial(list, () if number else judged))

    def judged(self, count: int) -> list[Event] | None:
        """Return the events of verdicts on the first layers whose reports are not settled.

        None unless these reports are complete, and this rank knows it.
        """
        return self._court.known(count) if self.ranks.size == 1 else None

    def settle(self, still_waiting: int = 0) -> list[Event]:
        """Wait until the reports of all layers but the last few are complete; return new events.

        Raises CertificateError when a layer breaks a bound that its method claims to keep.
        """
        events = self._court.settle(still_waiting)
        due = [self._due.popleft() for _ in range(len(self._due) - still_waiting)]
        if self.ranks.size > 1 and due:
            events = self._exchanged(due, events)
        for event in events:
            log.warning("%s: %s", event.layer, event.message)
        self.events.extend(events)
        return events

    def _exchanged(
        self, due: Sequence[tuple[LayerReport, int | None]], events: Sequence[Event]
    ) -> list[Event]:
        """Complete the reports of other ranks' layers; return the events of all, in their order."""
        told: dict[str, list[Event]] = {}
        for event in events:
            told.setdefault(event.layer, []).append(event)
        own = {
            report.name: {
                "report": dataclasses.asdict(report),
                "events": [dataclasses.asdict(each) for each in told.get(report.name, ())],
            }
            for report, owner in due
            if owner == self.ranks.rank
        }
        every = self.ranks.exchange(f"verdicts up to {due[-1][0].name}", {}, own)
        for report, owner in due:
            if owner is not None and owner != self.ranks.rank:
                found = every[owner][1][report.name]
                report.become(LayerReport.of(found["report"]))
                told[report.name] = [Event(**each) for each in found["events"]]
        return [event for report, _ in due for event in told.get(report.name, ())]

    def _judge(self, judged: Judged) -> list[Event]:
        """Complete the report of a layer, beside whatever the run is at."""
        where = Where(judged.report.name, "measuring what it lost", self.where.calibrated)
        with memory_named(where):
            return verdict(judged, self._recipe, self._method)

    def _rewrite(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        inputs: GroupInputs,
        known: Known,
        divider: Divider | None,
    ) -> tuple[Mapping[str, torch.Tensor], InputTransform | None, _Rewrites]:
        """Let the outlier handlers rewrite the group, one after another.

        known     statistics of the fitted inputs that have been observed already
        divider   as for `solve`

        A handler that needs statistics is not asked where no token reached the group. Where a
        module is to divide by the scale, the scale becomes one that it can take up, before the next
        handler sees what is left.
        """
        originals = weights
        total: InputTransform | None = None
        aside = _Rewrites()
        for handler in self._method.handlers:
            if handler.needs and not inputs.fitted.tokens:
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
            self.where.at(group.name, "rewriting its weights and inputs")
            seen = inputs if total is None else inputs.transformed(total)
            statistics = self._watch.statistics(
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
                        tokens=seen.fitted.tokens,
                    )
                    for name, weight in weights.items()
                },
                foldable=partial(_foldable, divider, None if total is None else total.scale),
            )
            rewrite = handler.rewrite(problem, self._rng(group.name))
            check_finite(rewrite.input_scale, f"{handler.name}: input_scale of {group.name!r}")
            before = None if total is None else total.scale
            total = (total or InputTransform()).then(rewrite, handler.name)
            rewritten = rewrite.weights
            if divider is not None and total.scale is not None and total.scale is not before:
                aside.folded = divider.folded(total.scale)
                total = dataclasses.replace(total, scale=aside.folded.scale)
                weights = {name: total.whole(weight) for name, weight in originals.items()}
                rewritten = {name: total.rest(weight) for name, weight in weights.items()}
            if rewrite.kept is not None:
                kept = {n: kept_weight(w, rewrite.kept, n) for n, w in weights.items()}
                aside.kept.update(kept)
            aside.info.update(rewrite.info)
            weights = rewritten
        return weights, total, aside

    def _round(self, problem: RoundingProblem) -> tuple[QuantizedWeight, str]:
        """Round one layer; where that is impossible, round to nearest and record the fallback."""
        try:
            return self._rounded(problem), self._recipe.method
        except (UncalibratedLayerError, HessianError) as error:
            self._falls.record(error, problem.name, "rounded to nearest instead")
            return rounding.to_nearest(problem), FALLBACK

    def _rounded(self, problem: RoundingProblem, first: int = 0) -> QuantizedWeight:
        """Return what the rounder makes of a layer, or of its rows from the first on."""
        rounder = self._method.rounder
        before = problem.weight._version
        quantized = rounder.round(problem, self._rng(problem.name, first))
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
        return quantized

    def _rng(self, layer: str, first: int = 0) -> np.random.Generator:
        """Return the generator of a layer: it depends on the seed and the name alone.

        first   row of those that are rounded
        """
        part = [first] if first else []
        return np.random.default_rng([self._recipe.seed, zlib.crc32(layer.encode()), *part])


def _foldable(
    divider: Divider | None, before: torch.Tensor | None, scale: torch.Tensor
) -> torch.Tensor:
    """Return what becomes of a scale [columns] that comes after another one; None for 1."""
    if divider is None:
        return scale
    if before is None:
        return divider.folded(scale).scale
    return divider.folded(before * scale).scale / before
