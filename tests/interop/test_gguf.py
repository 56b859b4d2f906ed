"""GGUF files, as the packages gguf and transformers read them, and as llama.cpp runs them."""

import itertools
import json
import math
from importlib import util

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import qframe
from qframe import Host, LayerInfo, Scheme
from qframe.conversion import convert
from qframe.errors import OutputError, UnsupportedError
from qframe.packing import PackedWeight
from qframe.stored import StoredLayer
from qframe.stored_model import StoredModel, outline_of
from qframe_plugins.exporters.gguf import GGUF, block_of, blocks
from qframe_plugins.rounders.rtn import RTN

HOST = Host.discover()
EXPORTER = GGUF()
LLAMA = {"model_type": "llama"}
IDS = np.arange(48) * 5 % 256
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# As the tokenizers of Llama 3 and of Qwen 2 have them: digits in threes, and one by one.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


@st.composite
def layers(draw):
    """Return (outline, layer) that the format has no objection to."""
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    if draw(st.integers(0, 5)) == 0:
        scheme = Scheme.preset("MXFP4")
    else:
        size = draw(st.sampled_from([-1, 32, 64, 96]))
        bits = bits if symmetric else min(bits, 5)
        rule = {"scale_rule": draw(st.sampled_from(["full", "restricted"]))} if symmetric else {}
        scale = draw(st.sampled_from(["float16", "bfloat16", "e8m0"])) if symmetric else "e8m0"
        fields = {"num_bits": bits, "symmetric": symmetric, "group_size": size, **rule}
        scheme = Scheme.parse({**fields, "scale_dtype": scale}, "drawn")
    rows, columns = draw(st.integers(1, 6)), 32 * draw(st.integers(1, 6))
    info = LayerInfo(name="block.layer", rows=rows, columns=columns)
    outline = outline_of(HOST, info, scheme)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = np.float32(rng.normal(size=(rows, columns)))
    problem = qframe.RoundingProblem(
        name="block.layer", weight=torch.from_numpy(weight), scheme=scheme, grid=outline.grid
    )
    packed = PackedWeight.pack(RTN().round(problem, rng), scheme, outline.grid)
    return outline, StoredLayer(packed)


