"""The options that say what to do with a network: the same for every command that takes a recipe.

They are the fields of `RecipeFlags`; a command decorated with `takes_recipe_flags` gets them as
one argument, `flags`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
import yaml

from qframe.cli.screen import warn
from qframe.errors import RecipeError
from qframe.host import Host
from qframe.kv_scheme import KV_PRESETS
from qframe.recipe import Recipe
from qframe.scheme import PRESETS, Scheme

if TYPE_CHECKING:
    from qframe.host import PluginRecord

_SCHEME, _LAYERS = "Scheme and method", "Which layers"
_DATA, _PLUGINS, _LIMITS = "Calibration", "Plugins", "Limits"


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """What was asked for on the command line; None or () where nothing was said."""

    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A .yaml, .json or .toml file. Options given beside it override it.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="rtn, gptq, ... or names joined by +; qframe plugins lists them. Default: rtn.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help=f"One of {', '.join(PRESETS)}. Default: W4A16.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Columns of a row that share a scale; -1: one scale per row.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without or with zero points.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    observer: Annotated[
        str | None,
        typer.Option(
            "--observer",
            metavar="minmax|mse",
            help="How scales are found.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    target_bits: Annotated[
        float | None,
        typer.Option(
            "--target-bits",
            help="Stored bits per weight, on average and at most, scales included: layers get more "
            "or fewer by how sensitive they are, which is measured. Default: the scheme's.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    candidate_bits: Annotated[
        str | None,
        typer.Option(
            "--candidate-bits",
            metavar="BITS,BITS,...",
            help="What --target-bits chooses from. Default: those of 2,3,4,5,6,8 that the method "
            "can do.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the method, typed as in YAML: --set dampening_frac=0.05. Repeat.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    kv_scheme: Annotated[
        str | None,
        typer.Option(
            "--kv-scheme",
            help=f"Of the KV cache, kept with the weights: {', '.join(KV_PRESETS)}. Default: none.",
            rich_help_panel=_SCHEME,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of every random choice.", rich_help_panel=_SCHEME),
    ] = None

    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            metavar="PATTERN",
            help="Only these: a layer's name, class, or 're:' and a regular expression. Repeat.",
            rich_help_panel=_LAYERS,
        ),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Leave these. Takes the place of the default, lm_head. Repeat.",
            rich_help_panel=_LAYERS,
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN:KEY=VALUE,...",
            help="Another scheme for some: 're:.*down_proj:num_bits=8,group_size=-1'. Repeat.",
            rich_help_panel=_LAYERS,
        ),
    ] = None

    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            help="A .txt, .jsonl or .parquet file, a folder of them, hf:NAME, or topics (Python's "
            "documentation, on every machine). Repeat for text of several kinds. Default: topics.",
            rich_help_panel=_DATA,
        ),
    ] = None
    num_calibration_samples: Annotated[
        int | None,
        typer.Option("--num-calibration-samples", help="Default: 128.", rich_help_panel=_DATA),
    ] = None
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            "--max-seq-length", help="Tokens of a sample. Default: 2048.", rich_help_panel=_DATA
        ),
    ] = None
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            "--compute-dtype",
            metavar="auto|float32|bfloat16",
            help="Of the matrix products in the calibration pass.",
            rich_help_panel=_DATA,
        ),
    ] = None

    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE",
            help="A Python file with hooks. Repeat.",
            rich_help_panel=_PLUGINS,
        ),
    ] = None
    no_plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--no-plugin", metavar="NAME", help="Do not load it. Repeat.", rich_help_panel=_PLUGINS
        ),
    ] = None

    on_fallback: Annotated[
        str | None,
        typer.Option(
            "--on-fallback",
            metavar="warn|error",
            help="When a layer cannot be done as asked: round it to nearest, or stop.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    on_overfit: Annotated[
        str | None,
        typer.Option(
            "--on-overfit",
            metavar="warn|rtn|error",
            help="When a layer is worse than rounding to nearest on held-out tokens: say so, round "
            "it to nearest, or stop. Default: warn.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    max_fallback_frac: Annotated[
        float | None,
        typer.Option(
            "--max-fallback-frac",
            help="More fallbacks than this share of the layers is an error. Default: 0.05.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    min_coverage: Annotated[
        float | None,
        typer.Option(
            "--min-coverage",
            help="Less than this share of the weights in linear layers is an error. Default: 0.5.",
            rich_help_panel=_LIMITS,
        ),
    ] = None

    on_violated_certificate: Annotated[
        str | None,
        typer.Option(
            "--on-violated-certificate",
            metavar="error|warn",
            help="When a layer breaks a bound that its method claims to keep. Default: error.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    keep_statistics: Annotated[
        bool | None,
        typer.Option(
            "--keep-statistics",
            help="Store what the layers were calibrated with, 8 bytes for each pair of inputs, so "
            "that qframe verify can recompute every certificate.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    fold_scales: Annotated[
        bool | None,
        typer.Option(
            "--fold-scales/--no-fold-scales",
            help="Let norms, and the layers before, divide by the scales of outlier handlers where "
            "that changes nothing, or the layers when they run. Default: fold.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    carried_dtype: Annotated[
        str | None,
        typer.Option(
            "--carried-dtype",
            metavar="float16|bfloat16",
            help="What parameters are stored in that are not quantized, as embeddings and norms. "
            "Default: their own dtypes.",
            rich_help_panel=_LIMITS,
        ),
    ] = None

    def to_recipe(self) -> Recipe:
        """Return the recipe: the file's, if one was given, with the options on top."""
        base = Recipe.from_file(self.recipe) if self.recipe is not None else Recipe()
        changes: dict[str, Any] = _given(
            method=self.method,
            targets=self.targets,
            ignore=self.ignore,
            seed=self.seed,
            on_fallback=self.on_fallback,
            on_overfit=self.on_overfit,
            max_fallback_frac=self.max_fallback_frac,
            min_coverage=self.min_coverage,
            on_violated_certificate=self.on_violated_certificate,
            keep_statistics=self.keep_statistics,
            fold_scales=self.fold_scales,
            carried_dtype=self.carried_dtype,
            kv_cache_scheme=self.kv_scheme,
            target_bits=self.target_bits,
            candidate_bits=parse_bits(self.candidate_bits),
        )
        scheme = self._scheme(base)
        if scheme is not None:
            changes["scheme"] = scheme.model_dump()
        if self.options:
            changes["options"] = {**base.options, **parse_settings(self.options, "--set")}
        if self.override:
            changes["overrides"] = {**base.overrides, **parse_overrides(self.override)}
        calibration = _given(
            dataset=tuple(self.dataset) if self.dataset else None,
            num_calibration_samples=self.num_calibration_samples,
            max_seq_length=self.max_seq_length,
            compute_dtype=self.compute_dtype,
        )
        if calibration:
            kept = base.calibration.model_dump(exclude_unset=True)
            changes["calibration"] = {**kept, **calibration}
        return base.replace(**changes) if changes else base

    def to_host(self) -> Host:
        """Return the host with the plugins that were asked for; failed ones are warned of."""
        return discover(self.plugin or (), self.no_plugin or ())

    def _scheme(self, base: Recipe) -> Scheme | None:
        """Return the scheme that the options ask for, or None when they say nothing of it."""
        changes = _given(
            group_size=self.group_size, symmetric=self.symmetric, observer=self.observer
        )
        if self.scheme is None and not changes:
            return None
        scheme = base.scheme if self.scheme is None else Scheme.preset(self.scheme)
        return scheme.replace(**changes) if changes else scheme


