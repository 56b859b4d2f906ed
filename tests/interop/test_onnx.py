"""ONNX files, as onnxruntime runs them."""

import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qframe
from qframe import LayerInfo, Scheme, bounds
from qframe.conversion import convert
from qframe.errors import MissingExtraError, UnsupportedError
from qframe.stored_model import StoredModel, outline_of
from qframe_plugins.exporters.onnx import ONNX, attributes, blocks, stored_bits, width_of
from tests.interop.packed import HOST, change, layer_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

EXPORTER = ONNX()
LLAMA = {"model_type": "llama"}
IDS = np.arange(48)[None] * 5 % 256


def session(content):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@st.composite
def cases(draw):
    """Return (outline, layer) that there is no objection to: tails, ragged groups, odd widths."""
    fields = {"num_bits": draw(st.integers(2, 8)), "symmetric": draw(st.booleans())}
    fields["scale_dtype"] = draw(st.sampled_from(["float16", "bfloat16", "float32", "e8m0"]))
    if fields["symmetric"]:
        fields["scale_rule"] = draw(st.sampled_from(["full", "restricted"]))
    fields["strategy"] = draw(st.sampled_from(["tensor", "channel", "group", "group", "group"]))
    if fields["strategy"] == "group":
        fields["group_size"] = draw(st.sampled_from([16, 32, 48, 96, 256]))
    rows = draw(st.integers(1, 9))
    columns = draw(st.one_of(st.integers(1, 200), st.sampled_from([144, 192, 300, 512])))
    return layer_of(Scheme.parse(fields, "drawn"), rows, columns, draw(st.integers(0, 2**32)))


