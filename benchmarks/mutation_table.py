"""Judge the judge: every mutant against the suite, and against the tolerances that others use.

    python benchmarks/mutation_table.py            # writes docs/mutants.md

For each plugin of tests/mutants the whole suite is run at the default profile with seed 0. A mutant
is killed when the check that it names fails; a twin must pass everything. Beside it stands what an
ordinary unit test would say, which compares the outputs of the mutant with those of the correct
plugin on ordinary random problems:

* torch.testing.assert_close with its default tolerances for the dtype;
* the normalized squared error sum (a - b)^2 / sum b^2, at most 5e-4, as llama.cpp's
  test-backend-ops asks of matrix products.

These two numbers are other people's, quoted; nothing of qframe is judged by them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qframe_conformance import SUITE_VERSION, check_plugin
from qframe_conformance.checks import checks_of

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "mutants.md"
QUOTED_NMSE = 5e-4  # llama.cpp, tests/test-backend-ops.cpp, matrix products


@dataclass(frozen=True)
class Row:
    """What became of one mutant."""

    module: str
    kind: str
    name: str
    bug: str
    check: str
    level: str
    killed: bool
    examples: int
    checks_that_fail: int
    close_misses: bool | None
    nmse_misses: bool | None


def modules() -> Iterator[ModuleType]:
    """Yield the modules of tests/mutants that hold mutants."""
    sys.path.insert(0, str(ROOT))
    for file in sorted((ROOT / "tests" / "mutants").glob("*.py")):
        module = importlib.import_module(f"tests.mutants.{file.stem}")
        if hasattr(module, "MUTANTS") and hasattr(module, "outputs"):
            yield module


def judge(job: tuple[str, int]) -> Row:
    """Run the suite on one mutant, and the ordinary comparisons."""
    name, number = job
    module = importlib.import_module(name)
    mutant = module.MUTANTS[number]
    report = check_plugin(mutant.make(), kind=mutant.kind, shrink=False)
    level = next(c.level for c in checks_of(mutant.kind) if c.name == mutant.killed_by)
    examples, killed = 0, False
    for record in report.records:
        if record.check == mutant.killed_by:
            examples += record.examples
            if record.bad:
                killed = True
                break
    close, nmse = compare(module, mutant)
    return Row(
        module=name,
        kind=mutant.kind,
        name=mutant.name,
        bug=mutant.bug,
        check=mutant.killed_by,
        level=level,
        killed=killed,
        examples=examples,
        checks_that_fail=len({record.check for record in report.failures}),
        close_misses=close,
        nmse_misses=nmse,
    )


def compare(module: ModuleType, mutant: Any) -> tuple[bool | None, bool | None]:
    """Return whether each of the two comparisons passes the mutant; None where it has no say.

    A mutant that raises, or returns arrays of other shapes, is found by any test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = module.outputs(mutant.correct())
        try:
            wrong = module.outputs(mutant.make())
        except Exception:
            return False, False
    if [np.shape(a) for a in wrong] != [np.shape(b) for b in right]:
        return False, False
    return (
        all(is_close(a, b) for a, b in zip(wrong, right, strict=True)),
        all(nmse(a, b) <= QUOTED_NMSE for a, b in zip(wrong, right, strict=True)),
    )


def is_close(got: Any, expected: Any) -> bool:
    """Whether torch.testing.assert_close is content."""
    a, b = (torch.from_numpy(np.array(x)) for x in (got, expected))
    try:
        torch.testing.assert_close(a, b.to(a.dtype))  # its defaults are what is examined
    except AssertionError:
        return False
    return True


def nmse(got: Any, expected: Any) -> float:
    """Return sum (a - b)^2 / sum b^2; infinite for what is not finite."""
    a, b = (np.asarray(x, np.float64) for x in (got, expected))
    if not np.isfinite(a).all():
        return float("inf")
    energy = float((b**2).sum())
    error = float(((a - b) ** 2).sum())
    return error / energy if energy else error


