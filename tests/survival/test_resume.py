"""A run that was stopped is gone on with: the same bytes, and nothing is done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import kept_blocks, mixed, pipeline, solve
from qframe.calibration import CalibrationData
from qframe.contracts import Event
from qframe.errors import OutputError, UnfinishedError
from qframe.learning import Learner
from qframe.solve import Solver
from qframe.unfinished import kept_blocks as how_many
from qframe.unfinished import unfinished_folder

BLOCKS = 5
RUNS = {
    "weights alone": {"method": "rtn"},
    "one method": {"method": "gptq", "scheme": {"num_bits": 3, "group_size": -1}},
    "scales that go into norms and layers": {"method": "awq+gptq"},
    "scales that stay": {"method": "awq+gptq", "fold_scales": False},
    "the original pass": {"method": "qronos"},
    "blocks that are learned": {"method": "autoround_block", "options": {"iterations": 3}},
    "stored scales of activations": {"method": "smoothquant+gptq", "scheme": "W8A8_STATIC"},
    "rotations, statistics": {"method": "hadamard+gptq", "keep_statistics": True},
    "columns in 16 bits": {"method": "llm_int8+rtn", "scheme": "W8A8"},
    "bits for each layer": {"method": "gptq", "target_bits": 5.0},
    "an output layer": {"method": "gptq", "ignore": ["model.layers.1.mlp.up_proj"]},
    "a block that is left": {"method": "rtn", "ignore": ["re:.*layers.2.*", "lm_head"]},
    "floats": {"method": "rtn", "scheme": "NVFP4"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_goes_on_writes_the_same_bytes(
    model, recipe, contents, stopped, undisturbed, tmp_path, name
):
    fields = recipe(**RUNS[name])
    out = tmp_path / "out"
    stopped(model, fields, out, after=2, threads=1)
    assert how_many(out)[0] >= 2
    qframe.quantize(model, fields, out=out, state="resume", threads=2)
    assert contents(out) == undisturbed(fields)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_is_done_is_not_done_again(model, recipe, stopped, tmp_path, monkeypatch):
    fields, out = recipe("gptq"), tmp_path / "out"
    stopped(model, fields, out, after=3)
    kept, _ = how_many(out)
    solved = []
    real = Solver.solve

    def counting(self, group, *arguments):
        solved.append(group.name.split(".")[2])
        return real(self, group, *arguments)

    monkeypatch.setattr(Solver, "solve", counting)
    qframe.quantize(model, fields, out=out, state="resume")
    assert sorted(set(solved)) == [str(block) for block in range(kept, BLOCKS)]


def test_one_thread_loses_no_more_than_the_block_it_is_at(model, recipe, tmp_path, monkeypatch):
    """With more of them a verdict on the block before may still be waited for."""
    real = Solver.solve

    def until(self, group, *arguments):
        if group.name.startswith("model.layers.3."):
            raise KeyboardInterrupt
        return real(self, group, *arguments)

    monkeypatch.setattr(Solver, "solve", until)
    with pytest.raises(KeyboardInterrupt):
        qframe.quantize(model, recipe("gptq"), out=tmp_path / "out", threads=1)
    assert how_many(tmp_path / "out") == (3, BLOCKS)


def test_blocks_that_were_learned_are_not_learned_again(
    model, recipe, stopped, tmp_path, monkeypatch
):
    fields, out = recipe("autoround_block", options={"iterations": 2}), tmp_path / "out"
    stopped(model, fields, out, after=2)
    kept, _ = how_many(out)
    learned = []
    learn = Learner.learn

    def counting(self, name, *arguments, **options):
        learned.append(name)
        learn(self, name, *arguments, **options)

    monkeypatch.setattr(Learner, "learn", counting)
    qframe.quantize(model, fields, out=out, state="resume")
    assert len(learned) == BLOCKS - kept


def test_sensitivities_are_not_measured_again(
    model, recipe, contents, undisturbed, tmp_path, monkeypatch
):
    fields, out = recipe("gptq", target_bits=5.0), tmp_path / "out"

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Walk, "with_data", stop)
        with pytest.raises(KeyboardInterrupt):
            qframe.quantize(model, fields, out=out)
    assert how_many(out) == (0, BLOCKS)
    monkeypatch.setattr(mixed, "measure", stop)
    qframe.quantize(model, fields, out=out, state="resume")
    assert contents(out) == undisturbed(fields)


def test_events_come_in_the_same_order(model, recipe, contents, stopped, tmp_path, monkeypatch):
    """Those of learning a block, of solving its groups, and of verdicts, which come later."""
    verdict, no_worse = solve.verdict, Learner._no_worse

    def judged(judged, *arguments):
        name = judged.report.name
        return [*verdict(judged, *arguments), Event(kind="judged", layer=name, message="so so")]

    def learned(self, problem, made):
        self._falls.overfitted("block", problem.name, "a little")
        return no_worse(self, problem, made)

    def massive(layer, chunks):
        return [Event(kind="massive token", layer=layer, message="quite")]

    monkeypatch.setattr(solve, "verdict", judged)
    monkeypatch.setattr(solve, "massive_token", massive)
    monkeypatch.setattr(Learner, "_no_worse", learned)
    fields = recipe("autoround_block", options={"iterations": 2})
    whole = qframe.quantize(model, fields, out=tmp_path / "whole")
    kinds = [event.kind for event in whole.report.events]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "overfit": BLOCKS,
        "massive token": 4 * BLOCKS,
        "judged": 7 * BLOCKS,
    }
    stopped(model, fields, tmp_path / "out", after=3)
    found = qframe.quantize(model, fields, out=tmp_path / "out", state="resume")
    assert found.report.events == whole.report.events
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_may_be_stopped_again_and_again(
    model, recipe, contents, stopped, undisturbed, tmp_path, kept_files
):
    fields, out = recipe("awq+gptq"), tmp_path / "out"
    stopped(model, fields, out, after=1)
    for after in (2, 3, 4):
        stopped(model, fields, out, after=after, state="resume")
        assert after <= how_many(out)[0] == len(kept_files(out)) <= BLOCKS
    qframe.quantize(model, fields, out=out, state="resume")
    assert contents(out) == undisturbed(fields)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_module_in_memory_goes_on_too(contents, stopped, tmp_path, calibrated):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(4)
            )

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    net = Net()
    fields = {"method": "awq+gptq" if calibrated else "rtn", "scheme": {"num_bits": 4}}
    fields["scheme"]["group_size"] = 8
    options = {}
    if calibrated:
        options["calibration"] = CalibrationData.from_tensors([torch.randn(32, 16)] * 2)
    expected = qframe.quantize(net, fields, out=tmp_path / "whole", **options)
    stopped(net, fields, tmp_path / "out", after=2, **options)
    found = qframe.quantize(net, fields, out=tmp_path / "out", state="resume", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    x = torch.randn(3, 16)
    assert torch.equal(found.module(x), expected.module(x))


def test_calibration_inputs_that_are_no_tensors_cannot_be_recognized(tmp_path):
    class Net(nn.Sequential):
        def forward(self, x, other):
            return super().forward(x)

    net = Net(nn.Linear(8, 8), nn.Linear(8, 8))
    data = CalibrationData(inputs=[(torch.randn(16, 8), object())])
    qframe.quantize(
        net,
        {"method": "gptq", "scheme": {"num_bits": 4, "group_size": 8}},
        out=tmp_path / "out",
        calibration=data,
    )
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# What is in the way -----------------------------------------------------------------------------


def test_a_run_that_was_stopped_is_not_deleted_in_silence(
    model, recipe, contents, stopped, undisturbed, tmp_path, kept_files
):
    fields, out = recipe("gptq"), tmp_path / "out"
    stopped(model, fields, out, after=2)
    before = [file.read_bytes() for file in kept_files(out)]
    for state in ("new", "none"):
        with pytest.raises(UnfinishedError, match=r"[23] of 5 blocks.*--resume.*--restart"):
            qframe.quantize(model, fields, out=out, state=state, threads=1)
        assert [file.read_bytes() for file in kept_files(out)] == before
    qframe.quantize(model, recipe(), out=out, state="restart")
    assert contents(out) == undisturbed(recipe())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("state", ["resume", "restart"])
def test_where_nothing_is_kept_a_run_begins(model, recipe, contents, undisturbed, tmp_path, state):
    qframe.quantize(model, recipe(), out=tmp_path / "out", state=state)
    assert contents(tmp_path / "out") == undisturbed(recipe())


def test_a_failure_before_the_first_block_is_done_leaves_nothing(model, recipe, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "solve", stop)
        with pytest.raises(KeyboardInterrupt):
            qframe.quantize(model, recipe("gptq"), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_where_nothing_is_to_be_kept(model, recipe, stopped, tmp_path):
    stopped(model, recipe(), tmp_path / "out", after=3, state="none")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_not_replaced_by_going_on(model, recipe, stopped, tmp_path):
    out = tmp_path / "out"
    stopped(model, recipe(), out, after=2)
    out.mkdir()
    (out / "mine").write_text("work of another kind")
    with pytest.raises(OutputError, match="exists and is not empty"):
        qframe.quantize(model, recipe(), out=out, state="resume")
    assert (out / "mine").is_file()
    assert how_many(out) is not None


# Files that are not whole -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_blocks(model, recipe, stopped, tmp_path_factory):
    """The hidden folder of a run that was stopped."""
    out = tmp_path_factory.mktemp("three") / "out"
    stopped(model, recipe(), out, after=3, threads=1)
    return unfinished_folder(out)


def put(folder, out):
    shutil.copytree(folder, unfinished_folder(out))


@settings(max_examples=12)
@given(
    block=st.integers(0, 2),
    damage=st.sampled_from(["cut", "changed", "longer", "missing"]),
    at=st.floats(0, 1, exclude_max=True),
)
def test_a_block_that_is_not_whole_and_later_ones_are_done_again(
    model, recipe, contents, undisturbed, three_blocks, tmp_path_factory, block, damage, at
):
    out = tmp_path_factory.mktemp("damaged") / "out"
    put(three_blocks, out)
    file = unfinished_folder(out) / "blocks" / f"{block:05d}.safetensors"
    data = file.read_bytes()
    place = int(at * len(data))
    if damage == "missing":
        file.unlink()
    else:
        changed = bytes([data[place] ^ 1])
        file.write_bytes(
            {
                "cut": data[:place],
                "longer": data + b" ",
                "changed": data[:place] + changed + data[place + 1 :],
            }[damage]
        )
    solved = set()
    real = Solver.solve_by_rows

    def counting(self, layers, *arguments):
        solved.update(int(layer.name.split(".")[2]) for layer in layers)
        return real(self, layers, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "solve_by_rows", counting)
        qframe.quantize(model, recipe(), out=out, state="resume")
    assert solved == set(range(block, BLOCKS))
    assert contents(out) == undisturbed(recipe())


def test_a_file_that_the_list_does_not_name_is_not_used(
    model, recipe, contents, undisturbed, three_blocks, tmp_path
):
    """A run may be killed after a block has its name, and before the list does."""
    out = tmp_path / "out"
    put(three_blocks, out)
    listed = unfinished_folder(out) / "state.json"
    state = json.loads(listed.read_text())
    state["blocks"].pop()
    listed.write_text(json.dumps(state))
    (unfinished_folder(out) / "blocks" / "new.tmp").write_bytes(b"half of one")
    qframe.quantize(model, recipe(), out=out, state="resume")
    assert contents(out) == undisturbed(recipe())


STATE = {"state_version": 2, "fingerprint": {}, "total": 5, "decision": None, "blocks": []}
BROKEN = [
    {"fingerprint": 1},
    {"total": "5"},
    {"decision": []},
    {"blocks": None},
    {"blocks": [3]},
    {"blocks": [{"layers": "a", "blake3": ""}]},
    {"blocks": [{"layers": [1], "blake3": ""}]},
    {"blocks": [{"layers": ["a"]}]},
]
TEXTS = ["", "{", "[]", "null", '{"state_version": 0}', "[" * 100_000, '{"state_version": 2}']
TEXTS += [json.dumps({**STATE, **wrong}) for wrong in BROKEN]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("state", ["new", "resume"])
def test_a_list_that_cannot_be_read_is_refused(model, recipe, three_blocks, tmp_path, text, state):
    out = tmp_path / "out"
    put(three_blocks, out)
    (unfinished_folder(out) / "state.json").write_text(text)
    with pytest.raises(UnfinishedError, match=r"state\.json.*--restart"):
        qframe.quantize(model, recipe(), out=out, state=state)
    assert (unfinished_folder(out) / "blocks" / "00000.safetensors").is_file()
    qframe.quantize(model, recipe(), out=out, state="restart")


def test_groups_that_are_not_those_of_the_run_before_are_refused(
    model, recipe, three_blocks, tmp_path, monkeypatch
):
    read = kept_blocks._read

    def otherwise(*arguments):
        block = read(*arguments)
        name, group = next(iter(block.groups.items()))
        block.groups[name] = replace(group, layers={name: group.layers[name], "other": None})
        return block

    out = tmp_path / "out"
    put(three_blocks, out)
    monkeypatch.setattr(kept_blocks, "_read", otherwise)
    with pytest.raises(UnfinishedError, match=r"read one input.*'other'.*--restart"):
        qframe.quantize(model, recipe(), out=out, state="resume")
