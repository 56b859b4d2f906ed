"""What a quantized layer is told of: what it lost, and whether it keeps its claims."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qframe import rounding
from qframe.certificates import (
    Certificate,
    Evidence,
    check_certificates,
    function_preserved,
    squared,
)
from qframe.contracts import Event
from qframe.fallbacks import claims_about
from qframe.fingerprints import Origin, fingerprint
from qframe.recipe import Method, Recipe
from qframe.report.layers import LayerReport
from qframe.report.measure import OutputErrors, clipped_share, sqnr_db
from qframe.stored import StoredLayer
from qframe.weights import check_finite


@dataclass(frozen=True, slots=True)
class Judged:
    """What is needed to complete a layer's report.

    origin   tells what the original weight was, as it was stored
    made     what takes the place of it, where it is at hand
    """

    evidence: Evidence
    original: torch.Tensor
    origin: Callable[[], Origin]
    made: torch.Tensor | None
    running: StoredLayer
    errors: OutputErrors
    report: LayerReport

    def effective(self) -> torch.Tensor:
        """Return what takes the place of the original weight."""
        if self.made is not None:
            return self.made
        values = rounding.dequantize(self.evidence.quantized)
        return self.running.plain(self.running.with_kept(values))


def verdict(judged: Judged, recipe: Recipe, method: Method) -> list[Event]:
    """Complete the report of a layer: what it lost, and whether it keeps its claims."""
    clock = time.perf_counter()
    report, problem = judged.report, judged.evidence.problem
    original = judged.original
    origin = judged.origin()
    report.source, report.source_dtype = origin.sha256, origin.dtype
    if judged.running.transform is not None:
        report.rewritten = fingerprint(problem.weight)
    signal, noise = _energies(judged)
    if not math.isfinite(noise):
        change = judged.effective() - original
        check_finite(change, f"layer {problem.name!r}: the quantized weight less the original")
    report.sqnr_db = sqnr_db(signal, noise)
    low, high = (torch.from_numpy(ends).float() for ends in judged.evidence.ranges())
    report.clipped = clipped_share(
        problem.weight, judged.evidence.quantized, problem.grid, (low, high)
    )
    if judged.errors.moments:
        nearest = rounding.to_nearest(dataclasses.replace(problem, weight=original))
        found = judged.errors.relative(original, (judged.effective(), rounding.dequantize(nearest)))
        report.error, report.rtn_error = found[0]
        report.drift = judged.errors.drift(original)
        if len(found) > 1:
            report.held_out_error, report.rtn_held_out_error = found[1]
    report.seconds["measure"] = time.perf_counter() - clock

    clock = time.perf_counter()
    report.certificates, events = _certify(judged, recipe, method)
    report.seconds["certify"] = time.perf_counter() - clock
    return events


def _energies(judged: Judged) -> tuple[float, float]:
    """Return the sums of the squares of the original weights, and of what became of them less."""
    if judged.running.transform is None:
        found = judged.evidence.differences()
        return found.signal, found.noise
    original, made = judged.original, judged.effective()
    strips = list(rounding.strips(*original.shape))
    signal = sum(squared(original[part]) for part in strips)
    return signal, sum(squared(made[part] - original[part]) for part in strips)


def _certify(
    judged: Judged, recipe: Recipe, method: Method
) -> tuple[tuple[Certificate, ...], list[Event]]:
    """Hold a layer, as it is stored, against what its method claims."""
    evidence, running = judged.evidence, judged.running
    problem = evidence.problem
    certificates: tuple[Certificate, ...] = ()
    if running.transform is not None:
        certificates = (
            function_preserved(
                judged.original,
                problem.weight,
                running.transform,
                running.kept,
                handlers=len(method.handlers),
            ),
        )
    certificates += evidence.certificates(claims_about(method.rounder, judged.report.method))
    violated = [certificate for certificate in certificates if not certificate.holds]
    if recipe.on_violated_certificate == "error":
        check_certificates(problem.name, violated)
    return certificates, [
        Event(kind="certificate violated", layer=problem.name, message=str(certificate))
        for certificate in violated
    ]
