"""Folders in GPTQ's layouts, as the format's description and its other readers have it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qframe
from qframe import LayerInfo, Scheme
from qframe.conversion import convert
from qframe.errors import UnsupportedError, VerifyError, WeightsError
from qframe.stored_model import StoredModel, outline_of
from qframe_plugins.layouts.gptq import V1, V2
from tests.interop.packed import (
    HOST,
    change,
    damaged,
    fields_of,
    imported,
    layer_of,
    packed_layers,
    refused_or_valued,
    said_shapes,
    same,
    words_of,
)

LAYOUTS = {V1: HOST.get("layout", V1), V2: HOST.get("layout", V2)}
IDS = torch.arange(48)[None] * 5 % 256
TEXT = {"num_calibration_samples": 4, "max_seq_length": 32}


@st.composite
def cases(draw):
    """Return (layout, outline, layer) that the layout has no objection to."""
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    symmetric = (True,) if layout.offset else (True, False)
    return layout, *draw(packed_layers((2, 3, 4, 8), (32, 64, 96), symmetric=symmetric))


def plain_weight(tensors, bits, offset):
    """Return the weight [rows, columns], written from the format's description."""
    qweight, qzeros, g_idx = (tensors[part].numpy() for part in ("qweight", "qzeros", "g_idx"))
    scales = tensors["scales"].float().numpy()
    columns, rows = len(g_idx), qweight.shape[1]
    zeros = np.array([fields_of(line, bits, rows) for line in qzeros]).reshape(len(qzeros), rows)
    zeros = zeros + offset
    weight = np.empty((rows, columns), np.float32)
    for row in range(rows):
        codes = fields_of(qweight[:, row], bits, columns)
        for column, code in enumerate(codes):
            group = g_idx[column]
            weight[row, column] = scales[group, row] * np.float32(code - zeros[group, row])
    return weight


@given(cases())
def test_what_is_packed_is_unpacked(case):
    layout, outline, layer = case
    assert layout.objections([outline]) == []
    tensors = layout.pack(layer)
    assert {p: (t.dtype, tuple(t.shape)) for p, t in tensors.items()} == said_shapes(
        layout, outline
    )
    assert tensors.keys() == set(layout.parts)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    same(layout.unpack(tensors, outline).tensors(), layer.tensors())


@given(cases())
def test_the_format_is_the_one_that_is_described(case):
    """A second reader, which shifts out one code after the other, gets the same values."""
    layout, outline, layer = case
    weight = plain_weight(layout.pack(layer), outline.scheme.num_bits, layout.offset)
    assert np.array_equal(weight, layer.weight().numpy())


@given(case=packed_layers((2, 3, 4, 8), (32, 64), symmetric=(False,)), seed=st.integers(0, 2**32))
def test_scales_of_either_sign_are_read(case, seed):
    """auto-round writes such: the largest weight of a group gets the code without a counterpart."""
    outline, layer = case
    tensors = LAYOUTS[V2].pack(layer)
    scales = tensors["scales"]
    negative = torch.from_numpy(np.random.default_rng(seed).random(scales.shape) < 0.5)
    tensors["scales"] = scales.where(~negative, -scales)
    read = LAYOUTS[V2].unpack(tensors, outline)
    assert np.array_equal(plain_weight(tensors, outline.scheme.num_bits, 0), read.weight().numpy())
    assert bool((read.packed.scale > 0).all())


