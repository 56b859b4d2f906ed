"""The suite as tests: one for every (plugin, scenario, check) that has something to say.

    pytest --pyargs qframe_conformance --qframe-plugin NAME

A scenario is explored once, and all its checks are answered from that. Pairs to which a check
does not apply are no tests. A plugin that hangs or crashes takes pytest along: `qframe check`
does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qframe.errors import QframeError, RecipeError
from qframe_conformance.checks import checks_of
from qframe_conformance.command import parse_reasons
from qframe_conformance.engine import Scenario
from qframe_conformance.report import Record
from qframe_conformance.reproduce import script
from qframe_conformance.running import Run
from qframe_conformance.suite import module_of, prepare
from qframe_conformance.target import Target, all_targets


class Explored:
    """One plugin, and what is known of it by now."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.scenarios = {scenario.id: scenario for scenario in run.scenarios()}
        self._records: dict[str, list[Record]] = {}

    def applying(self) -> Iterator[tuple[Scenario, str]]:
        """Yield the pairs of scenario and check that have something to say."""
        for scenario in self.scenarios.values():
            objections = self.run.objections(scenario)
            for each in self.run.checks:
                if each.name not in objections:
                    yield scenario, each.name

    def records(self, scenario: str) -> list[Record]:
        """Return the records of a scenario; it is explored at the first call."""
        if scenario not in self._records:
            self._records[scenario] = list(self.run.records(self.scenarios[scenario]))
        return self._records[scenario]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the tests. Raises UsageError where there is nothing to test."""
    found = []
    for plugin in _plugins(metafunc.config):
        name = plugin.run.name
        pairs = list(plugin.applying())
        if not pairs:
            raise pytest.UsageError(
                f"{plugin.run.kind} {name!r}: no check applies, which is no pass"
            )
        found += [
            pytest.param(plugin, scenario.id, check, id=f"{name}-{scenario.id}-{check}")
            for scenario, check in pairs
        ]
        found += [
            pytest.param(plugin, None, check, id=f"{name}-somewhere-{check}")
            for check in plugin.run.expected
        ]
    metafunc.parametrize(("plugin", "scenario", "check"), found)


def test_promise(plugin: Explored, scenario: str | None, check: str) -> None:
    """A check holds in a scenario; or one that is expected to fail does so somewhere."""
    if scenario is None:
        _must_fail_somewhere(plugin, check)
        return
    records = [r for r in plugin.records(scenario) if r.check == check or r.status == "crashed"]
    _answer(records[0], plugin.run)


def _must_fail_somewhere(plugin: Explored, check: str) -> None:
    records = [r for s in plugin.scenarios for r in plugin.records(s) if r.check == check]
    if not any(record.status == "expected failure" for record in records):
        reason = plugin.run.expected[check]
        pytest.fail(f"{check} is expected to fail ({reason}), but it does not", pytrace=False)


def _answer(record: Record, run: Run) -> None:
    """Pass, fail, skip or fail as expected, as the record says."""
    if record.bad:
        example = script(record, run.code())
        pytest.fail(f"{record.promise}\n{record.message}\n\n{example}", pytrace=False)
    if record.status == "expected failure":
        pytest.xfail(record.message)
    if record.status == "not drawn":
        pytest.skip("no drawn case has to do with it; a larger --qframe-profile draws more")


# Which plugins --------------------------------------------------------------------------------

_FOUND = pytest.StashKey[list[Explored]]()


def _plugins(config: pytest.Config) -> list[Explored]:
    """Return the plugins that are asked for; they are looked up once."""
    if _FOUND not in config.stash:
        try:
            config.stash[_FOUND] = _look_up(config)
        except QframeError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[_FOUND]


def _look_up(config: pytest.Config) -> list[Explored]:
    names, files = config.getoption("--qframe-plugin"), config.getoption("--qframe-file")
    targets, _, _ = all_targets(files)
    if names:
        known = {target.name for target in targets}
        # An unknown name is looked up all the same: its error says what is wrong.
        unknown = [Target(name=name, files=files) for name in names if name not in known]
        targets = [target for target in targets if target.name in names] + unknown
    reasons = parse_reasons(config.getoption("--qframe-expect-failure"))
    options = {
        "profile": config.getoption("--qframe-profile"),
        "seed": config.getoption("--qframe-seed"),
    }
    found = []
    for kind, plugin, host in [target.load() for target in targets]:
        module_of(kind)
        checks = [each.name for each in checks_of(kind)]
        expected = {name: why for name, why in reasons.items() if name in checks}
        run = prepare(plugin, kind=kind, expected_failures=expected, host=host, **options)
        found.append(Explored(run))
    used = {name for plugin in found for name in plugin.run.expected}
    if reasons.keys() - used:
        wrong = min(reasons.keys() - used)
        raise RecipeError(f"--qframe-expect-failure: no plugin has a check {wrong!r}")
    return found
