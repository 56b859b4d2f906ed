"""The suite: every check that applies to a plugin, on every scenario that it declares.

    from qframe_conformance import check_plugin

    report = check_plugin(MyRounder())
    print(report)

No pytest is needed, and no plugin is known here by name: what runs follows from the kind of the
object, from its capabilities, and from its claims.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from qframe.errors import PluginError, RecipeError, UnsupportedError
from qframe.host import KINDS, Host, object_name, objection
from qframe.strict import suggestion
from qframe_conformance.checks import FIRST_SUITE, Check, Violation, checks_of
from qframe_conformance.engine import Search, run
from qframe_conformance.report import Record, Report
from qframe_conformance.running import Run

SUITE_VERSION = "1.0"

MODULES: dict[str, str] = {
    "number format": "qframe_conformance.format_checks",
    "observer": "qframe_conformance.observer_checks",
    "outlier handler": "qframe_conformance.outlier_checks",
    "rounder": "qframe_conformance.rounder_checks",
    "kernel": "qframe_conformance.kernel_checks",
    "kv cache": "qframe_conformance.kv_checks",
}
"""Kind of plugin -> the module with its checks and `scenarios(plugin)`."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How much is tried: drawn cases per scenario. A case may hold many nasty rows."""

    name: str
    examples: int


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (Profile("fast", 2), Profile("default", 5), Profile("thorough", 100))
}


# One call -------------------------------------------------------------------------------------


def check_plugin(
    plugin: Any,
    *,
    kind: str | None = None,
    profile: str = "default",
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    scenarios: Sequence[str] | None = None,
    suite: str = SUITE_VERSION,
    shrink: bool = True,
    host: Host | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run the suite on one plugin object, in this process.

    kind                what it is checked as; None: the first kind whose contract it keeps
    profile             "fast", "default" or "thorough"
    seed                of everything that is drawn; the same seed gives the same report
    expected_failures   check name -> why it is known to fail. Strict: a check that holds in every
                        scenario although it is listed here counts as a failure
    only                names of the checks to run; None for all
    scenarios           ids of the scenarios to run; None for all
    suite               the version of the suite that you vouch for. Checks that came later are
                        left out, so a pinned version never asks for more
    shrink              make counterexamples small; takes time only where something fails
    host                where the observers that the plugin needs, and formats, are looked up; None:
                        among all that is installed
    progress            called with the id of each scenario before it begins

    A plugin that hangs or ends the process takes this process along; `check_contained` in
    `qframe_conformance.contain` does not mind.

    Raises PluginError for an object that keeps no contract, RecipeError for an unknown profile,
    check, scenario, or version of the suite.
    """
    started = time.perf_counter()
    prepared = prepare(
        plugin,
        kind=kind,
        profile=profile,
        seed=seed,
        expected_failures=expected_failures,
        only=only,
        suite=suite,
        shrink=shrink,
        host=host,
    )
    records: list[Record] = []
    for scenario in prepared.scenarios(scenarios):
        if progress is not None:
            progress(scenario.id)
        records += prepared.records(scenario)
    return prepared.report(records, time.perf_counter() - started)


def prepare(
    plugin: Any,
    *,
    kind: str | None = None,
    profile: str = "default",
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    suite: str = SUITE_VERSION,
    shrink: bool = True,
    host: Host | None = None,
    tick: Callable[[], None] | None = None,
) -> Run:
    """Look everything up that `check_plugin` is given, and raise what it raises.

    tick   called before each case
    """
    kind = kind or kind_of(plugin)
    module = module_of(kind)
    absent = plugin.absent() if kind == "kernel" and hasattr(plugin, "absent") else None
    if absent is not None:
        name = object_name(kind, plugin)
        raise UnsupportedError(f"kernel {name!r} cannot run on this machine: {absent.reason}")
    known = checks_of(kind)
    expected = dict(expected_failures or {})
    for name in (*(only or ()), *expected):
        if name not in [each.name for each in known]:
            near = suggestion(name, [each.name for each in known])
            raise RecipeError(f"the suite has no check {name!r} for {kind}s{near}")
    if profile not in PROFILES:
        raise RecipeError(f"unknown profile {profile!r}{suggestion(profile, PROFILES)}")
    newest = _version(suite)
    search = Search(PROFILES[profile].examples, seed, host)
    return Run(
        plugin=plugin,
        kind=kind,
        name=object_name(kind, plugin),
        module=module,
        checks=tuple(
            each
            for each in known
            if (only is None or each.name in only) and _version(each.since) <= newest
        ),
        search=search if tick is None else replace(search, tick=tick),
        expected=expected,
        suite=suite,
        profile=profile,
        shrink=shrink,
    )


def kind_of(plugin: Any) -> str:
    """Return the kind of a plugin object. Raises PluginError naming what each kind lacks."""
    reasons = []
    for kind, (_, contract) in KINDS.items():
        reason = objection(plugin, contract)
        if reason is None:
            return kind
        reasons.append(f"  {kind}: {reason}")
    raise PluginError("the object keeps no contract of qframe:\n" + "\n".join(reasons))


def module_of(kind: str) -> ModuleType:
    """Return the module with the checks of a kind. Raises PluginError where there is none."""
    if kind not in MODULES:
        known = suggestion(kind, MODULES)
        raise PluginError(f"the suite has no checks of the kind {kind!r}{known}")
    return importlib.import_module(MODULES[kind])


def _version(text: str) -> tuple[int, ...]:
    """Return a version of the suite as numbers. Raises RecipeError for one that never was."""
    try:
        version = tuple(int(part) for part in text.split("."))
    except ValueError:
        version = ()
    first, newest = ([int(n) for n in v.split(".")] for v in (FIRST_SUITE, SUITE_VERSION))
    if not first <= list(version) <= newest:
        raise RecipeError(
            f"there is no version {text!r} of the suite; this is {SUITE_VERSION}, the first was "
            f"{FIRST_SUITE}"
        )
    return version


# One case ---------------------------------------------------------------------------------------


def replay(check: str, case: Any) -> str:
    """Return in words what a check says of a case: the last line of every counterexample.

    Raises RecipeError for a check that does not exist.
    """
    known = [each for kind in _kinds_of_case(case) for each in _checks(kind)]
    for each in known:
        if each.name == check:
            outcome = run(each, case)
            if isinstance(outcome, Violation):
                return f"{check} is violated: {outcome}"
            return f"{check} holds" + (f", error / allowed = {outcome:.4g}" if outcome else "")
    near = suggestion(check, [each.name for each in known])
    raise RecipeError(f"the suite has no check {check!r}{near}")


def _kinds_of_case(case: Any) -> list[str]:
    """Return the kinds of plugin that a case may be about, by the module that it comes from.

    The modules of a kind begin alike: rounder_checks, rounder_cases, ...
    """
    home = type(case).__module__
    own = [kind for kind, name in MODULES.items() if home.startswith(name.removesuffix("checks"))]
    return own or list(MODULES)


def _checks(kind: str) -> tuple[Check, ...]:
    module_of(kind)  # which registers them
    return checks_of(kind)
