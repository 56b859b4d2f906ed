"""The main job, on small networks of several architectures, through the public API."""

import filecmp
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import (
    CalibrationData,
    Capabilities,
    Host,
    QuantizedWeight,
    bounds,
    hookimpl,
    rounding,
)
from qframe.checkpoint import CheckpointWriter
from qframe.errors import (
    FallbackError,
    ModelError,
    NonFiniteError,
    OutputError,
    PluginError,
    UncalibratedLayerError,
)
from qframe.model import find_layers
from qframe.ranks import SLOTS
from qframe.stored import QuantizedLinear
from tests.folds.nets import Stack
from tests.needy import host_needing

W4 = {"num_bits": 4, "group_size": 16}


def batches(seed, count, shape):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def sequential(seed=0, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, width, bias=False), nn.Linear(width, 8)
        )


def data(width=32):
    return CalibrationData.from_tensors(batches(1, 3, (20, width)), batches(2, 1, (20, width)))


def save_llama(folder, **changes):
    """Write a Llama folder without tokenizer, small and random."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def token_data(count=6, held=2, length=32):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 96, (count + held, length), generator=generator)
    return CalibrationData(
        inputs=[(w,) for w in tokens[:count].split(1)],
        held_out=[(w,) for w in tokens[count:].split(1)],
        source={"name": "random tokens"},
    )


def same_folders(a, b):
    compared = filecmp.dircmp(a, b)
    names = sorted(path.name for path in a.iterdir())
    assert not compared.left_only
    assert not compared.right_only
    _, different, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert (different, errors) == ([], [])


# What comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_plain_module_is_quantized_as_a_copy(method):
    net = sequential()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = qframe.quantize(net, {"method": method, "scheme": W4}, calibration=data())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    layers = [m for m in result.module.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 3
    x = batches(9, 1, (5, 32))[0]
    expected = x
    for module, original in zip(result.module, net, strict=True):
        if isinstance(module, QuantizedLinear):
            expected = nn.functional.linear(expected, module.weight, original.bias)
        else:
            expected = original(expected)
    assert torch.equal(result.module(x), expected)


@torch.no_grad()
def test_reported_errors_are_those_of_the_inputs_that_the_quantized_network_produces():
    net = sequential()
    inputs = data()
    result = qframe.quantize(
        net,
        {"method": "gptq", "scheme": W4, "calibration": {"compute_dtype": "float32"}},
        calibration=inputs,
    )
    for layer in result.report.layers:
        number = int(layer.name)
        for chunks, reported in (
            (inputs.inputs, layer.error),
            (inputs.held_out, layer.held_out_error),
        ):
            x = torch.cat([c[0] for c in chunks])
            for module in list(result.module)[:number]:
                x = module(x)
            x, w = x.double(), net[number].weight.double()
            q = result.module[number].weight.double()
            measured = torch.linalg.norm(x @ (w - q).T) / torch.linalg.norm(x @ w.T)
            # The report's products are float32 sums over the tokens and then the columns.
            terms = len(x) + w.shape[1] + 8
            allowed = (
                bounds.gamma(terms)
                * float(
                    torch.linalg.norm(w - q) * torch.linalg.norm(x) / torch.linalg.norm(x @ w.T)
                )
                ** 2
                / float(measured)
            )
            assert abs(float(measured) - reported) <= allowed


def test_gptq_beats_rtn_on_its_own_objective_summed_over_layers():
    result = qframe.quantize(sequential(), {"method": "gptq", "scheme": W4}, calibration=data())
    mine = sum(layer.error**2 for layer in result.report.layers)
    assert mine < sum(layer.rtn_error**2 for layer in result.report.layers)


def test_layers_that_read_one_input_are_observed_together(llama, tmp_path):
    started = []

    @dataclass(frozen=True)
    class Counting:
        name: str = "counting"

        def start(self, group):
            started.append(tuple(layer.name.rpartition(".")[2] for layer in group.layers))
            return Host.discover().get("observer", "absmax").start(group)

    qframe.quantize(
        llama,
        {"method": "needy", "scheme": W4},
        out=tmp_path / "out",
        calibration=token_data(),
        host=host_needing("counting", Counting()),
    )
    block = [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    # Once for each slot of the chunks that are fitted, and of those held out.
    data = token_data()
    slots = sum(min(SLOTS, len(chunks)) for chunks in (data.inputs, data.held_out))
    assert started == [group for group in block for _ in range(slots)] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_those_of_the_inputs_as_the_products_take_them(dtype):
    seen = []

    class Maxima:
        name = "maxima"
        needs = frozenset({"absmax"})
        capabilities = Capabilities()

        def round(self, problem, rng):
            seen.append(problem.statistics["absmax"])
            return rounding.to_nearest(problem)

    class Plugin:
        @hookimpl
        def qframe_rounders(self):
            return [Maxima()]

    host = Host.discover()
    host.add(Plugin(), "maxima")
    recipe = {"method": "maxima", "calibration": {"compute_dtype": dtype}}
    qframe.quantize(sequential(), recipe, calibration=data(), host=host)
    x = torch.cat(batches(1, 3, (20, 32))).to(getattr(torch, dtype)).float()
    assert torch.equal(seen[0], x.abs().amax(0))


def test_a_rewrite_keeps_the_function_and_reaches_the_rounder(tmp_path):
    seen = {}

    @dataclass(frozen=True)
    class Doubling:
        name: str = "doubling"
        needs: frozenset = frozenset({"absmax"})
        capabilities: Capabilities = field(default=Capabilities())

        def rewrite(self, problem, rng):
            seen[problem.name] = problem.statistics["absmax"]
            scale = torch.full((problem.columns,), 2.0)
            scale[::2] = 0.5
            return problem.scaled(scale)

    class Plugin:
        @hookimpl
        def qframe_outlier_handlers(self):
            return [Doubling()]

    host = Host.discover()
    host.add(Plugin(), "doubling")
    net = sequential()
    out = tmp_path / "out"
    result = qframe.quantize(
        net,
        {
            "method": "doubling+gptq",
            "scheme": {"num_bits": 8},
            "calibration": {"compute_dtype": "float32"},
        },
        out=out,
        calibration=data(),
        host=host,
    )
    assert torch.equal(seen["0"], torch.cat(batches(1, 3, (20, 32))).abs().amax(0))
    first = result.module[0]
    effective = first.weight / first.input_scale
    half_step = first.stored.packed.scale.float() / 2 / first.input_scale
    slack = 1 + bounds.gamma(4)
    rounded_to_nearest = (effective - net[0].weight).abs() <= half_step * slack
    assert rounded_to_nearest.any()
    x = batches(3, 1, (4, 32))[0]
    again = qframe.load(out, sequential())
    assert torch.equal(again(x), result.module(x))


@pytest.mark.parametrize("method", ["awq", "smoothquant+gptq"])
def test_layers_that_share_an_input_scale_are_written_and_read(llama, tmp_path, method):
    """A handler gives them one tensor, and a safetensors file holds none twice."""
    recipe = {
        "method": method,
        "scheme": {"num_bits": 4, "group_size": 32},
        "fold_scales": False,  # else the norm before them has it
    }
    qframe.quantize(llama, recipe, out=tmp_path / "out", calibration=token_data())
    network = qframe.load(tmp_path / "out")
    q, k = (network.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    assert torch.equal(q.input_scale, k.input_scale)
    assert not torch.equal(q.input_scale, torch.ones(64))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_bert_encoder_needs_no_code_of_its_own(tmp_path, method):
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=96,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    result = qframe.quantize(
        tmp_path / "bert", {"method": method, "scheme": W4}, out=out, calibration=token_data()
    )
    names = {layer.name for layer in result.report.layers}
    assert "pooler.dense" in names
    assert "encoder.layer.1.output.dense" in names
    assert result.report.coverage.matrix_fraction == 1
    network = qframe.load(out)
    with torch.no_grad():
        assert torch.isfinite(network(token_data().inputs[0][0]).pooler_output).all()


def test_gpt2_with_its_transposed_linear_layers_works(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    out = tmp_path / "out"
    result = qframe.quantize(
        tmp_path / "gpt2", {"method": "gptq", "scheme": W4}, out=out, calibration=token_data()
    )
    shapes = {layer.name: (layer.rows, layer.columns) for layer in result.report.layers}
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    tokens = token_data().inputs[0][0]
    with torch.no_grad():
        packed = qframe.load(out)(tokens).logits
        plain = qframe.load(out, dequantize=True)(tokens).logits
    # The same weights in another memory layout: sums may be in another order.
    assert (packed - plain).abs().max() <= bounds.gamma(64 * 96) * plain.abs().max() * 96


def test_a_tied_output_layer_is_untied_and_said_so(llama, tmp_path):
    out = tmp_path / "out"
    result = qframe.quantize(
        llama, {"method": "rtn", "scheme": W4, "ignore": []}, out=out, calibration=None
    )
    assert [event.layer for event in result.report.events if event.kind == "untied"] == ["lm_head"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    network = qframe.load(out)
    assert isinstance(network.lm_head, QuantizedLinear)
    original = transformers.LlamaForCausalLM.from_pretrained(llama)
    assert torch.equal(network.model.embed_tokens.weight, original.model.embed_tokens.weight)


# Determinism and purity -----------------------------------------------------------------------


def test_the_thread_count_does_not_change_a_byte(llama, tmp_path):
    recipe = {"method": "gptq", "scheme": {**W4, "num_bits": 3}}
    for threads in (1, 2, 5):
        qframe.quantize(
            llama, recipe, out=tmp_path / str(threads), calibration=token_data(), threads=threads
        )
    same_folders(tmp_path / "1", tmp_path / "2")
    same_folders(tmp_path / "1", tmp_path / "5")


def test_global_random_states_are_untouched(llama, tmp_path):
    import random

    def states():
        return (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())

    before = states()
    threads = torch.get_num_threads()
    qframe.quantize(
        llama, {"method": "gptq", "scheme": W4}, out=tmp_path / "out", calibration=token_data()
    )
    after = states()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


# Saving and loading ---------------------------------------------------------------------------

LOADER = """
import hashlib, json, sys, torch, qframe
from pathlib import Path
from torch import nn
hashes = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    columns, rows = json.loads((folder / "shape.json").read_text())
    net = qframe.load(folder / "out", nn.Sequential(nn.Linear(columns, rows)))
    hashes[folder.name] = hashlib.sha256(net[0].weight.numpy().tobytes()).hexdigest()
