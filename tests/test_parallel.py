"""Work that threads share: every piece once, whatever their number."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch

from qframe import parallel, rounding
from qframe.packing import pack_codes, unpack_codes


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_every_piece_is_worked_on_once(threads, count):
    done = [0] * count

    def work(place):
        done[place] += 1

    with parallel.sharing(threads):
        parallel.each(work, range(count))
    assert done == [1] * count


def test_a_thread_shares_its_work_only_where_it_was_told_to():
    names: set[str] = set()

    def seen():
        names.clear()
        parallel.each(lambda _: names.add(threading.current_thread().name), range(64))
        return set(names)

    own = {threading.current_thread().name}
    assert seen() == own
    with parallel.sharing(2):
        assert not seen() & own
        with parallel.sharing(1):
            assert seen() == own
        others = []
        thread = threading.Thread(target=lambda: others.append(seen()))
        thread.start()
        thread.join()
        assert others == [{thread.name}]  # another thread was not told
    assert seen() == own


def test_what_a_piece_raises_is_raised():
    def work(place):
        if place == 9:
            raise KeyError(place)

    with parallel.sharing(2), pytest.raises(KeyError, match="9"):
        parallel.each(work, range(20))


def test_a_worker_keeps_its_one_torch_thread_whatever_others_set():
    """Bits depend on it: products of matrices are summed up in another order by two."""

    def others():
        torch.set_num_threads(3)

    def work(_):
        before = torch.get_num_threads()
        for call in (others, others):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        with parallel.one_torch_thread():
            pass
        return before, torch.get_num_threads()

    own = torch.get_num_threads()
    others()
    start = parallel._start_worker

    def late():
        start()
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()

    try:
        with (
            mock.patch.object(parallel, "_pools", {}),
            mock.patch.object(parallel, "_start_worker", late),
        ):
            assert set(parallel.spread(work, range(4), 2)) == {(1, 1)}
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_same_bits_on_any_number_of_threads(monkeypatch, bits):
    monkeypatch.setattr(rounding, "_STRIP", 100)
    lowest = -(1 << bits >> 1)
    codes = torch.arange(40 * 33).remainder(1 << bits).add(lowest).to(torch.int16).reshape(40, 33)
    words = pack_codes(codes, bits, lowest)
    for threads in (1, 3):
        with parallel.sharing(threads):
            assert torch.equal(pack_codes(codes, bits, lowest), words)
            found = unpack_codes(words, bits, 33, lowest, torch.int16)
        assert found.dtype is torch.int16
        assert torch.equal(found, codes)
