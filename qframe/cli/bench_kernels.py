"""`qframe bench-kernels`: the kernels of an operation beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json, Threads
from qframe.cli.progress import progress_shown
from qframe.cli.screen import print_json, print_result
from qframe.dispatch import in_order
from qframe.errors import RecipeError
from qframe.kernels import OPS

if TYPE_CHECKING:
    from qframe.kernel_speed import Timed


def bench_kernels(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help=f"{', '.join(OPS)}. Default: all."),
    ] = None,
    *,
    shape: Annotated[
        str, typer.Option("--shape", metavar="ROWSxCOLUMNS", help="Of the weight.")
    ] = "4096x4096",
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", min=1, help="That come at once. Repeat. Default: 1, 16, 128."),
    ] = None,
    num_bits: Annotated[
        int, typer.Option("--num-bits", min=2, max=8, help="Of weights in groups, and of caches.")
    ] = 4,
    group_size: Annotated[int, typer.Option("--group-size", min=1, help="Columns.")] = 128,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens of a KV cache, 32 heads of 128.")
    ] = 4096,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Each kernel is timed so often, in turn.")
    ] = 5,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="Also load this Python file. Repeat."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the kernels of all backends on the same operands, in turn, with cold operands.

    Example: qframe bench-kernels linear_weight_only --tokens 1 --threads 1

    On one thread the time is that of the processor, on several that of the clock. Ratios are
    medians over the rounds; a time alone means little.
    """
    rows, columns = _shape(shape)
    with progress_shown() as progress:
        progress.step("loading libraries")
        import torch

        from qframe.host import Host
        from qframe.kernel_speed import Sizes, measure

        torch.set_num_threads(threads or torch.get_num_threads())
        host = Host.discover(plugin or ())
        kernels = in_order(host.get("kernel", name) for name in host.names("kernel"))
        sizes = [
            Sizes(
                rows=rows,
                columns=columns,
                tokens=count,
                num_bits=num_bits,
                group_size=group_size,
                context=context,
            )
            for count in tokens or (1, 16, 128)
        ]
        found = []
        for each in measure(kernels, ops or None, sizes, rounds=rounds):
            progress.step(f"{each.call.op} {_size(each)}")
            found.append(each)
    if as_json:
        records = [_record(each) for each in found]
        print_json({"threads": torch.get_num_threads(), "rounds": rounds, "found": records})
        return
    _print(found, rounds, torch.get_num_threads())


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise RecipeError(f"--shape {text}: expected ROWSxCOLUMNS, such as 4096x11008")
    return int(rows), int(columns)


def _size(timed: Timed) -> str:
    """Return the sizes of a call in words."""
    names = OPS[timed.call.op].call
    shown = zip(timed.call.shape, names, strict=True)
    return ", ".join(f"{number} {name}" for number, name in shown)


def _record(timed: Timed) -> dict[str, Any]:
    names = OPS[timed.call.op].call
    return {
        "op": timed.call.op,
        "shape": dict(zip(names, timed.call.shape, strict=True)),
        **{field: getattr(timed, field) for field in ("times", "shares", "refused")},
    }


def _print(found: list[Timed], rounds: int, threads: int) -> None:
    from rich.text import Text

    from qframe.kernel_speed import FULL
    from qframe.report.table import FAINT, figures, stacked, table, times, titled

    parts = []
    for op in dict.fromkeys(each.call.op for each in found):
        shown = table("sizes", "backend", "x auto", "x float32", "of reading", names=2)
        for each in (one for one in found if one.call.op == op):
            title, first = _size(each), next(iter(each.times), "")
            for name, share in each.shares.items():
                full = times(each.over(name, FULL)) if FULL in each.times else ""
                shown.add_row(title, name, times(each.over(name, first)), full, figures(share))
                title = ""
            for name, why in each.refused.items():
                shown.add_row(title, f"{name}: {why}")
                title = ""
        parts.append(titled(op, shown))
    legend = (
        f"Speeds, {threads} threads: medians of {rounds} rounds in which all take turns, operands "
        f"being cold and code warm. x auto: beside the backend that auto takes, the first. x "
        f"float32: beside torch in full precision. of reading: of what the same run reads from "
        f"memory."
    )
    print_result(stacked(*parts, Text(legend, style=FAINT)))