print(json.dumps(hashes))
"""


def test_a_new_process_loads_the_same_bits(tmp_path):
    expected = {}

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        bits=st.integers(2, 8),
        rows=st.integers(1, 9),
        columns=st.integers(1, 70),
        group_size=st.sampled_from([-1, 1, 7, 16, 64, "columns"]),
        symmetric=st.booleans(),
        actorder=st.sampled_from([None, "static", "group"]),
        scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
        seed=st.integers(0, 99),
    )
    def write(bits, rows, columns, group_size, symmetric, actorder, scale_dtype, seed):
        folder = tmp_path / "all" / str(len(expected))
        generator = torch.Generator().manual_seed(seed)
        net = nn.Sequential(nn.Linear(columns, rows))
        net[0].weight.data = torch.randn(rows, columns, generator=generator)
        scheme = {
            "num_bits": bits,
            "group_size": columns if group_size == "columns" else group_size,
            "symmetric": symmetric,
            "scale_dtype": scale_dtype,
        }
        result = qframe.quantize(
            net,
            {"method": "gptq", "options": {"actorder": actorder}, "scheme": scheme},
            out=folder / "out",
            calibration=CalibrationData.from_tensors(
                [torch.randn(50, columns, generator=generator)]
            ),
        )
        (folder / "shape.json").write_text(json.dumps([columns, rows]))
        weight = result.module[0].weight.numpy()
        expected[folder.name] = hashlib.sha256(weight.tobytes()).hexdigest()

    write()
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "all")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_size_on_disk_is_the_promised_one(tmp_path, bits, symmetric):
    rows, columns = 256, 1000
    net = nn.Sequential(nn.Linear(columns, rows, bias=False))
    scheme = qframe.Scheme(num_bits=bits, group_size=64, symmetric=symmetric)
    qframe.quantize(net, qframe.Recipe(scheme=scheme), out=tmp_path / "out")
    promised = sum(scheme.storage_bits(rows, columns).values()) / 8
    on_disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert promised <= on_disk <= promised * 102 / 100


# What can go wrong ----------------------------------------------------------------------------


class Branches(nn.Module):
    """One of its layers is never run."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(16, 16)
        self.idle = nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