def test_a_symmetric_folder_with_negative_scales_is_one_with_zero_points(tiny_llama, tmp_path):
    recipe = {"method": "rtn", "scheme": {"group_size": 32}}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out", format=V1)
    (tmp_path / "out" / "qframe.json").unlink()
    name, file = "model.layers.0.mlp.up_proj", tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.scales"][:, 1::2] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    model = StoredModel.open(tmp_path / "out")
    assert [n for n, o in model.outlines.items() if not o.scheme.symmetric] == [name]
    parts = {p: tensors[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
    assert np.array_equal(plain_weight(parts, 4, 1), model.layer(name).weight().numpy())


@given(case=packed_layers((2, 3, 4, 8), (32, 64), symmetric=(False,)))
def test_zero_points_of_v1_are_read_where_all_readers_agree(case):
    """Others wrote v1 with zero points: stored less one, from 1 on. A stored 2^b - 1 is refused."""
    outline, layer = case
    bits, v1, v2 = outline.scheme.num_bits, LAYOUTS[V1], LAYOUTS[V2]
    tensors = v2.pack(layer)
    zeros = [fields_of(line, bits, outline.info.rows) for line in tensors["qzeros"]]
    lines = [words_of([(zero - 1) % (1 << bits) for zero in line], bits) for line in zeros]
    tensors["qzeros"] = torch.from_numpy(np.array(lines))
    if all(zero > 0 for line in zeros for zero in line):
        same(v1.unpack(tensors, outline).tensors(), layer.tensors())
    else:
        with pytest.raises(WeightsError, match=rf"'block.layer'.*stored as {(1 << bits) - 1}"):
            v1.unpack(tensors, outline)


@given(case=packed_layers((2, 3, 4, 8), (32, 64), symmetric=(True,)))
def test_a_folder_that_is_labelled_wrongly_is_found_out(case):
    """Symmetric zero points of one version are not those of the other."""
    outline, layer = case
    with pytest.raises(WeightsError, match=r"those of checkpoint_format 'gptq_v2'"):
        LAYOUTS[V1].unpack(LAYOUTS[V2].pack(layer), outline)
    with pytest.raises(WeightsError, match=r"a zero point is \d+, and a symmetric layer"):
        LAYOUTS[V2].unpack(LAYOUTS[V1].pack(layer), outline)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_that_a_restricted_grid_has_not_is_refused(bits):
    """Which is -2^(b-1), stored as 0."""
    scheme = Scheme(num_bits=bits, strategy="channel", scale_rule="restricted")
    outline, layer = layer_of(scheme, 32, 32, seed=0)
    tensors = LAYOUTS[V2].pack(layer)
    tensors["qweight"][:, 0] = 0
    with pytest.raises(WeightsError, match=rf"'block.layer': holds code -{1 << bits - 1}, but the"):
        LAYOUTS[V2].unpack(tensors, outline)


@given(data=st.data())
def test_a_damaged_layer_is_refused_or_has_values(data):
    layout, outline, layer = data.draw(cases())
    refused_or_valued(layout, damaged(data.draw, layout.pack(layer)), outline)


# Folders ----------------------------------------------------------------------------------------

RECIPES = {
    "W4": {"method": "rtn", "scheme": {"group_size": 32}},
    "W3": {"method": "rtn", "scheme": {"num_bits": 3, "group_size": 16}},
    "W2 per channel": {"method": "rtn", "scheme": {"num_bits": 2, "group_size": -1}},
    "W8 bfloat16": {"method": "rtn", "scheme": {"num_bits": 8, "scale_dtype": "bfloat16"}},
    "W4 asymmetric": {"method": "rtn", "scheme": {"group_size": 32, "symmetric": False}},
    "actorder": {
        "method": "gptq",
        "scheme": {"group_size": 16},
        "options": {"actorder": "group"},
        "calibration": TEXT,
    },
    "awq+gptq": {"method": "awq+gptq", "scheme": {"group_size": 32}, "calibration": TEXT},
    "mixed": {
        "method": "rtn",
        "scheme": {"group_size": 32},
        "overrides": {"re:.*down_proj": {"num_bits": 8}, "re:.*v_proj": {"group_size": 16}},
        "ignore": ["lm_head", "re:.*o_proj"],
    },
}


@pytest.mark.parametrize(
    ("name", "version"),
    [(name, V2) for name in RECIPES] + [(name, V1) for name in ("W4", "W3", "actorder", "mixed")],
)
def test_a_folder_is_loaded_and_verified_with_and_without_its_manifest(
    tiny_llama, tmp_path, name, version
):
    recipe, out = RECIPES[name], tmp_path / "out"
    result = qframe.quantize(tiny_llama, recipe, out=out, format=version)
    assert result.report.storage.startswith(f"{version}, for GPTQModel")
    assert qframe.verify(out, tiny_llama).problems == []
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section == json.loads((out / "quantize_config.json").read_text())
    assert section["desc_act"] == (name == "actorder")
    own = qframe.quantize(tiny_llama, recipe, out=tmp_path / "own", format="qframe")
    before, ours = StoredModel.open(out), StoredModel.open(own.folder)
    (out / "qframe.json").unlink()
    after = StoredModel.open(out)
    assert after.layout.name == version
    assert after.outlines.keys() == before.outlines.keys() == ours.outlines.keys()
    for layer_name, layer in ours.layers():
        assert torch.equal(before.layer(layer_name).weight(), layer.weight())
        assert torch.equal(after.layer(layer_name).weight(), layer.weight())
        assert after.outlines[layer_name].info == ours.outlines[layer_name].info
    with torch.no_grad():
        assert torch.equal(qframe.load(out)(IDS).logits, qframe.load(own.folder)(IDS).logits)


def test_an_old_folder_has_only_the_file_beside_config_json_and_is_v1(tiny_llama, tmp_path):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, RECIPES["W4"], out=out, format=V1)
    weights = {name: layer.weight() for name, layer in StoredModel.open(out).layers()}
    (out / "qframe.json").unlink()
    change(out / "config.json", lambda config: config.pop("quantization_config"))
    keys = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
    (out / "quantize_config.json").write_text(json.dumps(keys))
    read = StoredModel.open(out)
    assert read.layout.name == V1
    for name, layer in read.layers():
        assert torch.equal(layer.weight(), weights[name])
    change(out / "config.json", lambda c: c.update(quantization_config={**keys, "bits": 8}))
    with pytest.raises(WeightsError, match="which no layout knows"):
        StoredModel.open(out)
    said = {**keys, "bits": 8, "quant_method": "gptq"}
    change(out / "config.json", lambda c: c.update(quantization_config=said))
    with pytest.raises(WeightsError, match=r"says bits=8, and quantize_config\.json says 4"):
        StoredModel.open(out)


def test_a_file_of_another_layout_is_not_carried_over(tiny_llama, tmp_path):
    (tiny_llama / "quantize_config.json").write_text("{}")
    qframe.quantize(tiny_llama, RECIPES["W4"], out=tmp_path / "out")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    (tiny_llama / "quantize_config.json").unlink()


def test_a_converted_folder_is_the_one_that_is_written_at_once(tiny_llama, tmp_path):
    """There and back too: the file beside config.json comes and goes."""
    for name, layout in (("a", V2), ("b", "compressed-tensors")):
        qframe.quantize(tiny_llama, RECIPES["W4"], out=tmp_path / name, format=layout)
    convert(tmp_path / "b", V2, tmp_path / "c")
    convert(tmp_path / "c", "compressed-tensors", tmp_path / "d")
    for one, other in (("a", "c"), ("b", "d")):
        files = sorted(file.name for file in (tmp_path / one).iterdir())
        assert files == sorted(file.name for file in (tmp_path / other).iterdir())
        assert ("quantize_config.json" in files) == (one == "a")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / one / name).read_bytes() == (tmp_path / other / name).read_bytes()
    assert qframe.verify(tmp_path / "c", tiny_llama).problems == []


