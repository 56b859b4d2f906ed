"""What an audit may find, and what it asks of the figures of a layer: rules, findings, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qframe.contracts import QuantizedWeight, RoundingProblem
from qframe.errors import QframeError, VerifyError
from qframe.report.layers import words_for_infinities
from qframe.rounding import to_nearest

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
    unexplained   how many of those that are so even if scales and weights were rounded before or
                  after codes were chosen (B1.h)
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
    unexplained: int | None = None
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


def judge_figures(
    report: AuditReport,
    name: str,
    figures: LayerFigures,
    scale: torch.Tensor,
    *,
    num_bits: int,
    even: bool,
) -> None:
    """Compare figures with the rules.

    scale   of all groups, none negative
    even    whether codes stand for themselves: steps are equal then
    """
    if scale.numel() > 1 and figures.dead < 1 and bool((scale == scale.flatten()[0]).all()):
        first = float(scale.flatten()[0])
        report.add(name, "default scales", "error", f"all {scale.numel()} scales are {first:g}")
    elif bool((scale > 0).any()):
        far = float(scale.max() / scale[scale > 0].median())
        if far >= FAR:
            report.add(name, "scale range", "warning", f"the largest is {far:.3g} times the median")
    if figures.dead > FEW_DEAD:
        severity: Severity = "error" if figures.dead == 1 else "warning"
        report.add(name, "dead groups", severity, f"{_percent(figures.dead)} of groups are all 0")
    if figures.at_ends > MANY_AT_ENDS and num_bits > 2:
        said = f"{_percent(figures.at_ends)} of codes are the least or the largest"
        severity = "error" if figures.at_ends == 1 else "warning"
        report.add(name, "saturated codes", severity, said)
    if figures.idle - figures.dead > HALF and even:
        said = f"{_percent(figures.idle)} of groups use the inner half of their codes alone"
        report.add(name, "unused codes", "warning", said)
    if abs(figures.centre) > HALF and num_bits in CENTRED and even:
        said = f"weights are {figures.centre:+.2f} steps on average"
        report.add(name, "centre", "warning", said)


def judge_distance(
    report: AuditReport, name: str, figures: LayerFigures, rows: torch.Tensor | None
) -> None:
    """Compare figures with the rules about the original.

    rows   of each row, how many times as far it is as rounded to nearest; None where unknown
    """
    error, above, farther = figures.error or 0.0, figures.above_nearest, figures.unexplained or 0
    if error >= 1:
        report.add(name, "reference", "error", f"||W - Q|| is {error:.3g} ||W||")
    elif above is not None and above > TWICE:
        said = (
            f"{above:.3g} times as far from the original as rounded to nearest"
            f"{_farthest(rows)}; a method that rewrites weights (AWQ, SmoothQuant) explains that, "
            f"or another original"
        )
        report.add(name, "rounding", "warning", said)
    elif rows is not None and rows.numel() and float(rows.max()) > FOUR_TIMES:
        said = f"row {int(rows.argmax())} is {float(rows.max()):.3g} times as far, others are not"
        report.add(name, "rounding", "warning", said)
    elif 0 < farther < FEW_CODES * figures.rows * figures.columns:
        said = f"{farther} of {figures.rows * figures.columns} codes are not the nearest ones"
        report.add(name, "single codes", "warning", said)


def _farthest(rows: torch.Tensor | None) -> str:
    """Return which row is much farther than the others, where one is."""
    if rows is None or rows.numel() < 2 or float(rows.max()) < FOUR_TIMES * float(rows.median()):
        return ""
    return f", row {int(rows.argmax())} {float(rows.max()):.3g} times"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def over(above: float, below: float) -> float:
    """Return a quotient of distances; 0 / 0 is 1, as nothing is as far as nothing."""
    if below == 0:
        return 1.0 if above == 0 else math.inf
    return above / below


def nearest_of(problem: RoundingProblem) -> QuantizedWeight | None:
    """Return the weight rounded to nearest on minmax scales; None where they do not fit."""
    try:
        return to_nearest(problem)
    except QframeError:
        return None
