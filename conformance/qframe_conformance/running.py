"""A run: one plugin, the checks that were asked for, and a record for each in each scenario."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from qframe.errors import RecipeError
from qframe.strict import suggestion
from qframe_conformance.checks import Check, Violation
from qframe_conformance.engine import (
    Observed,
    OutOfMemory,
    Scenario,
    Search,
    explore,
    smallest,
    undisturbed,
)
from qframe_conformance.report import Counterexample, Record, Report, Status
from qframe_conformance.reproduce import plugin_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A plugin, and everything that was asked for.

    shrunk   checks that have their small counterexample already; one for each is enough
    """

    plugin: Any
    kind: str
    name: str
    module: ModuleType
    checks: tuple[Check, ...]
    search: Search
    expected: Mapping[str, str]
    suite: str
    profile: str
    shrink: bool
    shrunk: set[str] = field(default_factory=set)

    def scenarios(self, ids: Sequence[str] | None = None) -> list[Scenario]:
        """Return the scenarios that the plugin declares, or those of them that are named.

        Raises RecipeError for an unknown id.
        """
        with undisturbed(self.search.host):
            found: list[Scenario] = list(self.module.scenarios(self.plugin))
        known = [scenario.id for scenario in found]
        for wanted in ids or ():
            if wanted not in known:
                raise RecipeError(
                    f"{self.kind} {self.name!r} has no scenario {wanted!r}"
                    f"{suggestion(wanted, known)}"
                )
        return [scenario for scenario in found if ids is None or scenario.id in ids]

    def objections(self, scenario: Scenario) -> dict[str, str]:
        """Return check -> why it has nothing to say there, for those that do not apply."""
        found = {each.name: each.objection(self.plugin, scenario.subject) for each in self.checks}
        return {name: reason for name, reason in found.items() if reason is not None}

    def records(self, scenario: Scenario) -> Iterator[Record]:
        """Run all checks on one scenario; yield a record for each, or one for a crash."""
        objections = self.objections(scenario)
        applying = [each for each in self.checks if each.name not in objections]
        try:
            seen = explore(scenario, applying, self.search) if applying else {}
            for each in self.checks:
                reason = objections.get(each.name)
                if reason is not None:
                    yield self._record(each, scenario, "not applicable", message=reason)
                else:
                    yield self._observed(each, scenario, seen[each.name])
            return
        except OutOfMemory as error:
            message = f"out of memory: {error}"
        gc.collect()  # the error held the frames in which the memory is
        yield self.crash(scenario.id, message)

    def _observed(self, each: Check, scenario: Scenario, observed: Observed) -> Record:
        """Return the record of a check that applied."""
        if observed.failure is None:
            status: Status = "held" if observed.examples else "not drawn"
            return self._record(
                each, scenario, status, examples=observed.examples, ratio=observed.ratio
            )
        example: Counterexample | None = None
        known = self.expected.get(each.name)
        if known is None:
            if self.shrink and each.name not in self.shrunk:
                self.shrunk.add(each.name)
                observed = smallest(scenario, each, observed, self.search)
            example = observed.case.counterexample(each.name)
        failure: Violation = observed.failure  # type: ignore[assignment]
        return self._record(
            each,
            scenario,
            "failed" if known is None else "expected failure",
            examples=observed.examples,
            ratio=failure.ratio,
            message=str(failure) if known is None else f"{known} ({failure})",
            counterexample=example,
            theorem=failure.theorem or each.theorem,
        )

    def _record(self, each: Check, scenario: Scenario, status: Status, **more: Any) -> Record:
        values: dict[str, Any] = {
            "check": each.name,
            "plugin": self.name,
            "scenario": scenario.id,
            "level": each.level,
            "theorem": each.theorem,
            "promise": each.promise,
            "status": status,
            **more,
        }
        return Record(**values)

    def crash(self, scenario: str, message: str) -> Record:
        """Return the record of a scenario from which the plugin did not come back."""
        return crash(self.kind, self.name, scenario, message, self.profile, self.search.seed)

    def code(self) -> str:
        """Return Python that makes the plugin."""
        return plugin_code(self.plugin, self.kind, self.name)

    def report(self, records: Sequence[Record], seconds: float) -> Report:
        """Return the report of all records."""
        return Report(
            plugin=self.name,
            kind=self.kind,
            suite=self.suite,
            profile=self.profile,
            seed=self.search.seed,
            records=strict(records, self.expected),
            seconds=seconds,
            code=self.code(),
        )


def crash(kind: str, plugin: str, scenario: str, message: str, profile: str, seed: int) -> Record:
    """Return the record of a scenario from which a plugin did not come back."""
    snippet = (
        "from qframe_conformance import check_plugin\n\n"
        f"print(check_plugin(plugin, kind={kind!r}, profile={profile!r}, seed={seed}, "
        f"scenarios=[{scenario!r}]))\n"
    )
    return Record(
        check="comes_back",
        plugin=plugin,
        scenario=scenario,
        level="structure",
        theorem="",
        promise="Every call comes back: no hang, no end of the process, no lack of memory.",
        status="crashed",
        message=message,
        counterexample=Counterexample(snippet=snippet),
    )


def strict(records: Sequence[Record], expected: Mapping[str, str]) -> list[Record]:
    """Turn what was expected to fail, and failed nowhere, into an unexpected pass."""
    fails = {record.check for record in records if record.status == "expected failure"}
    tested = {record.check for record in records if record.status == "held"}
    out = []
    for record in records:
        if record.check in expected and record.check not in fails:
            reason = expected[record.check]
            if record.status == "held":
                message = f"expected to fail ({reason}), but it holds"
                record = replace(record, status="unexpected pass", message=message)
            elif record.check not in tested:
                tested.add(record.check)  # once is enough
                message = f"expected to fail ({reason}), but it was never tested: {record.message}"
                record = replace(record, status="unexpected pass", message=message.rstrip(": "))
        out.append(record)
    return out
