"""Step 4, rounding: scales from weights, codes from scales, weights from codes.

What a rounder needs besides its own idea: `fit_scales` applies the scheme's scale rule,
`encode` rounds to nearest, `dequantize` says what codes mean. All of it is float32 arithmetic,
elementwise or reduced within a group, hence the same bits whatever the thread count.

Conventions (docs/bounds.md, B1): rounding is half to even; the range of an asymmetric group
always holds 0; zero points lie in [qmin, qmax]; stored scales are rounded *up*, so that storing
a scale never clips a weight; an all-zero group has scale 1 and the code of 0.
"""

from __future__ import annotations

import torch

from qframe.contracts import Grid, QuantizedWeight, RoundingProblem
from qframe.errors import NonFiniteError
from qframe.scheme import ScaleDtype, Scheme

SHRINKS = tuple(1 - k / 100 for k in range(80))  # candidates of the mse scale search

# What rounding up to a storage dtype needs: mantissa bits dropped from float32, the smallest
# normal and the smallest positive number, and the largest finite number.
_STORAGE = {
    "float16": (13, 2.0**-14, 2.0**-24, 65504.0),
    "bfloat16": (16, 2.0**-126, 2.0**-133, 3.3895313892515355e38),
}


def group_index(columns: int, scheme: Scheme) -> torch.Tensor:
    """Return the group of each column, [columns] int32, for contiguous groups."""
    return torch.arange(columns, dtype=torch.int32) // scheme.group_width(columns)


