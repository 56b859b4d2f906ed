"""`qframe plugins`: what is installed, what it provides, and why something does not work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json
from qframe.cli.flags import one_line
from qframe.cli.screen import print_json, print_result

if TYPE_CHECKING:
    from qframe.host import PluginRecord


def plugins(
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="Also load this Python file. Repeat."),
    ] = None,
    no_plugin: Annotated[
        list[str] | None,
        typer.Option("--no-plugin", metavar="NAME", help="Do not load it. Repeat."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List every plugin: where it comes from, whether it works, what it provides."""
    import warnings

    from qframe.host import Host

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # failures are rows of the table
        host = Host.discover(plugin or (), no_plugin or ())
    contested = [
        {"kind": kind, "name": name, "claimed_by": [record.label for record in rivals]}
        for (kind, name), rivals in host.contested().items()
    ]
    if as_json:
        print_json({"plugins": [_record(r) for r in host.records], "contested": contested})
        return
    from rich.text import Text

    from qframe.report.table import plugin_table, stacked

    lines = [
        Text(
            f"{item['kind']} {item['name']!r} is claimed by {' and '.join(item['claimed_by'])}: "
            f"neither is used; disable one with --no-plugin",
            style="bold red",
        )
        for item in contested
    ]
    print_result(stacked(plugin_table(_row(r) for r in host.records), *lines))


def _record(record: PluginRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "source": record.source,
        "version": record.version,
        "status": record.status,
        "error": one_line(record.error) or None,
        "provides": record.provides,
    }


def _row(record: PluginRecord) -> dict[str, str]:
    provides = "; ".join(
        f"{kind if len(names) == 1 else kind + 's'} {', '.join(names)}"
        for kind, names in record.provides.items()
    )
    source = record.source if record.version == "file" else f"{record.source} {record.version}"
    return {
        "name": record.name,
        "source": source,
        "status": record.status,
        "provides": provides,
        "error": one_line(record.error),
    }
