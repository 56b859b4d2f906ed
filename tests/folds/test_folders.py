"""Folders whose norms divide: written, loaded, the same for all threads, and verified."""

import base64
import filecmp

import numpy as np
import pytest
import torch
import transformers

import qframe
from qframe import CalibrationData
from qframe.errors import VerifyError
from qframe.weights import ModelFolder
from tests.folds.nets import (
    W4,
    Block,
    Stack,
    data,
    quantized,
    seeded,
)
from tests.test_verify import checkpoint_tensors, hashed_anew, rewrite_manifest, save

# Folders, threads, dtypes ---------------------------------------------------------------------


METHODS = {
    "awq": {"scheme": W4},
    "awq+gptq": {"scheme": W4, "keep_statistics": True},
    "smoothquant+hadamard": {"scheme": "W8A8"},
    "smoothquant+llm_int8": {"scheme": "W8A8", "options": {"threshold": 2.0}},
    "smoothquant+hadamard+llm_int8": {"scheme": "W8A8", "options": {"threshold": 2.0}},
    "smoothquant+awq": {"scheme": W4},
}
CALIBRATION = {"num_calibration_samples": 6, "max_seq_length": 24}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Llama folders by the dtype of their norms, which are not all ones; and channels of the inputs
    of o_proj and down_proj are of many sizes, so that their scales are."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tiny.write_llama(tmp_path_factory.mktemp("llama") / "model")
        tensors = checkpoint_tensors(folder)
        generator = torch.Generator().manual_seed(2)
        for name in tensors:
            if "norm" in name:
                values = 1 + torch.randn(tensors[name].shape, generator=generator)
                tensors[name] = values.to(dtype)
            if name.endswith(("v_proj.weight", "up_proj.weight")):
                sizes = 2.0 ** torch.randint(-3, 4, (len(tensors[name]), 1), generator=generator)
                tensors[name] *= sizes.to(tensors[name].dtype)
        save(folder, tensors)
        made[dtype] = folder
    return made


def run(model, method, out, **changes):
    recipe = {"method": method, "calibration": CALIBRATION, **METHODS[method]}
    threads = changes.pop("threads", None)
    return qframe.quantize(model, {**recipe, **changes}, out=out, threads=threads)


NORMS = {f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")}
LAYERS = {f"model.layers.{i}.{n}_proj" for i in (0, 1) for n in ("self_attn.v", "mlp.up")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_keeps_the_norms_dtype_and_can_be_verified(models, tmp_path, method, dtype):
    result = run(models[dtype], method, tmp_path / "out")
    assert set(result.report.folding.folded.values()) == NORMS | LAYERS
    made, source = ModelFolder(tmp_path / "out"), ModelFolder(models[dtype])
    for norm in NORMS:
        assert made.tensors[f"{norm}.weight"].dtype == source.tensors[f"{norm}.weight"].dtype
        assert not torch.equal(made.read(f"{norm}.weight"), source.read(f"{norm}.weight"))
    assert not [n for n in made.tensors if n.endswith("input_scale")]
    report = qframe.verify(tmp_path / "out", models[dtype])
    assert report.problems == []
    if method != "smoothquant+awq":  # where two products are rounded that only one makes again
        assert report.unchecked == []
    folded = {name for name in result.report.folding.folded}
    assert not folded & {item.layer for item in report.unchecked}


@pytest.mark.parametrize("method", ["awq", "smoothquant+hadamard+llm_int8"])
def test_threads_change_nothing(models, tmp_path, method):
    for threads in (1, 2):
        run(models[torch.bfloat16], method, tmp_path / str(threads), threads=threads)
    names = sorted(file.name for file in (tmp_path / "1").iterdir())
    same = filecmp.cmpfiles(tmp_path / "1", tmp_path / "2", names, shallow=False)
    assert same == (names, [], [])


@pytest.mark.parametrize("method", ["awq", "smoothquant+hadamard"])
def test_a_folder_and_the_module_in_memory_give_the_same_network(models, tmp_path, method):
    model = models[torch.float32]
    run(model, method, tmp_path / "out")
    loaded = qframe.load(tmp_path / "out")
    module = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    from qframe.calibration import prepare
    from qframe.recipe import CalibrationSettings

    inputs = prepare(model, CalibrationSettings(**CALIBRATION))
    recipe = {"method": method, **METHODS[method]}
    result = qframe.quantize(module, recipe, calibration=inputs)
    assert set(result.report.folding.folded.values()) == NORMS | LAYERS
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, result.module(tokens).logits)
        dense = qframe.load(tmp_path / "out", dequantize=True)
        assert torch.isfinite(dense(tokens).logits).all()
    mine, its = loaded.state_dict(), result.module.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_module_written_to_a_folder_is_read_again(host, tmp_path):
    net = seeded(Stack(Block(), Block()))
    result = quantized(net, host, out=tmp_path / "out")
    loaded = qframe.load(tmp_path / "out", seeded(Stack(Block(), Block()), seed=9))
    x = data().held_out[0][0]
    assert torch.equal(loaded(x), result.module(x))
    assert qframe.verify(tmp_path / "out", net, host=host).problems == []


def test_a_module_in_bfloat16_keeps_its_norms_in_bfloat16(host):
    net = seeded(Stack(Block()), dtype=torch.bfloat16)
    products = {"compute_dtype": "bfloat16"}
    made = quantized(net, host, data(torch.bfloat16), calibration=products)
    assert made.report.folding.folded["layers.0.one"] == "layers.0.norm"
    assert made.module.layers[0].norm.weight.dtype == torch.bfloat16


def test_gpt2_folds_norms_with_biases(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64)
    model = seeded(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path / "gpt2")
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs = CalibrationData(inputs=[(t,) for t in tokens.split(1)])
    recipe = {"method": "awq", "scheme": W4}
    result = qframe.quantize(tmp_path / "gpt2", recipe, out=tmp_path / "out", calibration=inputs)
    assert set(result.report.folding.folded.values()) == {
        f"transformer.h.{i}.ln_{n}" for i in (0, 1) for n in (1, 2)
    }
    assert qframe.verify(tmp_path / "out", tmp_path / "gpt2").problems == []
    out = tmp_path / "out"
    tensors = checkpoint_tensors(out)
    tensors["transformer.h.1.ln_2.bias"][3] += 1
    save(out, tensors)
    with hashed_anew(out):
        report = qframe.verify(out, tmp_path / "gpt2")
    assert [(p.kind, p.name) for p in report.problems] == [("tensor", "transformer.h.1.ln_2.bias")]


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
NORM_FOLDS = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}
LAYER_FOLDS = {"o_proj": "v_proj", "down_proj": "up_proj"}
ARCHITECTURES = {
    "qwen3": (lambda: transformers.Qwen3Config(**GROUPED), NORM_FOLDS | LAYER_FOLDS),
    # Its norms multiply by 1 + w.
    "gemma2": (lambda: transformers.Gemma2Config(**GROUPED), LAYER_FOLDS),
    # Between fc1 and fc2 is a GELU.
    "phi": (
        lambda: transformers.PhiConfig(**SMALL, intermediate_size=64),
        {"q_proj": "input_layernorm", "dense": "v_proj"},
    ),
    # Rows of gates and values, or of queries and values, are rows of one layer.
    "phi3": (
        lambda: transformers.Phi3Config(
            **SMALL, intermediate_size=64, num_key_value_heads=2, pad_token_id=0, eos_token_id=1
        ),
        {"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"},
    ),
}


