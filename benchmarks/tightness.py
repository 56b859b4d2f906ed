"""How near do correct plugins come to what is allowed? Writes docs/tightness.md.

    python benchmarks/tightness.py --seeds 20
    python benchmarks/tightness.py --seeds 20 --only awq chopped    # what else the page says stays

A bound that nothing comes near says little. For each theorem the largest error / allowed is taken
over the installed plugins and the correct twins of tests/mutants, over seeds of the default
profile. 1 means attained: a smaller bound would fail a correct plugin.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from qframe import Host
from qframe_conformance import check_plugin
from qframe_conformance.target import all_targets

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "tightness.md"
Found = dict[str, tuple[float, str, str, str]]


def subjects(only: Sequence[str] = ()) -> list[tuple[str, str, int]]:
    """Return what is measured: (kind, name, -1) of the installed, (module, name, number) of twins.

    only   their names; all where there are none
    """
    targets, problems, _ = all_targets()
    if problems:
        raise SystemExit("\n".join(problems))
    found = [(target.kind or "", target.name, -1) for target in targets]
    sys.path.insert(0, str(ROOT))
    for file in sorted((ROOT / "tests" / "mutants").glob("*.py")):
        module = importlib.import_module(f"tests.mutants.{file.stem}")
        if hasattr(module, "MUTANTS") and hasattr(module, "outputs"):
            found += [(module.__name__, twin.name, i) for i, twin in enumerate(module.TWINS)]
    if unknown := set(only) - {name for _, name, _ in found}:
        raise SystemExit(f"--only: no such plugin or twin: {', '.join(sorted(unknown))}")
    return [each for each in found if not only or each[1] in only]


def measure(job: tuple[tuple[str, str, int], int]) -> Found:
    """Return theorem -> (ratio, check, plugin, scenario) of one plugin and seed."""
    (first, name, number), seed = job
    if number < 0:
        kind, plugin = first, Host.discover().get(first, name)
    else:
        twin = importlib.import_module(first).TWINS[number]
        kind, plugin, name = twin.kind, twin.make(), f"{name} (twin)"
    report = check_plugin(plugin, kind=kind, seed=seed, shrink=False)
    return {
        theorem: (record.ratio or 0.0, record.check, f"{kind} {name}", record.scenario)
        for theorem, record in report.tightest().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    arguments = parser.parse_args()
    jobs = [(s, seed) for s in subjects(arguments.only) for seed in range(arguments.seeds)]
    best = written(arguments.seeds, arguments.only) if arguments.only else {}
    initial = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(arguments.workers, **initial) as pool:
        for found in pool.map(measure, jobs, chunksize=4):
            for theorem, entry in found.items():
                if theorem not in best or entry[0] > best[theorem][0]:
                    best[theorem] = entry
    DOCUMENT.write_text(document(best, arguments.seeds), encoding="utf-8")
    for theorem, entry in sorted(best.items()):
        print(f"{theorem:6} {entry[0]:.4f} {entry[1]} {entry[2]} {entry[3]}")


def written(seeds: int, but: Sequence[str]) -> Found:
    """Return what the document says of all but these names; it must be of as many seeds."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if f" {seeds} seeds" not in text:
        raise SystemExit(f"--only: {DOCUMENT.name} is not of {seeds} seeds; write all of it")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| B")]
    return {
        theorem.strip(): (float(ratio), check.strip("`"), plugin, scenario.strip())
        for theorem, _, ratio, check, plugin, scenario in rows
        if not plugin.removesuffix(" (twin)").endswith(tuple(f" {name}" for name in but))
    }


def document(best: Found, seeds: int) -> str:
    titles = dict(
        re.findall(
            r"^### (B\d+\.[a-z]) (.+)$",
            (ROOT / "docs" / "bounds.md").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    lines = [
        "# How tight the bounds are",
        "",
        "<!-- Written by benchmarks/tightness.py. Do not edit. -->",
        "",
        "The largest error / allowed that a *correct* plugin reached, by theorem of",
        f"[bounds.md](bounds.md), over the installed plugins and the twins, {seeds} seeds of the",
        "default profile. 1 is attained: a smaller bound would fail a correct plugin. Bounds of",
        "single weights are attained; bounds of sums allow for the worst signs of all terms at",
        "once, which random data does not have.",
        "",
        "| theorem | | largest ratio | check | reached by | scenario |",
        "|---|---|--:|---|---|---|",
    ]
    for theorem, (ratio, check, plugin, scenario) in sorted(best.items(), key=order):
        lines.append(
            f"| {theorem} | {titles.get(theorem, '')} | {ratio:.4f} | `{check}` | {plugin} | "
            f"{scenario} |"
        )
    return "\n".join(lines) + "\n"


def order(item: tuple[str, object]) -> tuple[int, str]:
    number, _, letter = item[0].removeprefix("B").partition(".")
    return int(number), letter


if __name__ == "__main__":
    main()
