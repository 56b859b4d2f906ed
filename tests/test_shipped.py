"""Every plugin that comes with qframe holds in the suite, as `qframe check NAME` says."""

import pytest

from qframe import Host
from qframe.host import KINDS
from qframe_conformance import check_plugin
from qframe_conformance.suite import MODULES

HOST = Host.discover()
SHIPPED = [(kind, name) for kind in KINDS if kind in MODULES for name in HOST.names(kind)]
ELSEWHERE = {"cuda": "it needs a GPU", "ptx_host": "tests/cuda checks what it runs"}
"""Backends of kernels that not every machine has, and why they are not checked here."""


@pytest.mark.parametrize(("kind", "name"), SHIPPED, ids=[f"{k}-{n}" for k, n in SHIPPED])
def test_it_holds(kind, name):
    plugin = HOST.get(kind, name)
    if kind == "kernel" and plugin.backend in ELSEWHERE:
        pytest.skip(ELSEWHERE[plugin.backend])
    report = check_plugin(plugin, kind=kind)
    assert report.ran
    assert report.ok, str(report)
