"""One-instruction mutants of the PTX of qframe's GPU kernels, judged by the cross-check.

    python benchmarks/ptx_mutants.py --sample 60            # of each kernel, drawn by --seed
    python benchmarks/ptx_mutants.py few_4_bits_1 --seed 7  # a shard: every mutant of a kernel
    python benchmarks/ptx_mutants.py --sample 200 --seed 1 --minutes 60   # a night's worth

A mutant stands in the place of the kernel for sm_90, and nowhere else. It is killed when the suite
fails: by a bound, by integers, by a finding of the checker, by a loop without end, or because the
kernel in another order of threads, or for another architecture, has other bits. Its calls are those
that `qframe crosscheck` draws, in twice as many cases, without the slow ones. They come in the
order of what they have killed; an answer with the bits of before needs no further look. Kinds of
changes are drawn in proportion, at least one of each.

Records are in ptx_mutants.json: what has been tried is not tried again, with another seed others
are added, and a kernel whose PTX is another one begins anew. ptx_mutants_table.py makes a document
of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ptx_mutants_table import reason_of, reasons

from qframe.kernels import OPS
from qframe_conformance.checks import Check, Violation, checks_of
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

RECORDS = Path(__file__).parent / "ptx_mutants.json"
ARCH = "sm_90"
CALLS = 10  # of all families, on which every check is tried
EXAMPLES = 4  # cases of a scenario
SLOWEST = 0.6  # seconds of a call
FUEL = 10**6  # jumps back of a block, after which a loop is taken to have no end
SEED = 0  # of the calls; the mutants have their own
WHOLE = "takes_activations"  # what is asked of a kernel for activations and codes at once
LATER = ("integers_exactly", "nan_comes_out", "few_tokens", "tokens_alone", WHOLE)
SURVIVES = ""


class Limited:
    """A kernel whose loops end."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def launch(self, *given: Any, **options: Any) -> Any:
        return self.kernel.launch(*given, **options, fuel=FUEL)


@dataclass
class Call:
    """A small call, its right answer, the checks that have to do with it, and what it killed."""

    case: KernelCase
    bits: bytes
    checks: list[Check]
    kills: int = 0


# Small calls ----------------------------------------------------------------------------------


@cache
def small_calls(op: str) -> list[tuple[float, set[str], Call, str]]:
    """Return (seconds, kernels that are launched, call, scenario) of calls of an operation."""
    [kernel] = [each for each in kernels_on(device.PtxHost(ARCH)) if each.op == op]
    kernel.on  # noqa: B018 - which is made once
    plan = prepare(kernel, kind="kernel", seed=SEED)
    found = []
    for scenario in scenarios(kernel):
        drawn: list[KernelCase] = []
        keep = Check("keep", "kernel", "structure", "", "", drawn.append, lambda *_: None)
        explore(scenario, [keep], Search(examples=EXAMPLES, seed=SEED))
        objections = plan.objections(scenario)
        checks = [each for each in checks_of("kernel") if each.name not in objections]
        for case in drawn:
            runs: list[Any] = []
            kernel.on.runs = runs
            try:
                answer = case.answer
                if case.dtype != "float32":  # kernels that nothing else launches
                    _failing([each for each in checks if each.name == WHOLE], case)
            except Refused:
                continue
            finally:
                kernel.on.runs = None
            began = time.perf_counter()
            case.again()
            seconds = time.perf_counter() - began
            if seconds < SLOWEST:
                bits = b"".join(part.tobytes() for part in answer)
                names = {name for name, _ in runs}
                found.append((seconds, names, Call(case, bits, checks), scenario.id))
    return found


def calls_of(name: str) -> tuple[list[Call], list[Call]]:
    """Return some calls that launch a kernel, of all families, and all others."""
    mine = [each for op in OPS for each in small_calls(op) if name in each[1]]
    families = defaultdict(list)
    for seconds, _, call, scenario in mine:
        families[call.case.op.name, scenario].append((seconds, call))
    for each in families.values():
        each.sort(key=lambda pair: -pair[0])  # the long ones: several groups, tiles, rounds
    chosen: list[Call] = []
    rng = np.random.default_rng(SEED)
    while len(chosen) < CALLS and any(families.values()):
        keys = [key for key, left in families.items() if left]
        for number in rng.permutation(len(keys)):
            if len(chosen) < CALLS:
                chosen.append(families[keys[number]].pop(0)[1])
    return chosen, [call for each in families.values() for _, call in each]


# Judgement ------------------------------------------------------------------------------------


def killed_by(mutant: Mutant, name: str, calls: list[Call], others: list[Call]) -> str:
    """Return the check that notices it, SURVIVES if none does."""
    changed = Limited(mutant.module().kernel(name))
    known = device._on_host

    def on_host(source: Source, arch: str) -> Any:
        return changed if (source.name, arch) == (name, ARCH) else known(source, arch)

    with mock.patch.object(device, "_on_host", on_host):
        for judge, given in (
            (_by_theorems, calls + [each for each in others if each.kills]),
            (_by_theorems, [each for each in others if not each.kills]),
            (_by_variants, calls),
            (_by_other_calls, calls),
        ):
            killer = judge(given)
            if killer:
                return killer
    return SURVIVES


