"""Step 4, rounding: scales from weights, codes from scales, weights from codes.

What a rounder needs besides its own idea: `fit_scales` applies the scheme's scale rule,
`encode` rounds to nearest, `dequantize` says what codes mean. All of it is float32 arithmetic,
elementwise or reduced within a group, hence the same bits whatever the thread count.

Conventions (docs/bounds.md, B1): rounding is half to even; the range of an asymmetric group
always holds 0; zero points lie in [qmin, qmax]; stored scales are rounded *up*, so that storing
a scale never clips a weight; an all-zero group has scale 1 and the code of 0. On a grid with
values the nearest value is taken, and of two that are as near the one with the even code (B2.d).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from qframe import pages, parallel, passes, scales
from qframe.contracts import Grid, QuantizedWeight, RoundingProblem
from qframe.errors import NonFiniteError, UnsupportedError
from qframe.scales import round_down, round_up, smallest_positive
from qframe.scheme import Scheme

__all__ = [
    "SHRINKS",
    "check_scales",
    "dequantize",
    "encode",
    "ends",
    "expand",
    "fit_scales",
    "group_index",
    "nearest_value",
    "round_down",
    "round_up",
    "scale_of_range",
    "shares",
    "smallest_positive",
    "strips",
    "tensor_scale",
    "to_nearest",
]

_STRIP = 1 << 18  # weights of a strip
SHRINKS = tuple(1 - k / 100 for k in range(80))  # candidates of the mse scale search


def group_index(columns: int, scheme: Scheme) -> torch.Tensor:
    """Return the group of each column, [columns] int32, for contiguous groups."""
    return torch.arange(columns, dtype=torch.int32) // scheme.group_width(columns)


def scale_of_range(
    lo: torch.Tensor,
    hi: torch.Tensor,
    scheme: Scheme,
    grid: Grid,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, zero_point) that cover [lo, hi], elementwise, both float32.

    global_scale   [1], what scales of a two-level scheme are multiples of; see `tensor_scale`

    Symmetric: scale = max(|lo|, |hi|) / grid.reach. With the full grid of b bits this puts the end
    of the range half a step beyond qmax, so the half-step bound holds there too.
    Asymmetric: scale = (hi - lo) / (qmax - qmin), zero_point = qmin - lo / scale, rounded.

    Raises UnsupportedError for a grid whose values do not reach what the scheme asks for.
    """
    extent, scale = _ideal(lo, hi, scheme, grid)
    if scheme.scale_rule == "ocp":
        power = torch.frexp(extent).exponent - int(np.frexp(grid.reach)[1])
        scale = scales.power_of_two(power.clamp(-127, 127))
        scale = torch.where(torch.isfinite(extent), scale, torch.inf)
    elif global_scale is None:
        scale = round_up(scale, scheme.scale_dtype)
    else:  # the clamp is for what two roundings may add to the largest group
        own = (scale / global_scale).clamp(max=scales.largest_number(scheme.scale_dtype))
        scale = round_up(own, scheme.scale_dtype)
    # A group that is not all zero must not vanish because its scale underflows.
    scale = torch.where((scale == 0) & (extent > 0), smallest_positive(scheme.scale_dtype), scale)
    scale = torch.where(extent == 0, torch.ones_like(scale), scale)
    if global_scale is not None:
        scale = scale * global_scale
    if scheme.symmetric:
        return scale, torch.zeros_like(scale)
    zero = torch.clamp(torch.round(grid.qmin - lo.clamp(max=0) / scale), grid.qmin, grid.qmax)
    return scale, zero


