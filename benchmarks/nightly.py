"""The default suite over the default plugins, for thousands of seeds: there is no false alarm.

    python benchmarks/nightly.py --runs 10000 --workers 2 --log nightly.log

A run is every installed plugin object that the suite has checks for, at the given profile, with one
seed; nothing may fail. The log has a line for every ten runs, and one for each failure. When it
is started again with the same log it goes on after the last seed that it finished. With --only it
runs the objects of some names: after a mended fault, those that it was in.

Other things for a night are QFRAME_TEST_PROFILE=nightly pytest, which takes all mutants and all
processors, and more one-instruction mutants of the GPU kernels, another seed each night:

    python benchmarks/ptx_mutants.py --sample 200 --seed 1 --minutes 300
    python benchmarks/ptx_mutants_table.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from qframe import Host
from qframe_conformance import check_plugin
from qframe_conformance.target import all_targets


def objects(only: Sequence[str]) -> list[tuple[str, str]]:
    """Return (kind, name) of every installed object that can be checked, or of those named."""
    targets, problems, _ = all_targets()
    if problems:
        raise SystemExit("\n".join(problems))
    found = [(target.kind or "", target.name) for target in targets]
    if unknown := set(only) - {name for _, name in found}:
        raise SystemExit(f"--only: not installed, or without checks: {', '.join(sorted(unknown))}")
    return [(kind, name) for kind, name in found if not only or name in only]


def prepare() -> None:
    torch.set_num_threads(1)
    os.environ["NUMBA_NUM_THREADS"] = "1"


def run(job: tuple[int, str, Sequence[str]]) -> tuple[int, int, list[str], dict[str, float]]:
    """Return (seed, pairs of check and scenario that ran, failures, worst ratio by theorem)."""
    seed, profile, only = job
    host, ran, failures, worst = Host.discover(), 0, [], {}
    for kind, name in objects(only):
        report = check_plugin(
            host.get(kind, name), kind=kind, profile=profile, seed=seed, shrink=False
        )
        ran += report.ran
        failures += [f"seed {seed}: {kind} {r.id}: {r.message}" for r in report.failures]
        if not report.ran:
            failures.append(f"seed {seed}: {kind} {name}: nothing ran")
        for theorem, ratio in report.worst().items():
            worst[theorem] = max(worst.get(theorem, 0.0), ratio)
    return seed, ran, failures, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--log", type=Path, default=Path("nightly.log"))
    arguments = parser.parse_args()

    done, ran, failures, worst = resumed(arguments.log)
    started = time.time()
    names = ", ".join(f"{kind} {name}" for kind, name in objects(arguments.only))
    with (
        arguments.log.open("a", encoding="utf-8") as log,
        ProcessPoolExecutor(arguments.workers, initializer=prepare) as pool,
    ):
        if not done:
            log.write(f"profile {arguments.profile}; {names}\n")
        jobs = ((seed, arguments.profile, arguments.only) for seed in range(done, arguments.runs))
        for seed, count, failed, ratios in pool.map(run, jobs, chunksize=4):
            ran, failures = ran + count, failures + len(failed)
            for theorem, ratio in ratios.items():
                worst[theorem] = max(worst.get(theorem, 0.0), ratio)
            log.writelines(f"FAILED {line}\n" for line in failed)
            if (seed + 1) % 10 == 0 or seed + 1 == arguments.runs:
                state = {"runs": seed + 1, "checks": ran, "failed": failures}
                ratios_text = json.dumps({k: round(v, 6) for k, v in sorted(worst.items())})
                log.write(f"{json.dumps(state)} worst {ratios_text}\n")
                log.flush()
    print(f"{arguments.runs} runs, {ran} checks, {failures} failed, {time.time() - started:.0f} s")
    sys.exit(bool(failures))


def resumed(log: Path) -> tuple[int, int, int, dict[str, float]]:
    """Return (runs, checks, failures, worst ratios) that a log has reached."""
    if log.is_file():
        for line in reversed(log.read_text(encoding="utf-8").splitlines()):
            if line.startswith("{"):
                state, _, worst = line.partition(" worst ")
                found = json.loads(state)
                return found["runs"], found["checks"], found["failed"], json.loads(worst)
    return 0, 0, 0, {}


if __name__ == "__main__":
    main()
