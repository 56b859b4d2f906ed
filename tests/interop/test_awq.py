"""Folders in AWQ's layout, as the format's description and its other readers have it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qframe
from qframe import LayerInfo, Scheme
from qframe.errors import UnsupportedError, VerifyError, WeightsError
from qframe.stored_model import StoredModel, outline_of
from tests.interop.packed import (
    HOST,
    WORD,
    change,
    damaged,
    imported,
    packed_layers,
    refused_or_valued,
    said_shapes,
    same,
)

LAYOUT = HOST.get("layout", "awq")
IDS = torch.arange(48)[None] * 5 % 256
TEXT = {"num_calibration_samples": 4, "max_seq_length": 32}
SHIFT_OF_ROW = (0, 16, 4, 20, 8, 24, 12, 28)  # of its code in the word of eight rows


def cases():
    return packed_layers((4,), (8, 16, 40), dtypes=("float16",), index=False)


def plain_weight(tensors):
    """Return the weight [rows, columns], written from the format's description."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales = tensors["scales"].float().numpy()
    columns, rows = len(qweight), scales.shape[1]
    width = columns // len(scales)
    weight = np.empty((rows, columns), np.float32)
    for column in range(columns):
        group = column // width
        for row in range(rows):
            word, shift = row // 8, SHIFT_OF_ROW[row % 8]
            code = (int(qweight[column, word]) & WORD) >> shift & 15
            zero = (int(qzeros[group, word]) & WORD) >> shift & 15
            weight[row, column] = scales[group, row] * np.float32(code - zero)
    return weight


@given(cases())
def test_what_is_packed_is_unpacked(case):
    outline, layer = case
    assert LAYOUT.objections([outline]) == []
    tensors = LAYOUT.pack(layer)
    shapes = {part: (t.dtype, tuple(t.shape)) for part, t in tensors.items()}
    assert shapes == said_shapes(LAYOUT, outline)
    assert tensors.keys() == set(LAYOUT.parts)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    same(LAYOUT.unpack(tensors, outline).tensors(), layer.tensors())


@given(cases())
def test_the_format_is_the_one_that_is_described(case):
    """A second reader, which shifts out one code after the other, gets the same values."""
    _, layer = case
    assert np.array_equal(plain_weight(LAYOUT.pack(layer)), layer.weight().numpy())


@given(case=cases(), seed=st.integers(0, 2**32))
def test_scales_of_either_sign_are_read(case, seed):
    outline, layer = case
    if outline.scheme.symmetric:
        return  # a folder of others is read as one with zero points
    tensors = LAYOUT.pack(layer)
    scales = tensors["scales"]
    negative = torch.from_numpy(np.random.default_rng(seed).random(scales.shape) < 0.5)
    tensors["scales"] = scales.where(~negative, -scales)
    read = LAYOUT.unpack(tensors, outline)
    assert np.array_equal(plain_weight(tensors), read.weight().numpy())
    assert bool((read.packed.scale > 0).all())


def test_a_word_that_was_packed_by_hand():
    """Codes 0..7 of eight rows: AutoAWQ's order, read off its packer."""
    scheme = Scheme(num_bits=4, symmetric=False, strategy="channel")
    outline = outline_of(HOST, LayerInfo(name="a", rows=8, columns=1), scheme)
    tensors = {
        "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    layer = LAYOUT.unpack(tensors, outline)
    assert layer.weight().flatten().tolist() == list(range(8))
    same(LAYOUT.pack(layer), tensors)


@given(data=st.data())
def test_a_damaged_layer_is_refused_or_has_values(data):
    outline, layer = data.draw(cases())
    refused_or_valued(LAYOUT, damaged(data.draw, LAYOUT.pack(layer)), outline)


# Folders ----------------------------------------------------------------------------------------

RECIPES = {
    "group 32": {"method": "rtn", "scheme": {"group_size": 32}},
    "per channel": {"method": "rtn", "scheme": {"group_size": -1}},
    "asymmetric": {"method": "rtn", "scheme": {"group_size": 16, "symmetric": False}},
    "awq": {
        "method": "awq",
        "scheme": {"group_size": 32, "symmetric": False},
        "calibration": TEXT,
        "ignore": ["lm_head", "model.layers.0.self_attn.o_proj"],
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_is_loaded_and_verified_with_and_without_its_manifest(tiny_llama, tmp_path, name):
    recipe, out = RECIPES[name], tmp_path / "out"
    result = qframe.quantize(tiny_llama, recipe, out=out, format="awq")
    assert result.report.storage.startswith("awq, for vLLM")
    assert qframe.verify(out, tiny_llama).problems == []
    own = qframe.quantize(tiny_llama, recipe, out=tmp_path / "own", format="qframe")
    before, ours = StoredModel.open(out), StoredModel.open(own.folder)
    (out / "qframe.json").unlink()
    after = StoredModel.open(out)
    assert after.layout.name == "awq"
    assert after.outlines.keys() == before.outlines.keys() == ours.outlines.keys()
    for layer_name, layer in ours.layers():
        assert torch.equal(before.layer(layer_name).weight(), layer.weight())
        assert torch.equal(after.layer(layer_name).weight(), layer.weight())
        assert after.outlines[layer_name].info == ours.outlines[layer_name].info
    with torch.no_grad():
        assert torch.equal(qframe.load(out)(IDS).logits, qframe.load(own.folder)(IDS).logits)


def test_its_section_is_what_readers_look_for(tiny_llama, tmp_path):
    qframe.quantize(tiny_llama, RECIPES["awq"], out=tmp_path / "out", format="awq")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"],
    }


def test_an_old_folder_has_only_the_file_beside_config_json(tiny_llama, tmp_path):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, RECIPES["group 32"], out=out, format="awq")
    weights = {name: layer.weight() for name, layer in StoredModel.open(out).layers()}
    (out / "qframe.json").unlink()
    change(out / "config.json", lambda config: config.pop("quantization_config"))
    keys = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (out / "quant_config.json").write_text(json.dumps(keys))
    read = StoredModel.open(out)
    assert read.layout.name == "awq"
    for name, layer in read.layers():
        assert torch.equal(layer.weight(), weights[name])


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"scheme": "NF4"}, "it has integers with num_bits of 4"),
        ({"scheme": {"num_bits": 8, "group_size": 32}}, "it has integers with num_bits of 4"),
        ({"scheme": {"group_size": 48}}, "group_size=48 does not divide the 64 columns"),
        ({"scheme": {"strategy": "tensor"}}, "use group_size: -1, one for each row"),
        ({"scheme": "W4A8"}, "activations are int8 per token; it quantizes weights alone"),
        ({"scheme": {"group_size": 32, "scale_dtype": "float32"}}, "use scale_dtype: float16"),
        (
            {"method": "gptq", "scheme": {"group_size": 32}, "options": {"actorder": "group"}},
            "use actorder: static",
        ),
        (
            {"scheme": {"group_size": 32}, "overrides": {"re:.*q_proj": {"group_size": 16}}},
            "group_size is 16 and 32; it has one for all layers",
        ),
        ({"scheme": {"group_size": 32}, "ignore": []}, "for one that is not quantized; ignore it"),
    ],
)
def test_what_it_cannot_express_is_said_before_any_work(tiny_llama, recipe, reason):
    with pytest.raises(UnsupportedError, match="cannot express") as caught:
        qframe.pipeline.plan_job(tiny_llama, {"method": "rtn", **recipe}, format="awq")
    assert reason in str(caught.value)


