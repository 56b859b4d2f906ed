"""The audit of a quantized folder that anybody wrote: is it sound, and how far from its original?

From the files alone: whether every layer can be unpacked, and whether its numbers look like those
of a layer that was quantized on purpose. What cannot be is an error; what is only strange is a
warning, with the rule that it breaks (`RULES`). With the original, every weight is compared with
what its code stands for (B1.b, B2.d), and the layer's squared error with that of rounding to
nearest, and with the least that its codes allow where a rounder knows that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qframe import parallel
from qframe.certificates import Evidence
from qframe.contracts import LayerOutline, QuantizedWeight, Rounder, RoundingProblem
from qframe.errors import QframeError, VerifyError
from qframe.host import Host
from qframe.model import Network
from qframe.report.layers import words_for_infinities
from qframe.rounding import dequantize, encode, expand, to_nearest
from qframe.stored_model import StoredModel
from qframe.weights import ModelFolder

Severity = Literal["error", "warning"]

RULES: Mapping[str, str] = {
    "structure": "every part of a layer is there, with a dtype, shape and values that it can have",
    "completeness": "every linear layer of the network is stored once, as codes or as it was",
    "default scales": "scales differ from one another, where there are several and weights not 0",
    "scale range": "no scale is 1024 times the median of its layer's",
    "dead groups": "at most one group in a hundred has weights that are all 0",
    "saturated codes": "at most a quarter of codes are the least or the largest, above 2 bits",
    "unused codes": "half of the groups reach beyond the inner half of their codes",
    "centre": "weights are less than half a step off zero on average, with 3 to 5 bits; a zero "
    "point that is one off, as between GPTQ's two versions, moves all of them by a step",
    "reference": "a layer is nearer to the original than a layer of zeros is",
    "rounding": "a layer is at most twice as far from the original as rounded to nearest, and each "
    "row four times",
    "single codes": "all codes are the nearest ones, or many are not: of a few bits have flipped",
}
"""Check -> what it asks for."""

FAR = 1024.0  # of a scale, in medians
FEW_DEAD = 1 / 100
MANY_AT_ENDS = 1 / 4
HALF = 0.5
TWICE, FOUR_TIMES = 2.0, 4.0
FEW_CODES = 1 / 1000
CENTRED = (3, 4, 5)  # bits; a step is too small to tell with more, and too large with less


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or strange.

    check   of `RULES`
    """

    layer: str
    check: str
    severity: Severity
    message: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.severity} {self.layer}: {self.check}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """What was measured of one layer.

    dead          share of groups whose weights are all 0
    at_ends       share of codes that are the least or the largest
    idle          share of groups whose codes do not leave the inner half of their range
    centre        mean of code - zero point, in steps
    half_steps    with a reference: how far the farthest weight is from its own, in half steps of
                  its scale, those at the end of the range aside (B1.b, B2.d)
    farther       how many codes are not the nearest one to their weight, on their scales
    error         with a reference: ||W - Q|| / ||W||
    above_nearest    ||W - Q|| over that of rounding to nearest with the same scheme
    above_least      ||W - Q||^2 over the least that any scales allow; None where none knows it
    """

    scheme: str
    rows: int
    columns: int
    dead: float
    at_ends: float
    idle: float
    centre: float
    half_steps: float | None = None
    farther: int | None = None
    error: float | None = None
    above_nearest: float | None = None
    above_least: float | None = None


