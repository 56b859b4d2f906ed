"""Tests for everyone's plugins.

    from qframe_conformance import check_plugin

    report = check_plugin(MyRounder())
    print(report)

`qframe check NAME` does the same on the command line, and `pytest --pyargs qframe_conformance
--qframe-plugin NAME` as tests. Checks stand in modules by kind of plugin; `suite` runs those that a
plugin's declarations call for. `strategies` has Hypothesis strategies for what plugins are given,
the nasty cases by name. docs/conformance.md is the manual.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qframe_conformance.checks import Violation, check, require, same_bits, within
    from qframe_conformance.contain import check_contained
    from qframe_conformance.kernel_subjects import check_kernel
    from qframe_conformance.report import Counterexample, Record, Report
    from qframe_conformance.suite import PROFILES, SUITE_VERSION, check_plugin, replay
    from qframe_conformance.target import Target

_HOME = {
    "PROFILES": "suite",
    "SUITE_VERSION": "suite",
    "Counterexample": "report",
    "Record": "report",
    "Report": "report",
    "Target": "target",
    "Violation": "checks",
    "check": "checks",
    "check_contained": "contain",
    "check_kernel": "kernel_subjects",
    "check_plugin": "suite",
    "replay": "suite",
    "require": "checks",
    "same_bits": "checks",
    "within": "checks",
}

__all__ = [
    "PROFILES",
    "SUITE_VERSION",
    "Counterexample",
    "Record",
    "Report",
    "Target",
    "Violation",
    "check",
    "check_contained",
    "check_kernel",
    "check_plugin",
    "replay",
    "require",
    "same_bits",
    "within",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qframe_conformance.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qframe_conformance' has no attribute {name!r}")
