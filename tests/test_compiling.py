"""What is compiled runs also where nothing can be kept, and that is said once."""

import logging

import pytest
from numba import njit

from qframe import compiling


@pytest.mark.parametrize("places", [True, False])
def test_a_function_runs_whether_or_not_it_can_be_kept(monkeypatch, caplog, places):
    asked = []

    def own(**options):
        asked.append(options.get("cache", False))
        if asked[-1] and not places:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**{name: value for name, value in options.items() if name != "cache"})

    monkeypatch.setattr(compiling, "_placeless", False)
    monkeypatch.setattr(compiling, "njit", own)
    with caplog.at_level(logging.INFO, "qframe.compiling"):
        twice, thrice = (
            compiling.kept(f, nogil=True) for f in (lambda x: x + x, lambda x: x + x + x)
        )
        assert (twice(3), thrice(3)) == (6, 9)
    assert asked == ([True, True] if places else [True, False, True, False])
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [("NUMBA_CACHE_DIR" in each) for each in warned] == [True] * (not places)
    compiled = [r.getMessage() for r in caplog.records if hasattr(r, "compiled")]
    assert compiled
    assert all(("the next run has them" in each) == places for each in compiled)
