"""Weights in codes of 4 or 8 bits as the weight-only products read them, group after group.

A step of a row, 32 codes, is 4 or 8 words of 32 bits: one or two loads of 128. Codes are stored
less the lowest one, and the lowest bits come first. To a code belongs the number code - zero, an
integer, which is made without a conversion: 0x4B000000 are the bits of 2^23, whose last bit is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from numba import uint32

from qframe.errors import UnsupportedError
from qframe_plugins.kernels.cuda.compile import inlined
from qframe_plugins.kernels.cuda.device import dense
from qframe_plugins.kernels.cuda.intrinsics import float_of
from qframe_plugins.kernels.cuda.places import Places, lay_out_columns

if TYPE_CHECKING:
    import torch

_MAGIC: Final = 0x4B000000  # the bits of the float32 2^23
_OFFSET: Final = 2**23


@dataclass(frozen=True)
class PackedWeight:
    """A weight: scale * (code - zero).

    words    [rows, pitch * bits / 32] int32, the codes in the order of `places`
    bits     4 or 8
    scale    [rows or 1, groups] float32
    zero     like scale, float32: 2^23 + zero, less the lowest code
    places   where columns lie
    """

    words: torch.Tensor
    bits: int
    scale: torch.Tensor
    zero: torch.Tensor
    places: Places

    @property
    def step(self) -> int:
        """How many groups of scales a row has, 0 where all rows share theirs."""
        return self.scale.shape[1] if len(self.scale) > 1 else 0


def pack(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_index: torch.Tensor
) -> PackedWeight:
    """Return a weight group after group.

    codes         [rows, columns] int16
    scale         [rows or 1, groups] float32; zero_point like it, int16
    group_index   [columns] int32

    Raises UnsupportedError for codes of more than eight bits.
    """
    import torch

    places = lay_out_columns(group_index, scale.shape[1])
    least = int(codes.min()) if codes.numel() else 0
    span = int(codes.max()) - least if codes.numel() else 0
    if span > 255:
        raise UnsupportedError(
            f"codes lie in {least}..{least + span}, expected at most 256 neighbouring numbers"
        )
    bits = 4 if span < 16 else 8
    laid = torch.zeros(len(codes), places.pitch, dtype=torch.uint8, device=codes.device)
    laid[:, places.at] = (codes.to(torch.int32) - least).to(torch.uint8)
    if bits == 4:
        laid = laid[:, 0::2] | laid[:, 1::2] << 4
    zero = (zero_point.to(torch.int32) - least + _OFFSET).to(torch.float32)
    words = laid.contiguous().view(torch.int32)
    return PackedWeight(words, bits, dense(scale), zero.contiguous(), places)


@inlined
def steps_of(word, shift, mask, zero):  # type: ignore[no-untyped-def]
    """Return code - zero of the code at a shift of a word, exactly; `zero` is 2^23 more."""
    code = uint32(uint32(uint32(word) >> uint32(shift)) & uint32(mask))
    return float_of(uint32(code | uint32(_MAGIC))) - zero
