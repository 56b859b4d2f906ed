"""Garbage is looked for where it may be worth the time, and what is freed goes back."""

from __future__ import annotations

import gc

import numpy as np
import psutil
import pytest

from qframe import freed


@pytest.fixture
def looked(monkeypatch):
    """How often garbage was looked for, since nobody has so far."""
    times = []
    monkeypatch.setattr(freed, "_tidied", -freed.WORTH)
    monkeypatch.setattr(gc, "collect", lambda: times.append(1))
    return times


def test_garbage_is_looked_for_once_and_then_where_a_process_has_grown(looked):
    freed.tidy_up()
    assert len(looked) == 1
    freed.tidy_up()
    assert len(looked) == 1
    grown = np.ones(3 * freed.WORTH, np.uint8)
    freed.tidy_up()
    assert len(looked) == 2
    del grown
    freed.tidy_up()
    assert len(looked) == 2


@pytest.mark.skipif(freed._library() is None, reason="the C library is not glibc")
def test_what_was_freed_in_large_pieces_is_the_systems_again():
    """After pieces of 16 MiB were freed, glibc would keep the next one, unless told otherwise."""
    freed.hand_back_large()
    for _ in range(3):
        piece = np.ones(16 << 20, np.uint8)
        before = psutil.Process().memory_info().rss
        del piece
        assert psutil.Process().memory_info().rss < before - (8 << 20)