def plain_weight(parts, bits, width, columns):
    """Return the weight [rows, columns], written from the operator's description."""
    stored, scale = parts["B"].numpy(), parts["scales"].numpy()
    rows = len(stored)
    per_byte = 8 // bits
    weight = np.zeros((rows, columns), np.float32)
    for row, column in np.ndindex(rows, columns):
        block, place = divmod(column, width)
        byte = int(stored[row, block, place // per_byte])
        code = byte >> bits * (place % per_byte) & (1 << bits) - 1
        zero = 1 << bits - 1
        if "zero_points" in parts:
            byte = int(parts["zero_points"][row, block // per_byte])
            zero = byte >> bits * (block % per_byte) & (1 << bits) - 1
        weight[row, column] = np.float32(code - zero) * scale[row, block]
    return weight


@given(cases())
def test_blocks_are_those_that_are_described(case):
    """A second reader, which takes one code after the other, gets the same values."""
    outline, layer = case
    assert EXPORTER.objections([outline], LLAMA) == []
    bits = stored_bits(outline.scheme)
    width = width_of(outline.scheme, outline.info.columns)
    parts = blocks(layer)
    assert width in (16, 32, 64, 128)
    assert ("zero_points" in parts) == (not outline.scheme.symmetric)
    weight = plain_weight(parts, bits, width, outline.info.columns)
    assert np.array_equal(weight, layer.weight().numpy())


@given(case=cases(), tokens=st.sampled_from([1, 2, 5]), seed=st.integers(0, 2**32))
def test_a_node_is_within_the_bound_of_its_products(case, tokens, seed):
    """B9.b: sums in float32, in any order, with zero points factored out or not."""
    outline, layer = case
    info, scheme = outline.info, outline.scheme
    parts = blocks(layer)
    node = helper.make_node("MatMulNBits", ["x", *parts], ["y"], **attributes(outline))
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, info.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, info.rows])],
        [numpy_helper.from_array(tensor.numpy(), part) for part, tensor in parts.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=domains, ir_version=8)
    x = np.float32(np.random.default_rng(seed).normal(size=(tokens, info.columns)))
    y = session(made.SerializeToString()).run(None, {"x": x})[0]
    found = layer.packed.unpack()
    index, rows = found.group_index.long(), info.rows
    scale = found.scale.double().expand(rows, -1)[:, index].numpy()
    half = 1 << stored_bits(scheme) - 1 if scheme.symmetric else 0
    codes = found.codes.double().numpy() + half
    zeros = found.zero_point.double().expand(rows, -1)[:, index].numpy() + half
    size = np.abs(x.astype(np.float64)) @ (scale * (np.abs(codes) + np.abs(zeros))).T
    exact = x.astype(np.float64) @ layer.weight().double().numpy().T
    # The last block may reach beyond the columns; what stands in for those is zero.
    allowed = bounds.weight_only(size, info.columns)
    assert bool((np.abs(y - exact) <= allowed).all())


# Networks -----------------------------------------------------------------------------------------


def plain_logits(model, ids):
    """Return logits in float64, the network written down a second time, from stored weights."""
    config, source = model.config, model.source

    def read(name):
        return source.read(name).double().numpy()

    def linear(x, name):
        if name in model.outlines:
            weight = model.layer(name).weight().double().numpy()
        else:
            weight = read(f"{name}.weight")
        bias = read(f"{name}.bias") if f"{name}.bias" in source.tensors else 0.0
        return x @ weight.T + bias

    def norm(x, name):
        root = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / root * read(f"{name}.weight")

    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    tokens = len(ids)
    frequencies = model.network().model.rotary_emb.inv_freq.double().numpy()
    scaling = model.network().model.rotary_emb.attention_scaling
    angles = np.arange(tokens)[:, None] * frequencies

    def turned(x):
        numbers = x[..., : size // 2] + 1j * x[..., size // 2 :]
        numbers = numbers * np.exp(1j * angles)[:, None] * scaling
        return np.concatenate((numbers.real, numbers.imag), -1)

    def headed(x, name, part, count):
        y = linear(x, f"{name}.{part}_proj").reshape(tokens, count, size)
        if f"{name}.{part}_norm.weight" in source.tensors:
            y = norm(y, f"{name}.{part}_norm")
        return y

    x = read("model.embed_tokens.weight")[ids]
    for number in range(config["num_hidden_layers"]):
        block = f"model.layers.{number}"
        name = f"{block}.self_attn"
        z = norm(x, f"{block}.input_layernorm")
        q = turned(headed(z, name, "q", heads))
        k, v = turned(headed(z, name, "k", keys)), headed(z, name, "v", keys)
        out = np.empty_like(q)
        for head in range(heads):
            mine = head // (heads // keys)
            scores = q[:, head] @ k[:, mine].T / size**0.5
            scores[np.triu_indices(tokens, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, mine]
        x = x + linear(out.reshape(tokens, -1), f"{name}.o_proj")
        z = norm(x, f"{block}.post_attention_layernorm")
        gate = linear(z, f"{block}.mlp.gate_proj")
        act = gate / (1 + np.exp(-gate)) * linear(z, f"{block}.mlp.up_proj")
        x = x + linear(act, f"{block}.mlp.down_proj")
    x = norm(x, "model.norm")
    if config.get("tie_word_embeddings") and "lm_head" not in model.outlines:
        return x @ read("model.embed_tokens.weight").T
    return linear(x, "lm_head")


def llama3(config):
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def yarn(config):
    config["rope_parameters"] = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def family(name, architecture):
    return lambda config: config.update(
        model_type=name, architectures=[architecture], sliding_window=None, head_dim=16
    )


NETWORKS = {
    "llama": (lambda config: None, {"scheme": {"group_size": 32}}),
    "rope of llama 3.1": (llama3, {"scheme": {"group_size": 48, "symmetric": False}}),
    "yarn": (yarn, {"scheme": {"group_size": 16, "scale_dtype": "float32"}}),
    "mistral": (family("mistral", "MistralForCausalLM"), {"scheme": "W8A16"}),
    "qwen2": (family("qwen2", "Qwen2ForCausalLM"), {"scheme": {"num_bits": 2, "group_size": 16}}),
    "qwen3": (family("qwen3", "Qwen3ForCausalLM"), {"scheme": {"num_bits": 3, "group_size": -1}}),
    "head": (lambda config: None, {"scheme": {"group_size": 32}, "ignore": []}),
}


def extra_weights(tiny, kind):
    """Return what a network of this kind has besides Llama's weights."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for number in range(tiny.LAYERS):
        name = f"model.layers.{number}.self_attn"
        if kind == "qwen2":
            for part in ("q", "k", "v"):
                rows = tiny.SHAPES[f"self_attn.{part}_proj"][0]
                found[f"{name}.{part}_proj.bias"] = torch.randn(rows, generator=generator)
        if kind == "qwen3":
            for part in ("q", "k"):
                found[f"{name}.{part}_norm.weight"] = torch.rand(16, generator=generator) + 0.5
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_as_near_to_exact_ones_as_those_of_torch(tiny, tmp_path, name, dtype):
    """Both are runs in float32 of the same stored weights, whose values pass as many roundings.

    So their errors are alike, apart from the order of sums: twice as large is far from alike, and
    far less than any other angle, mask or weight makes of it.
    """
    changed, recipe = NETWORKS[name]
    folder, out = tiny.write_llama(tmp_path / "model", tied=name == "llama"), tmp_path / "out"
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    weights = tiny.llama_weights(tied=name == "llama", vocab_size=size) | extra_weights(tiny, name)
    tiny.save_weights(folder, {key: tensor.to(dtype) for key, tensor in weights.items()})
    change(folder / "config.json", changed)
    qframe.quantize(folder, {"method": "rtn", **recipe}, out=out)
    if name == "head":  # which is no embedding, whatever config.json says
        change(out / "config.json", lambda config: config.update(tie_word_embeddings=True))
    convert(out, "onnx", tmp_path / "out.onnx")
    run, model = session(str(tmp_path / "out.onnx")), StoredModel.open(out)
    batch = np.concatenate((IDS, IDS[:, ::-1]))
    logits = run.run(None, {"input_ids": batch})[0]
    with torch.no_grad():
        theirs = qframe.load(out)(torch.from_numpy(batch.copy())).logits.double().numpy()
    exact = np.stack([plain_logits(model, ids) for ids in batch])
    error, usual = (np.sqrt(np.mean((y - exact) ** 2)) for y in (logits, theirs))
    assert 0 < error <= 2 * usual
    # A token alone, and a row of the batch alone, are those of the batch.
    alone = run.run(None, {"input_ids": batch[1:, :1]})[0]
    assert alone.shape == (1, 1, size)
    assert np.sqrt(np.mean((alone - exact[1:, :1]) ** 2)) <= 2 * usual


@pytest.mark.parametrize("name", ["llama", "rope of llama 3.1", "qwen3"])
def test_the_file_holds_the_weights_to_the_bit(tiny, tmp_path, name):
    changed, recipe = NETWORKS[name]
    folder = tiny.write_llama(tmp_path / "model", tied=False)
    if name != "qwen3":
        change(folder / "config.json", changed)
    qframe.quantize(folder, {"method": "rtn", **recipe}, out=tmp_path / "out", format="qframe")
    convert(tmp_path / "out", "onnx", tmp_path / "a.onnx")
    convert(tmp_path / "out", "onnx", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    graph = onnx.load(tmp_path / "a.onnx").graph
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"))
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    model = StoredModel.open(tmp_path / "out")
    nodes = {node.input[1]: node for node in graph.node if node.op_type == "MatMulNBits"}
    assert nodes.keys() == {f"{layer}.B" for layer in model.outlines}
    for layer_name, layer in model.layers():
        said = {each.name: each.i for each in nodes[f"{layer_name}.B"].attribute}
        assert (said["N"], said["K"]) == (layer.packed.rows, layer.packed.columns)
        parts = {
            part: torch.from_numpy(stored[f"{layer_name}.{part}"].copy())
            for part in ("B", "scales", "zero_points")
            if f"{layer_name}.{part}" in stored
        }
        weight = plain_weight(parts, said["bits"], said["block_size"], said["K"])
        assert np.array_equal(weight, layer.weight().numpy())
    embedding = model.source.read("model.embed_tokens.weight").numpy()
    assert np.array_equal(stored["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme.preset("NF4"), "MatMulNBits multiplies with integers"),
        (Scheme(num_bits=4, group_size=40), "group_size=40 is no multiple of 16; use one"),
        (Scheme.preset("W4A8"), "activations are int8 per token"),
    ],
)
def test_what_it_cannot_express_is_said(scheme, reason):
    info = LayerInfo(name="a.b", rows=8, columns=128)
    said = EXPORTER.objections([outline_of(HOST, info, scheme)], LLAMA)
    assert reason in "\n".join(said)
    assert "layers: a.b" in said[0]


def test_what_a_layer_has_besides_codes_is_objected_to():
    info = LayerInfo(name="a.b", rows=8, columns=128, kind="Conv1D")
    extras = frozenset({"rotation", "group index"})
    outline = outline_of(HOST, info, Scheme(num_bits=4, group_size=32), extras)
    said = "\n".join(EXPORTER.objections([outline], LLAMA))
    assert "its input is rotated" in said
    assert "use actorder: static" in said
    assert "weights of Conv1D are not known" in said


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; known: llama"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic' are not known"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "of type 'longrope' are not known"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not known"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not known; silu is"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096 is not known"),
        (
            {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True},
            "sliding_window=4096 is not known",
        ),
    ],
)
def test_networks_that_are_not_known_are_named(config, reason):
    assert reason in EXPORTER.objections([], {**LLAMA, **config})[0]


def test_a_window_that_is_not_used_is_none():
    config = {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    assert EXPORTER.objections([], config) == []


def test_what_has_no_place_is_refused_and_nothing_is_left(tiny_llama, tmp_path, monkeypatch):
    recipe = {"method": "rtn", "scheme": {"group_size": 32}}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    file = tmp_path / "out.onnx"
    module = importlib.import_module("qframe_plugins.exporters.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(module, "MOST_BYTES", 1000)
        with pytest.raises(UnsupportedError, match="files of one part have at most 2 GiB"):
            convert(tmp_path / "out", "onnx", file)
    with monkeypatch.context() as patch:
        patch.setitem(importlib.import_module("sys").modules, "onnx", None)
        with pytest.raises(MissingExtraError, match=r'pip install "qframe\[onnx\]"'):
            convert(tmp_path / "out", "onnx", file)
    with monkeypatch.context() as patch:
        patch.setattr(StoredModel, "carried", lambda self: ["model.adapter.weight"])
        patch.setattr(module, "_check_size", lambda model: None)
        with pytest.raises(UnsupportedError, match=r"'model.adapter.weight' has no place"):
            convert(tmp_path / "out", "onnx", file)
    assert not file.exists()
