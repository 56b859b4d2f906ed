"""Every plugin that comes with qframe holds in the suite, as `qframe check NAME` says."""

import pytest

from qframe import Host
from qframe.host import KINDS
from qframe_conformance import check_plugin
from qframe_conformance.suite import MODULES

HOST = Host.discover()
SHIPPED = [(kind, name) for kind in KINDS if kind in MODULES for name in HOST.names(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED, ids=[f"{k}-{n}" for k, n in SHIPPED])
def test_it_holds(kind, name):
    report = check_plugin(HOST.get(kind, name), kind=kind)
    assert report.ran
    assert report.ok, str(report)