def takes_recipe_flags(
    command: Callable[..., None], *, without: Sequence[str] = ()
) -> Callable[..., None]:
    """Give a command the options of RecipeFlags; it gets their values as `flags`.

    without   fields that are no options of this command
    """
    fields = [f for f in dataclasses.fields(RecipeFlags) if f.name not in without]
    hints = get_type_hints(RecipeFlags, include_extras=True)

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        flags = RecipeFlags(**{f.name: given.pop(f.name) for f in fields})
        command(flags=flags, **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())
    at = next(i for i, parameter in enumerate(own) if parameter.name == "flags")
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[f.name]
        )
        for f in fields
    ]
    signature = inspect.Signature([*own[:at], *shared, *own[at + 1 :]])
    with_flags.__signature__ = signature  # type: ignore[attr-defined]
    return with_flags


def discover(files: Sequence[Path], disable: Sequence[str]) -> Host:
    """Load the plugins; say which failed, and go on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same, with a line of Python code below it
        host = Host.discover(files, disable)
    for record in failed(host):
        warn(f"plugin {record.label} failed to load: {one_line(record.error)}")
    return host


def failed(host: Host) -> list[PluginRecord]:
    """Return the plugins that could not be loaded."""
    return [record for record in host.records if record.error is not None]


def one_line(error: Exception | None) -> str:
    """Return an error as one line with its type, "" for none."""
    if error is None:
        return ""
    text = " ".join(str(error).split())
    return text if type(error).__module__ == "qframe.errors" else f"{type(error).__name__}: {text}"


def parse_settings(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """Return KEY=VALUE texts as a mapping, values typed as in YAML.

    >>> parse_settings(["dampening_frac=0.05", "actorder=null"], "--set")
    {'dampening_frac': 0.05, 'actorder': None}
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{flag} {text}: expected KEY=VALUE, e.g. dampening_frac=0.05")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"{flag} {text}: {value!r} is no YAML value") from None
    return found


def parse_bits(text: str | None) -> tuple[int, ...] | None:
    """Return numbers of bits with commas between them; None for None.

    >>> parse_bits("3,4,8")
    (3, 4, 8)
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--candidate-bits {text}: expected numbers, e.g. 3,4,8") from None


def parse_overrides(texts: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return PATTERN:KEY=VALUE,KEY=VALUE texts as pattern -> scheme fields.

    The pattern ends at the last colon, so it may hold colons itself.

    >>> parse_overrides(["re:.*down_proj:num_bits=8,group_size=-1"])
    {'re:.*down_proj': {'num_bits': 8, 'group_size': -1}}
    """
    found: dict[str, Mapping[str, Any]] = {}
    for text in texts:
        pattern, colon, fields = text.rpartition(":")
        if not colon or not pattern or "=" not in fields:
            raise RecipeError(
                f"--override {text}: expected PATTERN:KEY=VALUE, e.g. 're:.*down_proj:num_bits=8'"
            )
        flag = f"--override {pattern}:"
        found[pattern] = {**found.get(pattern, {}), **parse_settings(fields.split(","), flag)}
    return found


def _given(**values: Any) -> dict[str, Any]:
    """Return what was given on the command line."""
    return {key: value for key, value in values.items() if value not in (None, [])}
