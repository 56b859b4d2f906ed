"""Commands that other packages add: entry points of the group "qframe.commands".

    [project.entry-points."qframe.commands"]
    check = "my_package.command:check"

The name on the left is the command; the object on the right is a function as typer wants it, whose
docstring is the command's help, or a `typer.Typer` with commands below that name. It is imported
when the command is used, and when the list of commands is shown, so its module must import nothing
heavy. A command of qframe itself cannot be taken over.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

from qframe.cli.command import Command
from qframe.errors import PluginError

GROUP = "qframe.commands"


class CommandGroup(TyperGroup):
    """The commands of qframe, and after them those of other packages."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in extensions() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; one that cannot be loaded says so when it is run."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        points = extensions().get(cmd_name)
        if points is None:
            return None
        made = _command(cmd_name, points)
        # So that the suggestions for a misspelt name know it, and it is loaded once.
        self.commands[cmd_name] = made
        return made

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed; a misspelt one gets a suggestion out of all of them."""
        if args and self.get_command(ctx, args[0].replace("_", "-")) is None:
            for name in extensions():
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def extensions() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return name -> the entry points that claim it, by name."""
    found: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        # By value: an installed package may be seen twice, when it is on the path as well.
        found.setdefault(point.name.replace("_", "-"), {}).setdefault(point.value, point)
    return {name: list(points.values()) for name, points in sorted(found.items())}


def _command(name: str, points: list[importlib.metadata.EntryPoint]) -> Any:
    """Return the command of an entry point, or one that tells why there is none."""
    if len(points) > 1:
        claims = " and ".join(_label(point) for point in points)
        return _broken(name, f"command {name!r} is claimed by {claims}; uninstall one of them")
    try:
        function = points[0].load()
    except BaseException as error:  # whatever it raises must not end the others
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _broken(name, f"command {name!r} of {_label(points[0])} cannot be loaded: {reason}")
    try:
        return _typed(name, function)
    except Exception as error:  # typer refuses what is not a function with types that it knows
        reason = " ".join(str(error).split())
        return _broken(
            name, f"command {name!r} of {_label(points[0])} is no function for typer: {reason}"
        )


def _typed(name: str, function: Any) -> Any:
    """Return a function, or a group of them, as a command."""
    if isinstance(function, typer.Typer):
        group = typer.main.get_group(function)
        group.name = name
        return group
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(name, cls=Command)(function)
    return typer.main.get_command(app)


def _broken(name: str, reason: str) -> Any:
    """Return a command that says why it does not work."""

    def fail(words: list[str] | None = typer.Argument(None, hidden=True)) -> None:  # noqa: B008
        raise PluginError(reason)

    fail.__doc__ = f"Does not work: {reason}"
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(
        name,
        cls=Command,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(fail)
    return typer.main.get_command(app)


def _label(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.value} of {point.dist.name}" if point.dist is not None else point.value
