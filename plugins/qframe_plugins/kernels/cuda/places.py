"""Where columns lie in a weight that was laid out group after group, in whole steps.

A step is 32 columns: what one matrix instruction takes of a row of eight-bit codes. A group begins
at a step, so groups may have any size, and any columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

STEP: Final = 32


@dataclass(frozen=True)
class Places:
    """Places of columns.

    at       [columns] int64, the place of each column
    column   [pitch] int32, the column at each place, -1 for none
    starts   [groups + 1] int32, the place at which each group begins
    group    [pitch / STEP] int32, the group of each step
    """

    at: torch.Tensor
    column: torch.Tensor
    starts: torch.Tensor
    group: torch.Tensor

    @property
    def pitch(self) -> int:
        """How many places there are, a multiple of STEP."""
        return len(self.column)

    @cached_property
    def in_order(self) -> bool:
        """Whether every column is its own place."""
        import torch

        same = torch.arange(self.pitch, dtype=torch.int32, device=self.column.device)
        return bool((self.column == same).all())

    @cached_property
    def ends(self) -> torch.Tensor:
        """The group that ends with each step, -1 for none, [pitch / STEP] int32."""
        import torch

        last = torch.ones_like(self.group, dtype=torch.bool)
        last[:-1] = self.group[1:] != self.group[:-1]
        return torch.where(last, self.group, -1)


def lay_out_columns(group_index: torch.Tensor, groups: int) -> Places:
    """Return the places of columns; group_index [columns] int32."""
    import torch

    index, device = group_index.long(), group_index.device
    count = torch.bincount(index, minlength=groups)
    steps = -(-count // STEP)
    starts = torch.zeros(groups + 1, dtype=torch.int64, device=device)
    starts[1:] = (STEP * steps).cumsum(0)
    order = torch.argsort(index, stable=True)
    of_group = index[order]
    rank = torch.arange(len(order), device=device) - (count.cumsum(0) - count)[of_group]
    at = torch.empty_like(index)
    at[order] = starts[of_group] + rank
    column = torch.full((int(starts[-1]),), -1, dtype=torch.int32, device=device)
    column[at] = torch.arange(len(index), dtype=torch.int32, device=device)
    group = torch.repeat_interleave(torch.arange(groups, device=device), steps)
    return Places(at, column, starts.to(torch.int32), group.to(torch.int32))
