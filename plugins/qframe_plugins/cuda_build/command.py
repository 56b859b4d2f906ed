"""`qframe kernels build`: compile GPU kernels with no GPU, and hold them against their budgets.

It reaches qframe as an entry point of the group "qframe.commands", as a command of anybody's does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Command, Debug, Json
from qframe.cli.progress import progress_shown
from qframe.cli.screen import note, print_json, print_result
from qframe.errors import OutputError, RecipeError
from qframe.strict import suggestion

if TYPE_CHECKING:
    from qframe_plugins.cuda_build.assembly import Figures
    from qframe_plugins.cuda_build.budgets import Verdict

ARCHES = ("sm_80", "sm_90", "sm_100")
BROKEN = 3  # numbers that are not right

kernels = typer.Typer(
    help="GPU kernels: what a compiler makes of them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


@kernels.callback()
def _kernels() -> None:
    """GPU kernels: what a compiler makes of them."""


@kernels.command("build", cls=Command)
def build(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KERNEL]...", help="Which of qframe's. Default: all."),
    ] = None,
    *,
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", metavar="SM", help=f"Repeat. Default: {', '.join(ARCHES)}."),
    ] = None,
    ptx: Annotated[
        list[Path] | None,
        typer.Option("--ptx", metavar="FILE", help="Kernels of this PTX, not qframe's. Repeat."),
    ] = None,
    budgets: Annotated[
        Path | None,
        typer.Option("--budgets", metavar="FILE", help="What they may cost. Default: qframe's."),
    ] = None,
    write_budgets: Annotated[
        Path | None,
        typer.Option("--write-budgets", metavar="FILE", help="Accept what they cost now."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Write PTX, machine code and listings."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile GPU kernels with no GPU and no driver, and show registers, memory and instructions.

    Example: qframe kernels build --arch sm_90

    Exit code 0 when all budgets are kept, 3 when not.
    """
    if ptx and names:
        raise RecipeError("give the names of qframe's kernels or --ptx FILE, not both")
    from qframe_plugins.cuda_build import budgets as rules
    from qframe_plugins.cuda_build.shipped import BUDGETS
    from qframe_plugins.cuda_build.tools import release

    release()  # before anything is compiled: without the tools there is no sense in it
    measured: dict[str, list[Figures]] = {}
    with progress_shown() as progress:
        for name, text, where in _texts(names or (), ptx or (), arch or ARCHES):
            progress.step(f"{name} {where}")
            for label, figures in _measured(name, text, where, out):
                measured.setdefault(label, []).append(figures)
    if write_budgets is not None:
        _write(write_budgets, rules.written(measured, release()))
    file = budgets or write_budgets or (None if ptx else BUDGETS)
    verdicts: list[Verdict] = []
    if file is not None:
        budget = rules.read_budgets(file)
        for name, found in measured.items():
            verdicts += [v for each in found for v in rules.judge(name, each, budget)]
        if not (names or ptx):
            verdicts += rules.strangers(measured, budget)
    broken = [verdict for verdict in verdicts if not verdict.holds]
    if as_json:
        print_json(_plain(release(), measured, verdicts))
    else:
        _print(release(), measured, verdicts, broken)
    if broken:
        raise typer.Exit(BROKEN)


def _texts(
    names: Sequence[str], files: Sequence[Path], arches: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield (name, PTX, architecture) of what is to be built."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"--ptx {file}: {error}; expected a text of PTX") from error
        yield from ((file.stem, text, where) for where in arches)
    if files:
        return
    from qframe_plugins.cuda_build.shipped import compiled, shipped

    known = shipped()
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no kernel {name!r}{suggestion(name, known)}")
    for name in names or known:
        for where in arches:
            yield name, compiled(name, where), where


def _measured(name: str, text: str, arch: str, out: Path | None) -> Iterator[tuple[str, Figures]]:
    """Yield what to call each kernel of a text, and its figures."""
    from qframe_plugins.cuda_build.assembly import assemble

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    found = assemble(text, arch, None if out is None else out / f"{name}.{arch}")
    for figures in found:
        yield (name if len(found) == 1 else figures.kernel), figures


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}; choose another file") from error
    note(f"wrote {file}")


def _plain(
    release: str, measured: Mapping[str, Sequence[Figures]], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    from dataclasses import asdict

    built = [
        {"kernel": name, "arch": each.arch, **each.counts}
        for name, found in measured.items()
        for each in found
    ]
    ok = bool(built) and all(verdict.holds for verdict in verdicts)
    verdicts_plain = [asdict(verdict) for verdict in verdicts]
    return {"ok": ok, "ptxas": release, "kernels": built, "verdicts": verdicts_plain}


def _print(
    release: str,
    measured: Mapping[str, Sequence[Figures]],
    verdicts: Sequence[Verdict],
    broken: Sequence[Verdict],
) -> None:
    from rich.text import Text

    from qframe.report.table import BAD, stacked, table
    from qframe_plugins.cuda_build.assembly import MEMORY, PTX_CLASSES
    from qframe_plugins.cuda_build.sass import CLASSES

    made = table("kernel", "arch", *MEMORY, "instructions", names=2)
    made.add_column("of them", overflow="fold")
    for name, found in measured.items():
        for each in found:
            sorts = [
                f"{each.counts[sort]} {sort}"
                for sort in (*CLASSES, *PTX_CLASSES)
                if each.counts[sort]
            ]
            numbers = [str(each.counts[word]) for word in (*MEMORY, "instructions")]
            made.add_row(name, each.arch, *numbers, ", ".join(sorts))
            name = ""
    kept = len(verdicts) - len(broken)
    line = f"{kept} of {len(verdicts)} limits are kept" if verdicts else "no limits were given"
    failures = [Text(str(verdict), style=BAD) for verdict in broken]
    print_result(stacked(made, *failures, Text(f"{line} (ptxas {release})")))
