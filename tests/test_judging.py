"""The court: what it finds and tells does not depend on who works when."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import pytest
import torch

from qframe.contracts import Event
from qframe.errors import CertificateError
from qframe.judging import Court, Verdict, _Case

LONG = 60  # seconds after which a test that hangs fails


def told(layer: str) -> Event:
    return Event(kind="test", layer=layer, message="")


def verdict(layer: str) -> Verdict:
    return lambda: [told(layer)]


@pytest.mark.parametrize("threads", [1, 2])
def test_events_come_in_the_order_of_layers_and_the_last_may_wait(threads: int) -> None:
    with Court(threads) as court:
        for number in range(5):
            court.hear(verdict(str(number)))
        assert [event.layer for event in court.settle(2)] == ["0", "1", "2"]
        court.hear(verdict("5"))
        assert [event.layer for event in court.settle()] == ["3", "4", "5"]
        assert court.settle() == []
        assert court.settle(3) == []


def test_what_a_verdict_held_is_gone_before_what_it_found_is_told() -> None:
    held, gone = torch.zeros(1), []
    there = weakref.ref(held)

    def look(held: torch.Tensor) -> list[Event]:
        return [told(str(len(held)))]

    case = _Case(partial(look, held))
    case.heard.add_done_callback(lambda _: gone.append(there() is None))
    del held
    case.hear()
    assert gone == [True]
    assert [event.layer for event in case.heard.result()] == ["1"]


def test_who_waits_for_a_report_works_on_another_one() -> None:
    came = threading.Event()
    where: list[str] = []

    def first() -> list[Event]:
        if not came.wait(LONG):
            raise TimeoutError
        return [told("first")]

    def last() -> list[Event]:
        where.append(threading.current_thread().name)
        came.set()
        return [told("last")]

    with Court(2) as court:
        court.hear(first)
        court.hear(last)
        assert [event.layer for event in court.settle()] == ["first", "last"]
    assert where == [threading.current_thread().name]


def test_the_first_layer_that_fails_is_named_whichever_was_heard_first() -> None:
    failed = threading.Event()

    def first() -> list[Event]:
        if not failed.wait(LONG):
            raise TimeoutError
        raise CertificateError("first")

    def last() -> list[Event]:
        failed.set()
        raise CertificateError("last")

    with Court(2) as court:
        court.hear(first)
        court.hear(last)
        with pytest.raises(CertificateError, match="first"):
            court.settle()


def test_a_verdict_has_one_torch_thread_wherever_it_is_heard() -> None:
    came = threading.Event()
    seen: list[int] = []

    def first() -> list[Event]:
        seen.append(torch.get_num_threads())
        if not came.wait(LONG):
            raise TimeoutError
        return []

    def last() -> list[Event]:
        seen.append(torch.get_num_threads())
        came.set()
        return []

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Court(2) as court:
            court.hear(first)
            court.hear(last)
            court.settle()
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_verdict_works_on_is_let_go_once_it_is_heard(threads: int) -> None:
    heard = threading.Event()

    class Layer:
        pass

    def of(layer: Layer) -> Verdict:
        return lambda: [told(type(layer).__name__)]

    layer = Layer()
    left = weakref.ref(layer, lambda _: heard.set())
    with Court(threads) as court:
        court.hear(of(layer))
        del layer
        gc.collect()
        assert heard.wait(LONG)  # though nobody has asked for what was found
        assert left() is None
        assert [event.layer for event in court.settle()] == ["Layer"]


@pytest.mark.parametrize("threads", [1, 2])
def test_errors_are_raised_when_reports_are_asked_for(threads: int) -> None:
    def wrong() -> list[Event]:
        raise CertificateError("wrong")

    with Court(threads) as court:
        court.hear(verdict("right"))
        court.hear(wrong)
        assert [event.layer for event in court.settle(1)] == ["right"]
        with pytest.raises(CertificateError, match="wrong"):
            court.settle()
