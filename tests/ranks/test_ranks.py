"""What ranks share: who has which chunks and layers, what they send, and where they meet."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import threading
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qframe import ranks
from qframe.calibration import Lockstep, Stop
from qframe.contracts import Event, InputGroup, LayerInfo
from qframe.errors import PluginError, RanksError
from qframe.host import Host
from qframe.inputs import GroupInputs, Split, Waiting
from qframe.launcher import launched
from qframe.merging import observed, restore, taken_down
from qframe.ranks import ALONE, SLOTS, _packed, _unpacked, rank_of, shares, slot_of
from qframe.report.layers import LayerReport
from qframe.solve import Solver
from qframe.weights import DTYPE_NAMES
from tests.ranks.threads import together

COLUMNS = 6
HOST = Host.discover()
GROUP = InputGroup(layers=(LayerInfo(name="up", rows=4, columns=COLUMNS),))


# Who has what ---------------------------------------------------------------------------------


@given(chunks=st.integers(1, 70), size=st.integers(1, 12))
def test_every_chunk_is_in_one_slot_and_every_slot_is_one_ranks(chunks, size):
    slots = [slot_of(number, chunks) for number in range(chunks)]
    assert slots == sorted(slots)
    assert set(slots) == set(range(min(SLOTS, chunks)))
    counts = [len(list(members)) for _, members in groupby(slots)]
    assert max(counts) - min(counts) <= 1
    owners = [rank_of(number, chunks, size) for number in range(chunks)]
    assert owners == sorted(owners)
    assert set(owners) <= set(range(size))
    for slot in set(slots):
        assert len({o for o, s in zip(owners, slots, strict=True) if s == slot}) == 1
    if size <= min(SLOTS, chunks):
        assert set(owners) == set(range(size))


@given(fitted=st.integers(0, 20), held_out=st.integers(0, 9), size=st.integers(1, 5))
def test_ranks_have_all_chunks_between_them(fitted, held_out, size):
    class Rank:
        def __init__(self, rank):
            self.rank, self.size = rank, size

    own = [Split(fitted, held_out, Rank(rank)).own for rank in range(size)]
    assert sorted(number for each in own for number in each) == list(range(fitted + held_out))


@given(
    costs=st.lists(st.integers(1, 9).map(float), max_size=9),
    size=st.integers(1, 4),
    first=st.integers(0, 3),
)
def test_layers_are_shared_so_that_no_rank_could_hand_one_on_for_the_better(costs, size, first):
    owners = shares(costs, size, first % size)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert len(owners) == len(costs)
    for rank in range(size):
        own = [c for c, o in zip(costs, owners, strict=True) if o == rank]
        assert not own or loads[rank] - min(own) <= min(loads)
    if costs:
        assert owners[costs.index(max(costs))] == first % size


# What they send -------------------------------------------------------------------------------


@given(data=st.data())
def test_what_is_sent_arrives(data):
    shapes = st.lists(st.integers(0, 3), max_size=3)
    tensors = {}
    for name in data.draw(st.sets(st.text(max_size=3), max_size=4)):
        shape, dtype = data.draw(shapes), data.draw(st.sampled_from(list(DTYPE_NAMES)))
        size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
        data_bytes = data.draw(st.binary(min_size=size, max_size=size))
        raw = torch.tensor(list(data_bytes), dtype=torch.uint8)
        if dtype is torch.bool:
            raw &= 1
        tensors[name] = raw.view(dtype).reshape(shape)
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    record = data.draw(st.lists(plain) | st.dictionaries(st.text(), plain))
    found, said = _unpacked(_packed(tensors, record))
    assert said == record
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, found[name])]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("name", HOST.names("observer"))
def test_a_statistic_goes_on_elsewhere_as_if_nothing_had_happened(name):
    observer = HOST.get("observer", name)
    width = COLUMNS * (1 + HOST.wants_pairs(name))
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    here, tensors = observer.start(GROUP), {}
    here.update(x[:15])
    record = taken_down(here, observer.start(GROUP), tensors, "0", name)
    sent, said = _unpacked(_packed(tensors, record))
    there = observer.start(GROUP)
    restore(there, said, sent)
    for each in (here, there):
        each.update(x[15:])
    assert torch.equal(torch.as_tensor(here.value()), torch.as_tensor(there.value()))


class Odd:
    """What observers of others may hold; a set is more than can be sent."""

    def __init__(self, *seen):
        self.seen = list(seen)


@pytest.mark.parametrize(
    "seen",
    [
        [1, 2.5, "x", None, True, b"\x00\xff"],
        [torch.ones(2), (torch.zeros(0, 3), [])],
        [np.arange(3, dtype=np.int8), np.float32(0.1), {"a": np.ones(()), 4: [1]}],
    ],
)
def test_lists_arrays_and_mappings_are_sent(seen):
    tensors = {}
    record = taken_down(Odd(*seen), Odd(), tensors, "0", "odd")
    sent, said = _unpacked(_packed(tensors, record))
    there = Odd()
    restore(there, said, sent)
    assert alike(there.seen, seen)


def alike(one, other):
    """Whether two values are of the same types, and have the same bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(alike, one.values(), other.values()))
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one.dtype == other.dtype and one.tolist() == other.tolist()
    return one == other


