"""Strict settings: an unknown key is an error with a suggestion, never a default in silence."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qframe.errors import RecipeError


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return names in a sentence, the first ones of many.

    >>> some(["q", "k", "v", "o", "gate"])
    'q, k, v and 2 more'
    """
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def by_layers(objections: Iterable[tuple[str, str]]) -> list[str]:
    """Return each reason once, with the layers that it is about.

    objections   (layer name, reason)
    """
    layers: dict[str, list[str]] = {}
    for name, reason in objections:
        layers.setdefault(reason, []).append(name)
    return [f"{reason}; layers: {some(names)}" for reason, names in layers.items()]


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or the list of known names.

    >>> suggestion("grup_size", ["group_size", "num_bits"])
    "; did you mean 'group_size'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


Location = tuple[int | str, ...]  # of a mistake: fields and places, from outside to inside


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and understands the aliases of other tools."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    aliases: ClassVar[Mapping[str, str]] = {}
    shared: ClassVar[tuple[str, ...]] = ()  # further words that are taken, for suggestions

    @model_validator(mode="before")
    @classmethod
    def _canonical_names(cls, data: Any) -> Any:
        return cls.canonical(data) if isinstance(data, Mapping) else data

    @classmethod
    def canonical(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return a mapping with aliases replaced. Raises ValueError for what is given twice."""
        out: dict[str, Any] = {}
        for key, value in data.items():
            name = cls.aliases.get(str(key), str(key))
            if name in out:
                raise ValueError(f"{name!r} is given twice (also under an alias)")
            out[name] = value
        return out

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> Self:
        """Build from a mapping; `where` (a file, an option) starts every message.

        Raises RecipeError listing every wrong key and value at once.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(explain(error, where, cls)) from None


def explain(
    error: ValidationError,
    where: str,
    model: type[Strict],
    line_of: Callable[[str], int] = lambda key: 0,
) -> str:
    """Turn a validation error into one line per mistake, with suggestions.

    line_of   returns the line of `where` on which a key stands, 0 where that is not known
    """
    lines, source = [], where
    for loc, said, given in mistakes(error, lambda loc: _depth(model, loc)):
        path = ".".join(str(part) for part in loc)
        number = line_of(str(loc[-1])) if loc else 0
        where = f"{source}:{number}" if number else source
        if not said:
            known = set(_words(_model_at(model, loc[:-1])))
            lines.append(f"{where}: unknown key {path!r}{suggestion(str(loc[-1]), known)}")
        else:
            got = "" if isinstance(given, dict) else f" (got {given!r})"
            lines.append(f"{where}: {path + ': ' if path else ''}{said}{got}")
    return "\n".join(lines)


def mistakes(
    error: ValidationError, depth: Callable[[Location], int]
) -> Iterator[tuple[Location, str, Any]]:
    """Yield (where, what is wrong, what was given); nothing is wrong with a key but that it is one.

    A value that may be of several types is wrong in as many ways: they become one mistake.

    depth   how many parts of a location are names of fields
    """
    found: dict[Location, list[Any]] = {}
    for mistake in error.errors():
        loc = mistake["loc"]
        field = loc if mistake["type"] == "extra_forbidden" else loc[: depth(loc)]
        found.setdefault(field, []).append(mistake)
    for field, several in found.items():
        first = several[0]
        if first["type"] == "extra_forbidden":
            yield field, "", first["input"]
        elif len({mistake["loc"] for mistake in several}) == 1:
            yield first["loc"], first["msg"].removeprefix("Value error, "), first["input"]
        else:
            first_said, *others = dict.fromkeys(mistake["msg"] for mistake in several)
            said = [first_said, *(other.removeprefix("Input should be ") for other in others)]
            yield field, ", or ".join(said), first["input"]


def _depth(model: type[Strict], loc: Location) -> int:
    """Return how many parts of a location are names of fields, of the model or of nested ones."""
    for place, part in enumerate(loc):
        if str(part) not in model.model_fields:
            return place
        model = _model_at(model, (part,))
    return len(loc)


def _model_at(model: type[Strict], path: Location) -> type[Strict]:
    """Return the model nested at `path`."""
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        for nested in (annotation, *get_args(annotation)):  # "Model | None" has the model inside
            if isinstance(nested, type) and issubclass(nested, Strict):
                model = nested
    return model


def _words(model: type[Strict]) -> list[str]:
    """Return the field names of a model, and what else is taken for them."""
    return [*model.model_fields, *model.aliases, *model.shared]
