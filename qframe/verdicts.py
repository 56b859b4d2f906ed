"""What a quantized layer is told of: what it lost, and whether it keeps its claims."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qframe import rounding
from qframe.certificates import (
    Certificate,
    Evidence,
    LayerClaim,
    check_certificates,
    function_preserved,
    squared,
)
from qframe.contracts import Event
from qframe.fallbacks import claims_about
from qframe.fingerprints import Origin, fingerprint
from qframe.recipe import Method, Recipe
from qframe.report.layers import LayerReport
from qframe.report.measure import OutputErrors, clipped_weights, sqnr_db
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


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a layer, or of some of its rows, by its weights alone.

    signal, noise   the sums of the squares of the weights, and of what became of them less
    clipped         weights more than half a step outside the range of the codes
    certificates    of what is claimed
    """

    signal: float
    noise: float
    clipped: int
    certificates: tuple[Certificate, ...]

    @property
    def finite(self) -> bool:
        """Whether all errors are finite, and so is what was judged by them."""
        return math.isfinite(self.noise)

    @classmethod
    def of(cls, evidence: Evidence, claims: Sequence[LayerClaim]) -> Found:
        """Look at a layer whose weights were not rewritten."""
        sums = evidence.differences()
        certificates = tuple(claim.certify(evidence) for claim in claims)
        return cls(sums.signal, sums.noise, _clipped(evidence), certificates)

    @classmethod
    def together(cls, parts: Sequence[tuple[int, Found]]) -> Found:
        """Return what was found of a layer, from what was found of all its rows, in order.

        parts   the number of the first row, and what was found from there on; at least one. Their
                certificates are of claims that a layer keeps where all parts of it do
        """
        each = [found for _, found in parts]
        claims = zip(*(found.certificates for found in each), strict=True)
        return cls(
            signal=math.fsum(found.signal for found in each),
            noise=math.fsum(found.noise for found in each),
            clipped=sum(found.clipped for found in each),
            certificates=tuple(_nearest(parts, claim) for claim in claims),
        )


def _nearest(
    parts: Sequence[tuple[int, Found]], certificates: Sequence[Certificate]
) -> Certificate:
    """Return the certificate of the part that comes closest, the first of those that do."""
    ratios = [math.inf if math.isnan(each.ratio) else each.ratio for each in certificates]
    number = ratios.index(max(ratios))
    found, top = certificates[number], parts[number][0]
    place = (found.place[0] + top, *found.place[1:]) if found.place else ()
    return dataclasses.replace(found, place=place)


def _clipped(evidence: Evidence) -> int:
    """Return how many weights are more than half a step outside the range of the codes."""
    low, high = (torch.from_numpy(ends).float() for ends in evidence.ranges())
    problem = evidence.problem
    return clipped_weights(problem.weight, evidence.quantized, problem.grid, (low, high))


def verdict(judged: Judged, recipe: Recipe, method: Method) -> list[Event]:
    """Complete the report of a layer: what it lost, and whether it keeps its claims."""
    clock = time.perf_counter()
    report, problem = judged.report, judged.evidence.problem
    original = judged.original
    if judged.running.transform is not None:
        report.rewritten = fingerprint(problem.weight)
    signal, noise = _energies(judged)
    if not math.isfinite(noise):
        change = judged.effective() - original
        check_finite(change, f"layer {problem.name!r}: the quantized weight less the original")
    tell(report, judged.origin(), signal, noise, _clipped(judged.evidence))
    if judged.errors.moments:
        nearest = rounding.to_nearest(dataclasses.replace(problem, weight=original))
        found = judged.errors.relative(original, (judged.effective(), rounding.dequantize(nearest)))
        report.error, report.rtn_error = found[0]
        report.drift = judged.errors.drift(original)
        if len(found) > 1:
            report.held_out_error, report.rtn_held_out_error = found[1]
    report.seconds["measure"] = time.perf_counter() - clock

    clock = time.perf_counter()
    report.certificates = _certify(judged, method)
    report.seconds["certify"] = time.perf_counter() - clock
    return violations(report, recipe)


def tell(report: LayerReport, origin: Origin, signal: float, noise: float, clipped: int) -> None:
    """Say in a report what the layer was made of, and what it lost; see `Found`."""
    report.source, report.source_dtype = origin.fingerprint, origin.dtype
    report.sqnr_db = sqnr_db(signal, noise)
    report.clipped = clipped / max(report.rows * report.columns, 1)


def violations(report: LayerReport, recipe: Recipe) -> list[Event]:
    """Return what there is to tell of certificates that do not hold.

    Raises CertificateError where the recipe asks for that.
    """
    violated = [certificate for certificate in report.certificates if not certificate.holds]
    if recipe.on_violated_certificate == "error":
        check_certificates(report.name, violated)
    return [
        Event(kind="certificate violated", layer=report.name, message=str(certificate))
        for certificate in violated
    ]


def _energies(judged: Judged) -> tuple[float, float]:
    """Return the sums of the squares of the original weights, and of what became of them less."""
    if judged.running.transform is None:
        found = judged.evidence.differences()
        return found.signal, found.noise
    original, made = judged.original, judged.effective()
    strips = list(rounding.strips(*original.shape))
    signal = sum(squared(original[part]) for part in strips)
    return signal, sum(squared(made[part] - original[part]) for part in strips)


def _certify(judged: Judged, method: Method) -> tuple[Certificate, ...]:
    """Hold a layer, as it is stored, against what its method claims."""
    evidence, running = judged.evidence, judged.running
    certificates: tuple[Certificate, ...] = ()
    if running.transform is not None:
        certificates = (
            function_preserved(
                judged.original,
                evidence.problem.weight,
                running.transform,
                running.kept,
                handlers=len(method.handlers),
            ),
        )
    return certificates + evidence.certificates(claims_about(method.rounder, judged.report.method))
