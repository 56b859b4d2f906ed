"""Steps 2 to 5 for one input group: observe, rewrite, round, pack, and measure.

An input group is the unit of the work: its layers read one input tensor, so they share their
statistics and their rewrite.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qframe import rounding
from qframe.contracts import (
    Event,
    Grid,
    InputGroup,
    QuantizedWeight,
    RoundingProblem,
    Statistic,
)
from qframe.errors import HessianError, PluginError, UncalibratedLayerError
from qframe.host import Host
from qframe.packing import PackedWeight
from qframe.recipe import Method, Recipe
from qframe.report.layers import LayerReport
from qframe.report.measure import OutputErrors, clipped_share, sqnr_db
from qframe.scheme import Scheme
from qframe.weights import check_finite

log = logging.getLogger("qframe")

SECOND_MOMENTS = "hessian"  # the observer that output errors are measured with


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """The inputs of one group, [tokens, columns] float32 each: fitted on, and held out."""

    fitted: tuple[torch.Tensor, ...] = ()
    held_out: tuple[torch.Tensor, ...] = ()

    @classmethod
    def collect(
        cls, group: InputGroup, inputs: Mapping[int, torch.Tensor], fitted: int
    ) -> GroupInputs:
        """Flatten and check activations by input number; from `fitted` on they are held out.

        Raises NonFiniteError naming the layer.
        """
        flat = {i: _tokens(x, group) for i, x in sorted(inputs.items())}
        return cls(
            tuple(x for i, x in flat.items() if i < fitted),
            tuple(x for i, x in flat.items() if i >= fitted),
        )

    def scaled(self, input_scale: torch.Tensor) -> GroupInputs:
        """Return what a rewritten layer sees: x / input_scale."""
        return GroupInputs(
            tuple(x / input_scale for x in self.fitted),
            tuple(x / input_scale for x in self.held_out),
        )


@dataclass(frozen=True, slots=True)
class Solved:
    """A layer after quantization: what is stored, what it computes with, what is reported."""

    packed: PackedWeight
    input_scale: torch.Tensor | None
    effective: torch.Tensor  # Q(W') / input_scale, [rows, columns]: its effect on plain inputs
    report: LayerReport


class Solver:
    """Quantizes input groups by the recipe, and keeps the events."""

    def __init__(self, recipe: Recipe, method: Method, host: Host, threads: int) -> None:
        self._recipe, self._method, self._host, self._threads = recipe, method, host, threads
        self.events: list[Event] = []

    def solve(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        inputs: GroupInputs,
    ) -> dict[str, Solved]:
        """Quantize the layers of a group.

        weights   layer name -> [rows, columns] float32
        inputs    empty for a data-free run
        """
        clock = time.perf_counter()
        moments = self._second_moments(group, inputs)
        rewritten, input_scale = self._rewrite(group, weights, schemes, inputs)
        if input_scale is not None:
            inputs = inputs.scaled(input_scale)
        statistics = self._statistics(self._method.rounder.needs, group, inputs, moments)
        errors = OutputErrors([m.value().to(torch.float32) for m in moments], threads=self._threads)
        shared_seconds = (time.perf_counter() - clock) / len(group.layers)

        solved = {}
        for layer in group.layers:
            scheme = schemes[layer.name]
            problem = RoundingProblem(
                name=layer.name,
                weight=rewritten[layer.name],
                scheme=scheme,
                grid=grid_of(self._host, scheme),
                statistics=statistics,
                tokens=_count(inputs.fitted),
            )
            clock = time.perf_counter()
            quantized, used = self._round(problem)
            round_seconds = time.perf_counter() - clock
            clock = time.perf_counter()
            packed = PackedWeight.pack(quantized, scheme, problem.grid, name=layer.name)
            effective = rounding.dequantize(quantized)
            if input_scale is not None:
                effective = effective / input_scale
            check_finite(effective, f"layer {layer.name!r}: the quantized weight")
            original = weights[layer.name]
            report = LayerReport(
                name=layer.name,
                method=used,
                scheme=scheme.describe(),
                rows=layer.rows,
                columns=layer.columns,
                bits_per_weight=packed.bits / max(layer.size, 1),
                sqnr_db=sqnr_db(original, effective),
                clipped=clipped_share(problem.weight, quantized, problem.grid),
                tokens=problem.tokens,
                tokens_held_out=_count(inputs.held_out),
                info=dict(quantized.info),
            )
            if moments:
                nearest = to_nearest(dataclasses.replace(problem, weight=original))
                found = errors.relative(original, (effective, rounding.dequantize(nearest)))
                report.error, report.rtn_error = found[0]
                if len(found) > 1:
                    report.held_out_error, report.rtn_held_out_error = found[1]
            report.seconds = {
                "calibrate": shared_seconds,
                "round": round_seconds,
                "pack_and_measure": time.perf_counter() - clock,
            }
            self.events.extend(quantized.events)
            solved[layer.name] = Solved(packed, input_scale, effective, report)
        return solved

    def _second_moments(self, group: InputGroup, inputs: GroupInputs) -> list[Statistic]:
        """Return second moments of the fitted, and of the held-out inputs, where there are any."""
        if SECOND_MOMENTS not in self._host.names("observer"):
            return []
        return [
            self._observe(SECOND_MOMENTS, group, chunks)
            for chunks in (inputs.fitted, inputs.held_out)
            if chunks
        ]

    def _statistics(
        self,
        needs: Iterable[str],
        group: InputGroup,
        inputs: GroupInputs,
        moments: list[Statistic],
    ) -> dict[str, Any]:
        """Return the values of the statistics that are needed, each observed once."""
        rewritten = bool(self._method.handlers)
        return {
            name: (
                moments[0]
                if name == SECOND_MOMENTS and moments and not rewritten
                else self._observe(name, group, inputs.fitted)
            ).value()
            for name in sorted(needs)
        }

    def _observe(self, name: str, group: InputGroup, chunks: tuple[torch.Tensor, ...]) -> Statistic:
        statistic: Statistic = self._host.get("observer", name).start(group)
        for x in chunks:
            statistic.update(x)
        return statistic

    def _rewrite(
        self,
        group: InputGroup,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        inputs: GroupInputs,
    ) -> tuple[Mapping[str, torch.Tensor], torch.Tensor | None]:
        """Let the outlier handlers rewrite the group, one after another."""
        total = None
        for handler in self._method.handlers:
            seen = inputs if total is None else inputs.scaled(total)
            statistics = {n: self._observe(n, group, seen.fitted).value() for n in handler.needs}
            scheme = schemes[group.name]
            rewrite = handler.rewrite(group, weights, statistics, scheme, self._rng(group.name))
            check_finite(rewrite.input_scale, f"{handler.name}: input_scale of {group.name!r}")
            weights = rewrite.weights
            total = rewrite.input_scale if total is None else total * rewrite.input_scale
        return weights, total

    def _round(self, problem: RoundingProblem) -> tuple[QuantizedWeight, str]:
        """Round one layer; where that is impossible, round to nearest and record the fallback."""
        rounder = self._method.rounder
        before = problem.weight._version
        try:
            quantized = rounder.round(problem, self._rng(problem.name))
        except (UncalibratedLayerError, HessianError) as error:
            if self._recipe.on_fallback == "error":
                raise
            event = Event(
                kind="fallback",
                layer=problem.name,
                message=f"rounded to nearest instead: {error}",
            )
            self.events.append(event)
            log.warning("%s: %s", event.layer, event.message)
            return to_nearest(problem), "round to nearest (fallback)"
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


def to_nearest(problem: RoundingProblem) -> QuantizedWeight:
    """Round to nearest: the baseline of every report, and what a layer falls back to."""
    scale, zero_point = rounding.fit_scales(
        problem.weight, problem.scheme, problem.grid, name=problem.name
    )
    index = rounding.group_index(problem.weight.shape[1], problem.scheme)
    codes = rounding.encode(problem.weight, scale, zero_point, index, problem.grid)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero_point, group_index=index)


def _tokens(x: torch.Tensor, group: InputGroup) -> torch.Tensor:
    flat = x.detach().reshape(-1, group.columns).to(torch.float32).contiguous()
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat


def _count(chunks: tuple[torch.Tensor, ...]) -> int:
    return sum(len(x) for x in chunks)