@given(layers())
def test_the_package_reads_the_same_values(case):
    outline, layer = case
    if outline.info.columns % (outline.scheme.group_size or 1) == 0:
        assert EXPORTER.objections([outline], LLAMA) == []
    kind = gguf.GGMLQuantizationType[block_of(outline.scheme)]
    made = blocks(layer, "block.layer")
    size = gguf.GGML_QUANT_SIZES[kind][1]
    assert made.shape == (outline.info.rows, outline.info.columns // 32 * size)
    assert np.array_equal(gguf.quants.dequantize(made, kind), layer.weight().numpy())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_is_no_float16_is_refused(symmetric):
    scheme = Scheme.parse(
        {"group_size": 32, "symmetric": symmetric, "scale_dtype": "float32"}, "test"
    )
    outline = outline_of(HOST, LayerInfo(name="l", rows=1, columns=32), scheme)
    weight = torch.linspace(0.1, 1, 32)[None]
    problem = qframe.RoundingProblem(name="l", weight=weight, scheme=scheme, grid=outline.grid)
    packed = PackedWeight.pack(RTN().round(problem, None), scheme, outline.grid)
    with pytest.raises(
        UnsupportedError, match=r"layer 'l': a scale is 0\.\d+, which is no float16"
    ):
        blocks(StoredLayer(packed), "l")


# Whole networks -----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def any_llama(request, tiny, tmp_path):
    return with_merge(tiny.write_llama(tmp_path / "model", tied=request.param))


@pytest.fixture
def llama(tiny, tmp_path):
    return with_merge(tiny.write_llama(tmp_path / "model", tied=False))


def with_merge(folder):
    """Give the tokenizer a merge: llama.cpp loads none without."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["he"] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    content["model"]["merges"] = [["h", "e"]]
    file.write_text(json.dumps(content))
    return folder


SCHEMES = {
    "W4": {"num_bits": 4, "group_size": 32},
    "W8": {"num_bits": 8, "group_size": -1},
    "W3 with zero points": {
        "num_bits": 3,
        "group_size": 32,
        "symmetric": False,
        "scale_dtype": "e8m0",
    },
    "MXFP4": "MXFP4",
}


def written(model, tmp_path, scheme, **recipe):
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    qframe.quantize(model, {"method": "rtn", "scheme": scheme, **recipe}, out=out)
    done = convert(out, "gguf", file)
    assert (done.source, done.target) == (StoredModel.open(out).layout.name, "gguf")
    return out, file


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_transformers_reads_the_same_tensors(any_llama, tmp_path, scheme):
    """Its own reader, which gives rows and names back as they are in the network."""
    overrides = {"re:.*down_proj": {"num_bits": 5}} if isinstance(scheme, dict) else {}
    out, file = written(any_llama, tmp_path, scheme, overrides=overrides)
    network = qframe.load(out, dequantize=True)
    tied = network.config.tie_word_embeddings
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=network)
    wanted = network.state_dict()
    if tied:
        wanted.pop("lm_head.weight")
    theirs = {name: tensor for name, tensor in read["tensors"].items() if name in wanted}
    assert theirs.keys() == wanted.keys()
    for name, tensor in theirs.items():
        assert torch.equal(torch.as_tensor(tensor).float(), wanted[name].float()), name
    assert read["config"]["num_hidden_layers"] == 2
    assert read["config"]["num_key_value_heads"] == 2


def perplexity(logits):
    scores = torch.from_numpy(logits[:-1]).double().log_softmax(-1)
    return math.exp(-float(scores.gather(1, torch.from_numpy(IDS[1:])[:, None]).mean()))


def agree(out, file):
    """Within half a per cent, as was asked for: llama.cpp rounds activations to eight bits."""
    from tests.interop.llama_cpp import Model, library

    model = Model(library(), file)
    theirs = model.logits(IDS)
    model.close()
    with torch.no_grad():
        ours = qframe.load(out)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert abs(math.log(perplexity(theirs) / perplexity(ours))) < math.log(1.005)
    assert not np.array_equal(theirs, ours)


@pytest.mark.skipif(util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_llama_cpp_has_the_same_perplexity(llama, tmp_path, scheme):
    out, file = written(llama, tmp_path, scheme)
    agree(out, file)
    from tests.interop.llama_cpp import Model, library

    model = Model(library(), file)
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    text = "then he said: 12 x"
    assert model.tokenize(text) == tokenizer.encode(text).ids
    assert len(tokenizer.encode(text).ids) == len(text) - 2
    model.close()


QWEN = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),  # biases of q, k and v
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),  # norms of queries and keys
    "mistral": ("MistralForCausalLM", "MistralConfig"),
}


@pytest.mark.skipif(util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("kind", QWEN)
def test_llama_cpp_runs_other_architectures(llama, tmp_path, kind):
    network, config = (getattr(transformers, name) for name in QWEN[kind])
    fields = json.loads((llama / "config.json").read_text())
    kept = {k: v for k, v in fields.items() if k not in ("architectures", "model_type", "dtype")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = network(config(**kept, head_dim=16))
        for name, parameter in made.named_parameters():
            if name.endswith("bias") or "_norm" in name:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
            elif "embed" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    tensors = {name: t.clone() for name, t in made.state_dict().items()}
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    (llama / "config.json").write_text(made.config.to_json_string(use_diff=False))
    change(llama, "config.json", lambda c: c.update(architectures=[network.__name__]))
    agree(*written(llama, tmp_path, SCHEMES["W8"]))


CUTS = {  # as tokenizer.json has them
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated"}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": QWEN_2}, "behavior": "Isolated"}],
}
TEXTS = [
    "hello he's 12345 ab  12 \n\n x",
    "  spaces   and\ttabs\r\n\r\nthen 1a2b3 ... !!!?? he'LL we'Ve",
    "a\n b \n\n\n c1234567890 (he)he-he_he",
]


@pytest.mark.skipif(util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(llama, tmp_path, cut):
    """With a merge of every two letters that stand beside one another, cuts show."""
    from tests.interop.llama_cpp import Model, library

    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    last = {**plain, "use_regex": cut in ("gpt-2", "smollm")}
    steps = [{**step, "invert": False} if step["type"] == "Split" else step for step in CUTS[cut]]
    file = llama / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    letters = [c for text in TEXTS for piece, _ in BYTES.pre_tokenize_str(text) for c in piece]
    pairs = list(dict.fromkeys(itertools.pairwise(letters)))
    spare = [c for c in sorted(vocabulary, key=vocabulary.get, reverse=True) if c not in letters]
    content["model"]["merges"] = [list(pair) for pair in pairs[: len(spare)]]
    for (one, other), left_out in zip(pairs, spare, strict=False):
        vocabulary["".join((one, other))] = vocabulary.pop(left_out)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, last]}
    file.write_text(json.dumps(content))
    _, made = written(llama, tmp_path, SCHEMES["W8"])
    tokenizer, model = Tokenizer.from_file(str(file)), Model(library(), made)
    for text in TEXTS:
        assert model.tokenize(text) == tokenizer.encode(text).ids
    model.close()


def test_the_same_file_each_time(llama, tmp_path):
    out, file = written(llama, tmp_path, SCHEMES["W4"])
    again = tmp_path / "again" / "out.gguf"
    convert(out, "gguf", again)
    assert again.read_bytes() == file.read_bytes()


def test_dtypes_of_the_rest_are_kept(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    half = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    save_file(half, llama / "model.safetensors", metadata={"format": "pt"})
    _, file = written(llama, tmp_path, SCHEMES["W4"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"scheme": {"group_size": 16}}, "group_size=16 is no multiple of 32"),
        ({"scheme": "W8A8"}, "activations are quantized"),
        ({"scheme": "NF4"}, "is in no block of it"),
        ({"scheme": {"num_bits": 8, "symmetric": False, "group_size": 32}}, "is in no block of it"),
        ({"method": "hadamard", "scheme": {"group_size": 32}}, "its input is rotated"),
        ({"scheme": {"group_size": 32, "symmetric": False}}, "scale times its zero point is"),
    ],
)
def test_what_it_cannot_express_is_refused_and_leaves_nothing(llama, tmp_path, recipe, message):
    qframe.quantize(llama, {"method": "rtn", **recipe}, out=tmp_path / "out")
    with pytest.raises(UnsupportedError, match=message):
        convert(tmp_path / "out", "gguf", tmp_path / "there" / "out.gguf")
    assert list((tmp_path / "there").glob("*")) == []


def change(folder, name, edit):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("config.json", lambda c: c.update(model_type="gptj"), "model_type 'gptj' is not known"),
        (
            "config.json",
            lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "rotary embeddings of type 'yarn'",
        ),
        ("config.json", lambda c: c.update(hidden_act="gelu"), "hidden_act 'gelu'"),
        ("tokenizer.json", lambda c: c["model"].update(merges=[]), "no merges"),
        ("tokenizer.json", lambda c: c["model"].update(type="Unigram"), "type 'Unigram'"),
        (
            "tokenizer.json",
            lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
            "Whitespace, is not known",
        ),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update(more=256), "has number 256"),
    ],
)
def test_networks_and_tokenizers_that_are_not_known_are_refused(
    llama, tmp_path, name, edit, message
):
    out = tmp_path / "out"
    qframe.quantize(llama, {"method": "rtn", "scheme": SCHEMES["W4"]}, out=out)
    change(out, name, edit)
    with pytest.raises(qframe.errors.QframeError, match=message):
        convert(out, "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_that_is_there_is_not_overwritten_unasked(llama, tmp_path):
    out, file = written(llama, tmp_path, SCHEMES["W4"])
    with pytest.raises(OutputError, match="pass --overwrite"):
        convert(out, "gguf", file)
    with pytest.raises(OutputError, match=r"ends in \.gguf"):
        convert(out, "gguf", tmp_path / "model.bin")
    convert(out, "gguf", file, overwrite=True)
