"""Layers that run on kernels: which kernels, what comes out, and what is said of the others."""

import logging

import pytest
import torch

import qframe
from qframe import CalibrationData, Unsupported
from qframe.contracts import OpCall
from qframe.dispatch import Dispatch, in_order
from qframe.errors import UnsupportedError
from qframe.host import Host
from qframe.kernel_layer import KernelLinear
from qframe.kernels import OPS
from qframe.stored import QuantizedLinear
from tests.tiny import write_llama

CALIBRATION = {"num_calibration_samples": 4, "max_seq_length": 32}
GROUPS = {"num_bits": 3, "group_size": 16, "symmetric": False}
W8A8 = {"method": "llm_int8", "scheme": "W8A8"}
RECIPES = {
    "W4A16": ({"method": "rtn", "scheme": {"num_bits": 4, "group_size": 16}}, "linear_weight_only"),
    "rotated": ({"method": "hadamard", "scheme": GROUPS}, "linear_weight_only"),
    "W8A8": ({"method": "rtn", "scheme": "W8A8"}, "linear_int8"),
    "scaled": ({"method": "smoothquant", "scheme": "W8A8", "fold_scales": False}, "linear_int8"),
    "kept": (
        {"method": "llm_int8", "scheme": "W8A8", "options": {"threshold": 2.0}},
        "linear_int8",
    ),
    "dynamic": (
        {
            "method": "llm_int8",
            "scheme": "W8A8",
            "options": {"threshold": 2.0, "outliers": "dynamic"},
        },
        "linear_int8_outliers",
    ),
    "W4A8": ({"method": "rtn", "scheme": "W4A8"}, "linear_int8_groups"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "MODEL"
    write_llama(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """Return name of a recipe -> folder, made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            recipe, _ = RECIPES[name]
            made[name] = tmp_path_factory.mktemp(name) / "OUT"
            qframe.quantize(model, {**recipe, "calibration": CALIBRATION}, out=made[name])
        return made[name]

    return folder


def allowed(layer, x):
    """Return how far two ways of computing a layer may lie apart, [tokens, rows].

    Each has the exact answer of the weights that it multiplies, but for roundings: of what is done
    to the input, of a scale and a code of the input, of a weight, and of sums of all products.
    """
    stored = layer.stored
    z = x.double() if stored.transform is None else stored.transform.move(x.double())
    columns = z.shape[-1]
    size = stored.weight().double().abs()
    magnitude = z.abs() @ size.T
    if stored.transform is not None and stored.transform.rotation is not None:
        magnitude = x.double().abs().sum(-1, keepdim=True) * size.sum(1)
    roundings = 2 * qframe.bounds.gamma(2 * columns + 40) * magnitude
    if stored.inputs is None:
        return roundings
    # A code near a half may be another one: then the input differs by a step.
    scale = z.abs().amax(-1, keepdim=True) / 127
    near = torch.from_numpy(qframe.bounds.doubtful((z / scale).numpy()))
    return roundings + scale * (near.double() @ size.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
def test_inputs_of_16_bits_give_what_is_rounded_once(name, dtype, quantized):
    """Whether a kernel takes them, or the layer makes them float32 and rounds at the end."""
    network = qframe.load(quantized(name), kernels="numba")
    layers = [module for module in network.modules() if isinstance(module, KernelLinear)]
    taken = {dtype in layer._short for layer in layers}
    assert taken == {name in ("W4A16", "W8A8", "W4A8")}
    for layer in layers[:3]:
        x = torch.randn(2, 3, layer.in_features).to(dtype)
        made = layer(x)
        assert made.dtype == dtype
        assert torch.equal(made, layer(x.float()).to(dtype))


def test_a_bias_is_added_before_outputs_are_rounded(quantized):
    network = qframe.load(quantized("W4A16"), kernels="numba")
    first = next(module for module in network.modules() if isinstance(module, KernelLinear))
    bias = torch.randn(first.out_features)
    layer = KernelLinear(first.stored, Dispatch(host_kernels(), "numba"), bias)
    x = torch.randn(3, layer.in_features).to(torch.bfloat16)
    wanted = (first(x.float()) + bias).to(torch.bfloat16)
    assert torch.equal(layer(x), wanted)


def host_kernels():
    host = Host.discover()
    return [host.get("kernel", name) for name in host.names("kernel")]


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_computes_what_it_did_without_kernels(name, backend, quantized):
    plain, fast = qframe.load(quantized(name)), qframe.load(quantized(name), kernels=backend)
    torch.manual_seed(0)
    layers = [(n, m) for n, m in fast.named_modules() if isinstance(m, KernelLinear)]
    assert len(layers) == sum(type(m) is QuantizedLinear for m in plain.modules())
    for path, layer in layers:
        before = plain.get_submodule(path)
        wanted = "numba" if backend == "auto" else backend
        assert layer.kernels[-1] == f"{RECIPES[name][1]}/{wanted}"
        for count in (0, 1, 9):
            x = torch.randn(2, count, layer.in_features)
            made, expected = layer(x), before(x)
            assert made.shape == expected.shape
            assert made.dtype == x.dtype
            distance = (made.double() - expected.double()).abs()
            assert bool((distance <= allowed(before, x)).all())


def test_a_bias_is_added(tmp_path):
    torch.manual_seed(0)
    before = torch.nn.Sequential(torch.nn.Linear(32, 16))
    data = CalibrationData.from_tensors([torch.randn(8, 32)], held_out=[torch.randn(4, 32)])
    recipe = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}, "min_coverage": 0}
    qframe.quantize(before, recipe, out=tmp_path / "OUT", calibration=data)
    network = torch.nn.Sequential(torch.nn.Linear(32, 16))
    made = qframe.load(tmp_path / "OUT", network, kernels="auto")[0]
    assert isinstance(made, KernelLinear)
    assert made.bias.any()
    assert torch.equal(made(torch.zeros(3, 32)), made.bias.expand(3, 16))


def test_activations_of_16_bits_come_out_in_16_bits(quantized):
    layer = qframe.load(quantized("W4A16"), kernels="auto").model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_what_is_stored_is_as_it_was(quantized):
    plain, fast = qframe.load(quantized("W4A8")), qframe.load(quantized("W4A8"), kernels="numba")
    fast(torch.arange(9)[None])
    before, after = plain.state_dict(), fast.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_layers_that_no_kernel_serves_go_on_and_are_named(model, tmp_path, caplog):
    out = tmp_path / "OUT"
    qframe.quantize(model, {"method": "rtn", "scheme": "FP8_DYNAMIC"}, out=out)
    with caplog.at_level(logging.WARNING, "qframe"):
        network = qframe.load(out, kernels="auto")
    assert "layers run without kernels, model.layers.0" in caplog.text
    assert "no integers" in caplog.text
    plain = qframe.load(out)
    layers = [(n, m) for n, m in network.named_modules() if type(m) is QuantizedLinear]
    assert len(layers) == sum(type(m) is QuantizedLinear for m in plain.modules()) > 0
    with torch.inference_mode():
        for name, layer in layers:
            x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
            assert torch.equal(layer(x), plain.get_submodule(name)(x))


def test_a_backend_that_is_not_there_is_an_error_that_names_the_others(quantized):
    with pytest.raises(
        UnsupportedError, match="'nunba'; choose auto or one of cuda, numba, ptx_host, torch"
    ):
        qframe.load(quantized("W8A8"), kernels="nunba")


def test_kernels_and_dequantized_weights_exclude_each_other(quantized):
    with pytest.raises(ValueError, match="either dequantize=True or kernels"):
        qframe.load(quantized("W8A8"), kernels="auto", dequantize=True)


# Dispatch -------------------------------------------------------------------------------------

CALL = OpCall(op="linear_int8", device="cpu", dtype="float32", scheme=None, shape=(1, 2, 3))


class Fake:
    op = "linear_int8"

    def __init__(self, backend, priority=0, refuses=""):
        self.backend, self.priority, self.refuses = backend, priority, refuses

    def supports(self, call):
        return Unsupported(self.refuses) if self.refuses else None


def test_the_highest_priority_is_taken_and_the_first_of_equals():
    low, high, also = Fake("low"), Fake("high", 5), Fake("also", 5)
    assert Dispatch([low, high, also]).choose(CALL) is high
    assert Dispatch([low, also, high]).choose(CALL) is also


def test_one_that_simulates_is_taken_by_name_and_never_by_auto():
    simulated = Fake("simulated", 99)
    simulated.by_name_only = True
    assert Dispatch([simulated, Fake("plain")]).choose(CALL).backend == "plain"
    assert [each.backend for each in in_order([simulated, Fake("plain")])] == ["plain"]
    assert Dispatch([simulated, Fake("plain")], "simulated").choose(CALL) is simulated
    with pytest.raises(UnsupportedError, match="simulated: it is taken only where"):
        Dispatch([simulated]).choose(CALL)


def test_one_that_does_not_serve_is_passed_over_and_that_is_logged_once(caplog):
    dispatch = Dispatch([Fake("slow"), Fake("fast", 5, "too narrow")])
    with caplog.at_level(logging.INFO, "qframe"):
        assert [dispatch.choose(CALL).backend for _ in range(3)] == ["slow"] * 3
    assert caplog.text.count("linear_int8/fast does not serve a call: too narrow") == 1


def test_a_backend_asked_for_by_name_is_not_replaced_by_another():
    dispatch = Dispatch([Fake("slow"), Fake("fast", 5, "too narrow")], "fast")
    with pytest.raises(UnsupportedError, match=r"backend 'fast' computes.*linear_int8/fast: too n"):
        dispatch.choose(CALL)


def test_an_error_has_every_reason():
    dispatch = Dispatch([Fake("one", 0, "too wide"), Fake("other", 5, "too narrow")])
    with pytest.raises(UnsupportedError, match=r"other: too narrow; linear_int8/one: too wide"):
        dispatch.choose(CALL)


def test_an_operation_without_kernels_is_an_error():
    call = OpCall(op="hadamard", device="cpu", dtype="float32", scheme=None, shape=(1, 2, 2))
    with pytest.raises(UnsupportedError, match="it has no kernel for this operation"):
        Dispatch([Fake("one")]).choose(call)


def test_every_operation_has_a_kernel_on_every_machine():
    host = Host.discover()
    served = {host.get("kernel", name).op for name in host.names("kernel") if "torch" in name}
    assert served == OPS.keys()