def _ideal(
    lo: torch.Tensor, hi: torch.Tensor, scheme: Scheme, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (extent, extent over what the grid covers at scale 1)."""
    if scheme.symmetric:
        if not grid.reach > 0:
            raise UnsupportedError(
                f"format {scheme.format_name!r}: its values do not lie on both sides of 0, so no "
                f"symmetric scheme can use it"
            )
        extent = torch.maximum(lo.abs(), hi.abs())
        return extent, extent / grid.reach
    if grid.values is not None:
        raise UnsupportedError(
            f"format {scheme.format_name!r}: zero points are for integers; use symmetric: true"
        )
    extent = hi.clamp(min=0) - lo.clamp(max=0)
    return extent, extent / (grid.qmax - grid.qmin)


def tensor_scale(weight: torch.Tensor, scheme: Scheme, grid: Grid) -> torch.Tensor | None:
    """Return what the scales of a two-level scheme are multiples of, [1] float32; else None.

    The largest scale of the minmax rule over the largest number of scale_dtype, rounded up to a
    power of two; 1 for a tensor of zeros.
    """
    if not scheme.two_level:
        return None
    grouped = _grouped(weight, scheme)
    if not grouped.numel():
        return torch.ones(1)
    extent, ideal = _ideal(grouped.amin(-1), grouped.amax(-1), scheme, grid)
    whole = scales.round_up_of_tensor(ideal.max() / scales.largest_number(scheme.scale_dtype))
    return torch.where(extent.max() == 0, 1.0, whole).reshape(1)


def fit_scales(
    weight: torch.Tensor, scheme: Scheme, grid: Grid, *, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale float32, zero_point int16), each [rows or 1, groups], by the scheme's rule.

    weight   [rows, columns] float32; groups are contiguous columns
    name     of the layer, for messages

    In a two-level scheme scales are numbers of scale_dtype times `tensor_scale` of the weight.

    Raises NonFiniteError when a scale does not fit its storage dtype.
    """
    grouped = _grouped(weight, scheme)
    lo, hi = ends(grouped)
    whole = tensor_scale(weight, scheme, grid)
    scale, zero = scale_of_range(lo, hi, scheme, grid, whole)
    if scheme.observer == "mse":
        best = _squared_error(grouped, scale, zero, scheme, grid)
        for shrink in SHRINKS[1:]:
            trial, trial_zero = scale_of_range(lo * shrink, hi * shrink, scheme, grid, whole)
            error = _squared_error(grouped, trial, trial_zero, scheme, grid)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, trial, scale)
            zero = torch.where(better, trial_zero, zero)
    check_scales(scale, scheme, name)
    return scale, zero.to(torch.int16)


