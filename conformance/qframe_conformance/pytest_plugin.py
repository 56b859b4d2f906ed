"""What `pytest` gets from the suite: options, and the fixture `qframe_check`.

    pytest --pyargs qframe_conformance --qframe-plugin NAME

runs the tests in `test_plugins`. In your own test file:

    def test_it_keeps_its_promises(qframe_check):
        qframe_check(MyRounder())

pytest imports this module in every run of the environment, so it imports nothing but pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from qframe_conformance.report import Report


class Check(Protocol):
    """What the fixture `qframe_check` is."""

    def __call__(self, plugin: Any, **options: Any) -> Report:
        """Run the suite; `options` are those of `check_plugin`."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    group = parser.getgroup("qframe", "conformance of qframe plugins")
    group.addoption(
        "--qframe-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="with --pyargs qframe_conformance: check this plugin (repeat; default: all)",
    )
    group.addoption(
        "--qframe-file",
        action="append",
        default=[],
        metavar="FILE",
        help="load this Python file as a plugin (repeat)",
    )
    group.addoption(
        "--qframe-profile",
        default="default",
        metavar="fast|default|thorough",
        help="how much is tried",
    )
    group.addoption("--qframe-seed", type=int, default=0, metavar="N", help="of all that is drawn")
    group.addoption(
        "--qframe-expect-failure",
        action="append",
        default=[],
        metavar="CHECK=REASON",
        help="this check is known to fail; when it does not, that is a failure (repeat)",
    )


@pytest.fixture
def qframe_check(request: pytest.FixtureRequest) -> Check:
    """Run the suite on a plugin object; fail with the whole report unless all promises hold."""

    def check(plugin: Any, **options: Any) -> Report:
        from qframe_conformance.suite import check_plugin

        given = {
            "profile": request.config.getoption("--qframe-profile"),
            "seed": request.config.getoption("--qframe-seed"),
        }
        report = check_plugin(plugin, **{**given, **options})
        if not report.ok:
            pytest.fail(str(report), pytrace=False)
        return report

    return check
