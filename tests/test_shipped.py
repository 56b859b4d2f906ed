"""Every plugin that comes with qframe holds in the suite, as `qframe check NAME` says."""

import pytest

from qframe import Host
from qframe.host import KINDS
from qframe_conformance import check_plugin
from qframe_conformance.suite import MODULES
from qframe_conformance.target import left_out

HOST = Host.discover()
SHIPPED = [(kind, name) for kind in KINDS if kind in MODULES for name in HOST.names(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED, ids=[f"{k}-{n}" for k, n in SHIPPED])
def test_it_holds(kind, name):
    plugin = HOST.get(kind, name)
    why = left_out(plugin) if kind == "kernel" else None
    if why is not None:
        pytest.skip(why)
    report = check_plugin(plugin, kind=kind)
    assert report.ran
    assert report.ok, str(report)