def check_twin(job: tuple[str, int]) -> tuple[str, str, str, bool, str]:
    """Return (kind, name, why, whether all holds, what does not)."""
    name, number = job
    twin = importlib.import_module(name).TWINS[number]
    report = check_plugin(twin.make(), kind=twin.kind, shrink=False)
    failures = "; ".join(f"{record.id}: {record.message}" for record in report.failures[:2])
    return twin.kind, twin.name, twin.why, report.ok, failures


def tick(value: bool | None) -> str:
    return {True: "misses it", False: "finds it", None: ""}[value]


def document(rows: list[Row], twins: list[tuple[str, str, str, bool, str]]) -> str:
    killed = sum(row.killed for row in rows)
    close = [row for row in rows if row.close_misses]
    squares = [row for row in rows if row.nmse_misses]
    missed = {row.name for row in close} & {row.name for row in squares}
    lines = [
        "# The suite, judged by its own mutants",
        "",
        "<!-- Written by benchmarks/mutation_table.py. Do not edit. -->",
        "",
        "A test that cannot fail proves nothing. So the conformance suite is run on plugins that",
        "are wrong on purpose, each with one mistake that is seen in the field, and on *twins*,",
        "which are right but do it otherwise. Every mutant must be failed by the check that it",
        f"names, and no twin by any. Suite {SUITE_VERSION}, profile default, seed 0.",
        "",
        f"**{killed} of {len(rows)} mutants are killed. "
        f"{sum(twin[3] for twin in twins)} of {len(twins)} twins pass.**",
        "",
        "What tolerances would have said of the same mutants, on ordinary random problems, with",
        "the correct plugin's output as the expected one (which a real test seldom has):",
        "",
        "| comparison | mutants that it misses |",
        "|---|--:|",
        f"| `torch.testing.assert_close`, default tolerances | {len(close)} of {len(rows)} |",
        f"| normalized squared error at most 5e-4 (as llama.cpp for matrix products) | "
        f"{len(squares)} of {len(rows)} |",
        f"| both | {len(missed)} of {len(rows)} |",
        "",
        "*Examples*: the drawn cases on which the named check was tried until it failed. *Checks*:",
        "how many of the suite's checks fail. The other two columns say what the comparisons do.",
    ]
    for kind, number in sorted(Counter(row.kind for row in rows).items()):
        lines += [
            "",
            f"## {kind.capitalize()}s: {number}",
            "",
            "| mutant | mistake | killed by | level | examples | checks | assert_close | NMSE |",
            "|---|---|---|---|--:|--:|---|---|",
        ]
        for row in (row for row in rows if row.kind == kind):
            by = f"`{row.check}`" if row.killed else f"**survives** `{row.check}`"
            lines.append(
                f"| {row.name} | {escaped(row.bug)} | {by} | {row.level} | {row.examples} | "
                f"{row.checks_that_fail} | {tick(row.close_misses)} | {tick(row.nmse_misses)} |"
            )
    lines += [
        "",
        f"## Twins: {len(twins)}",
        "",
        "| kind | twin | why it is right | |",
        "|---|---|---|---|",
    ]
    for kind, name, why, ok, failures in twins:
        state = "passes" if ok else f"**wrongly failed**: {escaped(failures)}"
        lines.append(f"| {kind} | {name} | {escaped(why)} | {state} |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def spread(function: Any, jobs: Iterable[Any], workers: int) -> list[Any]:
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, jobs, chunksize=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="modules whose name holds this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [m for m in modules() if not arguments.only or arguments.only in m.__name__]
    rows = spread(
        judge,
        [(m.__name__, i) for m in found for i in range(len(m.MUTANTS))],
        arguments.workers,
    )
    twins = spread(
        check_twin,
        [(m.__name__, i) for m in found for i in range(len(m.TWINS))],
        arguments.workers,
    )
    for row in rows:
        if not row.killed:
            print(f"survives: {row.kind} {row.name} (named check: {row.check})")
    for twin in twins:
        if not twin[3]:
            print(f"wrongly failed: {twin[0]} {twin[1]}: {twin[4]}")
    print(f"{sum(r.killed for r in rows)} of {len(rows)} mutants killed, {len(twins)} twins")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not arguments.only:
        DOCUMENT.write_text(document(rows, twins), encoding="utf-8")


if __name__ == "__main__":
    main()