def _by_theorems(calls: list[Call]) -> str:
    """Say what notices the answers of the small calls: nothing to do where no bit differs."""
    for call in sorted(calls, key=lambda each: -each.kills):
        fresh = call.case.by(call.case.kernel)
        try:
            same = b"".join(part.tobytes() for part in fresh.answer) == call.bits
        except Refused:
            killer = "answers"
        except Exception as error:  # whatever it is, it does not go unnoticed
            killer = type(error).__name__
        else:
            now = [each for each in call.checks if each.theorem and each.name not in LATER]
            killer = SURVIVES if same else _failing(now, fresh) or _by_variants([call])
        if killer:
            call.kills += 1
            return killer
    return SURVIVES


def _by_other_calls(calls: list[Call]) -> str:
    """Say what notices calls with integers, with a NaN, or with fewer tokens."""
    for name in LATER:
        for call in calls:
            later = [each for each in call.checks if each.name == name]
            killer = _failing(later, call.case.by(call.case.kernel))
            if killer:
                return killer
    return SURVIVES


def _by_variants(calls: list[Call]) -> str:
    for call in calls:
        checks = [each for each in call.checks if each.name == "variants_agree"]
        killer = _failing(checks, call.case.by(call.case.kernel))
        if killer:
            return killer
    return SURVIVES


def _failing(checks: list[Check], case: KernelCase) -> str:
    for check in checks:
        try:
            if isinstance(run(check, case), Violation):
                return check.name
        except Exception as error:
            return type(error).__name__
    return SURVIVES


# Samples --------------------------------------------------------------------------------------


def kind_of(mutant: Mutant) -> str:
    """Return what sort of change it is, in words without numbers."""
    change = mutant.change
    if change.startswith("["):
        return "the next cell of memory"
    if change.partition(" -> ")[0].lstrip("-").isdigit():
        return "a number that is one off"
    return "operands swapped" if change.endswith("swapped") else change


def drawn(every: list[Mutant], sample: int | None, seed: int) -> list[int]:
    """Return the numbers of the mutants to be tried, in a random order."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[int]] = defaultdict(list)
    for number in rng.permutation(len(every)):
        kinds[kind_of(every[number])].append(int(number))
    share = 1.0 if sample is None else min(sample / len(every), 1.0)
    chosen = [n for each in kinds.values() for n in each[: max(1, round(share * len(each)))]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def fingerprint(source: Source) -> str:
    return hashlib.sha256(compile_ptx(source, ARCH).encode()).hexdigest()[:12]


def known_records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def judged(source: Source, record: dict[str, Any], wanted: list[int], every: list[Mutant],
           until: float) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Add what becomes of the wanted mutants to a record; yield it after each of them."""
    tried = {n for each in record["killed"].values() for n in each}
    tried |= {each["number"] for each in record["survivors"]}
    left = [number for number in wanted if number not in tried]
    calls, others = calls_of(source.name) if left else ([], [])
    if left and not calls:
        raise SystemExit(f"no small call launches {source.name}: nothing could kill its mutants")
    record["calls"] = len(calls + others) or record.get("calls", 0)
    for number in left:
        if time.monotonic() > until:
            return
        mutant = every[number]
        killer = killed_by(mutant, source.name, calls, others)
        if killer:
            record["killed"].setdefault(killer, []).append(number)
        else:
            entry = {"line": mutant.line, "text": mutant.text, "change": mutant.change}
            record["survivors"].append({"number": number, **entry})
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernels", nargs="*", help="default: all")
    parser.add_argument("--sample", type=int, help="mutants of each kernel; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no longer than that")
    parser.add_argument("--again", action="store_true", help="only survivors that nothing explains")
    options = parser.parse_args()
    until, why = time.monotonic() + 60 * options.minutes, reasons()
    for source in SOURCES:
        if options.kernels and source.name not in options.kernels:
            continue
        every = list(mutants(Module.from_ptx(compile_ptx(source, ARCH)).source, source.name))
        record = known_records().get(source.name, {})
        if record.get("ptx") != fingerprint(source):
            record = {"ptx": fingerprint(source), "of": len(every), "killed": {}, "survivors": []}
        wanted = drawn(every, options.sample, options.seed)
        if options.again:
            explained = [each for each in record["survivors"] if reason_of(source.name, each, why)]
            wanted = [n["number"] for n in record["survivors"] if n not in explained]
            record["survivors"] = explained
        began, count = time.perf_counter(), 0
        for changed in judged(source, record, wanted, every, until):
            count += 1
            if count % 10 == 0:
                written(source.name, changed)
        written(source.name, record)
        killed = {name: len(each) for name, each in record["killed"].items()}
        took = f"{time.perf_counter() - began:.0f} s"
        print(source.name, count, killed, len(record["survivors"]), took, flush=True)


def written(name: str, record: dict[str, Any]) -> None:
    records = {**known_records(), name: record}
    text = json.dumps({s.name: records[s.name] for s in SOURCES if s.name in records}, indent=1)
    RECORDS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
