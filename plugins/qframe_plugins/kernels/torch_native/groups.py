"""A weight in groups, laid out once for PyTorch: group after group, code less zero point.

What a code stands for is scale * step. A step is an integer that is stored in the fewest bytes:
one for weights of up to seven bits whose zero points are codes, and for symmetric ones of eight.

Error: values are rounded once (docs/bounds.md, B1.d), sums of groups are exact (B5.f).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qframe_plugins.kernels.torch_native.codes import integer_product


@dataclass(frozen=True, eq=False, slots=True)
class Steps:
    """What `lay_out` returns.

    steps     [rows, columns] int8, int16 or int32, columns of a group side by side
    scale     [rows or 1, groups] float32
    counts    columns of each group
    order     the columns in this order, None where they lay so; [columns] int64
    largest   magnitude of the largest step
    """

    steps: torch.Tensor
    scale: torch.Tensor
    counts: tuple[int, ...]
    order: torch.Tensor | None
    largest: int

    def values(self, rows: slice) -> torch.Tensor:
        """Return scale * step of some rows, [rows, columns] float32, in the order of the steps."""
        steps = self.steps[rows]
        scale = self.scale if len(self.scale) == 1 else self.scale[rows]
        if len(set(self.counts)) == 1 and self.counts[0]:
            whole = steps.reshape(len(steps), len(self.counts), self.counts[0])
            return (whole * scale[:, :, None]).reshape(steps.shape)
        spread = torch.tensor(self.counts, device=scale.device)
        return steps * scale.repeat_interleave(spread, 1, output_size=steps.shape[1])

    def blocks(self) -> Blocks:
        """Return the same with each group in memory of its own."""
        parts = zip(self.steps.split(self.counts, 1), self.scale.unbind(1), strict=True)
        kept = tuple((steps.contiguous(), scale) for steps, scale in parts if steps.shape[1])
        return Blocks(kept, len(self.steps), self.order, self.largest)


@dataclass(frozen=True, eq=False, slots=True)
class Blocks:
    """A weight group by group.

    groups    (steps [rows, columns of the group], scale [rows or 1]) of every group with columns
    rows      of the weight
    order     as of `Steps`
    largest   as of `Steps`
    """

    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    rows: int
    order: torch.Tensor | None
    largest: int


def lay_out(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_index: torch.Tensor
) -> Steps:
    """Return the weight group after group; operands as of `linear_weight_only`."""
    index = group_index.long()
    steps = codes.to(torch.int32) - zero_point.to(torch.int32).index_select(1, index)
    order = None
    if bool((index[1:] < index[:-1]).any()):
        order = index.argsort(stable=True)
        steps = steps.index_select(1, order)
    counts = torch.bincount(index, minlength=scale.shape[1]).tolist()
    low, high = (int(each) for each in steps.aminmax()) if steps.numel() else (0, 0)
    narrow = (torch.int8, torch.int16)
    fits = (d for d in narrow if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
    steps = steps.to(next(fits, torch.int32)).contiguous()
    return Steps(steps, scale.contiguous(), tuple(counts), order, max(-low, high))


def multiply_floats(x: torch.Tensor, weight: Steps, chunk: int) -> torch.Tensor:
    """Return x W^T, [tokens, rows] float32; no more than `chunk` weights exist as numbers."""
    rows, columns = weight.steps.shape
    x = _arranged(x, weight.order)
    y = x.new_empty(len(x), rows)
    height = max(1, chunk // max(columns, 1))
    for first in range(0, rows, height):
        part = slice(first, first + height)
        y[:, part] = x @ weight.values(part).T
    return y


def multiply_codes(x_codes: torch.Tensor, x_scale: torch.Tensor, weight: Blocks) -> torch.Tensor:
    """Return s_x times the sum over groups of s_g a_g, [tokens, rows] float32."""
    x = _arranged(x_codes, weight.order)
    y = x_scale.new_zeros(len(x), weight.rows)
    first = 0
    for steps, scale in weight.groups:
        part = x[:, first : first + steps.shape[1]]
        y += integer_product(part, steps, weight.largest).to(torch.float32).mul_(scale)
        first += steps.shape[1]
    return y.mul_(x_scale[:, None])


def _arranged(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return x if order is None else x.index_select(1, order)
