"""What to quantize a KV cache to: axis, bits, and which tokens are kept as they came.

One scheme says how the keys, or the values, of a layer are stored; a cache's scheme has both.
The words are those of design and field: KIVI (Liu et al., ICML 2024, arXiv:2402.02750) quantizes
keys per channel and values per token, and keeps the last `residual_length` tokens; attention
sinks (Xiao et al., ICLR 2024, arXiv:2309.17453) are the first tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qframe.contracts import Grid
from qframe.scheme import ScaleDtype
from qframe.strict import Strict, suggestion

_SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WORD = 32  # rows of codes are padded to whole words of so many bits, at most

KV_CHUNK = 16  # tokens that are read through a cache at a time, where a network is scored

DEFAULT_METHOD = "kivi"
DEFAULT_PRESET = "KV4"
KV_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    name: {
        "key": {"axis": "channel", "group_size": keys, **both},
        "value": {"axis": "token", "group_size": values, "symmetric": bits == 8, **both},
    }
    for name, bits, keys, values, residual in (
        ("KV8", 8, 128, None, 32),
        ("KV4", 4, 64, 64, 32),
        ("KV2", 2, 32, 32, 128),
    )
    for both in ({"num_bits": bits, "residual_length": residual},)
}
"""KIVI's setting, keys per channel and values per token, for 8, 4 and 2 bits.

With 8 bits values have no offset: their channels lie about 0, and a token of 64 is smaller by 3 %.
"""


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


_BOTH = (*KVScheme.model_fields, *KVScheme.aliases)
_AXES = {"axis_key": "key", "axis_value": "value"}


class KVCacheScheme(Strict):
    """How the KV cache of a network is stored.

    key, value   a scheme each; fields that are left out are those of the preset
    method       which plugin stores them; `qframe plugins` lists those with KV caches
    options      options of the plugin

    May be given by the name of a preset, alone or as `preset` beside fields that differ. A field of
    a scheme that stands beside `key` and `value` goes to both. `axis_key` and `axis_value`, which
    other tools have, are the axes of the two.

    >>> KVCacheScheme.preset("KV2", residual_length=32).key.describe()
    'int2 asymmetric, per channel, group 32, last 32 tokens and first 0 kept'
    """

    key: KVScheme
    value: KVScheme
    method: str = DEFAULT_METHOD
    options: Mapping[str, Any] = Field(default_factory=dict)

    shared: ClassVar[tuple[str, ...]] = ("preset", *_BOTH, *_AXES)

    @model_validator(mode="before")
    @classmethod
    def _parts_from_preset(cls, data: Any) -> Any:
        given = {"preset": data} if isinstance(data, str) else data
        if not isinstance(given, Mapping):
            return data
        given = dict(given)
        name = str(given.pop("preset", DEFAULT_PRESET))
        if name.upper() not in KV_PRESETS:
            raise ValueError(f"unknown preset {name!r}{suggestion(name.upper(), KV_PRESETS)}")
        both = KVScheme.canonical({key: given.pop(key) for key in _BOTH if key in given})
        axes = {part: given.pop(word) for word, part in _AXES.items() if word in given}
        for part, preset in KV_PRESETS[name.upper()].items():
            own = given.get(part, {})
            if isinstance(own, KVScheme):
                own = own.model_dump()
            if isinstance(own, Mapping):
                own = KVScheme.canonical(own)
                if part in axes:
                    if "axis" in own:
                        raise ValueError(f"'axis_{part}' and the axis of {part!r} are both given")
                    own["axis"] = axes[part]
                given[part] = {**preset, **both, **own}
        return given

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return a preset, with changes. Raises RecipeError."""
        return cls.parse({"preset": name, **changes}, "kv_cache_scheme")

    @property
    def parts(self) -> Mapping[str, KVScheme]:
        """The schemes by the kind of store: "key" and "value"."""
        return {"key": self.key, "value": self.value}

    @property
    def bits(self) -> str:
        """The bits of keys and of values, e.g. "int8/int4", or "int4" where they are the same."""
        return "/".join(dict.fromkeys(f"int{part.num_bits}" for part in self.parts.values()))

    def describe(self) -> str:
        """Return a description, e.g. for reports."""
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.method}{options}; keys {self.key.describe()}; values {self.value.describe()}"
