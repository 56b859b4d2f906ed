"""What follows from what codes mean, and the exact symmetries that a rounder may claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qframe import Scheme, bounds, rounding
from qframe.certificates import group_ranges
from qframe.claims import (
    HalfStep,
    Idempotent,
    ScaleEquivariant,
    SchemeScale,
    SignSymmetric,
    claims_of,
)
from qframe.rounding import round_up
from qframe.scales import SMALLEST_OF_TENSOR
from qframe_conformance.checks import SKIPPED, Outcome, Violation, check, require, same_bits, within
from qframe_conformance.kinds import Float64
from qframe_conformance.rounder_cases import CalibrationCase, RounderCase, fields_of
from qframe_conformance.rounder_layers import CALIBRATION
from qframe_conformance.rounder_refusals import justified
from qframe_conformance.rounder_subjects import (
    about,
    claimed,
    every_third,
    layers,
    unless_deterministic,
)

Mask = npt.NDArray[np.bool_]


@check("rounder", "algebra", "B1.d", unless=layers())
def decodes(case: RounderCase) -> Outcome:
    """The stored weight is scale times (code - zero point), or times value: one float32 product."""
    (scale, _, _), steps = case.per_weight(), case.steps()
    values = case.packed.dequantize().numpy()
    allowed = bounds.decode(scale, steps)
    return within(values - scale * steps, allowed, "|stored value - s (c - z)|", "B1.d")


@check("rounder", "algebra", unless=layers())
def zeros(case: RounderCase) -> Outcome:
    """A row of zeros stays a row of zeros; for rounders whose rows mix, a layer of zeros does."""
    empty = (case.weight == 0).all(1)
    if not case.rounder.capabilities.row_independent:
        empty = empty.all().expand(len(empty))
    if not bool(empty.any()):
        return SKIPPED
    values = rounding.dequantize(case.quantized)[empty]
    require(not bool(values.any()), f"zeros became {float(values.abs().max()):g}")
    return None


# Rows -----------------------------------------------------------------------------------------


def _unless_rows_mix(rounder: Any, scheme: Scheme) -> str | None:
    if not rounder.capabilities.row_independent:
        return "capabilities say that rows depend on one another"
    if scheme.strategy == "tensor":
        return "rows share the scale of the tensor"
    return None


@check("rounder", "algebra", unless=layers(_unless_rows_mix, unless_deterministic))
@every_third
def row_independence(case: RounderCase) -> Outcome:
    """Every other row, in another order, has the codes and scales that it had among all."""
    made, count = case.quantized, len(case.weight)
    # Other rows would get other random numbers, or another scale of the tensor.
    if case.answer.used or count < 2 or case.scheme.two_level:
        return SKIPPED
    rows = torch.from_numpy(np.random.default_rng(case.seed).permutation(count)[::2])
    alone = case.again(weight=case.weight[rows])
    for name in ("codes", "scale", "zero_point"):
        same_bits(getattr(made, name)[rows], getattr(alone, name), f"{name} of some rows alone")
    return None


# Calibration ----------------------------------------------------------------------------------


@check("rounder", "algebra", unless=about(CALIBRATION))
def calibration(case: CalibrationCase) -> Outcome:
    """Statistics matter: for those that have nothing in common some layer comes out otherwise."""
    for one, other in case.layers:
        for each in (one, other):
            error = each.answer.error
            if error is not None and justified(case.rounder, each.problem, error) is None:
                raise Violation(f"raised {type(error).__name__}: {error}")
        pairs = zip(fields_of(one.quantized), fields_of(other.quantized), strict=False)
        if any(name != "order" and not torch.equal(mine, its) for (name, mine), (_, its) in pairs):
            return None
    needs = ", ".join(sorted(case.rounder.needs))
    raise Violation(f"{needs} is needed, but the same codes come out whatever it is")


# Symmetries that are claimed ------------------------------------------------------------------


@check("rounder", "algebra", "B1.g", unless=layers(claimed(ScaleEquivariant)))
@every_third
def scale_equivariance(case: RounderCase) -> Outcome:
    """Weights times 2^k have the same codes, and scales times 2^k, bit for bit.

    For minmax scales, and for rows in which nothing is subnormal before or after: neither a
    weight in float32, nor a scale in its dtype. Groups of zeros keep their scale.
    """
    if case.scheme.observer != "minmax":
        return SKIPPED
    power = -6 if case.scheme.scale_dtype == "float16" else -24
    rows = _normal_rows(case, 2.0**power)
    if not rows.any():
        return SKIPPED
    made = case.quantized
    scaled = case.again(weight=case.weight * 2.0**power)
    chosen = torch.from_numpy(np.flatnonzero(rows))
    same_bits(made.codes[chosen], scaled.codes[chosen], f"codes of 2^{power} times the weights")
    if case.scheme.strategy == "tensor":
        chosen = torch.tensor([0])
    ideal = torch.from_numpy(_ideal(case))
    moves = (ideal > 0)[chosen]
    if case.scheme.two_level:  # groups of zeros have the scale of the tensor
        moves = (ideal.amax() > 0).expand_as(moves) if ideal.numel() else moves
    expected = torch.where(moves, made.scale[chosen] * 2.0**power, made.scale[chosen])
    same_bits(expected, scaled.scale[chosen], f"scales of 2^{power} times the weights")
    same_bits(made.zero_point[chosen], scaled.zero_point[chosen], "zero points")
    return None


def _ideal(case: RounderCase) -> Float64:
    """Return the scale of each group in real arithmetic, [rows or 1, groups]."""
    lo, hi = group_ranges(case.problem, case.quantized.group_index)
    return bounds.ideal_scale(lo, hi, case.problem.grid, symmetric=case.scheme.symmetric)


def _normal_rows(case: RounderCase, factor: float) -> Mask:
    """Return in which rows nothing is subnormal, times `factor` < 1; all or none of a tensor."""
    magnitude = np.abs(case.weight.numpy()).astype(np.float64) * factor
    normal = (magnitude == 0) | (magnitude >= np.finfo(np.float32).smallest_normal)
    ideal = _ideal(case) * factor
    least = {"float16": np.finfo(np.float16).smallest_normal}.get(
        case.scheme.scale_dtype, np.finfo(np.float32).smallest_normal
    )
    stored = case.quantized.scale.double().numpy() * factor
    fits = (ideal == 0) | ((ideal >= least) & (stored >= least))
    whole = case.quantized.global_scale
    if whole is not None:
        fits &= bool(ideal.max(initial=0) == 0 or whole * factor >= SMALLEST_OF_TENSOR)
    together = case.scheme.strategy == "tensor" or whole is not None
    if together or not case.rounder.capabilities.row_independent:
        return np.full(len(magnitude), bool(normal.all() and fits.all()))
    rows: Mask = normal.all(1) & fits.all(1)
    return rows


def _unless_mirrored(rounder: Any, scheme: Scheme) -> str | None:
    return None if scheme.symmetric else "the grid is not its own mirror image"


@check("rounder", "algebra", "B1.g", unless=layers(claimed(SignSymmetric), _unless_mirrored))
def sign_symmetry(case: RounderCase) -> Outcome:
    """Where the grid is its own mirror image, -W has the codes of W with the other sign."""
    grid = case.problem.grid
    if not grid.mirrored or case.weight.numel() == 0:
        return SKIPPED
    made, mirrored = case.quantized, case.again(weight=-case.weight)
    same_bits(-made.codes, mirrored.codes, "codes of -W")
    same_bits(made.scale, mirrored.scale, "scales of -W")
    return None


@check("rounder", "algebra", "B1.e", unless=layers(claimed(Idempotent)))
@every_third
def idempotence(case: RounderCase) -> Outcome:
    """To round what the codes stand for gives the same values again; with float32 scales, codes.

    Where codes reach the ends of the grid, for then the values span what the weights spanned.
    The ends of the full symmetric grid are no values of it; the mse observer may clip once more.
    """
    groups, single = _spanned(case), case.scheme.scale_dtype == "float32"
    if not groups.any() or not (single or _claims_exact(case.rounder)):
        return SKIPPED
    made = case.quantized
    values = rounding.dequantize(made)
    again = case.again(weight=values)
    chosen = torch.from_numpy(_of_weights(case, groups))
    same_bits(made.codes[chosen], again.codes[chosen], "codes of the values")
    if not single:
        same_bits(values[chosen], rounding.dequantize(again)[chosen], "values of the values")
    return None


def _spanned(case: RounderCase) -> Mask:
    """Return which groups have codes at the ends of the grid, [rows or 1, groups]."""
    made, grid = case.quantized, case.problem.grid
    mirrored = case.scheme.symmetric and grid.mirrored
    kept = case.scheme.observer == "minmax" and case.scheme.scale_rule != "ocp"
    if not kept or not (mirrored or not case.scheme.symmetric) or not _ends_are_exact(case):
        return np.zeros(made.scale.shape, np.bool_)
    codes = made.codes.numpy()
    low, high = _any_of_groups(case, codes == grid.qmin), _any_of_groups(case, codes == grid.qmax)
    return low | high if mirrored else low & high


def _ends_are_exact(case: RounderCase) -> bool:
    """Return whether scales times the ends of the grid are float32 numbers, as B1.e wants them.

    With float32 scales it is enough that codes come again. The scale of a tensor comes again where
    its largest group has codes at an end, so not in asymmetric schemes.
    """
    dtype, grid = case.scheme.scale_dtype, case.problem.grid
    if dtype == "float32":
        return True
    span = grid.reach if case.scheme.symmetric else grid.qmax - grid.qmin
    digits = {"float16": 13, "bfloat16": 16, "e8m0": 24, "e4m3": 4}[dtype]
    fits = float(np.ldexp(span, digits - np.frexp(span)[1])).is_integer()
    return fits and not (case.scheme.two_level and not case.scheme.symmetric)


def _of_weights(case: RounderCase, groups: Mask) -> Mask:
    """Return a mask of groups as one of weights, [rows, columns]."""
    return np.broadcast_to(groups[:, case.quantized.group_index.numpy()], case.weight.shape)


def _claims_exact(rounder: Any) -> bool:
    return any(isinstance(claim, Idempotent) and claim.exact for claim in claims_of(rounder))


def _unless_exact(rounder: Any, subject: Any) -> str | None:
    """Return why values may come out otherwise although codes do not, or None."""
    return None if _claims_exact(rounder) else "Idempotent is not claimed to be exact"


_EXACT = (*map(claimed, (Idempotent, SchemeScale, HalfStep)), _unless_exact)


@check("rounder", "algebra", "B1.e", unless=layers(*_EXACT))
def fixed_point(case: RounderCase) -> Outcome:
    """A group that lies on the grid of its own scale is given back bit for bit."""
    if case.scheme.observer != "minmax" or case.weight.numel() == 0:
        return SKIPPED
    grid, dtype = case.problem.grid, case.scheme.scale_dtype
    if (case.scheme.symmetric and not grid.mirrored) or case.scheme.scale_rule == "ocp":
        return SKIPPED
    ideal, whole = _ideal(case), case.quantized.global_scale
    unit = np.float32(1) if whole is None else whole.numpy()
    stored = round_up(torch.from_numpy(np.float32(ideal) / unit), dtype).numpy() * unit
    lo, hi = group_ranges(case.problem, case.quantized.group_index)
    extent = hi - lo
    exact = (ideal > 0) & (stored == ideal) & (np.float32(extent) == extent)
    scale = np.broadcast_to(ideal[:, case.quantized.group_index.numpy()], case.weight.shape)
    weight = case.weight.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        if grid.values is None:
            steps = np.rint(weight / scale)
        else:
            steps = bounds.nearest_value(weight / scale, grid.values)
        on_grid = weight == np.float32(steps * scale)
    exact &= ~_any_of_groups(case, ~on_grid)
    if not exact.any():
        return SKIPPED
    chosen = _of_weights(case, exact)
    values = rounding.dequantize(case.quantized).numpy()
    same_bits(weight[chosen] + 0.0, values[chosen] + 0.0, "weights that lie on the grid")
    return None


def _any_of_groups(case: RounderCase, mask: Mask) -> Mask:
    """Return which groups have a weight in the mask, [rows or 1, groups]."""
    index, groups = case.quantized.group_index.numpy(), case.quantized.scale.shape[1]
    found = np.zeros((len(mask), groups), np.bool_)
    rows, columns = np.nonzero(mask)
    found[rows, index[columns]] = True
    if case.scheme.strategy == "tensor":
        found[:1] = found.any(0)
        found = found[:1]
    return found
