"""`qframe new-plugin`: a small package with a method that works, to be changed into your own."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from qframe.cli.command import Debug, Json
from qframe.cli.screen import print_json, print_plain
from qframe.errors import OutputError, RecipeError

TEMPLATES = Path(__file__).parent / "templates"
SHARED = {
    "pyproject.toml.jinja": "pyproject.toml",
    "README.md.jinja": "README.md",
    "test_plugin.py.jinja": "test_{module}.py",
}
"""Template of every kind -> the file that becomes of it."""

SHOWN = {"kernel": "dequantize/{name}", "number-format": "float5"}
"""Kind -> the name of what is written, where it is not the package's."""

KINDS = ("rounder", "outlier-handler", "observer", "number-format", "kernel")


def new_plugin(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What users will type: small letters, digits, -.")
    ],
    kind: Annotated[str, typer.Option("--kind", metavar="|".join(KINDS), help="Of plugin.")] = (
        "rounder"
    ),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where to put it. Default: ./NAME."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a small package with a working plugin and its test, to change into your own.

    Example: qframe new-plugin my-rounder --kind rounder
    """
    folder = Path(name) if out is None else out
    written = write(name, kind, folder)
    if as_json:
        print_json({"folder": str(folder), "files": [str(file) for file in written]})
        return
    for file in written:
        print_plain(str(file))
    told = values(name, kind, module_name(name))
    file = folder / f"{told['module']}.py"
    print_plain(f"\nqframe check {told['shown']} --plugin {file}")


def kind_of(kind: str) -> str:
    """Return the kind of object that a kind on the command line stands for."""
    return kind.replace("-", " ")


def module_name(name: str) -> str:
    """Return the module of a plugin: my-rounder -> my_rounder.

    Raises RecipeError for what is no name, or would hide a module of Python's.
    """
    import sys

    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", module) or keyword.iskeyword(module):
        raise RecipeError(
            f"{name!r} is no name for a plugin: small letters and digits, words joined by -, e.g. "
            f"my-rounder"
        )
    taken = {*sys.stdlib_module_names, "qframe", "numpy", "torch", "numba"}
    if module in taken:
        raise RecipeError(f"{name!r} is the name of a module that is needed; choose another one")
    return module


def write(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the package, and return its files.

    Raises RecipeError for a wrong name or kind, OutputError when the folder has files.
    """
    from qframe.strict import suggestion

    module = module_name(name)
    if kind not in KINDS:
        raise RecipeError(f"--kind {kind}: no such kind{suggestion(kind, KINDS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; choose another with -o")
    files = {**SHARED, f"{kind}.py.jinja": "{module}.py"}
    texts = {
        folder / target.format(module=module): render(template, values(name, kind, module))
        for template, target in files.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from error
    return sorted(texts)


def values(name: str, kind: str, module: str) -> dict[str, Any]:
    """Return what the templates are told."""
    return {
        "name": name,
        "kind": kind_of(kind),
        "module": module,
        "shown": SHOWN.get(kind, "{name}").format(name=name),
        "package": name.replace("_", "-"),
        "class_name": "".join(word.capitalize() for word in module.split("_")),
    }


def render(template: str, told: dict[str, Any]) -> str:
    """Return a template's text, filled in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return environment.get_template(template).render(told)
