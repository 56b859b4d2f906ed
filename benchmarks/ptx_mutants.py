"""One-instruction mutants of the PTX of qframe's GPU kernels, judged by the cross-check.

    python benchmarks/ptx_mutants.py                  # every mutant, for sm_90: hours
    python benchmarks/ptx_mutants.py --sample 40      # so many of each kernel, drawn by --seed

A mutant is killed when a check of the conformance suite fails on one of a few small calls, by
bounds, by integers, by a finding of the checker, or by another order of threads. What survives is
kept with its instruction, and whether any answer had other bits. Records are in ptx_mutants.json;
kernels that are in there with as many mutants, of the same PTX, are not tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from qframe_conformance.checks import SKIPPED, Check, Violation, checks_of
from qframe_conformance.engine import Refused, Search, explore, run
from qframe_conformance.kernel_case import KernelCase
from qframe_conformance.kernel_scenarios import scenarios
from qframe_conformance.suite import prepare
from qframe_plugins.kernels.cuda import device
from qframe_plugins.kernels.cuda.compile import Source, compile_ptx
from qframe_plugins.kernels.cuda.sources import SOURCES
from qframe_plugins.kernels.cuda_ops import kernels_on
from qframe_plugins.ptx_host import Module
from qframe_plugins.ptx_host.mutants import Mutant, mutants

HERE = Path(__file__).parent
RECORDS = HERE / "ptx_mutants.json"
ARCH = "sm_90"
CALLS = 4  # on which a mutant is tried
SLOWEST = 0.5  # seconds of a call
FUEL = 10**5  # jumps back, after which a loop is taken to have no end
COSTLY = {"few_tokens", "same_answer_again", "says_why_not", "variants_agree"}


class Limited:
    """A kernel whose loops end."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def launch(self, *given: Any, **options: Any) -> Any:
        return self.kernel.launch(*given, **options, fuel=FUEL)


def calls_of(kernel: Any, name: str, seed: int) -> list[tuple[KernelCase, list[Check]]]:
    """Return small calls in which the kernel `name` is launched, of several families."""
    found: list[tuple[float, KernelCase, list[Check]]] = []
    plan = prepare(kernel, kind="kernel", seed=seed)
    every = list(scenarios(kernel))
    rng = np.random.default_rng(seed)
    for scenario in [every[i] for i in rng.permutation(len(every))[: 2 * CALLS]]:
        drawn: list[KernelCase] = []
        keep = Check("keep", "kernel", "structure", "", "", drawn.append, lambda *_: None)
        explore(scenario, [keep], Search(examples=6, seed=seed))
        objections = plan.objections(scenario)
        checks = [
            each
            for each in checks_of("kernel")
            if each.name not in objections and each.name not in COSTLY
        ]
        for case in drawn:
            if case.optional:
                continue
            runs: list[Any] = []
            kernel.on.runs = runs
            case.answer  # noqa: B018 - the call itself, and the translation of the kernel
            kernel.on.runs = None
            began = time.perf_counter()
            case.again()
            seconds = time.perf_counter() - began
            if name in {launched for launched, _ in runs} and seconds < SLOWEST:
                found.append((seconds, case, checks))
    # The long ones: a kernel has to go round its loops, and meet several groups and tiles.
    found.sort(key=lambda each: -each[0])
    return [(case, checks) for _, case, checks in found[:CALLS]]


def killed_by(mutant: Mutant, name: str, calls: list[Any], bits: list[bytes]) -> str | None:
    """Return the check that fails first; "" if none but bits differ, None if all is the same."""
    changed = Limited(mutant.module().kernel(name))
    known = device._on_host

    def on_host(source: Source, arch: str) -> Any:
        return changed if source.name == name else known(source, arch)

    same = True
    with mock.patch.object(device, "_on_host", on_host):
        for (case, checks), before in zip(calls, bits, strict=True):
            fresh = case.by(case.kernel)
            try:
                same &= b"".join(part.tobytes() for part in fresh.answer) == before
            except Refused:
                return "answers"
            except Exception as error:  # whatever it is, it does not go unnoticed
                return type(error).__name__
            for check in checks:
                outcome = run(check, fresh)
                if isinstance(outcome, Violation):
                    return check.name
                if outcome is SKIPPED and check.name == "answers":
                    return "answers"
    if not same:
        return ""
    with mock.patch.object(device, "_on_host", on_host):
        [orders] = [each for each in checks_of("kernel") if each.name == "variants_agree"]
        for case, _ in calls:
            if isinstance(run(orders, case.by(case.kernel)), Violation):
                return orders.name
    return None


def drawn(source: Source, sample: int | None, seed: int) -> tuple[list[Mutant], int]:
    """Return the mutants to be tried, and how many there are."""
    module = Module.from_ptx(compile_ptx(source, ARCH))
    every = list(mutants(module.source, source.name))
    if sample is None or sample >= len(every):
        return every, len(every)
    chosen = np.random.default_rng(seed).choice(len(every), sample, replace=False)
    return [every[i] for i in sorted(chosen)], len(every)


def judged(source: Source, sample: int | None, seed: int) -> dict[str, Any]:
    """Return the record of one kernel."""
    calls: list[Any] = []
    for kernel in kernels_on(device.PtxHost(ARCH)):
        calls += calls_of(kernel, source.name, seed)
    bits = [b"".join(part.tobytes() for part in case.answer) for case, _ in calls]
    tried, of = drawn(source, sample, seed)
    record: dict[str, Any] = {"kernel": source.name, "ptx": fingerprint(source), "of": of}
    record |= {"tried": len(tried), "calls": len(calls), "killed": {}, "survivors": []}
    for mutant in tried if calls else []:
        check = killed_by(mutant, source.name, calls, bits)
        if check:
            record["killed"][check] = record["killed"].get(check, 0) + 1
        else:
            entry = {"line": mutant.line, "text": mutant.text, "change": mutant.change}
            record["survivors"].append({**entry, "same_bits": check is None})
    return record


def fingerprint(source: Source) -> str:
    return hashlib.sha256(compile_ptx(source, ARCH).encode()).hexdigest()[:12]


def known() -> dict[str, Any]:
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernels", nargs="*", help="default: all")
    parser.add_argument("--sample", type=int, help="mutants of each kernel; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    records = known()
    for source in SOURCES:
        old = records.get(source.name, {})
        wanted = options.sample or 10**9
        enough = old.get("tried", 0) >= min(wanted, old.get("of", 0))
        if options.kernels and source.name not in options.kernels:
            continue
        if old and enough and old["ptx"] == fingerprint(source):
            continue
        began = time.perf_counter()
        records[source.name] = judged(source, options.sample, options.seed)
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        record = records[source.name]
        print(source.name, record["tried"], record["killed"], len(record["survivors"]),
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
