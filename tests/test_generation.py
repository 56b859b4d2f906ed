"""Text from networks, how fast it comes, and the commands `qframe generate` and `qframe bench`."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

import qframe
from qframe.cli.generate import network_of
from qframe.errors import ModelError, RecipeError
from qframe.generation import generate
from qframe.growing_cache import GrowingKVCache
from qframe.held import held_bytes
from qframe.kernel_layer import KernelLinear
from qframe.kv_cache import QuantizedKVCache, QuantizedLayer
from qframe.speed import measure, unquantized
from qframe.timing import in_turn, speedup
from qframe_plugins.kv_caches import kivi
from tests.ran import command
from tests.tiny import write_llama

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("model") / "MODEL")


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "OUT"
    scheme = {"num_bits": 4, "group_size": 16}
    qframe.quantize(model, {"method": "rtn", "scheme": scheme, "kv_cache_scheme": "KV8"}, out=out)
    return out


@pytest.fixture(scope="module")
def eight_bits(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("eight") / "OUT"
    qframe.quantize(model, {"method": "hadamard", "scheme": "W8A8"}, out=out)
    return out


# Text -----------------------------------------------------------------------------------------


def test_the_likeliest_token_is_taken_each_time(model):
    network = network_of(model, "none")
    made = generate(network, model, PROMPT, max_new_tokens=12)
    tokens = AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        first = network(tokens).logits[0, -1].argmax()
        again = network(torch.tensor([[*tokens[0].tolist(), *made.tokens[:-1]]])).logits[0, -1]
    assert made.prompt_tokens == len(PROMPT)
    assert len(made.tokens) == 12
    assert made.tokens[0] == first
    assert made.tokens[-1] == again.argmax()
    assert made.prefill > 0
    assert made.decode > 0


def test_pieces_that_are_shown_are_the_text(model):
    shown = []
    made = generate(network_of(model, "none"), model, PROMPT, max_new_tokens=20, show=shown.append)
    assert "".join(shown) == made.text


def test_tokens_that_are_drawn_depend_on_the_seed_alone(model):
    network = network_of(model, "none")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found = [
        generate(network, model, PROMPT, max_new_tokens=16, temperature=50.0, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_quantized_cache_is_filled(model):
    cache = QuantizedKVCache("KV8")
    made = generate(network_of(model, "none"), model, PROMPT, max_new_tokens=9, cache=cache)
    assert cache.memory().tokens == len(PROMPT) + len(made.tokens) - 1


def test_what_is_drawn_and_what_ends_a_text(model, tmp_path, monkeypatch):
    """All tokens may be drawn, not some fifty; ends are those of every file that names some."""
    folder = tmp_path / "MODEL"
    shutil.copytree(model, folder)
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(folder)
    network, seen = network_of(folder, "none"), []
    whole = network.generate

    def spied(*args, **options):
        seen.append(options["generation_config"])
        return whole(*args, **options)

    monkeypatch.setattr(network, "generate", spied)
    generate(network, folder, PROMPT, max_new_tokens=2, temperature=1.0)
    assert (seen[0].top_k, seen[0].top_p) == (0, 1.0)
    assert {7, 9} <= set(seen[0].eos_token_id)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": float("nan")}, "temperature must not be negative"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_makes_no_sense_is_refused(model, given, why):
    network = network_of(model, "none")
    with pytest.raises(RecipeError, match=why):
        generate(network, model, given.pop("prompt", PROMPT), **given)


@pytest.mark.parametrize("given", [None, "KV8"])
def test_a_cache_has_room_for_more_unless_another_is_given(model, given, monkeypatch):
    network = network_of(model, "none")
    seen, forward = [], network.forward

    def spy(*args, **kwargs):
        seen.append(kwargs["past_key_values"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(network, "forward", spy)
    cache = None if given is None else QuantizedKVCache(given)
    generate(network, model, PROMPT, max_new_tokens=2, cache=cache)
    if cache is None:
        assert {type(each) for each in seen} == {GrowingKVCache}
    else:
        assert all(each is cache for each in seen)


def test_a_folder_without_a_tokenizer_is_named(model, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        generate(network_of(model, "none"), tmp_path, PROMPT)


# Speed ----------------------------------------------------------------------------------------


def test_candidates_take_turns():
    order = []
    clock = iter(range(100)).__next__
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = in_turn(calls, 3, clock=clock, repeats=2, between=lambda: order.append("-"))
    assert "".join(order) == "ab" + 3 * "-aa-bb"
    assert times == {"a": [0.5] * 3, "b": [0.5] * 3}


def test_a_twin_runs_just_before_what_is_timed_and_outside_the_time():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    in_turn(
        calls,
        2,
        clock=lambda: order.append("|") or 0.0,
        between=lambda: order.append("-"),
        twins={"a": lambda: order.append("A")},
    )
    assert "".join(order) == "ab" + 2 * "-A|a|-|b|"


def test_a_ratio_is_the_median_of_those_of_rounds():
    assert speedup([1, 10, 1], [3, 20, 1]) == 2


def test_every_network_is_timed_in_every_round(quantized):
    networks = {"a": network_of(quantized, "none"), "b": network_of(quantized, "auto")}
    speeds = measure(networks, prompt_tokens=7, new_tokens=3, rounds=2)
    assert speeds.keys() == networks.keys()
    for speed in speeds.values():
        assert len(speed.prefill) == len(speed.decode) == 2
        assert min(*speed.prefill, *speed.decode) > 0
    assert speeds["a"].over(speeds["a"]) == (1, 1)
    with pytest.raises(RecipeError, match="rounds must be at least 1"):
        measure(networks, rounds=0)


def test_every_network_reads_and_writes_the_same_tokens(model):
    read = {"a": [], "b": []}
    networks = {name: network_of(model, "none") for name in read}
    for name, network in networks.items():
        network.register_forward_pre_hook(
            lambda module, given, name=name: read[name].append(given[0].tolist())
        )
    measure(networks, prompt_tokens=5, new_tokens=2, rounds=1)
    assert read["a"] == read["b"]
    assert [len(tokens[0]) for tokens in read["a"]] == [5, 1, 1] * 2


def test_an_unquantized_network_multiplies_with_the_same_weights(eight_bits):
    """Rotated inputs meet rotated weights; here both are turned back."""
    network = unquantized(network_of(eight_bits, "none"))
    assert not any(type(each).__name__ == "QuantizedLinear" for each in network.modules())
    dense = network_of(eight_bits, "none")
    for name, layer in dense.named_modules():
        if hasattr(layer, "stored"):
            weight = layer.stored.plain(layer.stored.weight())
            assert torch.equal(network.get_submodule(name).weight, weight)


def test_memory_counts_what_kernels_lay_out_and_nothing_twice(quantized):
    shared = nn.Linear(4, 8, bias=False)
    assert held_bytes(nn.ModuleList([shared, shared])) == 4 * 4 * 8
    tied = nn.Linear(4, 8, bias=False)
    tied.weight = shared.weight
    assert held_bytes(nn.ModuleList([shared, tied])) == 4 * 4 * 8
    network = network_of(quantized, "auto")
    layers = [each for each in network.modules() if isinstance(each, KernelLinear)]
    panels = sum(plane.nbytes for each in layers for plane in each._prepared[0].planes)
    bare = network_of(quantized, "auto")
    for each in bare.modules():
        if isinstance(each, KernelLinear):
            del each._prepared
    assert panels > 0
    assert held_bytes(network) >= held_bytes(bare) + panels


# Commands -------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    return lambda *arguments: command(capsys, *arguments)


def test_generate_writes_the_text_to_stdout(run, quantized):
    made = run("generate", quantized, PROMPT, "-n", "5")
    assert made.code == 0, made.err
    assert made.out.endswith("\n")
    assert f"{len(PROMPT)} tokens read at" in made.said
    again = run("generate", quantized, PROMPT, "-n", "5", "--json")
    assert again.json()["text"] == made.out[:-1]
    assert len(again.json()["tokens"]) == 5


def test_generate_takes_a_folder_that_is_not_quantized(run, model):
    made = run("generate", model, PROMPT, "-n", "3", "--json", "--kv-scheme", "KV4")
    assert len(made.json()["tokens"]) == 3


def test_generate_names_what_is_wrong(run, quantized, model, tmp_path):
    assert "no backend 'nunba'" in run("generate", quantized, "a", "--kernels", "nunba").err
    assert "unknown preset 'KV5'" in run("generate", quantized, "a", "--kv-scheme", "KV5").err
    assert "config.json: no such file" in run("generate", tmp_path, "a").err
    assert "is not quantized" in run("generate", model, "a", "--kernels", "torch").err


def test_layers_without_kernels_are_not_slow_in_silence(run, model, tmp_path):
    qframe.quantize(model, {"method": "rtn", "scheme": "NF4"}, out=tmp_path / "OUT")
    said = run("generate", tmp_path / "OUT", "a", "-n", "1").said
    for word in ("14 layers have no kernel", "model.layers.0.self_attn.q_proj", "are no integers"):
        assert word in said
    assert "have no kernel" in run("bench", tmp_path / "OUT", "--rounds", "1").said
    assert "no kernel" not in run("generate", tmp_path / "OUT", "a", "--kernels", "none").said


def test_bench_shows_each_network_beside_float32(run, eight_bits, model):
    arguments = ("--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1")
    made = run("bench", eight_bits, *arguments)
    assert made.code == 0, made.err
    for word in ("float32", "bfloat16", "quantized, numba", "1.00x", "memory"):
        assert word in made.out
    record = run("bench", eight_bits, *arguments, "--json").json()
    assert list(record["networks"]) == ["float32", "bfloat16", "quantized, numba"]
    assert record["networks"]["float32"]["over_float32"] == [1.0, 1.0]
    sizes = [record["networks"][name]["nbytes"] for name in ("float32", "bfloat16")]
    assert sizes[0] > 1.9 * sizes[1]
    assert list(run("bench", model, *arguments, "--json").json()["networks"])[1:] == ["bfloat16"]
    assert np.isfinite(record["networks"]["bfloat16"]["decode_speed"])


def test_bench_times_a_quantized_cache_as_well(run, eight_bits, model, monkeypatch):
    attended, real = [], QuantizedLayer.attend

    def attend(self, query):
        attended.append(self.get_seq_length())
        return real(self, query)

    monkeypatch.setattr(QuantizedLayer, "attend", attend)
    arguments = ("--prompt-tokens", "40", "--new-tokens", "2", "--rounds", "1", "--kv-scheme")
    networks = run("bench", eight_bits, *arguments, "KV8", "--json").json()["networks"]
    assert list(networks)[2:] == ["quantized, numba", "quantized, numba, KV8 cache"]
    assert attended == [41, 41, 42, 42] * 2  # layers, tokens, and a round before the first
    assert "float32, KV2 cache" in run("bench", model, *arguments, "KV2").out
    refused = run("bench", model, *arguments, "KV5")
    assert refused.code != 0
    assert "unknown preset 'KV5'" in refused.err
    assert "loading" not in refused.err.replace("loading libraries", "")


def test_without_kernels_no_codes_are_attended_to(run, eight_bits, monkeypatch):
    called = []
    monkeypatch.setattr(QuantizedLayer, "attend", lambda *given: called.append(given) or 1 / 0)
    given = ("--kv-scheme", "KV8", "-n", "3", "--kernels")
    assert run("generate", eight_bits, "a", *given, "none").code == 0
    assert not called
    assert run("generate", eight_bits, "a", *given, "auto").code != 0
    assert called


def test_warmup_attends_to_the_codes_of_a_cache(run, model, tmp_path, monkeypatch):
    recipe = {"method": "rtn", "scheme": "W8A16", "kv_cache_scheme": {"preset": "KV8"}}
    qframe.quantize(model, recipe, out=tmp_path / "OUT")
    reached, real = [], kivi.shared_codes
    monkeypatch.setattr(kivi, "shared_codes", lambda *stores: reached.extend(real(*stores)) or [])
    made = run("warmup", tmp_path / "OUT")
    assert made.code == 0, made.err
    assert reached


def fresh(cache, *arguments):
    """Run `qframe ARGUMENTS` in a process with a cache of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "qframe", *map(str, arguments)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_a_first_run_says_that_it_compiles_and_a_second_one_does_not(eight_bits, tmp_path):
    out, said = fresh(tmp_path, "warmup", eight_bits)
    assert out.endswith("is ready: its kernels are compiled and kept")
    assert said.count("compiling kernels, once for this installation") == 1
    assert re.search(r"\d+ kernels compiled in [\d.]+ s; the next run has them from", said)
    _, again = fresh(tmp_path, "generate", eight_bits, PROMPT, "-n", "2")
    assert "compil" not in again
    assert "written at" in again


def test_full_precision_has_nothing_to_compile(model, tmp_path):
    _, said = fresh(tmp_path, "warmup", model)
    assert "compil" not in said
