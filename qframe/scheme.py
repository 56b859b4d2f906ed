"""What to quantize to: number format, granularity, and the rule that makes scales.

The words are those of compressed-tensors; the words of GPTQ, AWQ and their relatives are
accepted as aliases. The microscaling formats are schemes: a number format, groups, and scales of
eight bits (OCP, Microscaling Formats (MX) Specification 1.0, 2023; NVIDIA's NVFP4). Schemes that
quantize activations as well are the field's W8A8 and its relatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qframe.errors import RecipeError
from qframe.strict import Strict, suggestion

ScaleDtype = Literal["float32", "float16", "bfloat16"]
WeightScaleDtype = Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"]
_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "e8m0": 8, "e4m3": 8}
_FIELD_FORMATS: Mapping[str, tuple[str, int]] = {
    "fp8_e4m3": ("float", 8),
    "fp8_e5m2": ("float", 8),
    "fp6_e2m3": ("float", 6),
    "fp6_e3m2": ("float", 6),
    "fp4_e2m1": ("float", 4),
    "nf4": ("float", 4),
    "ternary": ("int", 2),
}
"""Formats that the field knows by name -> (type, num_bits), which need not be said then."""
_USUAL = {"float8": "fp8_e4m3", "float4": "fp4_e2m1"}  # what type and bits alone mean
_WORD = 32  # packed rows are padded to whole 32-bit words


class _Codes(Strict):
    """What codes are: the fields that weights and activations have in common."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    format: str | None = None

    aliases: ClassVar[Mapping[str, str]] = {
        "bits": "num_bits",
        "data_type": "type",
        "sym": "symmetric",
    }

    @model_validator(mode="before")
    @classmethod
    def _a_format_brings_its_codes(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("format") not in _FIELD_FORMATS:
            return data
        out = cls.canonical(data)
        type_, bits = _FIELD_FORMATS[out["format"]]
        return {"num_bits": bits, "type": type_, **out}

    @model_validator(mode="after")
    def _codes_are_those_of_the_format(self) -> Self:
        if not 1 <= self.num_bits <= 8:
            raise ValueError(f"num_bits must lie in 1..8, got {self.num_bits}")
        known = _FIELD_FORMATS.get(self.format or "", (self.type, self.num_bits))
        if known != (self.type, self.num_bits):
            raise ValueError(
                f"format {self.format!r} has type {known[0]!r} and num_bits {known[1]}, got "
                f"{self.type!r} and {self.num_bits}; leave both away"
            )
        return self

    @property
    def format_name(self) -> str:
        """The number format that the codes are of, e.g. "int4"."""
        plain = f"{self.type}{self.num_bits}"
        return self.format or _USUAL.get(plain, plain)


class ActivationScheme(_Codes):
    """How the inputs of a layer are quantized, each time before they are multiplied.

    num_bits, type, format   of a code, as in `Scheme`. Integers are -(2^(b-1)-1)..2^(b-1)-1
    symmetric   always: zero points of inputs are not supported
    strategy    one scale per token, or per tensor: all tokens of a call
    dynamic     a scale is that of the inputs at hand: absmax over the largest value. If false, it
                is found in calibration and stored, one per tensor; what lies beyond is clipped
    observer    of a scale that is not dynamic: which observer says how far it has to reach

    >>> ActivationScheme(num_bits=8).describe()
    'int8 per token'
    """

    symmetric: Literal[True] = True
    strategy: Literal["token", "tensor"] = "token"
    dynamic: bool = True
    observer: str | None = None

    @model_validator(mode="after")
    def _found_once_or_each_time(self) -> Self:
        if not self.dynamic and self.strategy != "tensor":
            raise ValueError(
                f"dynamic: false stores one scale for all tokens, so it needs strategy 'tensor', "
                f"got {self.strategy!r}"
            )
        if self.dynamic and self.observer is not None:
            raise ValueError(
                f"observer={self.observer!r} is for dynamic: false; a dynamic scale is that of "
                f"the inputs at hand"
            )
        return self

    @property
    def static_observer(self) -> str | None:
        """The observer that a stored scale comes from; None for a dynamic one."""
        return None if self.dynamic else self.observer or "minmax"

    def describe(self) -> str:
        """Return a short description, e.g. "int8 per token"."""
        found = "" if self.dynamic else f", static {self.static_observer}"
        return f"{self.format_name} per {self.strategy}{found}"


class Scheme(_Codes):
    """How the weights of one layer are quantized, and whether its inputs are.

    num_bits      bits of a code
    type          int, codes are integers; float, they stand for values that a format lists
    format        the number format's name, e.g. nf4; by default that of type and num_bits: int4,
                  and for floats fp8_e4m3 and fp4_e2m1
    symmetric     zero point fixed at 0; else a zero point per scale, and the range holds 0
    strategy      one scale per tensor, per channel (row), or per group of `group_size` columns
    group_size    columns of a row that share a scale; the last group may be shorter
    observer      how a scale is found: minmax (nothing is clipped) or mse (the clipping that
                  has the least squared weight error)
    scale_rule    symmetric only. full: codes -2^(b-1)..2^(b-1)-1, scale absmax / (2^b - 1) * 2;
                  restricted: codes -(2^(b-1)-1)..2^(b-1)-1, scale absmax / (2^(b-1) - 1).
                  Floats have one grid, scale absmax / largest value. ocp, for floats with scales
                  e8m0: 2^(floor(log2 absmax) - floor(log2 largest)), which may clip
    scale_dtype   how scales are stored; they are rounded up, so that nothing is clipped by it.
                  e8m0: powers of two; e4m3: numbers of fp8_e4m3, times one float32 of the tensor
    input_activations   how the inputs are quantized; None for as they come

    >>> Scheme.preset("W4A16", group_size=64).bits_per_weight(576, 576)
    4.25
    """

    num_bits: int = 4
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group"] = "group"
    group_size: int | None = None
    observer: Literal["minmax", "mse"] = "minmax"
    scale_rule: Literal["full", "restricted", "ocp"] = "full"
    scale_dtype: WeightScaleDtype = "float16"
    input_activations: ActivationScheme | None = None

    aliases: ClassVar[Mapping[str, str]] = {
        **_Codes.aliases,
        "w_bit": "num_bits",
        "wbits": "num_bits",
        "q_group_size": "group_size",
        "groupsize": "group_size",
    }

    @model_validator(mode="before")
    @classmethod
    def _inverse_aliases_and_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        out = dict(data)
        for inverse in ("asym", "zero_point"):
            if inverse in out:
                if "symmetric" in out or "sym" in out:
                    raise ValueError(f"{inverse!r} and 'symmetric' are both given")
                if not isinstance(out[inverse], bool):  # bool("false") is True
                    raise ValueError(f"{inverse!r} must be true or false, got {out[inverse]!r}")
                out["symmetric"] = not out.pop(inverse)
        sizes = [key for key in ("group_size", "q_group_size", "groupsize") if key in out]
        if len(sizes) > 1:
            raise ValueError("'group_size' is given twice (also under an alias)")
        size = out[sizes[0]] if sizes else None
        if size == -1:  # the field's sentinel for "per channel"
            del out[sizes[0]]
            if out.setdefault("strategy", "channel") != "channel":
                raise ValueError(
                    f"group_size=-1 means strategy 'channel', but strategy={out['strategy']!r}"
                )
        elif size is None:
            out.setdefault("strategy", "channel")
        else:
            out.setdefault("strategy", "group")
        return out

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise ValueError(
                f"strategy 'group' needs group_size >= 1 (or -1 for one scale per channel), "
                f"got {self.group_size}"
            )
        if self.strategy != "group" and self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size} needs strategy 'group', got {self.strategy!r}"
            )
        if self.type == "float" and not self.symmetric:
            raise ValueError("zero points are for type 'int'; floats need symmetric: true")
        ocp = (self.type, self.scale_dtype, self.observer) == ("float", "e8m0", "minmax")
        if self.scale_rule == "ocp" and not ocp:
            raise ValueError(
                "scale_rule 'ocp' is for type 'float', scale_dtype 'e8m0' and observer 'minmax', "
                f"got {self.type!r}, {self.scale_dtype!r} and {self.observer!r}; use 'full'"
            )
        return self

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return a named scheme, with changes: Scheme.preset("W4A16", group_size=64)."""
        if name.upper() not in PRESETS:
            raise RecipeError(f"unknown scheme {name!r}{suggestion(name.upper(), PRESETS)}")
        base = cls.model_validate(PRESETS[name.upper()])
        return base.replace(**changes) if changes else base

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changes, validated.

        A new group_size brings its strategy along, a new format its type and num_bits; new bits
        or a new type are those of their usual format.
        """
        canonical = {self.aliases.get(key, key): value for key, value in changes.items()}
        kept = self.model_dump()
        if "format" in canonical:
            kept.pop("num_bits")
            kept.pop("type")
        elif {"num_bits", "type"} & canonical.keys():
            kept.pop("format")
        if {"group_size", "strategy"} & canonical.keys():
            kept.pop("strategy")
            kept.pop("group_size")
        if {"asym", "zero_point"} & canonical.keys():
            kept.pop("symmetric")
        return self.parse({**kept, **canonical}, "scheme")

    @property
    def two_level(self) -> bool:
        """Whether scales are multiples of one of the whole tensor, which is stored as well."""
        return self.scale_dtype == "e4m3"

    def group_width(self, columns: int) -> int:
        """Return how many columns of a row share a scale."""
        if self.group_size is None:
            return max(columns, 1)
        return self.group_size

    def groups(self, columns: int) -> int:
        """Return how many groups a row has; the last one may be ragged."""
        return -(-columns // self.group_width(columns)) if columns else 0

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of scales and zero points."""
        return (1, 1) if self.strategy == "tensor" else (rows, self.groups(columns))

    def storage_bits(self, rows: int, columns: int) -> dict[str, int]:
        """Return the bits that codes, scales and zero points take in a file.

        Each row of codes (and of zero points) is a bit stream padded to whole 32-bit words. The
        scale of a tensor, where there is one, counts among the scales.

        >>> Scheme.preset("W4A16").storage_bits(2, 256)
        {'codes': 2048, 'scale': 64, 'zero_point': 0}
        """
        scale_rows, groups = self.scale_shape(rows, columns)
        return {
            "codes": rows * _padded(columns * self.num_bits),
            "scale": scale_rows * groups * _SCALE_BITS[self.scale_dtype] + 32 * self.two_level,
            "zero_point": 0 if self.symmetric else scale_rows * _padded(groups * self.num_bits),
        }

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Return the stored bits per weight, scales and zero points included."""
        return sum(self.storage_bits(rows, columns).values()) / (rows * columns)

    def describe(self) -> str:
        """Return a short description, e.g. "int4 symmetric, group 64, minmax"."""
        size = f" {self.group_size}" if self.group_size else ""
        kind = "symmetric" if self.symmetric else "asymmetric"
        rule = ", scales ocp" if self.scale_rule == "ocp" else ""
        if not rule and _SCALE_BITS[self.scale_dtype] == 8:
            rule = f", scales {self.scale_dtype}"
        inputs = self.input_activations
        rest = "" if inputs is None else f", inputs {inputs.describe()}"
        return f"{self.format_name} {kind}, {self.strategy}{size}, {self.observer}{rule}{rest}"


def _padded(bits: int) -> int:
    return -(-bits // _WORD) * _WORD


_INT8 = {"num_bits": 8, "scale_rule": "restricted"}  # what kernels of eight bits multiply
_FP8, _STATIC = {"format": "fp8_e4m3"}, {"strategy": "tensor", "dynamic": False}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "W8A16": {"num_bits": 8, "strategy": "channel"},
    "W4A16": {"num_bits": 4, "group_size": 128},
    "W4A16_ASYM": {"num_bits": 4, "group_size": 128, "symmetric": False},
    "W3A16": {"num_bits": 3, "group_size": 128},
    "W2A16": {"num_bits": 2, "group_size": 128},
    "W8A8": {**_INT8, "strategy": "channel", "input_activations": {}},
    "W8A8_STATIC": {**_INT8, "strategy": "channel", "input_activations": _STATIC},
    "W4A8": {"num_bits": 4, "group_size": 128, "input_activations": {}},
    "FP8_DYNAMIC": {"format": "fp8_e4m3", "strategy": "channel", "input_activations": _FP8},
    "FP8": {"format": "fp8_e4m3", "strategy": "tensor", "input_activations": {**_FP8, **_STATIC}},
    "W8A16_FP8": {"format": "fp8_e4m3", "strategy": "channel"},
    "MXFP8": {"format": "fp8_e4m3", "group_size": 32, "scale_dtype": "e8m0"},
    "MXFP4": {"format": "fp4_e2m1", "group_size": 32, "scale_dtype": "e8m0"},
    "NVFP4": {"format": "fp4_e2m1", "group_size": 16, "scale_dtype": "e4m3"},
    "NF4": {"format": "nf4", "group_size": 64},
    "TERNARY": {"format": "ternary", "group_size": 128, "observer": "mse"},
}