def test_layers_that_differ_and_those_that_are_left_are_named(tiny_llama, tmp_path):
    qframe.quantize(tiny_llama, RECIPES["mixed"], out=tmp_path / "out", format=V2)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["bits"] == 4
    dynamic = section["dynamic"]
    assert dynamic[r"+:^model\.layers\.0\.mlp\.down_proj$"] == {
        "bits": 8,
        "group_size": 32,
        "sym": True,
    }
    assert dynamic[r"-:^model\.layers\.1\.self_attn\.o_proj$"] == {}
    assert sorted(pattern[:2] for pattern in dynamic) == ["+:"] * 4 + ["-:"] * 2
    assert section["modules_in_block_to_quantize"] == [
        [
            "mlp.down_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "self_attn.k_proj",
            "self_attn.q_proj",
            "self_attn.v_proj",
        ]
    ]
    assert not section["lm_head"]
    recipe = {**RECIPES["W4"], "ignore": ["model.layers.0.self_attn.o_proj"]}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "one", format=V2)
    section = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert list(section["dynamic"]) == [r"-:^model\.layers\.0\.self_attn\.o_proj$"]
    assert "modules_in_block_to_quantize" not in section  # other blocks have that layer
    assert section["lm_head"]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"scheme": "NF4"}, "it has integers with num_bits of 2, 3, 4, 8"),
        ({"scheme": {"num_bits": 5, "group_size": 32}}, "it has integers with num_bits of"),
        ({"scheme": {"group_size": 48}}, "group_size=48 does not divide the 64 columns"),
        ({"scheme": {"strategy": "tensor"}}, "use group_size: -1, one for each row"),
        ({"scheme": "W4A8"}, "activations are int8 per token; it quantizes weights alone"),
        ({"method": "hadamard", "scheme": {"group_size": 32}}, "its input is rotated; take"),
        ({"scheme": {"group_size": 32, "scale_dtype": "e8m0"}}, "use scale_dtype: float16"),
        ({"scheme": {"group_size": 32, "symmetric": False}}, "or format 'gptq_v2'"),
    ],
)
def test_what_it_cannot_express_is_said_before_any_work(tiny_llama, tmp_path, recipe, reason):
    with pytest.raises(UnsupportedError, match="cannot express") as caught:
        qframe.pipeline.plan_job(tiny_llama, {"method": "rtn", **recipe}, format=V1)
    assert reason in str(caught.value)
    assert "q_proj" in str(caught.value)


