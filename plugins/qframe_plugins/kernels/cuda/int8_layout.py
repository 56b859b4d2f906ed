"""Weights and tokens in eight bits as the products read them: group after group, in whole steps.

What is left of a group's last step is zeros. Weights are laid out once, tokens in each call, by
`place_codes`, unless they lie right as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numba import cuda, int8, int32, uint32

from qframe.errors import UnsupportedError
from qframe_plugins.kernels.cuda.compile import inlined, source
from qframe_plugins.kernels.cuda.device import Fresh, Launcher, dense
from qframe_plugins.kernels.cuda.places import Places, lay_out_columns
from qframe_plugins.kernels.cuda.tokens import FULL, LARGEST, THREADS, WARPS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Int8Weight:
    """A weight: scale * (code - zero).

    codes         [rows, pitch] int8, columns in the order of `places`
    scale, zero   [rows or 1, groups] float32 and int32
    places        where columns lie
    as_it_is      tokens need not be laid out: places are columns, and no zero counts
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    places: Places
    as_it_is: bool


def lay_out(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_index: torch.Tensor
) -> Int8Weight:
    """Return a weight group after group.

    codes         [rows, columns] int8 or int16
    scale         [rows or 1, groups] float32; zero_point like it, int16
    group_index   [columns] int32

    Raises UnsupportedError for codes of more than eight bits, and for sums that an int32 may not
    hold.
    """
    import torch

    rows, groups, index = len(codes), scale.shape[1], group_index.long()
    wide, zero = codes.to(torch.int32), zero_point.to(torch.int32)
    shift = 0
    if wide.numel():
        least, most = int(wide.min()), int(wide.max())
        if least < -128 or most > 127:
            shift = least + 128
        if most - shift > 127:
            raise UnsupportedError(
                f"codes lie in {least}..{most}, expected at most 256 neighbouring numbers"
            )
    places = lay_out_columns(group_index, groups)
    longest = int(torch.bincount(index, minlength=groups).max()) if groups else 0
    size = int((wide - zero.index_select(1, index)).abs().max()) if wide.numel() else 0
    if size * LARGEST * longest >= 2**31:
        raise UnsupportedError(
            f"an int32 may not hold sums of {longest} products of up to {size} * {LARGEST}; "
            "use smaller groups, or another backend"
        )
    laid = torch.zeros(rows, places.pitch, dtype=torch.int8, device=codes.device)
    laid[:, places.at] = (wide - shift).to(torch.int8)
    zero = (zero - shift).contiguous()
    return Int8Weight(
        codes=laid,
        scale=dense(scale),
        zero=zero,
        places=places,
        as_it_is=places.in_order and not bool(zero.any()),
    )


def lay_out_channels(w_codes: torch.Tensor, w_scale: torch.Tensor) -> Int8Weight:
    """Return a weight with one scale for each row: one group of all columns."""
    import torch

    zero = torch.zeros(len(w_scale), 1, dtype=torch.int16, device=w_codes.device)
    index = torch.zeros(w_codes.shape[1], dtype=torch.int32, device=w_codes.device)
    return lay_out(w_codes, w_scale[:, None], zero, index)


def lay_out_tokens(
    on: Launcher, x_codes: torch.Tensor, weight: Int8Weight
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [tokens, pitch] int8, their sum over each group [tokens, groups] int32)."""
    import torch

    (tokens, columns), places = x_codes.shape, weight.places
    groups = len(places.starts) - 1
    sums = torch.zeros(tokens, groups, dtype=torch.int32, device=x_codes.device)
    if weight.as_it_is:
        return dense(x_codes), sums
    codes = torch.empty(tokens, places.pitch, dtype=torch.int8, device=x_codes.device)
    grid = tokens, -(-groups // WARPS)
    given = dense(x_codes), places.column, places.starts, Fresh(codes), sums
    on.launch(place_codes, grid, THREADS, *given, columns, places.pitch, groups)
    return codes, sums


@inlined
def sum_of_lanes(number, lanes):  # type: ignore[no-untyped-def]
    """Return the sum over neighbouring lanes, a power of two of them, in each of them."""
    distance = uint32(lanes >> uint32(1))
    while distance > uint32(0):
        number += cuda.shfl_xor_sync(FULL, number, distance)
        distance = uint32(distance >> uint32(1))
    return number


@inlined
def integers_of_lanes(number, lanes):  # type: ignore[no-untyped-def]
    """Return the sum of int32 over neighbouring lanes; in 64 bits each would be sent twice."""
    distance = uint32(lanes >> uint32(1))
    while distance > uint32(0):
        number = int32(number + cuda.shfl_xor_sync(FULL, number, distance))
        distance = uint32(distance >> uint32(1))
    return number


@source("int8*, int32*, int32*, int8*, int32*, uint32, uint32, uint32")
def place_codes(x, place, starts, codes, sums, columns, pitch, groups):  # type: ignore[no-untyped-def]
    """Set the codes of a token, and their sums; each warp takes a group."""
    token = uint32(cuda.blockIdx.x)
    thread = uint32(cuda.threadIdx.x)
    group = uint32(uint32(cuda.blockIdx.y * uint32(WARPS)) + uint32(thread >> uint32(5)))
    if group < groups:
        total = int32(0)
        at = uint32(uint32(starts[group]) + uint32(thread & uint32(31)))
        while at < uint32(starts[uint32(group + uint32(1))]):
            column = place[at]
            code = int8(0)
            if column >= int32(0):
                code = x[uint32(uint32(token * columns) + uint32(column))]
            codes[uint32(uint32(token * pitch) + at)] = code
            total = int32(total + int32(code))
            at = uint32(at + uint32(32))
        total = integers_of_lanes(total, uint32(32))
        if thread & uint32(31) == uint32(0):
            sums[uint32(uint32(token * groups) + group)] = total
