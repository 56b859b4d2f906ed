"""The host with handlers whose scales are known."""

import pytest

from qframe import Host
from tests.folds.nets import Plugin


@pytest.fixture(scope="module")
def host():
    made = Host.discover()
    made.add(Plugin(), "stretch")
    return made