@pytest.mark.parametrize("seen", [{1}, [object()], {(1,): 2}, lambda: 3])
def test_what_cannot_be_sent_is_named(seen):
    here = Odd()
    here.seen = seen
    with pytest.raises(PluginError, match=r"observer 'odd'.* 'seen' of type .*on one rank"):
        taken_down(here, Odd(), {}, "0", "odd")


# What they find together ----------------------------------------------------------------------


class Total:
    """A sum in float32, which is another one in another order, and how many tokens it is of."""

    def __init__(self):
        self.sum, self.tokens = torch.zeros(COLUMNS), 0

    def update(self, x):
        for token in x:
            self.sum = self.sum + token
        self.tokens += len(x)

    def merge(self, other):
        self.sum = self.sum + other.sum
        self.tokens += other.tokens

    def value(self):
        return torch.cat([self.sum, torch.tensor([float(self.tokens)])])


class Totals:
    name = "total"

    def start(self, group):
        return Total()


EXACT = ["absmax", "sample", "histogram", "minmax"]  # any order gives the same bits


@given(data=st.data())
def test_statistics_have_the_same_bits_on_any_number_of_ranks(data):
    """Whichever chunks reach the layer, on whichever ranks; none may."""
    name = data.draw(st.sampled_from(["total", "total", "hessian", *EXACT]))
    observer = Totals() if name == "total" else HOST.get("observer", name)
    fitted, held_out = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 5))
    reach = data.draw(st.sets(st.integers(0, fitted + held_out - 1)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    inputs = {
        n: torch.randn(data.draw(st.integers(0, 5)), COLUMNS, generator=generator) * 10.0 ** (n % 7)
        for n in sorted(reach)
    }

    def look(rank):
        split = Split(fitted, held_out, rank)
        own = {n: x for n, x in inputs.items() if n in split.own}
        group = GroupInputs.collect(GROUP, Waiting(own), split)
        parts = (group.fitted, group.held_out)
        seen = [observed(observer, GROUP, part, rank).value() for part in parts]
        some = [part.sample(4, rank, "some") if part.tokens else None for part in parts]
        return seen, some, [part.tokens for part in parts]

    seen, some, counts = look(ALONE)
    for place, part in enumerate((range(fitted), range(fitted, fitted + held_out))):
        chunks = [x for n, x in inputs.items() if n in part]
        tokens = torch.cat([torch.zeros(0, COLUMNS), *chunks])
        assert counts[place] == len(tokens)
        if len(tokens):
            assert torch.equal(some[place], tokens[:: -(-len(tokens) // 4)])
        if name in EXACT:
            whole = observer.start(GROUP)
            whole.update(tokens)
            assert torch.equal(seen[place], whole.value())
        if name == "total":
            assert seen[place][-1] == len(tokens)
            assert torch.equal(seen[place], by_slots(inputs, part))
    for found in together(data.draw(st.integers(2, 4)), look):
        assert found[2] == counts
        for one, other in zip([*seen, *some], [*found[0], *found[1]], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_slots_are_those_of_the_part_that_a_chunk_is_in():
    generator = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(7, COLUMNS, generator=generator) for n in range(20 + 12)}
    group = GroupInputs.collect(GROUP, Waiting(inputs), Split(20, 12))
    for part, numbers in ((group.fitted, range(20)), (group.held_out, range(20, 32))):
        seen = observed(Totals(), GROUP, part, ALONE).value()
        assert torch.equal(seen, by_slots(inputs, numbers))


def by_slots(inputs, part):
    """Return what is made of the tokens of each slot, put together in their order."""
    slots = {}
    for number, x in inputs.items():
        if number in part:
            slot = slot_of(number - part.start, len(part))
            slots.setdefault(slot, Total()).update(x)
    whole = slots.pop(min(slots)) if slots else Total()
    for slot in sorted(slots):
        whole.merge(slots[slot])
    return whole.value()


class Routed(nn.Module):
    """Sends each input to one of two layers, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(1, 1) for _ in range(3))

    def forward(self, x):
        return self.last(self.left(x) if x[0, 0] > 0 else self.right(x))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("signs", ["+-+", "---", "++-", "-"])
def test_ranks_stop_together_where_chunks_of_any_of_them_wait(size, signs):
    def walk(rank):
        net, met = Routed(), []

        def agree(own):
            every = [place for _, place in rank.exchange("next", {}, own)]
            return min((place for place in every if place is not None), default=None)

        steps = Lockstep(net, threads=1, dtype=torch.float32, agree=agree)
        for name in ("left", "right", "last"):
            steps.watch(Stop("layer", name), net.get_submodule(name))
        inputs = {
            number: (torch.full((1, 1), 1.0 if sign == "+" else -1.0),)
            for number, sign in enumerate(signs)
            if rank_of(number, len(signs), rank.size) == rank.rank
        }

        def on_stop(stop, arrivals):
            met.append((stop.name, sorted(arrivals)))
            return True

        steps.run(inputs, {}, on_stop)
        return met

    found = together(size, walk)
    names = [[name for name, _ in met] for met in found]
    assert all(each == names[0] for each in names)
    for place, name in enumerate(names[0]):
        there = sorted(number for met in found for number in met[place][1])
        wanted = {"left": "+", "right": "-", "last": "+-"}[name]
        assert there == [number for number, sign in enumerate(signs) if sign in wanted]


# What others have done ------------------------------------------------------------------------


def judged(layer, **told):
    given = {"method": "rtn", "scheme": "int4", "rows": 2, "columns": 4, "bits_per_weight": 4.5}
    report = LayerReport(name=layer, **given)
    for name, value in told.items():
        setattr(report, name, value)
    return report


def test_reports_and_events_of_other_ranks_layers_are_taken_over_in_their_order():
    theirs = judged("b", sqnr_db=17.5, source="abc", clipped=0.25)
    event = Event(kind="certificate violated", layer="b", message="by much")

    class Two:
        size, rank = 2, 0

        def exchange(self, place, tensors, own):
            told = {"report": dataclasses.asdict(theirs), "events": [dataclasses.asdict(event)]}
            return [({}, own), ({}, {"b": told})]

    solver = object.__new__(Solver)
    solver.ranks = Two()
    own = judged("b")
    due = [(judged("a"), 0), (own, 1), (judged("c"), 0), (judged("d"), None)]
    events = [Event(kind="test", layer=layer, message="") for layer in ("c", "a", "d")]
    found = solver._exchanged(due, events)
    assert [each.layer for each in found] == ["a", "b", "c", "d"]
    assert found[1] == event
    assert own == theirs


def test_ranks_that_are_at_different_places_are_told_where():
    group = object.__new__(ranks._Group)
    group.rank, group.size, group._group = 0, 2, None
    group._names = ["rank 0 (here)", "rank 1 (there)"]

    class Work:
        def is_completed(self):
            return True

        def wait(self):
            pass

    class Distributed:
        def all_gather(self, every, own, **options):
            there = b"statistics of up".ljust(ranks.LABEL_BYTES) + (0).to_bytes(8, "little")
            every[0].copy_(own)
            every[1].copy_(torch.frombuffer(bytearray(there), dtype=torch.uint8))
            return Work()

    group._distributed = Distributed
    assert group._meet("statistics of up", 7) == [7, 0]
    with pytest.raises(RanksError, match=r"rank 0 \(here\) is at 'the end', and rank 1 \(there\)"):
        group._meet("the end", 7)


# A launcher -----------------------------------------------------------------------------------


def test_there_is_one_process_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    with ranks.together() as found:
        assert found is ALONE


@pytest.fixture
def port(monkeypatch):
    """Be the first of two ranks that a launcher started; return the port of their store."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    ranks._launcher_store.cache_clear()
    yield port
    ranks._launcher_store.cache_clear()


def test_one_that_goes_while_connections_are_made_is_not_waited_for(port, monkeypatch):
    """It has come, and is gone before it is talked to: an hour is what the others would wait."""
    monkeypatch.setattr(ranks, "JOIN", 3600.0)
    monkeypatch.setattr(ranks, "GONE", 2.0)
    monkeypatch.setattr(ranks, "_runs", itertools.count(7))

    def come_and_go():
        store = torch.distributed.TCPStore("localhost", port, 2, is_master=False)
        other = torch.distributed.PrefixStore("qframe 7", store)
        other.set("who/1", "rank 1 (elsewhere)")
        other.set("alive/1", "0")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    with pytest.raises(RanksError, match="rank 0 of 2 cannot reach the others"), ranks.together():
        pass
    thread.join()
    assert not torch.distributed.is_initialized()


def test_who_comes_alone_says_so_and_does_not_wait_for_ever(port, monkeypatch, caplog):
    monkeypatch.setattr(ranks, "JOIN", 2.0)
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    with pytest.raises(RanksError, match="rank 0 of 2 cannot reach the others"), ranks.together():
        pass
    assert f"rank 0 of 2 waits for the others at localhost:{port}, 2 s" in caplog.text


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "")])
def test_an_environment_that_no_launcher_makes_is_refused(monkeypatch, rank, size):
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": rank}
    for name, value in {**environment, "WORLD_SIZE": size}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(RanksError, match="torchrun"):
        launched()
