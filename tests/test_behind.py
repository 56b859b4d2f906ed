"""What is written beside the rest: in order, one piece at a time, and what it raises is told."""

from __future__ import annotations

import threading

import pytest

from qframe.behind import Behind

LONG = 60  # seconds after which a test that hangs fails


@pytest.mark.parametrize("threads", [1, 2])
def test_work_is_done_in_order_and_is_over_in_the_end(threads):
    done = []
    with Behind(threads) as behind:
        for number in range(5):
            behind.do(lambda number=number: done.append(number))
        behind.wait()
        assert done == [0, 1, 2, 3, 4]
        behind.do(lambda: done.append(5))
    assert done == [0, 1, 2, 3, 4, 5]


def test_one_thread_does_everything_itself():
    where = []
    with Behind(1) as behind:
        behind.do(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]


def test_a_piece_begins_when_the_one_before_is_done():
    goes, seen = threading.Event(), []

    def first():
        if not goes.wait(LONG):
            raise TimeoutError
        seen.append("first")

    with Behind(2) as behind:
        behind.do(first)
        assert seen == []  # it is not waited for
        threading.Timer(0.05, goes.set).start()
        behind.do(lambda: seen.append("second"))
        behind.wait()
    assert seen == ["first", "second"]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_raised_is_told_once_where_the_next_piece_comes(threads):
    def broken():
        raise OSError("the disk is full")

    done = []
    with Behind(threads) as behind:
        with pytest.raises(OSError, match="full"):
            _both(behind, broken, lambda: done.append("after"))
        assert done == []
        behind.wait()
        behind.do(lambda: done.append("then"))
        behind.wait()
    assert done == ["then"]


def test_leaving_waits_for_what_has_begun_also_where_something_was_raised():
    goes, seen = threading.Event(), []

    def last():
        if not goes.wait(LONG):
            raise TimeoutError
        seen.append("last")

    def fail():
        with Behind(2) as behind:
            behind.do(last)
            threading.Timer(0.05, goes.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == ["last"]


def _both(behind, first, second):
    behind.do(first)
    behind.do(second)


def test_it_is_idle_when_all_is_done_also_where_that_failed():
    goes = threading.Event()

    def wait_for_it():
        if not goes.wait(LONG):
            raise TimeoutError
        raise KeyError

    with Behind(2) as behind:
        assert behind.idle
        behind.do(wait_for_it)
        assert not behind.idle
        goes.set()
        assert isinstance(behind._last.exception(LONG), KeyError)
        assert behind.idle
        with pytest.raises(KeyError):
            behind.wait()