@pytest.mark.parametrize(("config", "folds"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_what_folds_in_other_architectures(tmp_path, config, folds):
    model = seeded(transformers.AutoModelForCausalLM.from_config(config()))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs = CalibrationData(inputs=[(t,) for t in tokens.split(1)])
    recipe = {"method": "awq", "scheme": W4, "min_coverage": 0}
    out = tmp_path / "out"
    result = qframe.quantize(tmp_path / "model", recipe, out=out, calibration=inputs)
    found = [
        (layer.rpartition(".")[2], name.rpartition(".")[2])
        for layer, name in result.report.folding.folded.items()
    ]
    assert sorted(found) == sorted([*folds.items()] * 2)
    report = qframe.verify(out, tmp_path / "model")
    assert (report.problems, report.unchecked) == ([], [])


# Verifying ------------------------------------------------------------------------------------


NORM = "model.layers.1.input_layernorm"


@pytest.fixture
def folder(models, tmp_path):
    run(models[torch.bfloat16], "awq", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "change", [lambda w: w * 2, lambda w: -w, lambda w: w * 0, lambda w: w * 1.01]
)
def test_a_changed_norm_is_named(models, folder, change):
    tensors = checkpoint_tensors(folder)
    tensors[f"{NORM}.weight"][7] = change(tensors[f"{NORM}.weight"][7])
    save(folder, tensors)
    report = qframe.verify(folder)
    assert f"{NORM}.weight" in {p.name for p in report.problems if p.kind == "tensor"}
    with hashed_anew(folder):
        assert qframe.verify(folder).problems == []
        report = qframe.verify(folder, models[torch.bfloat16])
    assert [(p.kind, p.name) for p in report.problems] == [("tensor", f"{NORM}.weight")]
    assert report.exit_code == 4
    layers = {f"model.layers.1.self_attn.{n}_proj" for n in "qkv"}
    assert layers <= {item.layer for item in report.unchecked}


def test_the_reference_of_another_dtype_is_no_pair(models, folder):
    report = qframe.verify(folder, models[torch.float32])
    wrong = {p.name for p in report.problems if "the reference's torch.float32" in p.message}
    assert wrong == {f"{norm}.weight" for norm in NORMS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folded": None}, "disagree on what divides"),
        ({"folded": "model.norm"}, "disagree on what divides"),
    ],
)
def test_layers_of_an_input_must_agree_on_its_norm(folder, change, message):
    name = "model.layers.0.self_attn.k_proj"
    rewrite_manifest(folder, lambda m: m["layers"][name].update(change))
    report = qframe.verify(folder)
    assert any(message in p.message or "was rewritten" in p.message for p in report.problems)
    assert report.exit_code == 4


def all_of(group, **changes):
    def change(manifest):
        for layer in manifest["layers"].values():
            if layer["input_group"] == group:
                layer.update(changes)

    return change


@pytest.mark.parametrize(
    ("group", "norm", "message"),
    [
        ("self_attn.q_proj", "model.layers.0.post_attention_layernorm", "for several inputs"),
        ("self_attn.q_proj", "model.layers.0.nowhere", "has no weight [64]"),
        ("self_attn.q_proj", "lm_head", "has no weight [64]"),
        ("self_attn.o_proj", "model.norm", "and no layer reads them"),  # of v_proj
    ],
)
def test_norms_that_cannot_be_are_found_by_the_structure(folder, group, norm, message):
    rewrite_manifest(folder, all_of(f"model.layers.0.{group}", folded=norm))
    report = qframe.verify(folder)
    assert report.problems
    assert all(message in p.message for p in report.problems)


def test_what_divides_does_so_alone(models, tmp_path):
    out = tmp_path / "out"
    run(models[torch.bfloat16], "awq", out, fold_scales=False)
    rewrite_manifest(out, all_of("model.layers.0.self_attn.q_proj", folded="model.norm"))
    report = qframe.verify(out)
    assert len(report.problems) == 3
    message = "'model.norm' divides by the scale of its input, and so does it"
    assert {p.message for p in report.problems} == {message}


def divisions(change):
    def changed(manifest):
        for layer, record in manifest["divisions"].items():
            if layer.endswith("layers.0.self_attn.v_proj"):
                change(record)

    return changed


def other(values, dtype, place, value):
    found = np.frombuffer(base64.b64decode(values), dtype=dtype).copy()
    found[place] = value
    return base64.b64encode(found.tobytes()).decode()


VALUES, OUT = (f"model.layers.0.self_attn.{n}_proj" for n in "vo")


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda r: r.update(rows=other(r["rows"], "<i4", 5, 1000)), OUT, "has no rows that its 64"),
        (lambda r: r.update(rows=other(r["rows"], "<i4", 5, -1)), OUT, "has no rows that its 64"),
        (lambda r: r.update(rows=None), OUT, "has no rows that its 64"),
        (lambda r: r.update(exponents="AAAA"), OUT, "has no rows that its 64"),
        (lambda r: r.update(rows="AAAA"), None, "int32 have 4 bytes each"),
    ],
)
def test_rows_that_cannot_be_are_found_by_the_structure(folder, change, name, message):
    rewrite_manifest(folder, divisions(change))
    if name is None:
        with pytest.raises(VerifyError, match=message):
            qframe.verify(folder)
        return
    problems = qframe.verify(folder).problems
    assert [(p.kind, p.name) for p in problems] == [("layer", name)]
    assert message in problems[0].message


