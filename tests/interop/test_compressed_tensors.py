"""Folders in the layout of compressed-tensors, as that package and transformers read them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qframe
from qframe import Host, LayerInfo, Scheme
from qframe.errors import UnsupportedError, VerifyError, WeightsError
from qframe.packing import PackedWeight
from qframe.stored import StoredLayer
from qframe.stored_model import StoredModel, outline_of
from qframe_plugins.layouts.compressed_tensors import CompressedTensors, format_of
from qframe_plugins.rounders.rtn import RTN
from tests.interop.packed import change, damaged, refused_or_valued

compressed_tensors = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402
from transformers import AutoModelForCausalLM, CompressedTensorsConfig  # noqa: E402

HOST = Host.discover()
LAYOUT = CompressedTensors()
FLOAT8 = {"FP8_DYNAMIC", "FP8", "W8A16_FP8", "MXFP8", "MXFP4", "NVFP4"}


@st.composite
def schemes(draw):
    if draw(st.booleans()):
        name = draw(st.sampled_from([*sorted(FLOAT8), "W8A8", "W8A8_STATIC"]))
        return Scheme.preset(name)
    fields = {
        "num_bits": draw(st.integers(2, 8)),
        "symmetric": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    }
    fields["strategy"] = draw(st.sampled_from(["tensor", "channel", "group"]))
    if fields["strategy"] == "group":
        fields["group_size"] = draw(st.sampled_from([1, 3, 8, 16, 32]))
    if fields["symmetric"]:
        fields["scale_rule"] = draw(st.sampled_from(["full", "restricted"]))
    if draw(st.booleans()):
        fields["input_activations"] = {}
    return Scheme.parse(fields, "drawn")


@st.composite
def layers(draw):
    """Return (outline, layer) that the layout has no objection to."""
    scheme = draw(schemes())
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    columns = groups * (scheme.group_size or draw(st.sampled_from([1, 5, 8, 31, 33])))
    info = LayerInfo(name="block.layer", rows=rows, columns=columns)
    outline = outline_of(HOST, info, scheme)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = np.float32(rng.normal(size=(rows, columns)))
    weight *= np.float32(2.0) ** rng.integers(-9, 9, (rows, 1))
    if draw(st.booleans()):
        weight[:, : columns // 2] = 0
    problem = qframe.RoundingProblem(
        name="block.layer", weight=torch.from_numpy(weight), scheme=scheme, grid=outline.grid
    )
    packed = PackedWeight.pack(RTN().round(problem, rng), scheme, outline.grid)
    inputs = None
    if outline.input_grid is not None:
        from qframe.activations import InputQuantizer

        activations = scheme.input_activations
        step = None if activations.dynamic else torch.tensor([0.125])
        inputs = InputQuantizer(activations, outline.input_grid, step)
    return outline, StoredLayer(packed, inputs=inputs)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.double(), other[name].double()), name


@given(layers())
def test_what_is_packed_is_unpacked(case):
    outline, layer = case
    assert LAYOUT.objections([outline]) == []
    tensors = LAYOUT.pack(layer)
    shapes = {part: (str(t.dtype), tuple(t.shape)) for part, t in tensors.items()}
    names = {**{"I8": "int8", "I32": "int32", "I64": "int64", "U8": "uint8", "F32": "float32"}}
    names |= {"F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
    said = {p: (f"torch.{names[d]}", s) for p, (d, s) in LAYOUT.shapes(outline).items()}
    assert shapes == said
    assert shapes.keys() <= set(LAYOUT.parts)
    same(LAYOUT.unpack(tensors, outline).tensors(), layer.tensors())


@given(layers())
def test_the_package_reads_the_same_values(case):
    """Its own decompressor, given the section that we write."""
    outline, layer = case
    scheme = outline.scheme
    group = LAYOUT.config([outline], [])["config_groups"]["group_0"]
    read = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    tensors = dict(LAYOUT.pack(layer))
    if scheme.scale_dtype in ("float16", "bfloat16"):  # else it computes in 16 bits
        tensors["weight_scale"] = tensors["weight_scale"].float()
    # Exponents become bfloat16 there, whose numbers end at 2^-133.
    assume(scheme.scale_dtype != "e8m0" or bool((tensors["weight_scale"] > 20).all()))
    theirs = compressor.decompress(tensors, read)["weight"]
    assert torch.equal(theirs.float(), layer.weight())


@given(layers())
def test_the_package_packs_the_same_words(case):
    """Its own compressor, given our weight and scales, stores what we store."""
    outline, layer = case
    scheme = outline.scheme
    kind = format_of(scheme)
    assume(kind in ("pack-quantized", "int-quantized"))
    group = LAYOUT.config([outline], [])["config_groups"]["group_0"]
    read = QuantizationScheme.model_validate(group)
    own = LAYOUT.pack(layer)
    unpacked = layer.packed.unpack()
    half = 0 if scheme.symmetric else 1 << scheme.num_bits - 1
    zero_point = (unpacked.zero_point - half).to(torch.int8)
    scale = unpacked.scale
    if scheme.strategy == "tensor":
        zero_point, scale = zero_point.flatten(), scale.flatten()
    state = {"weight": layer.weight(), "weight_scale": scale, "weight_zero_point": zero_point}
    theirs = BaseCompressor.get_value_from_registry(kind).compress(state, read)
    codes = theirs.keys() - {"weight_scale"}
    assert codes == own.keys() - {"weight_scale", "input_scale"}
    same({part: theirs[part] for part in codes}, {part: own[part] for part in codes})


CASES = {
    "W4": {"num_bits": 4, "group_size": 32},
    "W3": {"num_bits": 3, "group_size": 16},
    "W8": "W8A16",
    "tensor": {"num_bits": 5, "strategy": "tensor"},
    "FP8 weights": "W8A16_FP8",
    "FP8": "FP8_DYNAMIC",
}
IDS = torch.arange(48)[None] * 5 % 256


@pytest.mark.parametrize("scheme", CASES.values(), ids=CASES)
def test_transformers_loads_it_and_computes_the_same_logits(tiny_llama, tmp_path, scheme):
    result = qframe.quantize(tiny_llama, {"method": "rtn", "scheme": scheme}, out=tmp_path / "out")
    assert result.report.storage.startswith("compressed-tensors, for transformers")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, qframe.load(tmp_path / "out")(IDS).logits)
    assert qframe.verify(tmp_path / "out", tiny_llama).problems == []


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_transformers_reads_zero_points(tiny_llama, tmp_path, bits):
    scheme = {"num_bits": bits, "group_size": 32, "symmetric": False, "scale_dtype": "float32"}
    qframe.quantize(tiny_llama, {"method": "rtn", "scheme": scheme}, out=tmp_path / "out")
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=config
    )
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, qframe.load(tmp_path / "out")(IDS).logits)


@pytest.mark.parametrize("scheme", ["MXFP8", "MXFP4", "NVFP4"])
def test_transformers_has_the_same_weights_in_bfloat16(tiny_llama, tmp_path, scheme):
    qframe.quantize(tiny_llama, {"method": "rtn", "scheme": scheme}, out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    theirs(IDS)  # its layers are decompressed when they run
    ours = StoredModel.open(tmp_path / "out")
    for name, layer in ours.layers():
        assert torch.equal(theirs.get_submodule(name).weight.float(), layer.weight())


@pytest.mark.parametrize("scales", ["float16", "bfloat16"])
def test_scales_of_another_dtype_than_the_network_are_said_to_be_rounded(
    tiny_llama, tmp_path, scales
):
    tensors = load_file(tiny_llama / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    change(tiny_llama / "config.json", lambda config: config.update(dtype="bfloat16"))
    recipe = {"method": "rtn", "scheme": {"group_size": 32, "scale_dtype": scales}}
    result = qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs(IDS)
    same_weights = all(
        torch.equal(theirs.get_submodule(name).weight, layer.weight().bfloat16())
        for name, layer in StoredModel.open(tmp_path / "out").layers()
    )
    said = "round scales of float16 to the network's bfloat16" in result.report.storage
    assert (said, same_weights) == ((True, False) if scales == "float16" else (False, True))


def test_activations_of_eight_bits_differ_by_what_their_rounding_costs(tiny_llama, tmp_path):
    """Each side rounds an input to within half its step (B1.b), and multiplies the same codes."""
    qframe.quantize(tiny_llama, {"method": "rtn", "scheme": "W8A8"}, out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = StoredModel.open(tmp_path / "out")
    seen = {}
    for name in ours.outlines:
        theirs.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, (args[0], out))
        )
    with torch.no_grad():
        theirs(IDS)
    for name, layer in ours.layers():
        x, out = seen[name]
        weight = layer.weight()
        mine = layer.multiply(x, weight)
        reach = x.double().abs().amax(-1, keepdim=True)
        halves = reach / 127 / 2 + reach / 127.5 / 2
        apart = halves * weight.double().abs().sum(1)
        columns = weight.shape[1]
        # Both multiply in float32 what they rounded, which is at most (1 + 1/254) |x|.
        size = (x.double().abs() + halves) @ weight.double().abs().T
        rounded = 2 * qframe_gamma(columns + 3) * size
        assert bool(((mine.double() - out.double()).abs() <= apart + rounded).all())
        assert not torch.equal(mine, out)


def qframe_gamma(n):
    from qframe import bounds

    return bounds.gamma(n)


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"scheme": "NF4"}, "'nf4 symmetric, group 64, minmax' is in no format of it"),
        ({"scheme": {"group_size": 48}}, "group_size=48 does not divide the 64 columns"),
        ({"method": "hadamard", "scheme": {"group_size": 32}}, "its input is rotated; take"),
        ({"method": "llm_int8", "scheme": "W8A8"}, "some columns are kept in 16 bits"),
        (
            {"method": "gptq", "scheme": {"group_size": 32}, "options": {"actorder": "group"}},
            "use actorder: static",
        ),
        (
            {"scheme": {"num_bits": 4, "group_size": 32, "input_activations": {"num_bits": 4}}},
            "activations are int4 per token",
        ),
    ],
)
def test_what_it_cannot_express_is_said_before_any_work(tiny_llama, tmp_path, recipe, reason):
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="cannot express") as caught:
        qframe.pipeline.plan_job(tiny_llama, recipe, format="compressed-tensors")
    assert reason in str(caught.value)
    assert "q_proj" in str(caught.value)
    with pytest.raises(UnsupportedError):
        qframe.quantize(tiny_llama, recipe, out=out, format="compressed-tensors")
    assert not out.exists()
    job = qframe.pipeline.plan_job(tiny_llama, recipe)
    assert job.layout.name == "qframe"
    assert reason in "\n".join(job.not_usual)


def test_a_scale_that_nothing_divides_by_is_for_qframe_alone(tiny_llama, tmp_path):
    recipe = {"method": "awq", "scheme": {"group_size": 32}, "fold_scales": False}
    recipe["calibration"] = {"num_calibration_samples": 4, "max_seq_length": 32}
    result = qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    assert "for qframe alone" in result.report.storage
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "qframe"
    assert qframe.verify(tmp_path / "out", tiny_llama).problems == []
    other = qframe.quantize(tiny_llama, recipe, out=tmp_path / "own", format="qframe")
    assert other.report.storage == "qframe, for qframe"
    a, b = qframe.load(tmp_path / "out"), qframe.load(tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(a(IDS).logits, b(IDS).logits)
    with pytest.raises(UnsupportedError, match=r"divided by a scale of each column.*q_proj"):
        qframe.quantize(tiny_llama, recipe, out=tmp_path / "no", format="compressed-tensors")
    assert not (tmp_path / "no").exists()


def test_scales_that_are_folded_are_read_by_others(tiny_llama, tmp_path):
    recipe = {"method": "awq+gptq", "scheme": {"group_size": 32}}
    recipe["calibration"] = {"num_calibration_samples": 4, "max_seq_length": 32}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, qframe.load(tmp_path / "out")(IDS).logits)


def test_layers_of_several_schemes_are_named(tiny_llama, tmp_path):
    recipe = {
        "scheme": {"group_size": 32},
        "overrides": {"re:.*down_proj": {"num_bits": 8}, "re:.*v_proj": {"format": "fp8_e4m3"}},
        "ignore": ["lm_head", "model.layers.0.self_attn.o_proj"],
    }
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["format"] == "mixed-precision"
    assert sorted(len(g["targets"]) for g in section["config_groups"].values()) == [2, 2, 9]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, qframe.load(tmp_path / "out")(IDS).logits)


# Folders that others wrote ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*CASES.values(), "W8A8", "MXFP4", "NVFP4"], ids=str)
def test_a_folder_without_a_manifest_is_read_by_what_others_write(tiny_llama, tmp_path, scheme):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, {"method": "rtn", "scheme": scheme}, out=out)
    before = StoredModel.open(out)
    (out / "qframe.json").unlink()
    after = StoredModel.open(out)
    assert after.manifest is None
    assert after.outlines.keys() == before.outlines.keys()
    for name, layer in after.layers():
        assert torch.equal(layer.weight(), before.layer(name).weight())
        assert after.outlines[name].info == before.outlines[name].info
    with torch.no_grad():
        assert bool(torch.isfinite(qframe.load(out)(IDS).logits).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("config_groups"), "config_groups must say"),
        (lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), "'marlin-24' is not"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["lm_head"]), "no group's targets"),
        (lambda c: c["config_groups"]["group_0"].update(weights=None), "weights must say"),
        (
            lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"),
            "strategy",
        ),
        (
            lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=8),
            "weight_packed should be",
        ),
        (lambda c: c.update(quant_method="fbgemm"), "'fbgemm', which no layout knows"),
        (
            lambda c: c["config_groups"]["group_0"].update(output_activations={}),
            "output_activations are not known",
        ),
        (lambda c: c["config_groups"]["group_0"].update(targets=["re:("]), "no regular expression"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tiny_llama, tmp_path, change, message):
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, {"method": "rtn", "scheme": {"group_size": 32}}, out=out)
    (out / "qframe.json").unlink()
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises((WeightsError, VerifyError), match=message):
        dict(StoredModel.open(out).layers())


@given(data=st.data())
def test_a_damaged_layer_is_refused_or_has_values(data):
    outline, layer = data.draw(layers())
    refused_or_valued(LAYOUT, damaged(data.draw, LAYOUT.pack(layer)), outline)
