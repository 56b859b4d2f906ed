"""Memory that tensors leave is given to others: never while one of them can still be read."""

from __future__ import annotations

import gc
import mmap
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import pages
from qframe.out_of_memory import bytes_asked
from qframe.pages import LARGE, Pages, empty, kept_pages

SIZES = st.integers(1, 5).map(lambda size: size * LARGE // 4)


@given(st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 9)), max_size=40))
def test_tensors_that_live_at_the_same_time_never_share_memory(steps):
    """Some are let go, in any order, while views of them may stay."""
    made, live = Pages(), {}
    for number, (take, size, which) in enumerate(steps):
        if take or not live:
            tensor = made.empty((size,), torch.uint8)
            tensor.fill_(number % 256)
            live[number] = tensor[size // 2 :]  # a view keeps the memory
        else:
            del live[sorted(live)[which % len(live)]]
        assert all(bool((view == key % 256).all()) for key, view in live.items())
    tensor = None
    live.clear()
    assert made.spare == made.total  # all of it has come back


@given(st.lists(SIZES, min_size=1, max_size=30))
def test_there_is_never_more_than_was_used_at_one_time(sizes):
    made = Pages()
    for size in sizes:
        made.empty((size,), torch.uint8)  # used, and left at once
        assert made.total <= max(sizes)
        assert made.spare == made.total


def test_what_a_tensor_leaves_is_used_again():
    made = Pages()
    first = made.empty((LARGE,), torch.float32)
    view, place = first[7:], first.data_ptr()
    del first
    assert made.empty((LARGE,), torch.float32).data_ptr() != place
    del view
    places = {made.empty((LARGE // 2,), torch.int16).data_ptr() for _ in range(3)}
    kept = [made.empty((LARGE,), torch.float32) for _ in range(2)]
    assert places <= {place, *(tensor.data_ptr() for tensor in kept)}
    assert made.total == 8 * LARGE


class Fixed(mmap.mmap):
    """Memory of a system that does not move pages."""

    def resize(self, size):
        raise SystemError


@pytest.mark.parametrize("moves", [True, False])
def test_memory_that_is_too_small_grows_where_the_system_can_do_that(monkeypatch, moves):
    made, places = Pages(), []
    if not moves:
        monkeypatch.setattr(pages.mmap, "mmap", Fixed)
    for size in (1, 3, 2, 5):
        tensor = made.empty((size * LARGE,), torch.uint8)
        places.append(tensor[:LARGE].clone())
        tensor.fill_(size)
        del tensor
    seen = [int(place.min()) for place in places]
    assert seen in ([0, 1, 3, 2], [0, 0, 3, 0])
    assert not moves or not sys.platform.startswith("linux") or seen[1] == 1
    assert made.total == made.spare == 5 * LARGE


@pytest.mark.parametrize(("waste", "again"), [(2, False), (8, True)])
def test_what_waits_does_not_wait_in_much_more_than_it_needs(waste, again):
    made = Pages(waste)
    made._most = 9 * LARGE  # so that nothing is let go for another reason
    place = made.empty((LARGE,), torch.float32).data_ptr()
    assert (made.empty((LARGE,), torch.uint8).data_ptr() == place) == again
    assert made.empty((LARGE,), torch.float32).data_ptr() == place  # it was not taken apart


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, LARGE), torch.float32), ((LARGE, 2), torch.int16), ((LARGE,), torch.bool)],
)
def test_tensors_are_what_torch_would_give(shape, dtype):
    with kept_pages():
        tensor = empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert tensor.fill_(1).sum() == tensor.numel()


def test_small_ones_and_those_of_others_are_torchs_own():
    assert pages._pages is None
    with kept_pages() as outer:
        with kept_pages() as inner:
            assert inner is outer
        small, large = empty((LARGE - 1,), torch.uint8), empty((LARGE,), torch.uint8)
        waiting = empty((2 * LARGE,), torch.uint8, waits=True)
        other = empty((LARGE,), torch.int16)
        totals = {kind: pool.total for kind, pool in outer.items()}
        assert totals == {None: 2 * LARGE, torch.uint8: LARGE, torch.int16: 2 * LARGE}
    assert pages._pages is None
    assert empty((LARGE,), torch.uint8).numel() == LARGE
    assert {kind: pool.total for kind, pool in outer.items()} == totals
    for tensor in (small, large, waiting, other):
        tensor.fill_(1)  # which is still there


def test_a_run_that_ends_leaves_nothing_behind():
    with kept_pages() as made:
        empty((LARGE,), torch.uint8)
        with pytest.raises(KeyError), kept_pages():
            raise KeyError
        assert pages._pages is made
    assert pages._pages is None


def test_threads_take_and_leave_memory_at_the_same_time():
    made, wrong = Pages(), []

    def work(own):
        for turn in range(60):
            tensor = made.empty((LARGE + turn,), torch.uint8)
            tensor.fill_(own)
            if turn % 7 == 0:
                gc.collect()
            if not bool((tensor == own).all()):
                wrong.append(own)
            del tensor

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert made.total <= 4 * (LARGE + 60)
    assert made.spare == made.total


def test_what_is_spare_goes_before_memory_is_said_to_be_over(monkeypatch):
    """Where it is over all the same, it is the error that a run names its layer in."""
    made = Pages()
    small = [made.empty((LARGE,), torch.uint8) for _ in range(3)]
    del small[:2]
    left, whole = 2, pages._region

    def tight(size, part):
        if len(made._spare) > left:
            raise MemoryError
        return whole(size, part)

    monkeypatch.setattr(pages, "_region", tight)
    made._most = 100 * LARGE  # so that nothing is let go for another reason
    assert made.empty((20 * LARGE,), torch.uint8).numel() == 20 * LARGE
    left = 0
    assert made.empty((40 * LARGE,), torch.uint8).numel() == 40 * LARGE
    monkeypatch.undo()
    with pytest.raises(MemoryError) as error:
        made.empty((1 << 60,), torch.uint8)
    assert bytes_asked(str(error.value)) == 1 << 60
    assert made.empty((LARGE,), torch.uint8).numel() == LARGE