@pytest.mark.parametrize("exponent", [-1, 3, 100])
def test_rows_that_were_divided_by_something_else_are_named(models, folder, exponent):
    """Codes of v_proj are not the nearest to their weights then, and o_proj has another scale."""
    rewrite_manifest(
        folder, divisions(lambda r: r.update(exponents=other(r["exponents"], "<i1", 7, exponent)))
    )
    assert qframe.verify(folder).problems == []
    report = qframe.verify(folder, models[torch.bfloat16])
    said = [p.message for p in report.problems if p.name == VALUES]
    assert said
    assert (exponent == 100) == any("its scales cannot be what" in message for message in said)
    assert report.exit_code != 0


def test_channels_that_are_other_rows_are_named(models, folder):
    """All of them feed one channel less or more than they did, with another exponent."""

    def change(record):
        rows = np.frombuffer(base64.b64decode(record["rows"]), dtype="<i4")
        exponents = np.frombuffer(base64.b64decode(record["exponents"]), dtype="<i1")
        unlike = np.flatnonzero(exponents != exponents[rows[0]])
        record.update(rows=other(record["rows"], "<i4", 0, unlike[0]))

    rewrite_manifest(folder, divisions(change))
    report = qframe.verify(folder, models[torch.bfloat16])
    assert [(p.kind, p.name) for p in report.problems] == [("layer", VALUES)]
    assert f"divided by the scale that layer {OUT!r}" in report.problems[0].message


def test_a_norm_that_is_said_to_be_folded_and_is_not_is_named(models, folder):
    """Its layers are the reference's, times one."""
    rewrite_manifest(
        folder,
        all_of("model.layers.0.self_attn.q_proj", folded="model.norm"),
    )
    report = qframe.verify(folder, models[torch.bfloat16])
    assert {p.name for p in report.problems} == {
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    }
