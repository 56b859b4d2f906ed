"""Activations that wait on the disk come back bit for bit, whatever a network does with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import InputGroup, LayerInfo, pipeline
from qframe.calibration import Lockstep, Stop
from qframe.errors import OutputError
from qframe.inputs import Waiting
from qframe.spilling import Spill

W4 = {"num_bits": 4, "group_size": 32}
RECIPES = {
    "gptq": {"method": "gptq", "scheme": W4},
    "rtn": {"method": "rtn", "scheme": W4},
    "awq": {"method": "awq", "scheme": W4},
    "awq+gptq": {"method": "awq+gptq", "scheme": W4},
    "qronos": {"method": "qronos", "scheme": W4},
    "one scale of activations": {"method": "rtn", "scheme": "W8A8_STATIC"},
    "llm_int8": {"method": "llm_int8", "scheme": "W8A8"},
}
CALIBRATION = {"num_calibration_samples": 24, "max_seq_length": 128}  # two chunks


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def with_budget(monkeypatch):
    """Give waiting activations so many bytes, whatever else a run takes; return the spills."""
    made = []

    class Kept(Spill):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    def set_to(budget):
        monkeypatch.setattr(pipeline, "activation_budget", lambda *_: budget)
        monkeypatch.setattr(pipeline, "Spill", Kept)
        return made

    return set_to


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("budget", [0, 150_000], ids=["none wait", "some wait"])
def test_the_folder_is_the_same_with_activations_on_the_disk(
    tiny_llama, tmp_path, with_budget, recipe, budget
):
    recipe = {**recipe, "calibration": CALIBRATION}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "plain", threads=2)
    made = with_budget(budget)
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out", threads=2, max_memory=1 << 40)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert made[0].spilled > 0
    assert made[0].most <= budget
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "plain"]


class Odd(nn.Module):
    """Views, things that are kept in a module and read by other chunks, and numbers in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.kept = None

    def forward(self, x):
        whole = x * 3
        left, right = whole.split(3, dim=1)
        turned = whole.T
        if self.kept is None:
            self.kept = (torch.arange(6.0) + 1, whole.sum(0))
        y = self.first(whole.clone() + self.kept[0])
        left += 1  # seen in `whole` and in `turned`
        y = y + turned.T[:, [5, 4, 3, 2, 1, 0]] + self.kept[0].expand(2, 6)[0]
        z = self.second(y + whole)
        return z + right.sum() + left.mean() + self.kept[0].sum()


def passed(inputs, threads, spill, budget=None):
    """Return what chunks bring to the layers and what they return, in order.

    What they bring is in memory while they wait as far as the budget allows, and no farther.
    """
    torch.manual_seed(0)
    module, found, results = Odd(), [], {}
    steps = Lockstep(module, threads=threads, dtype=torch.float32, spill=spill)
    for name in ("first", "second"):
        steps.watch(Stop("layer", name), module.get_submodule(name))

    def keep(_, args, result):
        results[float(args[0].sum())] = result.clone()

    module.register_forward_hook(keep)

    def on_stop(stop, arrivals):
        there = [arrival.args[0].untyped_storage().nbytes() for arrival in arrivals.values()]
        assert budget is None or sum(there) <= budget
        for number, arrival in arrivals.items():
            x = arrival.args[0]
            read = x if spill is None else spill.read(number, x)
            found.append((stop.name, number, read.clone()))
        return True

    steps.run({i: (x,) for i, x in enumerate(inputs)}, {}, on_stop)
    return found, results


@settings(max_examples=20)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    budget=st.sampled_from([0, 1, 200, 500, 1 << 20]),
    threads=st.sampled_from([1, 2]),
)
def test_a_network_does_not_notice(tmp_path_factory, rows, budget, threads):
    generator = torch.Generator().manual_seed(len(rows))
    inputs = [torch.randn(count, 6, generator=generator) for count in rows]
    # What is kept by the module is the first chunk's, and which that is the threads decide: only
    # what does not depend on it is read.
    plain, results = passed(inputs, threads, None)
    with Spill(budget, tmp_path_factory.mktemp("spill")) as spill:
        found, again = passed(inputs, threads, spill, budget)
    assert [each[:2] for each in found] == [each[:2] for each in plain]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, plain, strict=True))
    assert results.keys() == again.keys()
    assert all(torch.equal(results[key], again[key]) for key in results)
    assert spill.most <= budget
    if budget == 0 and any(rows):
        assert spill.spilled


def test_nothing_is_written_where_the_budget_is_just_enough(tmp_path):
    inputs = [torch.randn(3, 6) for _ in range(4)]
    with Spill(1 << 20, tmp_path) as spill:
        passed(inputs, 1, spill)
    assert (spill.spilled, spill.most > 0) == (0, True)
    with Spill(spill.most, tmp_path) as enough:
        passed(inputs, 1, enough)
    assert (enough.spilled, enough.most) == (0, spill.most)
    with Spill(spill.most - 1, tmp_path) as too_little:
        passed(inputs, 1, too_little)
    assert too_little.spilled > 0


def test_what_observers_have_seen_can_still_be_emptied():
    """A tensor that was numpy's, too, never can be."""
    x = torch.randn(3, 6)
    group = InputGroup(layers=(LayerInfo(name="up", rows=4, columns=6),))
    [seen] = Waiting({0: x}, lambda number, tensor: tensor).chunks(group, torch.float32, 1)
    seen.numpy()
    assert torch.equal(seen, x)
    x.untyped_storage().resize_(0)


def test_embeddings_are_let_go_when_the_first_block_begins(tiny_llama, tmp_path, monkeypatch):
    networks, there = [], []
    make = pipeline._as_network
    monkeypatch.setattr(pipeline, "_as_network", lambda m: networks.append(make(m)) or networks[0])

    def look(_):
        there.append(networks[0].module.get_input_embeddings().weight.is_meta)

    recipe = {**RECIPES["gptq"], "calibration": CALIBRATION}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out", progress=look)
    assert there == [True] * len(there) != []


def test_no_room_for_activations_is_told(tiny_llama, tmp_path, with_budget, monkeypatch):
    with_budget(0)
    monkeypatch.setattr(Spill, "_file", lambda self, number: self._folder / "no" / str(number))
    recipe = {**RECIPES["gptq"], "calibration": CALIBRATION}
    with pytest.raises(OutputError, match=r"cannot write .*activations.*No such file"):
        qframe.quantize(tiny_llama, recipe, out=tmp_path / "out", max_memory=1 << 40)
    assert not list(tmp_path.glob("**/activations*"))
