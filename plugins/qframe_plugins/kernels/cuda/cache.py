"""Keys or values of a cache in codes, as kernels read them: scale * code + offset.

A row of codes is a token's `head_dim` codes (axis "token"), or those of one channel of the tokens
of a group (axis "channel"); a code of three bits may lie in two words. Kernels take what places are
counted with, `Numbers`, one after the other.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from numba import cuda, float32, int32, uint32

from qframe_plugins.kernels.cuda.compile import inlined
from qframe_plugins.kernels.cuda.device import dense

if TYPE_CHECKING:
    import torch

    from qframe import KVScheme


@dataclass(frozen=True)
class Numbers:
    """How to find a code.

    bits     of a code
    lowest   the code that is stored as 0
    rows     of a head; words: of a row
    step     tokens of a group, 0 where each token has its own scales
    span     channels of a group; groups: of channels, for a token or a group of them
    above    scales of a head
    """

    bits: int
    lowest: int
    rows: int
    words: int
    step: int
    span: int
    groups: int
    above: int


TYPES = "int32*, float32*, float32*, uint32, int32, uint32, uint32, uint32, uint32, uint32, uint32"
"""What a kernel takes of a cache: words, scale, offset, and `Numbers`."""


def arguments(
    words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, scheme: KVScheme, width: int
) -> tuple[torch.Tensor | int, ...]:
    """Return what a kernel takes of a cache; width: head_dim."""
    numbers = Numbers(
        bits=scheme.num_bits,
        lowest=scheme.grid.qmin,
        rows=words.shape[2],
        words=words.shape[3],
        step=scheme.step if scheme.axis == "channel" else 0,
        span=1 if scheme.axis == "channel" else scheme.group_size or width,
        groups=scale.shape[3],
        above=scale.shape[2] * scale.shape[3],
    )
    return dense(words), dense(scale), dense(offset), *astuple(numbers)


@inlined
def code_at(words, row, at, bits, lowest):  # type: ignore[no-untyped-def]
    """Return a code as a float32: the one at place `at` of the row that begins at words[row]."""
    bit = uint32(at * bits)
    word = uint32(row + uint32(bit >> uint32(5)))
    shift = uint32(bit & uint32(31))
    code = uint32(uint32(words[word]) >> shift)
    if uint32(shift + bits) > uint32(32):  # the rest is in the next word
        rest = uint32(words[uint32(word + uint32(1))])
        code = uint32(code | uint32(rest << uint32(uint32(32) - shift)))
    code = uint32(code & uint32(uint32(uint32(1) << bits) - uint32(1)))
    return float32(int32(int32(code) + lowest))


@inlined
def number_at(  # type: ignore[no-untyped-def]
    head, token, channel, width, all_words, scale, offset, bits, lowest, rows, words, step, span,
    groups, above,
):  # fmt: skip
    """Return what a head's cache holds of a token in a channel."""
    row, at = token, channel
    group = uint32(uint32(token * groups) + uint32(channel // span))
    if step != uint32(0):
        of_tokens = uint32(token // step)
        row = uint32(uint32(of_tokens * width) + channel)
        at = uint32(token - uint32(of_tokens * step))
        group = uint32(uint32(of_tokens * groups) + channel)
    row = uint32(uint32(uint32(head * rows) + row) * words)
    group = uint32(uint32(head * above) + group)
    code = code_at(all_words, row, at, bits, lowest)
    return cuda.fma(scale[group], code, offset[group])