def round_up(scale: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """Return the least number of `dtype` that is >= scale, as float32; inf where none is.

    scale   any shape, float32, >= 0

    >>> round_up(torch.tensor([1.0, 1.0001]), "float16")
    tensor([1.0000, 1.0010])
    """
    if dtype == "float32":
        return scale
    dropped, normal, tiny, largest = _STORAGE[dtype]
    mask = (1 << dropped) - 1
    bits = scale.contiguous().view(torch.int32)
    up = ((bits + mask) & ~mask).view(torch.float32)
    subnormal = torch.ceil(scale * (1 / tiny)) * tiny if dtype == "float16" else up
    up = torch.where(scale < normal, subnormal, up)
    return torch.where(scale <= largest, up, torch.inf)  # inf for NaN too, whatever its bits


def round_down(x: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """Return the largest number of `dtype` that is <= x, as float32; -inf where none is.

    x   any shape, float32, finite, of any sign

    >>> round_down(torch.tensor([1.0001, -1.0001]), "float16")
    tensor([ 1.0000, -1.0010])
    """
    if dtype == "float32":
        return x
    dropped, normal, tiny, largest = _STORAGE[dtype]
    cut = (x.contiguous().view(torch.int32) & ~((1 << dropped) - 1)).view(torch.float32)
    if dtype == "float16":
        cut = torch.where(x < normal, torch.floor(x * (1 / tiny)) * tiny, cut)
    return torch.where(x < 0, -round_up(-x, dtype), cut.clamp(max=largest))


def smallest_positive(dtype: ScaleDtype) -> float:
    """Return the smallest positive number of a scale dtype."""
    return 2.0**-149 if dtype == "float32" else _STORAGE[dtype][2]


def scale_of_range(
    lo: torch.Tensor, hi: torch.Tensor, scheme: Scheme, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, zero_point) that cover [lo, hi], elementwise, both float32.

    Symmetric: scale = max(|lo|, |hi|) / ((qmax - qmin) / 2). With the full grid of b bits this
    puts the end of the range half a step beyond qmax, so the half-step bound holds there too.
    Asymmetric: scale = (hi - lo) / (qmax - qmin), zero_point = qmin - lo / scale, rounded.
    """
    if scheme.symmetric:
        extent = torch.maximum(lo.abs(), hi.abs())
        scale = extent / ((grid.qmax - grid.qmin) / 2)
    else:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        extent = hi - lo
        scale = extent / (grid.qmax - grid.qmin)
    scale = round_up(scale, scheme.scale_dtype)
    # A group that is not all zero must not vanish because its scale underflows.
    scale = torch.where((scale == 0) & (extent > 0), smallest_positive(scheme.scale_dtype), scale)
    scale = torch.where(extent == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, torch.clamp(torch.round(grid.qmin - lo / scale), grid.qmin, grid.qmax)


def fit_scales(
    weight: torch.Tensor, scheme: Scheme, grid: Grid, *, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale float32, zero_point int16), each [rows or 1, groups], by the scheme's rule.

    weight   [rows, columns] float32; groups are contiguous columns
    name     of the layer, for messages

    Raises NonFiniteError when a scale does not fit its storage dtype.
    """
    grouped = _grouped(weight, scheme)
    lo, hi = grouped.amin(-1), grouped.amax(-1)
    scale, zero = scale_of_range(lo, hi, scheme, grid)
    if scheme.observer == "mse":
        best = _squared_error(grouped, scale, zero, scheme, grid)
        for shrink in SHRINKS[1:]:
            trial, trial_zero = scale_of_range(lo * shrink, hi * shrink, scheme, grid)
            error = _squared_error(grouped, trial, trial_zero, scheme, grid)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, trial, scale)
            zero = torch.where(better, trial_zero, zero)
    check_scales(scale, scheme, name)
    return scale, zero.to(torch.int16)


def check_scales(scale: torch.Tensor, scheme: Scheme, name: str) -> None:
    """Raise NonFiniteError when a scale overflowed its storage dtype."""
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError(
            f"layer {name!r}: a scale does not fit scale_dtype={scheme.scale_dtype!r}; "
            f"use scale_dtype='float32' or 'bfloat16' for this layer"
        )


def expand(per_group: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Return per-group values [rows or 1, groups] as per-weight values [rows, columns]."""
    groups, columns = per_group.shape[1], len(index)
    width = columns // max(groups, 1)
    if columns and width * groups == columns:
        even = torch.arange(groups, dtype=index.dtype).repeat_interleave(width)
        if torch.equal(index, even):  # copying runs is many times faster than looking each up
            runs = per_group[:, :, None].expand(-1, -1, width).reshape(-1, columns)
            return runs.expand(rows, -1)
    return per_group[:, index.long()].expand(rows, -1)


def encode(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    index: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Return the nearest codes, [rows, columns] int16: clip(rint(w / scale) + zero_point).

    index   [columns], the group of each column
    """
    rows = weight.shape[0]
    steps = torch.round(weight / expand(scale, index, rows))
    codes = steps + expand(zero_point, index, rows)
    return codes.clamp(grid.qmin, grid.qmax).to(torch.int16)


def to_nearest(problem: RoundingProblem) -> QuantizedWeight:
    """Round to nearest: the baseline of every report, and what a layer falls back to."""
    scale, zero_point = fit_scales(problem.weight, problem.scheme, problem.grid, name=problem.name)
    index = group_index(problem.weight.shape[1], problem.scheme)
    codes = encode(problem.weight, scale, zero_point, index, problem.grid)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero_point, group_index=index)


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """Return the weights that the codes stand for: scale * (code - zero_point), float32."""
    rows, index = quantized.codes.shape[0], quantized.group_index
    steps = quantized.codes - expand(quantized.zero_point, index, rows)
    return steps.to(torch.float32) * expand(quantized.scale, index, rows)


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
    codes = (torch.round(grouped / scale) + zero).clamp(grid.qmin, grid.qmax)
    error = (grouped - scale * (codes - zero)).square()
    if scheme.strategy != "tensor":
        return error.sum(-1, dtype=torch.float64)
    # One reduction over a whole tensor would depend on the thread count: sum rows, then rows.
    return error.reshape(-1).to(torch.float64).cumsum(0)[-1:].reshape(1, 1)