def test_sizes_that_readers_do_not_take_are_objected_to():
    scheme = Scheme(num_bits=4, group_size=8)
    for rows, columns in [(40, 64), (64, 40), (1, 64)]:
        info = LayerInfo(name="a.b", rows=rows, columns=columns)
        said = LAYOUTS[V2].objections([outline_of(HOST, info, scheme)])
        assert "are no multiple of 32; ignore these layers; layers: a.b" in said[0]
    info = LayerInfo(name="a.b", rows=64, columns=64, kind="Conv1D")
    assert "weights of Conv1D" in LAYOUTS[V2].objections([outline_of(HOST, info, scheme)])[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda c: c.update(checkpoint_format="gptq_v3"), "'gptq_v3' is not known"),
        (lambda c: c.update(is_marlin_format=True), "'marlin' is not known"),
        (lambda c: c.update(bits=5), "bits=5 of layer 'model.layers.0"),
        (lambda c: c.update(bits="4"), "bits='4' of layer"),
        (lambda c: c.update(bits=8), "qweight|qzeros|g_idx should be"),
        (lambda c: c.update(group_size=16), "qzeros should be torch.int32"),
        (lambda c: c.update(group_size=0), "group_size"),
        (lambda c: c.update(sym="yes"), "sym must be true or false"),
        (lambda c: c.update(checkpoint_format="gptq"), "those of checkpoint_format 'gptq_v2'"),
        (lambda c: c.update(dynamic=[]), "no error"),
        (lambda c: c.update(dynamic={"-:q_proj": {}}), "no error"),  # not from its beginning on
        (lambda c: c.update(dynamic={".*": {"bits": 4}, ".*k_proj": {"bits": 8}}), "no error"),
        (lambda c: c.update(dynamic=["a"]), "dynamic must map"),
        (lambda c: c.update(dynamic={"+:(": {}}), "no regular expression"),
        (lambda c: c.update(dynamic={"-:.*q_proj": {}}), "says that layer .*q_proj' is not"),
        (lambda c: c.update(dynamic={".*q_proj": 3}), "must be an object"),
        (lambda c: c.update(dynamic={".*q_proj": {"bits": 7}}), "bits=7 of layer"),
        (lambda c: c.update(quant_method="fbgemm"), "'fbgemm', which no layout knows"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tiny_llama, tmp_path, how, message):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, RECIPES["W4"], out=out, format=V2)
    (out / "qframe.json").unlink()
    (out / "quantize_config.json").unlink()
    change(out / "config.json", lambda config: how(config["quantization_config"]))
    if message == "no error":
        assert len(list(StoredModel.open(out).layers())) == 14
        return
    with pytest.raises((WeightsError, VerifyError), match=message):
        dict(StoredModel.open(out).layers())


