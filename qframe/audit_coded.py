"""The audit of what a reader opens: codes, scales and offsets that no scheme of qframe holds.

The rules are those of folders (`qframe.audit_report`). With the original, codes have to be the
nearest ones up to what storing scales after them may have moved (B1.b, B2.d, B1.h). Rounding to
nearest, and the least error, are asked of the scheme that is nearest to the format, where there is
one: scales in float32, zero points that are integers. So the least error is known for symmetric
integers of few bits alone; where scales may have either sign, each group has the better of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

from qframe import bounds
from qframe.audit_report import (
    AuditReport,
    LayerFigures,
    judge_distance,
    judge_figures,
    nearest_of,
    over,
)
from qframe.contracts import (
    Checkpoint,
    CodedLayer,
    CodedWeight,
    Grid,
    Rounder,
    RoundingProblem,
)
from qframe.errors import QframeError, UnsupportedError
from qframe.grids import grid_of
from qframe.host import Host
from qframe.rounding import dequantize
from qframe.weights import ModelFolder

PIECE = 1 << 22  # weights at a time
ROUNDINGS = 4  # of float32, of a quotient and of what it is compared with, at most


def audit_coded(
    report: AuditReport,
    checkpoint: Checkpoint,
    reference: ModelFolder | None,
    host: Host,
    least: Rounder | None,
    say: Callable[[str], None],
) -> None:
    """Audit a checkpoint that a reader opened.

    reference   the full-precision folder that it was made of
    least       finds scales of least weight error, where a rounder does
    say         told what begins
    """
    _check_missing(report, checkpoint, reference)
    named = reference is not None and any(
        _reference_name(reference, name) is not None for name in checkpoint.layers
    )
    if reference is not None and not named:
        said = "no layer has a name that the reference has: nothing was compared"
        report.add("", "reference", "warning", said)
    for number, (name, layer) in enumerate(checkpoint.layers.items(), 1):
        say(f"layer {number} of {len(checkpoint.layers)}")
        coded = _read(report, checkpoint, name)
        if coded is None:
            continue
        figures = _figures(layer, coded)
        even = coded.grid.values is None
        judge_figures(report, name, figures, coded.scale.abs(), num_bits=layer.num_bits, even=even)
        if reference is not None and named:
            figures = _compared(report, reference, layer, coded, figures, host, least)
        report.layers[name] = figures


def _check_missing(
    report: AuditReport, checkpoint: Checkpoint, reference: ModelFolder | None
) -> None:
    """Look for layers that are not there."""
    report.carried = len(checkpoint.carried)
    for name in checkpoint.layers:
        if f"{name}.weight" in checkpoint.carried:
            report.add(name, "completeness", "error", "is stored both as codes and as a weight")
    try:
        missing = checkpoint.missing()
    except QframeError as error:
        missing = []
        report.add("", "completeness", "warning", f"what is missing is not known: {error}")
    for name, said in missing:
        report.add(name, "completeness", "error", said)
    known = {name for name, _ in missing} | checkpoint.layers.keys()
    shared = {n.removesuffix(".weight") for n in checkpoint.carried} | known
    if reference is None or not any(f"{name}.weight" in reference.tensors for name in shared):
        return
    tied = reference.config.get("tie_word_embeddings", False)
    for weight, stored in reference.tensors.items():
        name = weight.removesuffix(".weight")
        output = name == "lm_head" and tied
        if len(stored.shape) == 2 and name != weight and name not in shared and not output:
            report.add(name, "completeness", "error", "is in the reference, and not here")


def _read(report: AuditReport, checkpoint: Checkpoint, name: str) -> CodedWeight | None:
    """Return the codes of a layer, or None when they cannot be read."""
    try:
        return checkpoint.read(name)
    except UnsupportedError as error:
        said = str(error).removeprefix(f"layer {name!r}: ")
        report.add(name, "completeness", "warning", f"was not audited: {said}")
    except QframeError as error:
        report.add(name, "structure", "error", str(error).removeprefix(f"layer {name!r}: "))
    report.unreadable += 1
    return None


# The numbers ------------------------------------------------------------------------------------


def _pieces(coded: CodedWeight) -> Iterator[slice]:
    """Yield slices of rows with about PIECE weights each."""
    rows, columns = coded.codes.shape
    step = max(PIECE // max(columns, 1), 1)
    for top in range(0, rows if columns else 0, step):
        yield slice(top, min(top + step, rows))


def _grouped(values: torch.Tensor, coded: CodedWeight, rows: slice) -> torch.Tensor:
    """Return some rows as groups, [rows, groups, columns of a group]."""
    part = values[rows]
    return part.reshape(len(part), coded.scale.shape[1], -1)


def _values(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return what codes stand for at scale 1, float64."""
    if grid.values is None:
        return codes.double()
    return torch.tensor(grid.values, dtype=torch.float64)[codes.long() - grid.qmin]


def _figures(layer: CodedLayer, coded: CodedWeight) -> LayerFigures:
    """Measure a layer."""
    grid = coded.grid
    span = grid.qmax - grid.qmin
    dead = ends = idle = 0
    centre, weights = 0.0, 0
    for rows in _pieces(coded):
        codes, weight = (_grouped(each, coded, rows) for each in (coded.codes, coded.weight))
        dead += int((weight == 0).all(dim=2).sum())
        at_end = (codes == grid.qmin) | (codes == grid.qmax)
        if grid.qmin < 0:  # the most negative code may have no counterpart
            at_end |= codes == -grid.qmax
            idle += int((codes.abs().amax(dim=2) < span / 4).sum())
        else:
            idle += int((codes.amax(dim=2) - codes.amin(dim=2) < span / 2).sum())
        ends += int(at_end.sum())
        step = coded.scale[rows].abs()
        there = step > 0
        centre += float((weight.double().sum(dim=2)[there] / step[there]).sum())
        weights += int(there.sum()) * weight.shape[2]
    groups, total = max(coded.scale.numel(), 1), max(coded.codes.numel(), 1)
    return LayerFigures(
        scheme=layer.kind,
        rows=layer.rows,
        columns=layer.columns,
        dead=dead / groups,
        at_ends=ends / total,
        idle=idle / groups,
        centre=centre / max(weights, 1),
    )