def ends(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest number of each group, [rows, groups].

    grouped   [rows, groups, width] float32, width > 0; none is NaN
    """
    rows, groups, width = grouped.shape
    lowest, highest = grouped.new_empty(rows, groups), grouped.new_empty(rows, groups)

    def work(part: slice) -> None:
        bits = grouped[part].contiguous().view(torch.int32).view(-1, width).numpy()
        found = (each[part].view(torch.int32).view(-1).numpy() for each in (lowest, highest))
        passes.ends(bits, *found)

    parallel.each(work, shares(rows, groups * width))
    return lowest, highest


def check_scales(scale: torch.Tensor, scheme: Scheme, name: str) -> None:
    """Raise NonFiniteError when a scale overflowed its storage dtype."""
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError(
            f"layer {name!r}: a scale does not fit scale_dtype={scheme.scale_dtype!r}; "
            f"use scale_dtype='float32' or 'bfloat16' for this layer"
        )


def _even_width(index: torch.Tensor, groups: int) -> int:
    """Return the columns of a group where all are contiguous and have as many; 0 else.

    index   [columns], the group of each column
    """
    columns = len(index)
    width = columns // max(groups, 1)
    if not columns or width * groups != columns:
        return 0
    even = torch.arange(groups, dtype=index.dtype).repeat_interleave(width)
    return width if torch.equal(index, even) else 0


def expand(per_group: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Return per-group values [rows or 1, groups] as per-weight values [rows, columns]."""
    width = _even_width(index, per_group.shape[1])
    if width:  # copying runs is many times faster than looking each up
        runs = per_group[:, :, None].expand(-1, -1, width).reshape(-1, len(index))
        return runs.expand(rows, -1)
    return per_group[:, index.long()].expand(rows, -1)


def strips(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows that stay in the cache with what is made of them; none of no weights."""
    step = max(_STRIP // max(columns, 1), 1)
    for top in range(0, rows if columns else 0, step):
        yield slice(top, min(top + step, rows))


def shares(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows for work that takes each weight once: what threads may share."""
    if parallel.shared() > 1:
        yield from strips(rows, columns)
    elif rows and columns:
        yield slice(0, rows)


def _of_strip(
    per_group: torch.Tensor, part: slice, width: int, index: torch.Tensor
) -> torch.Tensor:
    """Return per-group values of some rows: [rows or 1, groups, 1] for even groups, of `width`."""
    own = per_group if len(per_group) == 1 else per_group[part]
    return own[:, :, None] if width else own[:, index.long()]


def encode(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    index: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Return the nearest codes, [rows, columns] int16: clip(rint(w / scale) + zero_point).

    index   [columns], the group of each column

    On a grid with values it is the code of the value nearest to w / scale, rounded to float32; of
    two that are as near, the even one.
    """
    found = pages.empty(weight.shape, torch.int16)
    if grid.values is None:
        runs = passes.runs_of(index.numpy())
        whole, step, shift = weight.numpy(), scale.numpy(), zero_point.numpy()

        def work(part: slice) -> None:
            own, s, z = (passes.part_of(each, part) for each in (whole, step, shift))
            passes.encode(own, s, z, runs, grid.qmin, grid.qmax, found[part].numpy())

        parallel.each(work, shares(*weight.shape))
    else:
        width = _even_width(index, scale.shape[1])

        def work(part: slice) -> None:
            step = _of_strip(scale, part, width, index)
            shape = (-1, *step.shape[1:2], width) if width else weight[part].shape
            codes = _nearest_place(weight[part].reshape(shape) / step, grid).add_(grid.qmin)
            found[part].view(shape).copy_(codes)

        parallel.each(work, strips(*weight.shape))
    return found


def nearest_value(quotient: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the value that the nearest code of a symmetric grid stands for, float32, elementwise.

    NaN stays NaN.
    """
    if grid.values is None:
        return torch.round(quotient).clamp(grid.qmin, grid.qmax)
    found = _values(grid)[_nearest_place(quotient, grid)]
    return torch.where(quotient.isnan(), quotient, found)


def _nearest_place(quotient: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return which value is the nearest, counted from 0, int32."""
    return torch.bucketize(quotient, _thresholds(grid), right=True, out_int32=True)


@lru_cache(maxsize=64)
def _thresholds(grid: Grid) -> torch.Tensor:
    """Return for each value but the first the least float32 that is rounded to it.

    The midpoint, where that is a float32 and the upper code is even; else the next float32 above
    it. Midpoints are exact in float64, unless neighbours are more than 2^29 times apart.
    """
    values = np.array(grid.values, np.float64)
    middles = (values[1:] + values[:-1]) / 2
    near = middles.astype(np.float32)
    upper_is_even = (np.arange(grid.qmin + 1, grid.qmax + 1) % 2) == 0
    reached = (near > middles) | ((near == middles) & upper_is_even)
    above = np.nextafter(near, np.float32(np.inf))
    return torch.from_numpy(np.where(reached, near, above))


@lru_cache(maxsize=64)
def _values(grid: Grid) -> torch.Tensor:
    """Return the values of a grid, float32."""
    return torch.tensor(grid.values, dtype=torch.float32)


def to_nearest(problem: RoundingProblem) -> QuantizedWeight:
    """Round to nearest: the baseline of every report, and what a layer falls back to."""
    scale, zero_point = fit_scales(problem.weight, problem.scheme, problem.grid, name=problem.name)
    index = group_index(problem.weight.shape[1], problem.scheme)
    codes = encode(problem.weight, scale, zero_point, index, problem.grid)
    return QuantizedWeight(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        group_index=index,
        grid=None if problem.grid.values is None else problem.grid,
        global_scale=tensor_scale(problem.weight, problem.scheme, problem.grid),
    )


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """Return the weights that the codes stand for, float32.

    scale * (code - zero_point), or scale * value where `quantized.grid` has values.
    """
    codes, index, grid = quantized.codes, quantized.group_index, quantized.grid
    scale, zero = quantized.scale, quantized.zero_point
    found = torch.empty(codes.shape)
    width = _even_width(index, scale.shape[1])
    for part in strips(*codes.shape):
        own_scale = _of_strip(scale, part, width, index)
        shape = (-1, *own_scale.shape[1:2], width) if width else codes[part].shape
        own = codes[part].reshape(shape)
        if grid is not None and grid.values is not None:
            steps = _values(grid)[(own - grid.qmin).int()]
        else:
            steps = (own - _of_strip(zero, part, width, index)).to(torch.float32)
        torch.mul(steps, own_scale, out=found[part].view(shape))
    return found


def _grouped(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the weight as [rows, groups, width]; a ragged tail is padded with zeros.

    Zeros change neither a symmetric extent nor a range that holds 0, and have no error.
    """
    if scheme.strategy == "tensor":
        return (weight if weight.numel() else weight.new_zeros(1)).reshape(1, 1, -1)
    rows, columns = weight.shape
    width, groups = scheme.group_width(columns), scheme.groups(columns)
    if groups * width != columns:
        weight = torch.nn.functional.pad(weight, (0, groups * width - columns))
    return weight.reshape(rows, groups, width)


def _squared_error(
    grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme, grid: Grid
) -> torch.Tensor:
    """Return the squared rounding error of each group, float64 [rows or 1, groups]."""
    scale, zero = scale[..., None], zero[..., None]
    if grid.values is not None:
        steps = _values(grid)[_nearest_place(grouped / scale, grid)]
    else:
        steps = (torch.round(grouped / scale) + zero).clamp(grid.qmin, grid.qmax) - zero
    error = (grouped - scale * steps).square()
    if scheme.strategy != "tensor":
        return error.sum(-1, dtype=torch.float64)
    # One reduction over a whole tensor would depend on the thread count: sum rows, then rows.
    return error.reshape(-1).to(torch.float64).cumsum(0)[-1:].reshape(1, 1)
