"""How near do correct plugins come to what is allowed? Writes docs/tightness.md.

    python benchmarks/tightness.py --seeds 20

A bound that nothing comes near says little. For each theorem the largest error / allowed is taken
over the installed plugins and the correct twins of tests/mutants, over seeds of the default
profile. 1 means attained: a smaller bound would fail a correct plugin.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from qframe import Host
from qframe_conformance import check_plugin
from qframe_conformance.target import all_targets

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "tightness.md"
Found = dict[str, tuple[float, str, str, str]]


def subjects() -> list[tuple[str, str, int]]:
    """Return what is measured: (kind, name, -1) of the installed, (module, "", number) of twins."""
    targets, problems = all_targets()
    if problems:
        raise SystemExit("\n".join(problems))
    found = [(target.kind or "", target.name, -1) for target in targets]
    sys.path.insert(0, str(ROOT))
    for file in sorted((ROOT / "tests" / "mutants").glob("*.py")):
        module = importlib.import_module(f"tests.mutants.{file.stem}")
        if hasattr(module, "MUTANTS") and hasattr(module, "outputs"):
            found += [(module.__name__, "", i) for i in range(len(module.TWINS))]
    return found


def measure(job: tuple[tuple[str, str, int], int]) -> Found:
    """Return theorem -> (ratio, check, plugin, scenario) of one plugin and seed."""
    (first, name, number), seed = job
    if number < 0:
        kind, plugin = first, Host.discover().get(first, name)
    else:
        twin = importlib.import_module(first).TWINS[number]
        kind, plugin, name = twin.kind, twin.make(), f"{twin.name} (twin)"
    report = check_plugin(plugin, kind=kind, seed=seed, shrink=False)
    return {
        theorem: (record.ratio or 0.0, record.check, f"{kind} {name}", record.scenario)
        for theorem, record in report.tightest().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(s, seed) for s in subjects() for seed in range(arguments.seeds)]
    best: Found = {}
    initial = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(arguments.workers, **initial) as pool:
        for found in pool.map(measure, jobs, chunksize=4):
            for theorem, entry in found.items():
                if theorem not in best or entry[0] > best[theorem][0]:
                    best[theorem] = entry
    DOCUMENT.write_text(document(best, arguments.seeds), encoding="utf-8")
    for theorem, entry in sorted(best.items()):
        print(f"{theorem:6} {entry[0]:.4f} {entry[1]} {entry[2]} {entry[3]}")


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