# The original -----------------------------------------------------------------------------------


def _reference_name(reference: ModelFolder, name: str) -> str | None:
    """Return the tensor that a layer was made of; the output layer may be the embedding."""
    found = f"{name}.weight"
    if found in reference.tensors:
        return found
    embedding = "model.embed_tokens.weight"
    return embedding if name == "lm_head" and embedding in reference.tensors else None


def _compared(
    report: AuditReport,
    reference: ModelFolder,
    layer: CodedLayer,
    coded: CodedWeight,
    figures: LayerFigures,
    host: Host,
    least: Rounder | None,
) -> LayerFigures:
    """Compare a layer with the original; return its figures with what that gave."""
    name = _reference_name(reference, layer.name)
    if name is None:
        report.add(layer.name, "reference", "error", "is no layer of the reference")
        return figures
    weight = reference.read(name).float()
    if tuple(weight.shape) != (layer.rows, layer.columns):
        report.add(layer.name, "reference", "error", f"is {list(weight.shape)} in the reference")
        return figures
    weight = weight.reshape(coded.codes.shape)
    ratio, farther = _half_steps(coded, weight)
    squares = _row_squares(coded.weight, weight)
    above = rows = best = None
    scheme = layer.scheme
    if scheme is not None:
        grid = grid_of(host, scheme)
        problem = RoundingProblem(
            name=layer.name, weight=weight, scheme=scheme, grid=grid, input_grid=None
        )
        nearest = nearest_of(problem)
        if nearest is not None:
            of_nearest = _row_squares(dequantize(nearest), weight)
            above = over(float(squares.sum()), float(of_nearest.sum())) ** 0.5
            rows = torch.where(of_nearest > 0, squares / of_nearest, 0.0).sqrt()
        best = _least(least, problem, signed=bool((coded.scale < 0).any()))
    found = dataclasses.replace(
        figures,
        half_steps=ratio,
        farther=farther,
        unexplained=farther,
        error=over(float(squares.sum()) ** 0.5, float(weight.double().norm())),
        above_nearest=above,
        above_least=None if best is None else over(float(squares.sum()), best),
    )
    judge_distance(report, layer.name, found, rows)
    return found


def _half_steps(coded: CodedWeight, weight: torch.Tensor) -> tuple[float, int]:
    """Return how far the farthest weight is, in what B1.b, B2.d and B1.h allow, and how many are.

    Where a scale is negative codes count down, so everything is turned round.
    """
    worst, farther = 0.0, 0
    for rows in _pieces(coded):
        codes = _grouped(coded.codes, coded, rows)
        original = _grouped(weight, coded, rows).double()
        scale, offset, scale_moved, offset_moved = (
            each[rows][..., None]
            for each in (coded.scale, coded.offset, coded.scale_moved, coded.offset_moved)
        )
        values = _values(codes, coded.grid)
        sign = torch.where(scale < 0, -1.0, 1.0)
        delta = (scale * values + offset - original) * sign * (scale != 0)
        allowance = bounds.gamma(ROUNDINGS) * (original.abs() + offset.abs())
        moved = bounds.chosen_before(
            values.numpy(), _widest(coded.grid), scale_moved.numpy(), offset_moved.numpy()
        )
        error, allowed = bounds.nearest(
            delta.numpy(),
            codes.numpy(),
            scale.abs().numpy(),
            coded.grid,
            allowance.numpy() + moved,
        )
        worst = max(worst, bounds.ratio(error, allowed))
        farther += int((error > allowed * bounds.CHECKER).sum())
    return worst, farther


def _widest(grid: Grid) -> float:
    """Return half of the widest gap between values, at scale 1."""
    return 0.5 if grid.values is None else float(np.diff(grid.values).max()) / 2


def _row_squares(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each row, [rows] float64."""
    parts = [
        (values[top : top + step].double() - weight[top : top + step].double()).square().sum(dim=1)
        for step in [max(PIECE // max(weight.shape[1], 1), 1)]
        for top in range(0, len(weight), step)
    ]
    return torch.cat(parts) if parts else weight.new_zeros(0, dtype=torch.float64)


def _least(least: Rounder | None, problem: RoundingProblem, *, signed: bool) -> float | None:
    """Return the least squared error that any scales allow; None where nobody knows it.

    signed   whether a group may have a scale of either sign
    """
    scheme = problem.scheme
    if least is None or not scheme.symmetric or least.capabilities.objection(scheme) is not None:
        return None
    found = []
    for sign in (1, -1) if signed else (1,):
        turned = dataclasses.replace(problem, weight=sign * problem.weight)
        try:
            best = least.round(turned, np.random.default_rng(0))
        except QframeError:
            return None
        squares = (dequantize(best).double() - turned.weight.double()).square()
        found.append(squares.reshape(len(squares), best.scale.shape[1], -1).sum(dim=2))
    return float(torch.stack(found).amin(dim=0).sum())