@dataclass(kw_only=True)
class AuditReport:
    """What `audit` found.

    layout      how the folder stores its layers
    reference   what it was compared with, or None
    layers      layer -> figures, of those that could be unpacked
    carried     tensors that are no part of a quantized layer
    """

    folder: Path
    layout: str
    reference: str | None = None
    layers: dict[str, LayerFigures] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    carried: int = 0
    unreadable: int = 0

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong, though it may be strange. 4: it is not sound."""
        return VerifyError.exit_code if self.errors() else 0

    def errors(self) -> list[Finding]:
        """Return what is wrong."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def add(self, layer: str, check: str, severity: Severity, message: str) -> None:
        """Take down a finding."""
        self.findings.append(Finding(layer, check, severity, message))

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        content = {
            "folder": str(self.folder),
            "layout": self.layout,
            "reference": self.reference,
            "exit_code": self.exit_code,
            "layers": {name: asdict(figures) for name, figures in self.layers.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "carried": self.carried,
        }
        finite: dict[str, Any] = words_for_infinities(content)
        return finite


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
        _judge_figures(report, name, outline, quantized, figures)
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


def _judge_figures(
    report: AuditReport,
    name: str,
    outline: LayerOutline,
    quantized: QuantizedWeight,
    figures: LayerFigures,
) -> None:
    """Compare figures with the rules."""
    scale = quantized.scale
    if scale.numel() > 1 and figures.dead < 1 and bool((scale == scale.flatten()[0]).all()):
        first = float(scale.flatten()[0])
        report.add(name, "default scales", "error", f"all {scale.numel()} scales are {first:g}")
    elif scale.numel():
        far = float(scale.max() / scale.median())
        if far >= FAR:
            report.add(name, "scale range", "warning", f"the largest is {far:.3g} times the median")
    if figures.dead > FEW_DEAD:
        severity: Severity = "error" if figures.dead == 1 else "warning"
        report.add(name, "dead groups", severity, f"{_percent(figures.dead)} of groups are all 0")
    if figures.at_ends > MANY_AT_ENDS and outline.scheme.num_bits > 2:
        said = f"{_percent(figures.at_ends)} of codes are the least or the largest"
        severity = "error" if figures.at_ends == 1 else "warning"
        report.add(name, "saturated codes", severity, said)
    if figures.idle - figures.dead > HALF and outline.grid.values is None:
        said = f"{_percent(figures.idle)} of groups use the inner half of their codes alone"
        report.add(name, "unused codes", "warning", said)
    few = outline.scheme.num_bits in CENTRED and outline.grid.values is None
    if abs(figures.centre) > HALF and few:
        said = f"weights are {figures.centre:+.2f} steps on average"
        report.add(name, "centre", "warning", said)


def _by_group(values: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    """Return the largest value of each group, [rows, groups]."""
    index = quantized.group_index.long().expand(values.shape[0], -1)
    found = values.new_zeros((values.shape[0], quantized.scale.shape[1]))
    return found.scatter_reduce(1, index, values, "amax")


def _share(found: torch.Tensor) -> float:
    return float(found.double().mean()) if found.numel() else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


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
    found = dataclasses.replace(
        figures,
        half_steps=HalfStep().certify(Evidence(problem, quantized, threads=threads)).ratio,
        farther=_farther(problem, quantized),
        error=_over(_distance(quantized, problem), float(weight.double().norm())),
        above_nearest=_above(quantized, _nearest(problem), problem),
        above_least=_square(_above(quantized, _best(least, problem), problem)),
    )
    _judge_distance(report, name, found, _rows_above(quantized, _nearest(problem), problem))
    return found


def _judge_distance(
    report: AuditReport, name: str, figures: LayerFigures, rows: torch.Tensor | None
) -> None:
    """Compare figures with the rules about the original.

    rows   of each row, how many times as far it is as rounded to nearest; None where unknown
    """
    error, above, farther = figures.error or 0.0, figures.above_nearest, figures.farther or 0
    if error >= 1:
        report.add(name, "reference", "error", f"||W - Q|| is {error:.3g} ||W||")
    elif above is not None and above > TWICE:
        said = (
            f"{above:.3g} times as far from the original as rounded to nearest; a method that "
            f"rewrites weights (AWQ, SmoothQuant) explains that, or another original"
        )
        report.add(name, "rounding", "warning", said)
    elif rows is not None and rows.numel() and float(rows.max()) > FOUR_TIMES:
        said = f"row {int(rows.argmax())} is {float(rows.max()):.3g} times as far, others are not"
        report.add(name, "rounding", "warning", said)
    elif 0 < farther < FEW_CODES * figures.rows * figures.columns:
        said = f"{farther} of {figures.rows * figures.columns} codes are not the nearest ones"
        report.add(name, "single codes", "warning", said)


def _farther(problem: RoundingProblem, quantized: QuantizedWeight) -> int:
    """Return how many codes are farther from their weight than another one on the same scales.

    Products with scales are exact in float64, and so is what is compared.
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
    return int((there > (dequantize(nearest).double() - weight).abs()).sum())


def _nearest(problem: RoundingProblem) -> QuantizedWeight | None:
    """Return the weight rounded to nearest on minmax scales; None where they do not fit."""
    try:
        return to_nearest(problem)
    except QframeError:
        return None


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
    return _over(_distance(quantized, problem), _distance(other, problem))


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


def _over(above: float, below: float) -> float:
    if below == 0:
        return 1.0 if above == 0 else math.inf
    return above / below
