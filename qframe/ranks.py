"""Processes that do one run together, on one machine or on several: the ranks of torch.distributed.

Every rank takes the same steps on the whole network, each with chunks of calibration text and with
layers of its own, and what they find out they `exchange`: each gives some tensors and plain values,
and gets those of all. That is the one thing that they do together. It happens at places that do not
depend on data, all ranks say which place they are at, and whoever waits keeps an eye on the others:
so a rank that goes another way, fails, or is gone ends the run everywhere instead of hanging it.

Which chunks are added up first does not depend on the number of ranks: chunks lie in `SLOTS` slots,
one after another, every slot is one rank's, and what is made of each is put together in their
order. One rank does just that with all of them.

Numbers are on the CPU, so the ranks talk by gloo, also where other programs of the same launcher
would use NCCL.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, Protocol

import torch

from qframe.errors import QframeError, RanksError
from qframe.launcher import launched
from qframe.weights import DTYPE_NAMES, DTYPES

log = logging.getLogger("qframe")

SLOTS = 8  # of chunks; so many ranks can have some
BEAT = 1.0  # seconds after which a rank says that it is alive
GONE = 20.0  # seconds after which one that has not said so counts as gone
LABEL_BYTES = 256  # of the name of a place where ranks meet
JOIN = 300.0  # seconds in which all ranks have to come
PATIENCE = 10.0  # seconds after which one that waits for the others says so
_LONG = timedelta(days=365)  # what ranks wait for one another may take; who is gone is found out

Tensors = Mapping[str, torch.Tensor]
Given = tuple[dict[str, torch.Tensor], Any]
"""What a rank has given: tensors by name, and plain values."""


class Ranks(Protocol):
    """Processes that do a run together, seen from one of them.

    rank   its number
    size   how many there are
    """

    rank: int
    size: int

    def exchange(self, place: str, tensors: Tensors, record: Any) -> list[Given]:
        """Return what every rank has given, in the order of ranks.

        place    where in the run this is, the same on all ranks
        record   plain values, as JSON has them

        Raises RanksError where another rank is elsewhere, has failed, or is gone.
        """
        ...


class Alone:
    """A process that does a run on its own."""

    rank = 0
    size = 1

    def exchange(self, place: str, tensors: Tensors, record: Any) -> list[Given]:
        """Return what was given."""
        return [(dict(tensors), record)]


ALONE = Alone()


def slot_of(number: int, chunks: int) -> int:
    """Return the slot of a chunk, by its number among so many."""
    return number * min(SLOTS, chunks) // chunks


def rank_of(number: int, chunks: int, size: int) -> int:
    """Return which of `size` ranks has a chunk."""
    return slot_of(number, chunks) * size // min(SLOTS, chunks)


def shares(costs: Sequence[float], size: int, first: int = 0) -> list[int]:
    """Return for each piece of work the rank that does it: the dearest first, to whoever has least.

    first   the rank that comes first where several have as little
    """
    loads, found = [0.0] * size, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = min(range(size), key=lambda r: (loads[r], (r - first) % size))
        loads[rank] += costs[place]
        found[place] = rank
    return found


@contextmanager
def together() -> Iterator[Ranks]:
    """Be one of the ranks that a launcher started; alone where there is none.

    An error that is raised in the context is told to the others.

    Raises RanksError where they cannot be reached.
    """
    rank, size = launched()
    if size == 1:
        yield ALONE
        return
    group = _Group(rank, size)
    try:
        yield group
    except BaseException as error:
        group.fail(str(error) if isinstance(error, QframeError) else repr(error))
        raise
    else:
        group.leave()


_runs = itertools.count()  # of this process: each needs words of its own in the store


@cache
def _launcher_store(rank: int, size: int) -> Any:
    """Return the store that the launcher has, or that the first rank makes for all of them."""
    from torch.distributed.rendezvous import rendezvous

    waiting = threading.Timer(PATIENCE, _say_that_one_waits, (rank, size))
    waiting.daemon = True
    waiting.start()
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=JOIN))))
    finally:
        waiting.cancel()
    return store


def _say_that_one_waits(rank: int, size: int) -> None:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.warning("rank %d of %d waits for the others at %s, %.0f s", rank, size, place, JOIN)


class _Group:
    """Ranks that talk by gloo, and know by the launcher's store that the others are alive."""

    def __init__(self, rank: int, size: int) -> None:
        distributed = self._distributed()
        self.rank, self.size = rank, size
        self._over = threading.Event()
        try:
            self._store = distributed.PrefixStore(
                f"qframe {next(_runs)}", _launcher_store(rank, size)
            )
            self._say("who", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
            self._say("alive", "0")
            self._names = [self._ask("who", other) for other in range(size)]
            # All are here, so who does not answer now has gone since, or cannot be reached.
            self._store.set_timeout(timedelta(seconds=GONE))
            # torch before 2.9 keeps a group's first timeout, which must not end what takes long.
            adjusts = hasattr(distributed.ProcessGroup, "set_timeout")
            connecting = timedelta(seconds=GONE) if adjusts else _LONG
            self._group = None  # the one that there is
            if distributed.is_initialized():  # by whoever calls qframe, for purposes of their own
                made = distributed.new_group(backend="gloo", timeout=connecting)
                self._group = made
            else:
                distributed.init_process_group(
                    "gloo",
                    store=distributed.PrefixStore("group", self._store),
                    rank=rank,
                    world_size=size,
                    timeout=connecting,
                )
                made = distributed.group.WORLD
            if adjusts:
                made.set_timeout(_LONG)
        except (RuntimeError, ValueError, OSError) as error:
            raise RanksError(
                f"rank {rank} of {size} cannot reach the others: {_first_line(error)}"
            ) from error
        self._seen = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        self._wrong: str | None = None  # who has failed or is gone, as far as the store tells
        self._answered, self._silent_store = time.monotonic(), False
        self._beating = threading.Thread(target=self._beat, name="qframe-alive", daemon=True)
        self._beating.start()

    def exchange(self, place: str, tensors: Tensors, record: Any) -> list[Given]:
        """Return what every rank has given, in the order of ranks."""
        own = _packed(tensors, record)
        found = []
        for rank, length in enumerate(self._meet(place, len(own))):
            data = own if rank == self.rank else torch.empty(length, dtype=torch.uint8)
            self._wait(
                place,
                lambda data=data, rank=rank: self._distributed().broadcast(
                    data, src=rank, group=self._group, async_op=True
                ),
            )
            found.append((dict(tensors), record) if rank == self.rank else _unpacked(data))
        return found

    def fail(self, message: str) -> None:
        """Tell the others that this rank has failed."""
        if not self._silent_store:
            with suppress(RuntimeError):  # the store may be gone, and with it the launcher
                self._say("failed", message)
        self._end()

    def leave(self) -> None:
        """End what was begun, when all ranks are here."""
        try:
            self._meet("the end", 0)
        finally:
            self._end()

    def _end(self) -> None:
        """End what was begun: threads that are left when the program ends would abort it.

        One that waits for a store which does not answer cannot be ended.
        """
        self._over.set()
        self._beating.join(BEAT if self._silent_store else None)
        self._distributed().destroy_process_group(self._group)

    def _meet(self, place: str, length: int) -> list[int]:
        """Wait until all ranks are at a place; return what each has said of itself, a number."""
        label = place.encode()[:LABEL_BYTES].ljust(LABEL_BYTES)
        own = torch.frombuffer(bytearray(label + length.to_bytes(8, "little")), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(
            place,
            lambda: self._distributed().all_gather(every, own, group=self._group, async_op=True),
        )
        said = [bytes(each.tolist()) for each in every]
        for rank, text in enumerate(said):
            there = text[:LABEL_BYTES].decode(errors="replace").strip()
            if text[:LABEL_BYTES] != label:
                raise RanksError(
                    f"{self._names[self.rank]} is at {place!r}, and {self._names[rank]} at "
                    f"{there!r}: they must have the same model, recipe, text and versions"
                )
        return [int.from_bytes(text[LABEL_BYTES:], "little") for text in said]

    def _wait(self, place: str, begin: Any) -> None:
        """Do something together, and look after the others meanwhile."""
        pause, since = 1e-4, time.monotonic()
        try:
            work = begin()
            while not work.is_completed():
                self._look(place, since)
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
            work.wait()
        except RuntimeError as error:
            deadline = time.monotonic() + 2 * BEAT  # the other may be about to say why
            while (failed := self._failed()) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            raise RanksError(
                f"{self._names[self.rank]} ends, at {place!r}: "
                + (failed or f"another one is gone: {_first_line(error)}")
            ) from error

    def _look(self, place: str, since: float) -> None:
        """Raise RanksError where another rank has failed, or has not been heard of for long.

        since   when this rank began to wait: before, it may have been too busy to listen
        """
        wrong, quiet = self._wrong, time.monotonic() - max(self._answered, since)
        if wrong is None and quiet > GONE:
            self._silent_store = True
            wrong = (
                f"the store in which ranks say that they are alive has not answered for "
                f"{quiet:.0f} s: who has it, the launcher or rank 0, is down or was stopped"
            )
        if wrong:
            raise RanksError(f"{self._names[self.rank]} ends, at {place!r}: {wrong}")

    def _gone(self) -> str | None:
        """Return who has not been heard of for long; None where all have been."""
        now = time.monotonic()
        for rank, (last, since) in self._seen.items():
            said = self._ask("alive", rank)
            if said != last:
                self._seen[rank] = said, now
            elif now - since > GONE:
                return (
                    f"nothing was heard of {self._names[rank]} for {now - since:.0f} s: its "
                    f"machine or its network is down, or it was stopped"
                )
        return None

    def _failed(self) -> str | None:
        """Return who has failed, and why; None where nobody has said so."""
        with suppress(RuntimeError):  # whoever has the store may be gone
            for rank in self._seen:
                if self._store.check([f"failed/{rank}"]):
                    return f"{self._names[rank]} has failed: {self._ask('failed', rank)}"
        return None

    def _beat(self) -> None:
        """Say that this rank is alive, and hear of the others, in a thread of its own.

        A store may take for ever to answer, which must not keep those who wait.
        """
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            try:
                self._say("alive", str(count))
                self._wrong = self._failed() or self._gone()
            except RuntimeError as error:
                self._wrong = f"another one is gone: {_first_line(error)}"
                return
            self._answered = time.monotonic()

    def _say(self, what: str, text: str) -> None:
        self._store.set(f"{what}/{self.rank}", text)

    def _ask(self, what: str, rank: int) -> str:
        return str(self._store.get(f"{what}/{rank}"), errors="replace")

    @staticmethod
    def _distributed() -> Any:
        from torch import distributed

        return distributed


def first(ranks: Ranks, place: str, make: Any) -> Any:
    """Return on every rank the plain values that `make` returns on the first one."""
    record = make() if ranks.rank == 0 else None
    return ranks.exchange(place, {}, record)[0][1]


def check_same(ranks: Ranks, what: str, found: Any) -> None:
    """Raise RanksError, naming what differs, unless all ranks found the same plain values."""
    from qframe.unfinished import differences

    found = json.loads(json.dumps(found))
    every = ranks.exchange(what, {}, found)
    for rank, (_, other) in enumerate(every):
        for place, here, there in differences(every[0][1], other):
            raise RanksError(
                f"{what} differs between ranks: {place} is {here} on rank 0 and {there} on rank "
                f"{rank}; all ranks need the same model, recipe, text and versions"
            )


def _packed(tensors: Tensors, record: Any) -> torch.Tensor:
    """Return tensors and plain values as bytes, [n] uint8: eight of length, JSON, data."""
    header = [[name, DTYPE_NAMES[t.dtype], list(t.shape)] for name, t in tensors.items()]
    text = json.dumps([header, record]).encode()
    parts = [torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)]
    parts += [_bytes_of(t.detach().contiguous()) for t in tensors.values() if t.numel()]
    return torch.cat(parts)


def _unpacked(data: torch.Tensor) -> Given:
    """Return what `_packed` has made these of."""
    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    header, record = json.loads(bytes(data[8 : 8 + length].numpy()))
    tensors, place = {}, 8 + length
    for name, dtype, shape in header:
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        if tensor.numel():
            _bytes_of(tensor).copy_(data[place : place + tensor.nbytes])
        tensors[name] = tensor
        place += tensor.nbytes
    return tensors, record


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
