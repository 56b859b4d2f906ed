"""The audit of a quantized folder that anybody wrote: is it sound, and how far from its original?

From the files alone: whether every layer can be unpacked, and whether its numbers look like those
of a layer that was quantized on purpose. What cannot be is an error; what is only strange is a
warning, with the rule that it breaks (`RULES`). With the original, every weight is compared with
what its code stands for (B1.b, B2.d), and the layer's squared error with that of rounding to
nearest, and with the least that its codes allow where a rounder knows that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qframe import bounds, parallel
from qframe.audit_coded import audit_coded
from qframe.audit_report import (
    AuditReport,
    LayerFigures,
    judge_distance,
    judge_figures,
    nearest_of,
    over,
)
from qframe.certificates import Evidence
from qframe.contracts import LayerOutline, QuantizedWeight, Reader, Rounder, RoundingProblem
from qframe.errors import QframeError, VerifyError
from qframe.host import Host
from qframe.model import Network
from qframe.rounding import dequantize, encode, expand
from qframe.stored_model import StoredModel
from qframe.weights import ModelFolder

FEW_BITS = 4  # with more, what bfloat16 rounds off is a step and more


def audit(
    folder: str | Path,
    reference: str | Path | None = None,
    *,
    host: Host | None = None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> AuditReport:
    """Audit a quantized folder, whoever wrote it.

    reference   the full-precision folder that it was made of
    threads     how many; default: all cores
    say         told what begins

    Raises VerifyError or WeightsError for a folder that no layout knows.
    """
    host, say = host or Host.discover(), say or (lambda line: None)
    threads = threads or parallel.default_threads()
    say("reading headers")
    for name in host.names("reader"):
        reader: Reader = host.get("reader", name)
        checkpoint = reader.open(Path(folder))
        if checkpoint is not None:
            report = AuditReport(folder=Path(folder), layout=name)
            original = None if reference is None else ModelFolder(reference)
            report.reference = None if reference is None else str(reference)
            audit_coded(report, checkpoint, original, host, _least(host), say)
            return report
    if Path(folder).is_file():
        known = ", ".join(host.names("reader"))
        raise VerifyError(
            f"{folder}: a file of no format that is known (known: {known}); qframe_readers adds one"
        )
    model = StoredModel.open(folder, host)
    report = AuditReport(folder=model.source.path, layout=model.layout.name)
    network = None
    if reference is not None:
        network = Network.from_folder(ModelFolder(reference))
        report.reference = str(reference)
    _check_completeness(report, model)
    least = _least(host)
    for number, (name, outline) in enumerate(model.outlines.items(), 1):
        say(f"layer {number} of {len(model.outlines)}")
        quantized = _unpacked(report, model, name)
        if quantized is None:
            continue
        figures = _figures(outline, quantized)
        judge_figures(
            report,
            name,
            figures,
            quantized.scale,
            num_bits=outline.scheme.num_bits,
            even=outline.grid.values is None,
        )
        if network is not None:
            figures = _compared(report, network, name, outline, quantized, figures, least, threads)
        report.layers[name] = figures
    return report


# The files --------------------------------------------------------------------------------------


def _check_completeness(report: AuditReport, model: StoredModel) -> None:
    """Look for layers that are stored twice, or not at all."""
    stored = model.source.tensors
    report.carried = len(model.carried())
    for name, outline in model.outlines.items():
        if f"{name}.weight" in stored and "weight" not in model.layout.shapes(outline):
            said = "is stored both as codes and as a plain weight"
            report.add(name, "completeness", "error", said)
    try:
        left = model.left()
    except QframeError as error:
        report.add("", "completeness", "warning", f"the network was not built: {error}")
        return
    tied = model.config.get("tie_word_embeddings", False)
    for info in left:
        output = info.name == "lm_head" and tied
        if f"{info.name}.weight" not in stored and not output:
            report.add(info.name, "completeness", "error", "is neither quantized nor stored")


def _unpacked(report: AuditReport, model: StoredModel, name: str) -> QuantizedWeight | None:
    """Return the codes of a layer, or None when it cannot be unpacked."""
    try:
        return model.layer(name).packed.unpack()
    except QframeError as error:
        report.unreadable += 1
        report.add(name, "structure", "error", str(error).removeprefix(f"layer {name!r}: "))
        return None


# The numbers ------------------------------------------------------------------------------------


def _figures(outline: LayerOutline, quantized: QuantizedWeight) -> LayerFigures:
    """Measure a layer."""
    grid, scheme = outline.grid, outline.scheme
    codes = quantized.codes
    moved = codes - expand(quantized.zero_point, quantized.group_index, codes.shape[0])
    reached = _by_group(moved.abs(), quantized)
    reach = (grid.qmax - grid.qmin) / 2
    ends = (codes == grid.qmin) | (codes == grid.qmax)
    if scheme.symmetric:  # the most negative code has no counterpart
        ends |= codes == -grid.qmax
    return LayerFigures(
        scheme=scheme.describe().replace(f", {scheme.observer}", ""),  # which is not known
        rows=outline.info.rows,
        columns=outline.info.columns,
        dead=_share(reached == 0),
        at_ends=_share(ends),
        idle=_share(reached < reach / 2),
        centre=float(moved.double().mean()) if moved.numel() else 0.0,
    )


def _by_group(values: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    """Return the largest value of each group, [rows, groups]."""
    index = quantized.group_index.long().expand(values.shape[0], -1)
    found = values.new_zeros((values.shape[0], quantized.scale.shape[1]))
    return found.scatter_reduce(1, index, values, "amax")


def _share(found: torch.Tensor) -> float:
    return float(found.double().mean()) if found.numel() else 0.0


# The original -----------------------------------------------------------------------------------


def _compared(
    report: AuditReport,
    network: Network,
    name: str,
    outline: LayerOutline,
    quantized: QuantizedWeight,
    figures: LayerFigures,
    least: Rounder | None,
    threads: int,
) -> LayerFigures:
    """Compare a layer with the original; return its figures with what that gave."""
    from qframe.claims import HalfStep

    if name not in network.layers:
        report.add(name, "reference", "error", "is no layer of the reference")
        return figures
    weight = network.weight(name)
    network.release(network.module.get_submodule(name))
    if tuple(weight.shape) != (outline.info.rows, outline.info.columns):
        report.add(name, "reference", "error", f"is {list(weight.shape)} in the reference")
        return figures
    problem = RoundingProblem(
        name=name,
        weight=weight,
        scheme=outline.scheme,
        grid=outline.grid,
        input_grid=outline.input_grid,
    )
    farther, unexplained = _farther(problem, quantized)
    found = dataclasses.replace(
        figures,
        half_steps=HalfStep().certify(Evidence(problem, quantized, threads=threads)).ratio,
        farther=farther,
        unexplained=unexplained,
        error=over(_distance(quantized, problem), float(weight.double().norm())),
        above_nearest=_above(quantized, nearest_of(problem), problem),
        above_least=_square(_above(quantized, _best(least, problem), problem)),
    )
    judge_distance(report, name, found, _rows_above(quantized, nearest_of(problem), problem))
    return found


def _farther(problem: RoundingProblem, quantized: QuantizedWeight) -> tuple[int, int]:
    """Return how many codes are farther from their weight than another one on the same scales.

    And how many of those by more than scales and weights of 16 bits explain, for integers: bfloat16
    where a code has few bits, else the dtype of scales. Products with scales are exact in float64,
    and so is what is compared.
    """
    codes = encode(
        problem.weight,
        quantized.scale,
        quantized.zero_point,
        quantized.group_index,
        problem.grid,
    )
    nearest = dataclasses.replace(quantized, codes=codes)
    weight = problem.weight.double()
    there = (dequantize(quantized).double() - weight).abs()
    least = (dequantize(nearest).double() - weight).abs()
    farther = there > least
    few = problem.scheme.num_bits <= FEW_BITS
    dtype = "bfloat16" if few else problem.scheme.scale_dtype
    if dtype not in bounds.UNIT or problem.grid.values is not None:
        return int(farther.sum()), int(farther.sum())
    scale = expand(quantized.scale, quantized.group_index, len(codes)).double()
    moved = bounds.stored_apart(scale.numpy(), dtype)
    value = dequantize(quantized).double() / scale
    explained = bounds.chosen_before(value.numpy(), 0.5, 2 * moved, 0.0)
    half = torch.from_numpy(explained) + scale / 2
    return int(farther.sum()), int((farther & (there > half)).sum())


def _best(least: Rounder | None, problem: RoundingProblem) -> QuantizedWeight | None:
    """Return the weight on the scales of least squared error, where a rounder finds them."""
    if least is None or least.capabilities.objection(problem.scheme) is not None:
        return None
    try:
        return least.round(problem, np.random.default_rng(0))
    except QframeError:
        return None


def _above(
    quantized: QuantizedWeight, other: QuantizedWeight | None, problem: RoundingProblem
) -> float | None:
    """Return how many times as far from the weight one is as the other."""
    if other is None:
        return None
    return over(_distance(quantized, problem), _distance(other, problem))


def _rows_above(
    quantized: QuantizedWeight, other: QuantizedWeight | None, problem: RoundingProblem
) -> torch.Tensor | None:
    """Return the same of each row, [rows]; 0 where the other one is exact."""
    if other is None:
        return None
    weight = problem.weight.double()
    there, here = ((dequantize(q).double() - weight).norm(dim=1) for q in (quantized, other))
    return torch.where(here > 0, there / here, 0.0)


def _square(value: float | None) -> float | None:
    return None if value is None else value**2


def _distance(quantized: QuantizedWeight, problem: RoundingProblem) -> float:
    return float((dequantize(quantized).double() - problem.weight.double()).norm())


def _least(host: Host) -> Rounder | None:
    """Return a rounder that claims to find the scales of least weight error, if there is one."""
    from qframe.claims import FittedScale

    for name in host.names("rounder"):
        rounder: Rounder = host.get("rounder", name)
        if any(isinstance(claim, FittedScale) for claim in getattr(rounder, "claims", ())):
            return rounder
    return None
