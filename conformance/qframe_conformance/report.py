"""What a run of the suite found: one record per (check, plugin, scenario), and a summary."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal[
    "held",
    "failed",
    "crashed",
    "not applicable",
    "not drawn",
    "expected failure",
    "unexpected pass",
]
BAD: frozenset[str] = frozenset({"failed", "crashed", "unexpected pass"})
TESTED: frozenset[str] = BAD | {"held", "expected failure"}
REPORT_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterexample:
    """The smallest input found that breaks a promise.

    snippet   Python that prints what the check says of it. It uses two names that the script
              around it defines (`qframe_conformance.reproduce`): `plugin`, and `arrays`
    arrays    name -> array
    """

    snippet: str
    arrays: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One check on one scenario.

    status     "not drawn": no drawn case had to do with the promise. "crashed": the plugin never
               came back from a call
    examples   cases on which the promise was tested
    ratio      the largest error / allowed seen; None for exact promises
    message    what was violated, or why the check does not apply
    """

    check: str
    plugin: str
    scenario: str
    level: str
    theorem: str
    promise: str
    status: Status
    examples: int = 0
    ratio: float | None = None
    message: str = ""
    counterexample: Counterexample | None = None

    @property
    def id(self) -> str:
        """The record's name: check[plugin-scenario]."""
        return f"{self.check}[{self.plugin}-{self.scenario}]"

    @property
    def bad(self) -> bool:
        """Whether it speaks against the plugin."""
        return self.status in BAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All records of one plugin.

    suite     version of the suite;  profile, seed: how it was run
    code      Python that makes the plugin, for counterexamples
    """

    plugin: str
    kind: str
    suite: str
    profile: str
    seed: int
    records: Sequence[Record]
    seconds: float = 0.0
    code: str = ""

    @property
    def failures(self) -> list[Record]:
        """The records that speak against the plugin."""
        return [record for record in self.records if record.bad]

    @property
    def ran(self) -> int:
        """How many (check, scenario) pairs were really tested."""
        return sum(record.status in TESTED for record in self.records)

    @property
    def ok(self) -> bool:
        """Whether something was tested and nothing failed: zero checks are no pass."""
        return self.ran > 0 and not self.failures

    def counts(self) -> dict[str, int]:
        """Return status -> how many records."""
        return dict(Counter(record.status for record in self.records))

    def worst(self) -> dict[str, float]:
        """Return theorem -> the largest error / allowed that was seen."""
        return {theorem: record.ratio or 0.0 for theorem, record in self.tightest().items()}

    def tightest(self) -> dict[str, Record]:
        """Return theorem -> the record with its largest error / allowed."""
        found: dict[str, Record] = {}
        for record in self.records:
            if record.ratio is None or not record.theorem:
                continue
            best = found.get(record.theorem)
            if best is None or best.ratio is None or not record.ratio <= best.ratio:
                found[record.theorem] = record
        return dict(sorted(found.items()))

    def line(self) -> str:
        """Return the summary: what was run, held, failed, and was not applicable."""
        counts = self.counts()
        parts = [f"{self.ran} ran", f"{counts.get('held', 0)} held", f"{len(self.failures)} failed"]
        parts += [
            f"{counts[status]} {status}"
            for status in ("expected failure", "not applicable", "not drawn")
            if counts.get(status)
        ]
        nothing = "; nothing was tested, which is no pass" if not self.ran else ""
        return (
            f"{self.kind} {self.plugin!r}: {', '.join(parts)}{nothing} "
            f"(suite {self.suite}, profile {self.profile}, seed {self.seed})"
        )

    def __str__(self) -> str:
        """Return all of it as text, 100 columns wide."""
        from qframe_conformance.summary import as_text

        return as_text(self)

    def to_markdown(self) -> str:
        """Return a table with a row for each check, and the failures, as Markdown."""
        from qframe_conformance.summary import as_markdown

        return as_markdown(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without counterexamples' arrays."""
        return {
            "schema_version": REPORT_SCHEMA,
            "plugin": self.plugin,
            "kind": self.kind,
            "suite": self.suite,
            "profile": self.profile,
            "seed": self.seed,
            "ok": self.ok,
            "counts": self.counts(),
            "worst": {theorem: _finite(ratio) for theorem, ratio in self.worst().items()},
            "records": [_plain(record) for record in self.records],
        }

    def to_json(self) -> str:
        """Return the report as JSON text, without counterexamples' arrays."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write every counterexample as a script that runs alone, beside its arrays.

        Returns the scripts, NAME.py; each reads NAME.npz. report.json and report.md stand beside
        them. The folder is made, and files of an earlier run in it are replaced.
        """
        from qframe_conformance.reproduce import save

        return save(self, Path(folder))


def _finite(ratio: float | None) -> float | str | None:
    """Return a number that JSON has, else the word for it."""
    return ratio if ratio is None or math.isfinite(ratio) else str(ratio)


def _plain(record: Record) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    values["id"] = record.id
    example = values.pop("counterexample")
    values["snippet"] = None if example is None else example.snippet
    values["ratio"] = _finite(record.ratio)
    return values
