"""Ranks that are threads of one process: what they do together can be tried without a network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from qframe.errors import RanksError
from qframe.ranks import _packed, _unpacked

LONG = 60  # seconds after which ranks that wait for one another have gone different ways


class Meeting:
    """Where threads put what they give."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=LONG)
        self.given = [None] * size


class ThreadRank:
    """One of them."""

    def __init__(self, rank, meeting):
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.places = []

    def exchange(self, place, tensors, record):
        self.places.append(place)
        self._meeting.given[self.rank] = (place, dict(tensors), record)
        self._meeting.barrier.wait()
        every = list(self._meeting.given)
        self._meeting.barrier.wait()
        if len({there for there, _, _ in every}) > 1:
            raise RanksError(f"ranks are at {[there for there, _, _ in every]}")
        # As a network would, it hands over copies.
        return [_unpacked(_packed(tensors, record)) for _, tensors, record in every]


def together(size, work):
    """Return what work(rank) returns on each of `size` ranks."""
    meeting = Meeting(size)
    ranks = [ThreadRank(number, meeting) for number in range(size)]

    def one(rank):
        try:
            return work(rank)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(one, ranks))
    assert len({tuple(rank.places) for rank in ranks}) == 1
    return found