@pytest.mark.parametrize(
    ("part", "how", "message"),
    [
        ("scales", lambda t: t.double(), "scales of dtype F64"),
        ("qweight", lambda t: t.long(), r"qweight should be I32 with two axes, got I64 \[6, 96\]"),
        ("qweight", lambda t: t.flatten(), r"with two axes, got I32 \[576\]"),
        ("qweight", lambda t: t[:-1], "5 words hold no whole number of 3-bit codes"),
        ("qweight", lambda t: t[:-3], "qzeros should be torch.int32"),
        ("g_idx", lambda t: t + 99, "group index in"),
    ],
)
def test_a_layer_that_is_stored_otherwise_is_refused(tiny_llama, tmp_path, part, how, message):
    out, name = tmp_path / "out", "model.layers.1.mlp.up_proj"
    recipe = {"method": "rtn", "scheme": {"num_bits": 3, "group_size": 32}}
    qframe.quantize(tiny_llama, recipe, out=out, format=V2)
    (out / "qframe.json").unlink()
    tensors = load_file(out / "model.safetensors")
    tensors[f"{name}.{part}"] = how(tensors[f"{name}.{part}"]).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"'{name}'.*{message}"):
        dict(StoredModel.open(out).layers())


@pytest.mark.parametrize("part", ["scales", "g_idx", "qzeros"])
def test_a_folder_without_a_part_of_a_layer_is_refused(tiny_llama, tmp_path, part):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, RECIPES["W4"], out=out, format=V2)
    (out / "qframe.json").unlink()
    tensors = load_file(out / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"'model.layers.1.mlp.up_proj': {part} missing"):
        dict(StoredModel.open(out).layers())


# Readers of others ------------------------------------------------------------------------------


@given(case=cases())
def test_gptqmodel_dequantizes_to_the_same_values(case):
    """Its own torch kernel, which has zero points as gptq_v2 has them and converts those of v1."""
    kernel = imported("gptqmodel.nn_modules.qlinear.torch", "gptqmodel")
    model = imported("gptqmodel.utils.model", "gptqmodel")
    layout, outline, layer = case
    scheme, info = outline.scheme, outline.info
    kind = "bfloat16" if scheme.scale_dtype == "bfloat16" else "float16"
    assume(scheme.scale_dtype != "float32" and scheme.group_size in (None, 16, 32))
    theirs = kernel.TorchLinear(
        bits=scheme.num_bits,
        group_size=scheme.group_size or -1,
        sym=scheme.symmetric,
        desc_act=layer.packed.group_index is not None,
        in_features=info.columns,
        out_features=info.rows,
    )
    for part, tensor in layout.pack(layer).items():
        setattr(theirs, part, tensor.clone())
    if layout.offset:
        model.convert_gptq_v1_to_v2_format_module(theirs, scheme.num_bits, torch.int32)
    # It multiplies in the dtype of scales: what is exact in float32 is rounded once.
    assert torch.equal(theirs.dequantize_weight().T, layer.weight().to(getattr(torch, kind)))


@given(case=packed_layers((2, 3, 4, 8), (32, 64), dtypes=("float16",), index=False))
def test_auto_round_dequantizes_to_the_same_values(case):
    """Its layers for v1 and v2 have float16 scales; multiplied with the identity, they are W."""
    outline, layer = case
    scheme, info = outline.scheme, outline.info
    layout = LAYOUTS[V1] if scheme.symmetric else LAYOUTS[V2]
    module = "qlinear_torch_zp" if scheme.symmetric else "qlinear_torch"
    theirs = imported(f"auto_round_extension.torch.{module}", "auto-round").QuantLinear(
        scheme.num_bits, scheme.group_size or -1, info.columns, info.rows, bias=False
    )
    # With g_idx it computes no more outputs than it has inputs.
    tensors = {part: t for part, t in layout.pack(layer).items() if part != "g_idx"}
    theirs.load_state_dict(tensors)
    values = theirs(torch.eye(info.columns, dtype=torch.float32)).T
    assert torch.equal(values, layer.weight().half().float())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["W4", "actorder", "W4 asymmetric"])
def test_transformers_has_the_same_weights(tiny_llama, tmp_path, name):
    """Through GPTQModel and optimum."""
    imported("gptqmodel", "gptqmodel")
    imported("optimum.gptq", "optimum")
    qframe.quantize(tiny_llama, RECIPES[name], out=tmp_path / "out", format=V2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    ours = StoredModel.open(tmp_path / "out")
    for layer_name, layer in ours.layers():
        found = theirs.get_submodule(layer_name).dequantize_weight().T
        assert torch.equal(found, layer.weight().half())
