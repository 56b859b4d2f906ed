"""`qframe check`: run the suite on a plugin by name, and say what held, what failed, and how.

It reaches qframe as an entry point of the group "qframe.commands", as a command of anybody's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qframe.cli.command import Debug, Json
from qframe.cli.screen import note, print_json, print_plain, stdout, warn
from qframe.errors import RecipeError

if TYPE_CHECKING:
    from qframe_conformance.report import Report
    from qframe_conformance.target import Target

NOT_AS_CLAIMED = 4  # as for a checkpoint that is not what it claims to be


def check(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The plugin; qframe plugins lists them."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Check every plugin that is installed.")
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="rounder, observer, outlier handler, ...; where a name alone does not tell.",
        ),
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="Also load this Python file. Repeat."),
    ] = None,
    no_plugin: Annotated[
        list[str] | None,
        typer.Option("--no-plugin", metavar="NAME", help="Do not load it. Repeat."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the plugin. Repeat."),
    ] = None,
    profile: Annotated[
        str,
        typer.Option("--profile", metavar="fast|default|thorough", help="How much is tried."),
    ] = "default",
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CHECK", help="Run this check alone. Repeat."),
    ] = None,
    expect_failure: Annotated[
        list[str] | None,
        typer.Option(
            "--expect-failure",
            metavar="CHECK=REASON",
            help="It is known to fail, and why. When it holds after all, that is a failure. "
            "Repeat.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="VERSION", help="Leave out checks that came later."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="DIR",
            help="Write each counterexample as a script that runs alone, beside its arrays.",
        ),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Run it here, for a debugger; a plugin that hangs or crashes takes qframe along.",
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option("--time-limit", min=0, help="Seconds for one drawn case. Default: 60."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory-limit", min=0, help="GiB beside the libraries'. Default: 4."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a plugin keeps its promises.

    Example: qframe check rtn

    What is checked follows from what the plugin declares and claims. It runs in a process of its
    own, with limits of time and memory. Exit code 0 when something was tested and all of it holds,
    4 when not.
    """
    if (name is None) == (not everything):
        raise RecipeError("give the NAME of a plugin, or --all for every plugin")
    if everything:
        given = {"--kind": kind, "--set": options, "--only": only}
        given["--expect-failure"] = expect_failure
        for flag, value in given.items():
            if value:
                raise RecipeError(f"{flag} is about one plugin and does not go with --all")
    from qframe.cli.flags import parse_settings
    from qframe_conformance.suite import SUITE_VERSION
    from qframe_conformance.target import Target, all_targets

    files, disable = [str(file) for file in plugin or ()], list(no_plugin or ())
    problems: list[str] = []
    if name is None:
        targets, problems, elsewhere = all_targets(files, disable)
        for line in elsewhere:
            note(line)
    else:
        settings = parse_settings(options or (), "--set")
        targets = [Target(name=name, kind=kind, files=files, disable=disable, options=settings)]
    for problem in problems:
        warn(problem)
    run = _runner(
        in_process=in_process,
        limits={"seconds": seconds, "memory": None if memory is None else int(memory * (1 << 30))},
        profile=profile,
        seed=seed,
        only=only or None,
        expected_failures=parse_reasons(expect_failure or ()),
        suite=suite or SUITE_VERSION,
    )
    reports: list[Report] = []
    for target in targets:
        report = run(target)
        reports.append(report)
        saved = [] if save is None else report.save(save / _folder(target) if everything else save)
        if not as_json:
            _show(report, saved, brief=everything)
    ok = bool(reports) and not problems and all(report.ok for report in reports)
    if as_json:
        found = [report.to_dict() for report in reports]
        print_json({"ok": ok, "problems": problems, "reports": found})
    if not ok:
        raise typer.Exit(NOT_AS_CLAIMED)


def parse_reasons(texts: Sequence[str]) -> dict[str, str]:
    """Return CHECK=REASON texts as a mapping. Raises RecipeError for one without a reason."""
    found = {}
    for text in texts:
        check, _, reason = text.partition("=")
        if not check.strip() or not reason.strip():
            raise RecipeError(f"--expect-failure {text}: expected CHECK=REASON")
        found[check.strip()] = reason.strip()
    return found


def _runner(
    *, in_process: bool, limits: dict[str, Any], **options: Any
) -> Callable[[Target], Report]:
    """Return what checks a target."""
    import os
    import sys

    shows = sys.stderr.isatty() and "CI" not in os.environ

    def progress(scenario: str) -> None:
        note(f"  {scenario}")

    options["progress"] = progress if shows else None
    if not in_process:
        from qframe_conformance.contain import check_contained

        limited = {key: value for key, value in limits.items() if value is not None}
        return lambda target: check_contained(target, **options, **limited)
    from qframe_conformance.suite import check_plugin

    def run(target: Target) -> Report:
        kind, plugin, host = target.load()
        return check_plugin(plugin, **{**options, "kind": kind, "host": host})

    return run


def _show(report: Report, saved: Sequence[Path], *, brief: bool) -> None:
    """Print a report; of one that is all right, when there are many, only the last line."""
    from qframe_conformance.summary import renderable

    if saved:
        more = f", the first of {len(saved)} in that folder" if len(saved) > 1 else ""
        note(f"wrote {saved[0]}{more}")
    if not (brief and report.ok):
        stdout().print(renderable(report), crop=False)
        print_plain("")
    print_plain(report.line())


def _folder(target: Target) -> str:
    return f"{target.kind}-{target.name}".replace("/", "-").replace(" ", "-")
