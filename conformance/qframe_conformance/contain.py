"""Checks plugins in a process of their own, so that a plugin which hangs or crashes is a finding.

    from qframe_conformance.contain import check_contained
    from qframe_conformance.target import Target

    report = check_contained(Target(name="mine", files=["mine.py"]), seconds=10)

The process (`worker`) reports as it goes. When it falls silent for too long, ends before its
time, or wants too much memory, the scenario in which that happened gets a record "crashed", and
a new process goes on with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from qframe import errors
from qframe.errors import PluginError, QframeError
from qframe_conformance import wire
from qframe_conformance.process import Place
from qframe_conformance.report import Record, Report
from qframe_conformance.running import crash, strict
from qframe_conformance.suite import SUITE_VERSION
from qframe_conformance.target import Target

SECONDS = 60.0  # for one case; a first call may compile
MEMORY = 4 << 30  # bytes of address space beside the libraries'
RESTARTS = 5


def check_contained(
    target: Target,
    *,
    profile: str = "default",
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    scenarios: Sequence[str] | None = None,
    suite: str = SUITE_VERSION,
    shrink: bool = True,
    progress: Callable[[str], None] | None = None,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    restarts: int = RESTARTS,
    beside: bool = False,
    place: Place | None = None,
) -> Report:
    """Run the suite on a plugin in another process; the report is that of `check_plugin`.

    seconds    how long the plugin may be silent: one case of one scenario
    memory     bytes that it may take beside the libraries', where the system can limit it
    restarts   after so many crashes the scenarios that are left are given up
    beside     where a kernel is wrong, tell what the other kernels answer
    place      where it is done; None: in a process for it alone. `seconds` is the place's then

    The other arguments are those of `check_plugin`.

    Raises what `check_plugin` and `Target.load` raise, and PluginError for a plugin that cannot
    even be loaded.
    """
    started = time.perf_counter()
    expected = dict(expected_failures or {})
    job = {
        "target": target.to_dict(),
        "options": {
            "profile": profile,
            "seed": seed,
            "expected_failures": expected,
            "only": None if only is None else list(only),
            "suite": suite,
            "shrink": shrink,
        },
        "scenarios": None if scenarios is None else list(scenarios),
        "memory": memory,
        "beside": beside,
    }
    found = _Found(progress)
    with Place(seconds) if place is None else nullcontext(place) as where:
        while (what := where.do(job, found.hear)) is not None:
            if not found.code:
                raise PluginError(f"loading {target.name!r}: {what}")
            at = found.now or "(before the first scenario)"
            found.records.append(crash(found.kind, found.name, at, what, profile, seed))
            found.crashes += 1
            left = found.left()
            if not left or not found.now:
                break
            if found.crashes > restarts:
                message = f"given up after {found.crashes} crashes; not tried: {', '.join(left)}"
                found.records.append(crash(found.kind, found.name, left[0], message, profile, seed))
                break
            job["scenarios"] = left
    return Report(
        plugin=found.name,
        kind=found.kind,
        suite=suite,
        profile=profile,
        seed=seed,
        records=strict(found.records, expected),
        seconds=time.perf_counter() - started,
        code=found.code,
    )


@dataclass(slots=True)
class _Found:
    """What the processes said so far."""

    progress: Callable[[str], None] | None
    kind: str = ""
    name: str = ""
    code: str = ""
    scenarios: list[str] = field(default_factory=list)
    now: str = ""  # the scenario that has begun last
    records: list[Record] = field(default_factory=list)
    crashes: int = 0

    def left(self) -> list[str]:
        """Return the scenarios that come after the one of now."""
        return self.scenarios[self.scenarios.index(self.now) + 1 :] if self.now else []

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in a message."""
        if "code" in message:
            self.kind, self.name = message["kind"], message["name"]
            self.code = message["code"]
            self.scenarios = message["scenarios"]
            self.now = ""
        elif "begins" in message:
            self.now = message["begins"]
            if self.progress is not None:
                self.progress(self.now)
        elif "record" in message:
            self.records.append(wire.record(message["record"]))
        elif "error" in message:
            raise _error(message["error"], message["message"])


def _error(name: str, message: str) -> QframeError:
    """Return the error that the process met."""
    cls = getattr(errors, name, PluginError)
    try:
        made: QframeError = cls(message)
    except TypeError:  # it wants something else than a message
        return PluginError(message)
    return made
