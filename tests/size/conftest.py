"""Commands for the tests of what a run takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.ran import Ran, command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `qframe ARGUMENTS`."""
    monkeypatch.delenv("QFRAME_THREADS", raising=False)
    return partial(command, capsys)