def test_rows_that_fill_no_words_are_objected_to():
    info = LayerInfo(name="a.b", rows=12, columns=64)
    said = LAYOUT.objections([outline_of(HOST, info, Scheme(num_bits=4, group_size=8))])
    assert said == ["12 rows are no multiple of 8; ignore these layers; layers: a.b"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda c: c.update(version="gemv"), "version='gemv' is not known, only 'gemm'"),
        (lambda c: c.update(bits=3), "bits=3 is not known, only 4"),
        (lambda c: c.update(zero_point=False), "zero_point=False is not known, only True"),
        (lambda c: c.update(group_size=16), "qzeros should be torch.int32"),
        (lambda c: c.update(group_size="many"), "group_size"),
        (lambda c: c.update(quant_method="fbgemm"), "'fbgemm', which no layout knows"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tiny_llama, tmp_path, how, message):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, RECIPES["group 32"], out=out, format="awq")
    (out / "qframe.json").unlink()
    change(out / "config.json", lambda config: how(config["quantization_config"]))
    with pytest.raises((WeightsError, VerifyError), match=message):
        dict(StoredModel.open(out).layers())


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_folder_without_a_part_of_a_layer_is_refused(tiny_llama, tmp_path, part):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, RECIPES["group 32"], out=out, format="awq")
    (out / "qframe.json").unlink()
    tensors = load_file(out / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"'model.layers.1.mlp.up_proj': {part} missing"):
        dict(StoredModel.open(out).layers())


# Readers of others ------------------------------------------------------------------------------


@given(case=packed_layers((4,), (32, 64), dtypes=("float16",), index=False))
def test_gptqmodel_dequantizes_to_the_same_values(case):
    """Its function for AutoAWQ's format, which transformers uses too."""
    awq = imported("gptqmodel.quantization.awq.utils.packing_utils", "gptqmodel")
    outline, layer = case
    tensors = LAYOUT.pack(layer)
    values = awq.dequantize_gemm(
        bits=4, group_size=outline.scheme.group_width(outline.info.columns), **tensors
    )
    # It multiplies in the dtype of scales: what is exact in float32 is rounded once.
    assert torch.equal(values.T, layer.weight().half())


@given(case=packed_layers((4,), (8, 32), dtypes=("float16",), index=False))
def test_autoawq_dequantizes_to_the_same_values(case):
    awq = imported("awq.utils.packing_utils", "autoawq")
    outline, layer = case
    tensors = LAYOUT.pack(layer)
    width = outline.scheme.group_width(outline.info.columns)
    values = awq.dequantize_gemm(bits=4, group_size=width, **tensors)
    assert torch.equal(values.T, layer.weight().half())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["group 32", "asymmetric"])
def test_transformers_has_the_same_weights(tiny_llama, tmp_path, name):
    """Through GPTQModel; what its layers make of the identity is their weight."""
    imported("gptqmodel", "gptqmodel")
    qframe.quantize(tiny_llama, RECIPES[name], out=tmp_path / "out", format="awq")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    ours = StoredModel.open(tmp_path / "out")
    for layer_name, layer in ours.layers():
        module = theirs.get_submodule(layer_name)
        values = module(torch.eye(layer.packed.columns, dtype=torch.float16)).T
        assert torch.equal(values, layer.weight().half())
