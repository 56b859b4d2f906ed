"""The commands and what they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from qframe import __version__
from qframe.cli.bench import bench
from qframe.cli.bench_kernels import bench_kernels
from qframe.cli.command import Command
from qframe.cli.compare import compare
from qframe.cli.convert import convert
from qframe.cli.demo import demo
from qframe.cli.doctor import doctor
from qframe.cli.eval import evaluate
from qframe.cli.extensions import CommandGroup
from qframe.cli.generate import generate
from qframe.cli.inspect import inspect
from qframe.cli.new_plugin import new_plugin
from qframe.cli.plugins import plugins
from qframe.cli.quantize import quantize
from qframe.cli.screen import print_plain
from qframe.cli.verify import verify
from qframe.cli.warmup import warmup

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    # Other tools spell long options with underscores: --group_size is --group-size.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print_plain(f"qframe {__version__}")
        raise typer.Exit


@app.callback()
def _qframe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Quantize real networks with plugins, and measure what it did to them."""


for _function, _name in (
    (quantize, "quantize"),
    (compare, "compare"),
    (evaluate, "eval"),
    (convert, "convert"),
    (verify, "verify"),
    (generate, "generate"),
    (bench, "bench"),
    (bench_kernels, "bench-kernels"),
    (warmup, "warmup"),
    (demo, "demo"),
    (inspect, "inspect"),
    (plugins, "plugins"),
    (doctor, "doctor"),
    (new_plugin, "new-plugin"),
):
    app.command(_name, cls=Command)(_function)
