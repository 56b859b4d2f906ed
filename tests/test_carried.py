"""What no codes stand for, cast to 16 bits: to the nearest number, before anything else happens."""

import pytest
import torch
import transformers

import qframe
from qframe import CalibrationData, Host
from qframe.calibration import prepare
from qframe.errors import NonFiniteError, RecipeError
from qframe.memory import folder_size
from qframe.pipeline import plan_job
from qframe.recipe import CalibrationSettings
from qframe.weights import ModelFolder
from tests.folds.nets import Block, Plugin, Stack, data, quantized, seeded
from tests.test_verify import checkpoint_tensors, hashed_anew, save

CALIBRATION = {"num_calibration_samples": 6, "max_seq_length": 24}
W4 = {"num_bits": 4, "group_size": 8}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
METHODS = {
    "rtn": {},
    "gptq": {"calibration": CALIBRATION, "keep_statistics": True},
    "awq+gptq": {"calibration": CALIBRATION, "keep_statistics": True},
}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A Llama whose norms and embeddings are no numbers of 16 bits."""
    folder = tiny.write_llama(tmp_path_factory.mktemp("llama") / "model")
    tensors = checkpoint_tensors(folder)
    generator = torch.Generator().manual_seed(3)
    for name in tensors:
        if "norm" in name or "embed" in name:
            tensors[name] = 1 + torch.randn(tensors[name].shape, generator=generator)
    save(folder, tensors)
    return folder


def run(folder, method, out, dtype, **changes):
    recipe = {"method": method, "scheme": W4, **METHODS[method], "carried_dtype": dtype}
    return qframe.quantize(folder, {**recipe, **changes}, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_cast_folder_is_that_of_the_cast_model(model, tiny, tmp_path, method, dtype):
    """The other model has the same numbers for what is carried, and the same weights."""
    run(model, method, tmp_path / "out", dtype)
    other = tiny.write_llama(tmp_path / "other")
    tensors = checkpoint_tensors(model)
    carried = [name for name in tensors if "_proj" not in name]
    assert len(carried) > 4
    for name in carried:
        tensors[name] = tensors[name].to(DTYPES[dtype])
    save(other, tensors)
    run(other, method, tmp_path / "plain", None)
    mine, its = checkpoint_tensors(tmp_path / "out"), checkpoint_tensors(tmp_path / "plain")
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert {mine[name].dtype for name in carried} == {DTYPES[dtype]}
    report = qframe.verify(tmp_path / "out", model)
    assert (report.problems, report.unchecked) == ([], [])


def test_what_is_stored_is_what_was_said_before(model, tmp_path):
    recipe = {"method": "rtn", "scheme": W4}
    sizes = {}
    for dtype in (None, "bfloat16"):
        size = folder_size(plan_job(model, {**recipe, "carried_dtype": dtype}))
        run(model, "rtn", tmp_path / str(dtype), dtype)
        written = ModelFolder(tmp_path / str(dtype)).tensors.values()
        assert size.quantized + size.carried == sum(tensor.bytes for tensor in written)
        sizes[dtype] = size
    assert sizes[None].carried == 2 * sizes["bfloat16"].carried
    assert sizes[None].quantized == sizes["bfloat16"].quantized


def test_a_carried_tensor_that_was_changed_is_named(model, tmp_path):
    out = tmp_path / "out"
    run(model, "rtn", out, "bfloat16")
    tensors = checkpoint_tensors(out)
    name = "model.embed_tokens.weight"
    tensors[name][5, 3] = tensors[name][5, 3] * (1 + 2**-7)
    save(out, tensors)
    with hashed_anew(out):
        problems = qframe.verify(out, model).problems
    assert [(p.kind, p.name) for p in problems] == [("tensor", name)]


def test_a_number_that_does_not_fit_is_an_error_that_names_it(model, tiny, tmp_path):
    other = tiny.write_llama(tmp_path / "other")
    tensors = checkpoint_tensors(model)
    tensors["model.norm.weight"][7] = 70_000.0
    save(other, tensors)
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight'.* 7e\+04, .*use 'bfloat16'"):
        run(other, "rtn", tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    run(other, "rtn", tmp_path / "out", "bfloat16")
    net = seeded(Block())
    net.norm.weight.data[1] = 70_000
    with pytest.raises(NonFiniteError, match=r"'norm.weight'.*use 'bfloat16'"):
        qframe.quantize(net, {"method": "rtn", "scheme": W4, "carried_dtype": "float16"})


def test_a_weight_that_two_modules_share_is_cast_for_both(model, tmp_path):
    changes = {"ignore": [], "min_coverage": 0}
    result = run(model, "rtn", tmp_path / "out", "bfloat16", **changes)
    assert [event.layer for event in result.report.events if event.kind == "untied"] == ["lm_head"]
    tensors = checkpoint_tensors(tmp_path / "out")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.weight_packed" in tensors
    assert qframe.verify(tmp_path / "out", model).problems == []


@pytest.mark.parametrize("method", ["awq", "stretch"])
def test_a_module_keeps_its_dtypes_and_gets_the_values(tmp_path, method):
    host = Host.discover()
    host.add(Plugin(), "stretch")
    net = seeded(Stack(Block(), Block()))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    out = tmp_path / "out"
    result = quantized(net, host, method=method, carried_dtype="bfloat16", out=out)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    stored = checkpoint_tensors(out)
    for name, value in result.module.state_dict().items():
        if name.endswith(("norm.weight", "bias")):
            assert (value.dtype, stored[name].dtype) == (torch.float32, torch.bfloat16)
            assert torch.equal(value, stored[name].float())
    loaded = qframe.load(out, seeded(Stack(Block(), Block()), seed=9))
    x = data().held_out[0][0]
    assert torch.equal(loaded(x), result.module(x))
    assert qframe.verify(out, net, host=host).problems == []


def test_biases_of_quantized_layers_are_cast(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64)
    seeded(transformers.GPT2LMHeadModel(config)).save_pretrained(tmp_path / "gpt2")
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs = CalibrationData(inputs=[(t,) for t in tokens.split(1)])
    recipe = {"method": "gptq", "scheme": W4, "carried_dtype": "bfloat16"}
    qframe.quantize(tmp_path / "gpt2", recipe, out=tmp_path / "out", calibration=inputs)
    made, source = ModelFolder(tmp_path / "out"), checkpoint_tensors(tmp_path / "gpt2")
    biases = [name for name in made.tensors if name.endswith("bias")]
    assert len(biases) > 8
    assert all(torch.equal(made.read(name), source[name].bfloat16()) for name in biases)
    assert qframe.verify(tmp_path / "out", tmp_path / "gpt2").problems == []


def test_a_folder_and_its_module_give_the_same(model, tmp_path):
    run(model, "awq+gptq", tmp_path / "out", "bfloat16", keep_statistics=False)
    module = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = prepare(model, CalibrationSettings(**CALIBRATION))
    recipe = {"method": "awq+gptq", "scheme": W4, "carried_dtype": "bfloat16"}
    result = qframe.quantize(module, recipe, calibration=inputs)
    mine, its = qframe.load(tmp_path / "out").state_dict(), result.module.state_dict()
    for name in mine:
        assert torch.equal(mine[name], its[name]), name


def test_dtypes_that_are_none_are_refused():
    with pytest.raises(RecipeError, match="carried_dtype"):
        qframe.Recipe.parse({"carried_dtype": "int8"}, "here")
