"""What to quantize a KV cache to: axis, bits, and which tokens are kept as they came.

One scheme says how the keys, or the values, of a layer are stored; keys and values have one each.
The words are those of design and field: KIVI (Liu et al., ICML 2024, arXiv:2402.02750) quantizes
keys per channel and values per token, and keeps the last `residual_length` tokens; attention
sinks (Xiao et al., ICLR 2024, arXiv:2309.17453) are the first tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qframe.contracts import Grid
from qframe.scheme import ScaleDtype
from qframe.strict import Strict

_SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WORD = 32  # rows of codes are padded to whole words of so many bits, at most


class KVScheme(Strict):
    """How the keys, or the values, of one layer are stored.

    num_bits          bits of a code, 2 to 8
    axis              who shares a scale. token: the channels of one token, in groups of
                      `group_size` (None: all of them). channel: `group_size` tokens of one channel
    group_size        see `axis`; the last group of a token may be shorter
    symmetric         x = scale * code; else x = scale * code + offset, and the range of a group
                      goes from its smallest to its largest number, whether it holds 0 or not
    residual_length   the last tokens that are kept as they came
    sink_tokens       the first tokens that are kept as they came
    scale_dtype       how scales and offsets are stored: scales are rounded up and offsets down, so
                      that nothing is clipped by it

    >>> KVScheme(num_bits=2, axis="channel", group_size=32).describe()
    'int2 asymmetric, per channel, group 32, last 128 tokens and first 0 kept'
    """

    num_bits: int = 4
    axis: Literal["token", "channel"] = "token"
    group_size: int | None = None
    symmetric: bool = False
    residual_length: int = 128
    sink_tokens: int = 0
    scale_dtype: ScaleDtype = "float16"

    aliases: ClassVar[Mapping[str, str]] = {
        "bits": "num_bits",
        "nbits": "num_bits",
        "sym": "symmetric",
        "q_group_size": "group_size",
    }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"num_bits must lie in 2..8, got {self.num_bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.axis == "channel" and self.group_size is None:
            raise ValueError(
                "axis 'channel' needs group_size: how many tokens of a channel share a scale"
            )
        for name in ("residual_length", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        return self

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changes, validated."""
        return self.parse({**self.model_dump(), **changes}, "kv_cache_scheme")

    @property
    def type(self) -> str:
        """The type of number, in the words of `Capabilities`."""
        return "int"

    @property
    def strategy(self) -> str:
        """The axis, in the words of `Capabilities`."""
        return self.axis

    @property
    def grid(self) -> Grid:
        """The codes: signed when symmetric, else from zero."""
        if self.symmetric:
            half = 1 << (self.num_bits - 1)
            return Grid(-half, half - 1)
        return Grid(0, (1 << self.num_bits) - 1)

    @property
    def step(self) -> int:
        """How many tokens can only be quantized together."""
        return self.group_size if self.axis == "channel" and self.group_size else 1

    def scale_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return the shape of scales and offsets.

        shape   of the codes, [batch, heads, tokens, head_dim]
        """
        batch, heads, tokens, head_dim = shape
        if self.axis == "token":
            return batch, heads, tokens, -(-head_dim // (self.group_size or max(head_dim, 1)))
        return batch, heads, -(-tokens // self.step), head_dim

    def nbytes(self, shape: tuple[int, int, int, int], itemsize: int, quantized: int) -> int:
        """Return the bytes of a store, with rows of codes padded to whole 32-bit words.

        shape       of all tokens, [batch, heads, tokens, head_dim]
        itemsize    bytes of a number that is kept as it came
        quantized   how many of the tokens are codes

        A row of codes is what shares its scales: one token's, or one channel's of a token group.

        >>> KVScheme(num_bits=4, group_size=64).nbytes((1, 2, 256, 64), 2, quantized=128)
        41984
        """
        batch, heads, tokens, head_dim = shape
        *_, units, lanes = self.scale_shape((batch, heads, quantized, head_dim))
        rows, width = (units, head_dim) if self.axis == "token" else (units * lanes, self.step)
        words = rows * -(-width * self.num_bits // _WORD)
        scales = units * lanes * (1 if self.symmetric else 2) * _SCALE_BYTES[self.scale_dtype]
        kept = (tokens - quantized) * head_dim * itemsize
        return batch * heads * (words * _WORD // 8 + scales + kept)

    def describe(self) -> str:
        """Return a short description, e.g. for reports."""
        size = f", group {self.group_size}" if self.group_size else ""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"int{self.num_bits} {kind}, per {self.axis}{size}, last {self.residual_length} "
            f"tokens and first {self.sink_tokens} kept"
        )