class Sharing(nn.Module):
    """Two layers of one input; `again` runs the second twice, `apart` gives it a copy."""

    def __init__(self, *, again=False, apart=False):
        super().__init__()
        self.one, self.two, self.last = (nn.Linear(64, 64) for _ in range(3))
        self.again, self.apart = again, apart

    def forward(self, x):
        y = self.one(x) + self.two(x.clone() if self.apart else x)
        return self.last(self.two(y) if self.again else y)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_that_runs_again_is_calibrated_on_its_first_inputs_and_named(threads):
    net = Stack(Sharing(again=True), Sharing(again=True))
    data = CalibrationData.from_tensors(batches(1, 5, (8, 64)), batches(2, 2, (8, 64)))
    result = qframe.quantize(net, {"method": "gptq"}, calibration=data, threads=threads)
    again = [event.layer for event in result.report.events if event.kind == "runs again"]
    assert again == ["layers.0.two", "layers.1.two"]
    assert {layer.tokens for layer in result.report.layers} == {40}
    assert {layer.input_group for layer in result.report.layers[:2]} == {"layers.0.one"}


class Optional(Sharing):
    """Some inputs leave the second layer out, and all others run it twice."""

    def forward(self, x):
        y = self.one(x)
        return self.last(self.two(y + self.two(x)) if x[0, 0, 0] > 0 else y)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_that_only_some_inputs_run_may_run_again(threads):
    inputs = batches(1, 5, (1, 8, 64))
    for number, x in enumerate(inputs):
        x[0, 0, 0] = 1.0 if number % 2 == 0 else -1.0
    data = CalibrationData.from_tensors(inputs)
    report = qframe.quantize(
        Stack(Optional()), {"method": "gptq"}, calibration=data, threads=threads
    ).report
    again = [event.layer for event in report.events if event.kind == "runs again"]
    assert again == ["layers.0.two"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_block_whose_layers_read_other_inputs_than_the_first_of_its_make_is_named(threads):
    net = Stack(Sharing(), Sharing(apart=True))
    data = CalibrationData.from_tensors(batches(1, 5, (8, 64)))
    with pytest.raises(ModelError, match=r"layer 'layers\.1\.two' shares its input"):
        qframe.quantize(net, {"method": "gptq"}, calibration=data, threads=threads)


def test_a_layer_that_no_token_reaches_falls_back_and_is_named():
    inputs = CalibrationData.from_tensors(batches(1, 2, (30, 16)))
    recipe = {"method": "gptq", "scheme": {"num_bits": 4}, "max_fallback_frac": 1}
    report = qframe.quantize(Branches(), recipe, calibration=inputs).report
    assert [event.layer for event in report.fallbacks()] == ["idle"]
    assert {layer.name: layer.method for layer in report.layers}["used"] == "gptq"
    with pytest.raises(FallbackError, match=r"1 of 2 layers.*idle"):
        qframe.quantize(Branches(), {**recipe, "max_fallback_frac": 0.05}, calibration=inputs)
    with pytest.raises(UncalibratedLayerError, match="'idle' saw no calibration tokens"):
        qframe.quantize(Branches(), {**recipe, "on_fallback": "error"}, calibration=inputs)


def test_a_nan_activation_is_named_and_leaves_nothing_behind(tmp_path):
    poisoned = batches(1, 2, (30, 32))
    poisoned[1][3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer '0': its input.*nan"):
        qframe.quantize(
            sequential(),
            {"method": "gptq", "scheme": W4},
            out=tmp_path / "out",
            calibration=CalibrationData.from_tensors(poisoned),
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("do not lose me")
    with pytest.raises(OutputError, match="not empty"):
        qframe.quantize(sequential(), {"scheme": W4}, out=out)
    assert (out / "precious").read_text() == "do not lose me"
    qframe.quantize(sequential(), {"scheme": W4}, out=out, overwrite=True)
    assert (out / "qframe.json").is_file()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("out", [None, "out"])
def test_a_layer_alone_is_no_network(tmp_path, out):
    """It would have no name; this used to end in a KeyError when it was written."""
    with pytest.raises(ModelError, match=r"itself one Linear.*nn\.Sequential"):
        qframe.quantize(nn.Linear(16, 8), {"method": "rtn"}, out=out and tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_folder_is_not_quantized_again(llama, tmp_path):
    qframe.quantize(llama, {"scheme": W4}, out=tmp_path / "once")
    with pytest.raises(
        ModelError, match=r"already quantized \(quant_method 'compressed-tensors'\)"
    ):
        qframe.quantize(tmp_path / "once", {"scheme": W4}, out=tmp_path / "twice")


def _codes_of_wrong_shape(problem):
    good = rounding_to_nearest(problem)
    return QuantizedWeight(
        codes=good.codes[:, :-1],
        scale=good.scale,
        zero_point=good.zero_point,
        group_index=good.group_index,
    )


def _codes_out_of_range(problem):
    good = rounding_to_nearest(problem)
    return QuantizedWeight(
        codes=good.codes + 9,
        scale=good.scale,
        zero_point=good.zero_point,
        group_index=good.group_index,
    )


def _changes_its_input(problem):
    problem.weight.mul_(2)
    return rounding_to_nearest(problem)


def rounding_to_nearest(problem):
    scale, zero = rounding.fit_scales(problem.weight, problem.scheme, problem.grid)
    index = rounding.group_index(problem.weight.shape[1], problem.scheme)
    codes = rounding.encode(problem.weight, scale, zero, index, problem.grid)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero, group_index=index)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_codes_of_wrong_shape, "layer '0'"),
        (_codes_out_of_range, "layer '0'"),
        (_changes_its_input, "changed problem.weight of layer '0'"),
        (lambda problem: problem.weight, "returned Tensor for layer '0'"),
    ],
)
def test_a_rounder_that_breaks_its_contract_is_named(wrong, message):
    @dataclass(frozen=True)
    class Wrong:
        name: str = "wrong"
        needs: frozenset = frozenset()
        capabilities: Capabilities = field(default=Capabilities())

        def round(self, problem, rng):
            return wrong(problem)

    class Plugin:
        @hookimpl
        def qframe_rounders(self):
            return [Wrong()]

    host = Host.discover()
    host.add(Plugin(), "wrong")
    with pytest.raises(PluginError, match=message):
        qframe.quantize(sequential(), {"method": "wrong", "scheme": W4}, host=host)


def test_peak_memory_is_one_block_not_the_network(tmp_path):
    """Of all parameters, no more than one block's (and what is outside) are ever loaded."""
    folder = save_llama(tmp_path / "llama")
    loaded = []

    from qframe import model

    original = model.Network.load

    def load(self, module, *, recurse):
        original(self, module, recurse=recurse)
        loaded.append(
            sum(any(not p.is_meta for p in block.parameters()) for block in self.blocks.values())
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Network, "load", load)
        qframe.quantize(
            folder,
            {"method": "gptq", "scheme": W4},
            out=tmp_path / "out",
            calibration=token_data(),
        )
    assert max(loaded) == 1
    assert len(find_layers(qframe.load(tmp_path / "out"))) == 1  # only lm_head is plain


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    made = []

    def interrupted(self, *arguments, **options):
        real(self, *arguments, **options)
        made.append(self)
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt

    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out"):
        pass
    assert [path.suffix for path in made][-1:] == [".tmp"]
    assert not list(tmp_path.iterdir())
