"""Text becomes windows of tokens, and chunks run in lockstep."""

import json

import pytest
import torch
from torch import nn

from qframe.calibration import CalibrationData, Lockstep, Stop, prepare, read_text, tokenize
from qframe.errors import CalibrationError, ModelError, RecipeError
from qframe.evaluation import windows_of
from qframe.host import Host
from qframe.pipeline import shortfall
from qframe.positions import positions, window_length
from qframe.recipe import CalibrationSettings, Recipe


def test_every_kind_of_file_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    lines = [json.dumps({"text": "second", "other": 1}), "", json.dumps({"text": "third"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "ignored.csv").write_text("no")
    assert read_text(str(tmp_path / "a.txt")) == ["first"]
    assert read_text(str(tmp_path / "b.jsonl")) == ["second", "third"]
    assert read_text(str(tmp_path)) == ["first", "second", "third"]


def test_the_two_halves_of_the_topics_are_different_texts():
    assert read_text("topics", "calibration") != read_text("topics", "evaluation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("bad.jsonl", b'{"text": "fine"}\n{"txt": 1}', r'bad.jsonl:2: expected .* "text" field'),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_what_is_not_text_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(str(tmp_path / name))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CalibrationError, match="tokenizer cannot be loaded"):
        tokenize(tmp_path, ["text"])


def test_chunks_are_cut_the_same_way_on_every_machine():
    windows = torch.arange(10 * 512).reshape(10, 512)
    data = CalibrationData.from_tokens(windows[:9], windows[9:], {})
    assert [len(chunk) for (chunk,) in data.inputs] == [4, 4, 1]
    assert [len(chunk) for (chunk,) in data.held_out] == [1]
    assert torch.equal(torch.cat([chunk for (chunk,) in data.inputs]), windows[:9])


# Lockstep -------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Sends each input to one of two layers, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.last(self.left(x) if x[0, 0] > 0 else self.right(x))


def copies(count):
    return dict.fromkeys(range(count), (torch.ones(1, 4),))


def steps_of(module, names, threads=2):
    steps = Lockstep(module, threads=threads, dtype=torch.float32)
    for name in names:
        steps.watch(Stop("layer", name), module.get_submodule(name))
    return steps


@pytest.mark.parametrize("threads", [1, 3])
def test_all_chunks_meet_before_every_layer_and_see_the_new_weight(threads):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inputs = [(torch.randn(2, 4, generator=torch.Generator().manual_seed(i)),) for i in range(5)]
    met = []

    def on_stop(stop, arrivals):
        met.append((stop.name, sorted(arrivals)))
        if stop.name == "1":
            for i, arrival in arrivals.items():  # the first layer was replaced by zeros
                assert torch.equal(arrival.args[0], net[0].bias.expand(2, 4)), i
        net[int(stop.name)].weight.data = torch.zeros(4, 4)
        return True

    steps_of(net, ["0", "1"], threads).run(dict(enumerate(inputs)), {}, on_stop)
    assert met == [("0", [0, 1, 2, 3, 4]), ("1", [0, 1, 2, 3, 4])]


def test_chunks_that_take_different_ways_meet_where_they_can():
    net = Routed()
    inputs = [(torch.full((1, 4), sign),) for sign in (1.0, -1.0, 1.0)]
    met = []

    def on_stop(stop, arrivals):
        met.append((stop.name, sorted(arrivals)))
        return True

    steps_of(net, ["left", "right", "last"]).run(dict(enumerate(inputs)), {}, on_stop)
    assert met == [("left", [0, 2]), ("right", [1]), ("last", [0, 1, 2])]


def test_a_chunk_that_may_pass_does_not_wait_for_the_others():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    met, asked = [], set()

    def on_stop(stop, arrivals):
        met.append((stop.name, sorted(arrivals)))
        return True

    def passes(stop, number, arrival):
        asked.add((stop.name, number))
        return stop.name == "1" and number != 2

    steps_of(net, ["0", "1", "2"]).run(copies(4), {}, on_stop, passes)
    assert met == [("0", [0, 1, 2, 3]), ("1", [2]), ("2", [0, 1, 2, 3])]
    assert asked == {(name, number) for name in "012" for number in range(4)}


def test_the_pass_ends_as_soon_as_nothing_more_is_wanted():
    reached = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].register_forward_hook(lambda *_: reached.append(True))
    steps_of(net, ["0", "1"]).run(copies(3), {}, lambda stop, _: stop.name != "1")
    assert reached == []


def test_an_error_in_the_network_ends_all_chunks_and_is_told():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    with pytest.raises(ModelError, match="forward pass of Sequential failed"):
        steps_of(net, ["0"]).run(copies(3), {}, lambda *_: True)


def test_an_error_at_a_stop_ends_all_chunks_and_is_raised_as_it_is():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def on_stop(stop, arrivals):
        raise KeyboardInterrupt

    steps = steps_of(net, ["0"])
    with pytest.raises(KeyboardInterrupt):
        steps.run(copies(3), {}, on_stop)
    assert net(torch.ones(1, 4)).shape == (1, 4)  # no hook is left behind


# Windows of a real tokenizer ------------------------------------------------------------------


def test_windows_are_disjoint_spread_and_accounted_for(tiny, tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i} of the text." for i in range(600)), encoding="utf-8")
    tokens = tokenize(tiny_llama, [text.read_text()])
    asked = CalibrationSettings(
        dataset=str(text), num_calibration_samples=16, max_seq_length=8, held_out_fraction=0.25
    )
    data = prepare(tiny_llama, asked)
    fitted, held = (
        [w for (c,) in part for w in c.tolist()] for part in (data.inputs, data.held_out)
    )
    every = [tokens[i : i + 8].tolist() for i in range(0, len(tokens) - 7, 8)]
    spread = [every[round(i * (len(every) - 1) / 19)] for i in range(20)]
    assert (len(fitted), len(held)) == (16, 4)
    assert sorted(fitted + held) == sorted(spread)
    assert data.source["tokens_in_text"] == len(tokens)
    assert shortfall(data) == []


def test_every_data_set_gives_its_share_of_windows(tiny_llama, tmp_path):
    names = []
    for kind in ("red", "green", "blue"):
        file = tmp_path / f"{kind}.txt"
        file.write_text(" ".join(f"{kind} word {i}." for i in range(400)), encoding="utf-8")
        names.append(str(file))
    asked = CalibrationSettings(
        dataset=names, num_calibration_samples=16, max_seq_length=8, held_out_fraction=0.25
    )
    data = prepare(tiny_llama, asked)
    assert [source["windows"] for source in data.source["sources"]] == [6, 5, 5]
    assert [source["windows_held_out"] for source in data.source["sources"]] == [2, 1, 1]
    assert (data.source["windows"], data.source["windows_held_out"]) == (16, 4)
    assert data.source["name"] == " + ".join(names)
    alone = prepare(
        tiny_llama, asked.model_copy(update={"dataset": names[2], "num_calibration_samples": 5})
    )
    assert data.inputs[-1][0][-5:].tolist() == alone.inputs[0][0].tolist()
    with pytest.raises(CalibrationError, match="less than a window for each of 3 data sets"):
        prepare(tiny_llama, asked.model_copy(update={"num_calibration_samples": 2}))


def test_one_data_set_in_a_list_is_that_data_set():
    assert CalibrationSettings(dataset=["topics"]) == CalibrationSettings(dataset="topics")
    with pytest.raises(RecipeError, match=r"dataset.*at least 1 item"):
        CalibrationSettings.parse({"dataset": []}, "calibration")


def test_a_value_that_may_be_of_several_types_is_one_mistake(tmp_path):
    with pytest.raises(RecipeError) as raised:
        Recipe.parse({"calibration": {"dataset": 3}, "scheme": {"grup_size": 1}}, "mine")
    assert str(raised.value).splitlines() == [
        "mine: unknown key 'scheme.grup_size'; did you mean 'group_size'?",
        "mine: calibration.dataset: Input should be a valid string, or a valid tuple (got 3)",
    ]
    file = tmp_path / "mine.yaml"
    file.write_text("method: rtn\ncalibration:\n  dataset: 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml:3: calibration\.dataset: Input should be"):
        Recipe.from_file(file)
    with pytest.raises(RecipeError, match=r"'dampening_frac': .*, or 'auto' \(got 'aut'\)"):
        Host.discover().configured("rounder", "gptq", {"dampening_frac": "aut"}, "mine")


def test_too_little_text_is_told_and_almost_none_refused(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a few words, no more than that. " * 6, encoding="utf-8")
    asked = CalibrationSettings(dataset=str(text), num_calibration_samples=500, max_seq_length=4)
    [event] = shortfall(prepare(tiny_llama, asked))
    assert event.kind == "less calibration text"
    assert event.message.startswith("500 windows of 4 tokens wanted")
    with pytest.raises(CalibrationError, match="fewer than two windows of max_seq_length=100"):
        prepare(tiny_llama, asked.model_copy(update={"max_seq_length": 100}))


def test_windows_are_no_longer_than_the_network_was_made_for(tiny_llama, tmp_path):
    """With rotary positions it would compute nonsense, and nobody would be told."""
    text = tmp_path / "text.txt"
    text.write_text("a few words, no more than that. " * 60, encoding="utf-8")
    asked = CalibrationSettings(dataset=str(text), max_seq_length=128)
    assert prepare(tiny_llama, asked).source["max_seq_length"] == 128
    unasked = CalibrationSettings(dataset=str(text))
    assert prepare(tiny_llama, unasked).source["max_seq_length"] == 128
    with pytest.raises(CalibrationError, match=r"128 positions .* max_seq_length=129"):
        prepare(tiny_llama, asked.model_copy(update={"max_seq_length": 129}))
    assert windows_of(tiny_llama, str(text))[1].window == 128
    assert windows_of(tiny_llama, str(text), length=100)[1].window == 100
    with pytest.raises(CalibrationError, match=r"128 positions .* window=129"):
        windows_of(tiny_llama, str(text), length=129)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),
        ({"text_config": {"max_position_embeddings": 16}, "max_position_embeddings": 8}, 16),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_positions_are_read_from_the_config(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert positions(tmp_path) == found
    assert window_length(tmp_path, None, 48, "window") == min(48, found or 48)


def test_the_recipe_of_a_run_can_be_run_again(tiny_llama, tmp_path):
    """The length that nobody asked for must not be asked for by what the run wrote."""
    again = CalibrationSettings.model_validate(CalibrationSettings().model_dump())
    text = tmp_path / "text.txt"
    text.write_text("a few words, no more than that. " * 60, encoding="utf-8")
    settings = again.model_copy(update={"dataset": str(text)})
    assert prepare(tiny_llama, settings).source["max_seq_length"] == 128
