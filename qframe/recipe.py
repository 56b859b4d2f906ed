"""What is done to which layer: a strict recipe, resolved once to an explicit map.

A recipe is read from YAML, JSON or TOML, or made from command-line flags. `resolve` matches its
patterns against the layers of a network; the resulting `Plan` is what every later stage uses
and what the checkpoint stores. A pattern that matches nothing is an error.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from qframe.contracts import KVCacheQuantizer, LayerInfo, OutlierHandler, Rounder
from qframe.errors import RecipeError, UnsupportedError
from qframe.host import Host, option_hint, option_names
from qframe.kv_scheme import KVCacheScheme
from qframe.scheme import PRESETS, ActivationScheme, Scheme
from qframe.strict import Strict, by_layers, explain, suggestion

DEFAULT_ROUNDER = "rtn"  # what a method without a rounder, "awq" say, rounds with


class CalibrationSettings(Strict):
    """Which text, how much of it, and in which precision.

    dataset             where text comes from; of several, each gives an equal share
    max_seq_length      tokens of a window; None: 2048, or what the network was made for where that
                        is less (`qframe.positions`)
    held_out_fraction   windows kept aside, as a share of the samples; nothing is fitted on them
    compute_dtype       of matrix products in the calibration pass; statistics are those of the
                        inputs as these products take them, summed in at least float32. auto:
                        bfloat16 where the processor multiplies it natively, else float32
    """

    dataset: str | Annotated[tuple[str, ...], Field(min_length=1)] = "topics"
    num_calibration_samples: Annotated[int, Field(ge=1)] = 128
    max_seq_length: Annotated[int, Field(ge=2)] | None = None
    held_out_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    aliases: ClassVar[Mapping[str, str]] = {
        "nsamples": "num_calibration_samples",
        "seqlen": "max_seq_length",
    }

    @field_validator("dataset")
    @classmethod
    def _one_is_a_string(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return value[0] if isinstance(value, tuple) and len(value) == 1 else value

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets, one or more."""
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset


