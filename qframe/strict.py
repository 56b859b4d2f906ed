"""Strict settings: an unknown key is an error with a suggestion, never a default in silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qframe.errors import RecipeError


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


def explain(error: ValidationError, where: str, model: type[Strict]) -> str:
    """Turn a validation error into one line per mistake, with suggestions."""
    lines = []
    for mistake in error.errors():
        path = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            known = set(_fields_at(model, mistake["loc"][:-1]))
            wrong = str(mistake["loc"][-1])
            lines.append(f"{where}: unknown key {path!r}{suggestion(wrong, known)}")
        else:
            said = mistake["msg"].removeprefix("Value error, ")
            given = "" if isinstance(mistake["input"], dict) else f" (got {mistake['input']!r})"
            lines.append(f"{where}: {path + ': ' if path else ''}{said}{given}")
    return "\n".join(lines)


def _fields_at(model: type[Strict], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names (and aliases) of the model nested at `path`."""
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        for nested in (annotation, *get_args(annotation)):  # "Model | None" has the model inside
            if isinstance(nested, type) and issubclass(nested, Strict):
                model = nested
    return [*model.model_fields, *model.aliases, *model.shared]
