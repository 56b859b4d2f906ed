"""Attention: over a cache in codes, decoded, then multiplied; and of the newest token over numbers.

Query heads that share keys are multiplied as queries of one head, so keys and values are not
repeated. scaled_dot_product_attention is not called: it does not return log sum exp, without which
parts of a text cannot be merged, and its kernel for CPUs answers 0 to a query with a NaN, as to one
that may see no token. It would save little: decoding takes most of the time.

Error: decoded with two roundings; sums in float32 in the order of the BLAS (docs/bounds.md, B7.e,
B7.i).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from qframe_plugins.kernels.torch_native.layout import row_major

_BYTE, _WORD = 8, 32


def attend(
    q: torch.Tensor, keys: tuple[Any, ...], values: tuple[Any, ...], tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(z) V and log sum exp z: [batch, heads, head_dim], [batch, heads] float32.

    keys, values   words, scale, offset and scheme, as operands of `attention_kv`
    """
    batch, heads, width = q.shape
    k, v = (decoded(words, parts, tokens, width) for words, *parts in (keys, values))
    shared = q.reshape(batch, k.shape[1], heads // k.shape[1], width) / math.sqrt(width)
    logits = shared @ k.transpose(-1, -2)
    out = (logits.softmax(-1) @ v).reshape(batch, heads, width)
    return out, logits.logsumexp(-1).reshape(batch, heads)


def attend_newest(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `attention_rotary` returns. Keys and values of those before are not copied."""
    batch, heads, width = q.shape
    kv_heads, tokens = keys.shape[1:3]
    key = _turned(k, cos, sin)
    shared = _turned(q, cos, sin).reshape(batch, kv_heads, heads // kv_heads, width) * scaling
    past, own = shared @ keys.transpose(-1, -2), shared @ key[..., None]
    weights = torch.cat((past, own), -1).softmax(-1)
    out = weights[..., :tokens] @ values + weights[..., tokens:] * v[:, :, None]
    return out.reshape(batch, heads, width), key


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x cos + x' sin of [batch, heads, head_dim], x' being (- second half, first half)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def decoded(words: torch.Tensor, parts: Sequence[Any], tokens: int, width: int) -> torch.Tensor:
    """Return scale * code + offset, [batch, kv heads, tokens, head_dim] float32.

    parts   scale, offset and scheme
    """
    scale, offset, scheme = parts
    batch, heads, rows, _ = words.shape
    channel = scheme.axis == "channel"
    codes = unpacked(words, scheme.num_bits, scheme.step if channel else width)
    if channel:  # a row is a channel of a group of tokens
        codes = codes.reshape(batch, heads, rows // width, width, scheme.step)
        scale, offset = scale[..., None], offset[..., None]
    elif scale.shape[3] > 1:
        group = torch.arange(width, device=words.device) // scheme.group_size
        scale, offset = scale.index_select(3, group), offset.index_select(3, group)
    numbers = codes.to(torch.float32)
    if scheme.grid.qmin:
        numbers += scheme.grid.qmin
    numbers = numbers.mul_(scale).add_(offset)
    if channel:
        numbers = numbers.transpose(3, 4).flatten(2, 3)
    return numbers[:, :, :tokens]


def unpacked(words: torch.Tensor, num_bits: int, count: int) -> torch.Tensor:
    """Return the codes of rows of words, [..., count] uint8 or int64, 0 .. 2^num_bits - 1.

    words   [..., ceil(count * num_bits / 32)] int32, lowest bits first; a code of 3, 5, 6 or 7 bits
            may begin in one word and end in the next
    """
    mask = (1 << num_bits) - 1
    if _BYTE % num_bits == 0 and sys.byteorder == "little":
        stored = row_major(words).view(torch.uint8)
        parts = [stored >> shift & mask for shift in range(0, _BYTE, num_bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    start = torch.arange(count, device=words.device) * num_bits
    first = start // _WORD
    last = (first + 1).clamp(max=words.shape[-1] - 1)  # where it is not needed, any will do
    low = words.index_select(-1, first).long() & 0xFFFFFFFF
    high = words.index_select(-1, last).long() << _WORD
    return (high | low) >> start % _WORD & mask