class Recipe(Strict):
    """What to do with a network.

    method             names joined by "+": outlier handlers, then a rounder ("awq+gptq")
    options            options of the rounder and the handlers, e.g. dampening_frac
    scheme             a preset's name, or the fields of a Scheme
    targets            which layers: class name, full name, or "re:" and a regular expression;
                       None for every linear layer
    ignore             which of those to leave
    overrides          pattern -> scheme fields that differ there
    on_fallback        what to do when a layer cannot be done as asked: warn or error
    on_overfit         what to do when a layer's output error on held-out tokens is larger than that
                       of rounding to nearest: warn in the report, rtn: round it to nearest, or
                       error (exit code 3)
    max_fallback_frac  more fallbacks than this share of layers is an error (exit code 3)
    min_coverage       less than this share of matrix weights quantized is an error
    on_violated_certificate   what to do when a layer breaks a bound that its method claims to
                              keep: error (exit code 3) or warn
    keep_statistics    store what the rounder was calibrated with, once for each input, so that
                       `qframe verify` can recompute every certificate
    fold_scales        let norms divide by the scales of outlier handlers, where that is found to
                       change nothing (`qframe.folds`); else layers divide, when they run
    carried_dtype      float16 or bfloat16: what parameters are stored in that no codes stand for,
                       as embeddings and norms; None for their own dtypes
    kv_cache_scheme    how keys and values are to be stored when the network generates: a preset's
                       name, or the fields of a KVCacheScheme; None for as they come. It changes no
                       weight, and is kept for those who run the network
    target_bits        stored bits per weight of the quantized layers, on average and at most; which
                       layer gets how many is decided by measured sensitivity
                       (`qframe.sensitivity`). None for num_bits of the scheme everywhere
    candidate_bits     num_bits that layers may get then; None for those of 2, 3, 4, 5, 6 and 8 that
                       the method can do. Layers whose num_bits an override gives keep theirs
    """

    version: Literal[1] = 1
    method: str = DEFAULT_ROUNDER
    options: Mapping[str, Any] = Field(default_factory=dict)
    scheme: Scheme = Field(default_factory=lambda: Scheme.preset("W4A16"))
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings)
    seed: int = 42
    on_fallback: Literal["warn", "error"] = "warn"
    on_overfit: Literal["warn", "rtn", "error"] = "warn"
    max_fallback_frac: Annotated[float, Field(ge=0, le=1)] = 0.05
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.5
    on_violated_certificate: Literal["warn", "error"] = "error"
    keep_statistics: bool = False
    fold_scales: bool = True
    carried_dtype: Literal["float16", "bfloat16"] | None = None
    kv_cache_scheme: KVCacheScheme | None = None
    target_bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    candidate_bits: (
        Annotated[tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(min_length=1)] | None
    ) = None

    aliases: ClassVar[Mapping[str, str]] = {"modules_to_not_convert": "ignore"}

    @field_validator("scheme", mode="before")
    @classmethod
    def _preset_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return Scheme.preset(value)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        if isinstance(value, Mapping) and "preset" in value:
            rest = {k: v for k, v in value.items() if k != "preset"}
            try:
                return Scheme.preset(str(value["preset"]), **rest)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _candidates_are_for_a_target(self) -> Self:
        if self.candidate_bits is not None and self.target_bits is None:
            raise ValueError("candidate_bits: say with target_bits how many bits are to be reached")
        return self

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        for pattern in (*(self.targets or ()), *self.ignore, *self.overrides):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern.removeprefix("re:"))
                except re.error as error:
                    raise ValueError(f"pattern {pattern!r}: {error}") from None
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a recipe from a .yaml, .json or .toml file; messages name file and line."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"recipe {path}: {error.strerror}{_not_a_file(path)}") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path}: {error}") from None
        try:
            if path.suffix == ".toml":
                data: Any = tomllib.loads(text)
            elif path.suffix == ".json":
                data = json.loads(text)
            else:
                data = yaml.safe_load(text)
        except (
            ValueError,
            RecursionError,
            yaml.YAMLError,
        ) as error:  # of TOML and JSON: ValueError
            raise RecipeError(f"recipe {path}: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"recipe {path}: expected a mapping, got {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            said = explain(error, str(path), cls, lambda key: _line_of(key, text))
            raise RecipeError(said) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changes, validated."""
        return self.parse({**self.model_dump(exclude_unset=True), **changes}, "recipe")


def _not_a_file(path: Path) -> str:
    """Return what may have been meant where there is no such file, "" for nothing."""
    if path.exists():
        return ""
    name = str(path)
    if name.upper() in PRESETS:
        return f"; {name} is a scheme: --scheme {name}, or scheme: {name} in a recipe"
    if path.suffix:
        return ""
    return (
        f"; a recipe is a .yaml, .json or .toml file; a scheme, such as {next(iter(PRESETS))}, is "
        f"given by --scheme, and a method by --method"
    )


def _line_of(key: str, text: str) -> int:
    """Return the line on which a key first stands, 1-based; 0 when not found."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf'\s*["\']?{re.escape(key)}["\']?\s*[:=]', line):
            return number
    return 0


@dataclass(frozen=True, slots=True)
class Method:
    """A rounder, and the outlier handlers that come before it."""

    name: str
    rounder: Rounder
    handlers: tuple[OutlierHandler, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """The observers whose statistics the method reads."""
        return self.rounder.needs.union(*(handler.needs for handler in self.handlers))

    @property
    def learns(self) -> bool:
        """Whether the rounder learns the layers of a block together (`qframe.blocks`)."""
        return hasattr(self.rounder, "learn")

    @property
    def scales(self) -> bool:
        """Whether a handler may scale inputs: all but those that only rotate, or keep columns."""
        return not all(
            getattr(handler, "rotates", False) or getattr(handler, "keeps", False)
            for handler in self.handlers
        )

    @property
    def extras(self) -> frozenset[str]:
        """What it gives layers besides codes for certain (`qframe.contracts.EXTRAS`)."""
        found = set()
        if any(getattr(handler, "rotates", False) for handler in self.handlers):
            found.add("rotation")
        if any(getattr(handler, "keeps", False) for handler in self.handlers):
            found.add("kept columns")
        if getattr(self.rounder, "orders_groups", False):
            found.add("group index")
        return frozenset(found)


def parse_method(host: Host, recipe: Recipe) -> Method:
    """Look the parts of recipe.method up and give each its options.

    Raises UnknownNameError or RecipeError.
    """
    handlers: list[str] = []
    rounder: str | None = None
    for part in recipe.method.split("+"):
        if part in host.names("outlier handler"):
            if rounder is not None:
                raise RecipeError(
                    f"method {recipe.method!r}: outlier handler {part!r} must come before the "
                    f"rounder {rounder!r}"
                )
            handlers.append(part)
        elif part in host.names("rounder") and rounder is None:
            rounder = part
        elif rounder is not None and part in host.names("rounder"):
            raise RecipeError(
                f"method {recipe.method!r} has two rounders, {rounder!r} and {part!r}"
            )
        else:
            known = [*host.names("rounder"), *host.names("outlier handler")]
            _reraise_failed(host, part)
            raise RecipeError(f"unknown method {part!r}{suggestion(part, known)}")
    parts = [("outlier handler", name) for name in handlers]
    parts.append(("rounder", rounder or DEFAULT_ROUNDER))
    options = {part: _options_of(host, *part, recipe.options) for part in parts}
    used = {key for chosen in options.values() for key in chosen}
    for key in recipe.options:
        if OPTION_ALIASES.get(key, key) not in used:
            known = [n for part in parts for n in option_names(host.get(*part))]
            raise RecipeError(
                f"method {recipe.method!r} has no option {key!r}{option_hint(key, known)}"
            )
    where = f"method {recipe.method!r}"
    made = [host.configured(*part, options[part], where) for part in parts]
    _check_order(recipe.method, made[:-1])
    method = Method(recipe.method, made[-1], tuple(made[:-1]))
    if method.learns and handlers:
        raise UnsupportedError(
            f"method {recipe.method!r}: {made[-1].name!r} learns the layers of a block before any "
            f"handler sees them, so none can come before it; use it alone, or another rounder"
        )
    return method


def _check_order(method: str, handlers: Sequence[OutlierHandler]) -> None:
    """Raise UnsupportedError where channels would change that have been mixed, or are kept."""
    places = [
        2 if getattr(h, "keeps", False) else int(getattr(h, "rotates", False)) for h in handlers
    ]
    for (before, one), (after, other) in pairwise(zip(handlers, places, strict=True)):
        if one > other or one == other > 0:
            raise UnsupportedError(
                f"method {method!r}: {after.name!r} cannot come after {before.name!r}. First come "
                f"handlers that scale channels, then one that rotates them, and last of all one "
                f"that keeps some as they are"
            )


OPTION_ALIASES: Mapping[str, str] = {
    "damp_percent": "dampening_frac",
    "percdamp": "dampening_frac",
    "desc_act": "actorder",
    "act_order": "actorder",
    "blocksize": "block_size",
    "llm_int8_threshold": "threshold",
}
"""Names that options have in other tools -> the name they have here."""


def _options_of(host: Host, kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = option_names(host.get(kind, name))
    chosen = {}
    for key, value in options.items():
        canonical = OPTION_ALIASES.get(key, key)
        if canonical in known:
            # GPTQ's desc_act is a boolean: true means that groups follow the order.
            if canonical == "actorder" and isinstance(value, bool):
                value = "group" if value else None
            if canonical == "actorder" and value == "weight":
                value = "static"
            chosen[canonical] = value
    return chosen


def _reraise_failed(host: Host, name: str) -> None:
    """Show the real error when the plugin of this name could not be loaded."""
    if any(r.name == name and r.error is not None for r in host.records) or any(
        key[1] == name for key in host.contested()
    ):
        kind = next((k for k, n in host.contested() if n == name), "rounder")
        host.get(kind, name)


# Which layers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The explicit map that every stage uses: layer -> scheme, and why the others are left."""

    schemes: Mapping[str, Scheme]
    left: Mapping[str, str]

    @property
    def observers(self) -> frozenset[str]:
        """The observers that stored scales of activations come from."""
        inputs = (scheme.input_activations for scheme in self.schemes.values())
        return frozenset(s.static_observer for s in inputs if s and s.static_observer)


def resolve(recipe: Recipe, layers: Mapping[str, LayerInfo]) -> Plan:
    """Match the recipe's patterns against the layers.

    Raises RecipeError for patterns that match nothing, all of them together.
    """
    unmatched = []
    explicit = "ignore" in recipe.model_fields_set
    patterns = [*(recipe.targets or ()), *(recipe.ignore if explicit else ()), *recipe.overrides]
    for pattern in patterns:
        if not any(matches(pattern, layer) for layer in layers.values()):
            near = "" if pattern.startswith("re:") else suggestion(pattern, layers)
            if near.startswith("; known"):
                near = f"; the network has {len(layers)} linear layers, e.g. {next(iter(layers))!r}"
            unmatched.append(f"pattern {pattern!r} matches no layer{near}")
    if unmatched:
        raise RecipeError("\n".join(unmatched))
    schemes, left = {}, {}
    for name, layer in layers.items():
        if recipe.targets is not None and not any(matches(p, layer) for p in recipe.targets):
            left[name] = "not among the targets"
        elif any(matches(p, layer) for p in recipe.ignore):
            left[name] = "ignored by the recipe"
        else:
            scheme = recipe.scheme
            for pattern, changes in recipe.overrides.items():
                if matches(pattern, layer):
                    scheme = scheme.replace(**changes)
            schemes[name] = scheme
    if not schemes:
        raise RecipeError("the recipe leaves every layer: nothing to quantize")
    return Plan(schemes, left)


def matches(pattern: str, layer: LayerInfo) -> bool:
    """Return whether a pattern means this layer: class name, full name, or "re:"."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), layer.name) is not None
    return pattern in (layer.name, layer.kind)


def check_supported(method: Method, plan: Plan, host: Host) -> None:
    """Raise UnsupportedError listing every layer whose scheme the method or formats refuse."""
    said = by_layers(
        (name, reason)
        for name, scheme in plan.schemes.items()
        for reason in scheme_objections(method, scheme, host)
    )
    if said:
        raise UnsupportedError("\n".join(said))


def scheme_objections(method: Method, scheme: Scheme, host: Host) -> Iterator[str]:
    """Yield why parts of a method, or the number formats, cannot do a scheme."""
    parts: tuple[OutlierHandler | Rounder, ...] = (*method.handlers, method.rounder)
    for part in parts:
        reason = part.capabilities.objection(scheme)
        if reason:
            yield f"{part.name}: {reason}"
    yield from _format_objections(scheme, host)


def kv_quantizer(scheme: KVCacheScheme, host: Host) -> KVCacheQuantizer:
    """Return the quantizer that a scheme names, with its options.

    Raises UnknownNameError, RecipeError for an option, UnsupportedError for a scheme of keys or
    values that it cannot do.
    """
    where = "kv_cache_scheme"
    quantizer: KVCacheQuantizer = host.configured("kv cache", scheme.method, scheme.options, where)
    for kind, part in scheme.parts.items():
        reason = quantizer.capabilities.objection(part)
        if reason:
            raise UnsupportedError(f"{where}.{kind}: {scheme.method}: {reason}")
    return quantizer


def _format_objections(scheme: Scheme, host: Host) -> Iterator[str]:
    """Yield why no number format serves a scheme, or no observer the scales of its activations."""
    own = _format_objection(scheme, host, symmetric=scheme.symmetric, scale_rule=scheme.scale_rule)
    if own:
        yield own
    inputs = scheme.input_activations
    if inputs is None:
        return
    theirs = _format_objection(inputs, host, symmetric=True, scale_rule="restricted")
    if theirs:
        yield f"input_activations: {theirs}"
    observer = inputs.static_observer
    if observer is None:
        return
    every = {name: host.get("observer", name) for name in host.names("observer")}
    known = [name for name, each in every.items() if getattr(each, "finds_reach", False)]
    if observer not in known:
        yield (
            f"input_activations: no observer {observer!r} that finds how far a stored scale has "
            f"to reach{suggestion(observer, known)}"
        )


def _format_objection(
    scheme: Scheme | ActivationScheme, host: Host, *, symmetric: bool, scale_rule: str
) -> str | None:
    """Return why no number format serves codes, or None."""
    name = scheme.format_name
    if name not in host.names("number format"):
        return f"no number format {name!r} (known: {', '.join(host.names('number format'))})"
    made = host.get("number format", name)
    if (made.type, made.num_bits) != (scheme.type, scheme.num_bits):
        return (
            f"number format {name!r} has type={made.type!r} and num_bits={made.num_bits}, the "
            f"scheme says {scheme.type!r} and {scheme.num_bits}"
        )
    try:
        made.grid(symmetric=symmetric, scale_rule=scale_rule)
    except UnsupportedError as error:
        return str(error)
    return None
