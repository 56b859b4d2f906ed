"""Rotations against their matrix, and what several handlers do to an input one after another."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qframe
from qframe import Recipe, Rewrite, Rotation, bounds, reference_ops
from qframe.calibration import CalibrationData
from qframe.errors import UnsupportedError
from qframe.memory import bits_per_weight, stored_bits_per_weight
from qframe.pipeline import plan_job
from qframe.stored import QuantizedLinear
from qframe.transforms import InputTransform
from qframe.weights import ModelFolder

COLUMNS = st.sampled_from([1, 2, 3, 8, 12, 64, 96])


def drawn(columns, seed):
    return Rotation.drawn(columns, np.random.default_rng(seed))


def rows(columns, seed, count=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns)) * np.exp(2 * rng.normal(size=columns))
    return torch.from_numpy(x.astype(np.float32))


def norms(x, rotation):
    return np.linalg.norm(np.float64(x).reshape(len(x), *rotation.signs.shape), axis=2)


@given(COLUMNS, st.integers(0, 2**32))
def test_butterflies_are_the_matrix(columns, seed):
    rotation, x = drawn(columns, seed), rows(columns, seed)
    signs = rotation.signs.flatten().numpy()
    wanted = reference_ops.hadamard(x.numpy(), signs, rotation.block)
    error = norms(rotation.apply(x).double().numpy() - wanted, rotation)
    assert bounds.ratio(error, bounds.hadamard(norms(x, rotation), rotation.block)) <= 1


@given(COLUMNS, st.integers(0, 2**32))
def test_undoing_gives_the_rows_back(columns, seed):
    rotation, x = drawn(columns, seed), rows(columns, seed)
    there = bounds.hadamard(norms(x, rotation), rotation.block)
    back = bounds.hadamard(norms(x, rotation) + there, rotation.block)
    error = norms((rotation.undo(rotation.apply(x)) - x).numpy(), rotation)
    assert bounds.ratio(error, there + back) <= 1


@given(COLUMNS, st.integers(0, 2**32), st.booleans(), st.booleans())
def test_a_layer_computes_the_same_from_what_becomes_of_its_input(columns, seed, scales, rotates):
    x, weight = rows(columns, seed), rows(columns, seed + 1, count=3)
    rng = np.random.default_rng(seed)
    scale = torch.from_numpy(np.exp2(rng.integers(-3, 4, columns)).astype(np.float32))
    rotation = drawn(columns, seed) if rotates else None
    transform = InputTransform(scale if scales else None, rotation)
    made = transform.rewrite(weight)
    error = (x.double() @ weight.double().T).numpy() - (
        transform.apply(x).double() @ made.double().T
    ).numpy()
    used = scale.numpy() if scales else np.ones(columns)
    block = rotation.block if rotates else 1
    allowed = bounds.rotated_output(x.numpy(), weight.numpy(), used, block)
    if not rotates:
        allowed = bounds.rewrite_output(x.numpy(), weight.numpy(), used)
    assert bounds.ratio(error, allowed) <= 1


@given(COLUMNS, st.integers(0, 2**32))
def test_what_is_stored_is_the_same_transform(columns, seed):
    scale = torch.rand(columns, generator=torch.Generator().manual_seed(0)) + 1
    transform = InputTransform(scale, drawn(columns, seed))
    stored = InputTransform.stored(transform.tensors())
    x = rows(columns, seed)
    assert stored.fault(columns) == ""
    assert torch.equal(stored.apply(x), transform.apply(x))
    assert transform.tensors()["input_signs"].dtype == torch.int8


def test_nothing_stored_is_no_transform():
    assert InputTransform.stored({}) is None


def test_blocks_are_the_largest_power_of_two_that_divides_the_columns():
    assert [drawn(columns, 0).block for columns in (576, 1536, 7, 1, 4096)] == [64, 512, 1, 1, 4096]


def test_the_bits_do_not_depend_on_strides():
    rotation, x = drawn(96, 3), rows(96, 3, count=8)
    strided = torch.stack((x, x), 1)[:, 1]
    assert torch.equal(rotation.apply(x), rotation.apply(strided))
    assert torch.equal(rotation.apply(x)[2:3], rotation.apply(x[2:3]))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (InputTransform(torch.ones(3)), "input_scale should be float32 [4], got torch.float32 [3]"),
        (InputTransform(torch.zeros(4)), "input_scale must be positive and finite"),
        (InputTransform(rotation=Rotation(torch.ones(4))), "signs should be float32 [blocks"),
        (InputTransform(rotation=Rotation(torch.ones(1, 8))), "4 in all, got torch.float32 [1, 8]"),
        (InputTransform(rotation=Rotation(torch.zeros(1, 4))), "signs should be +1 or -1"),
    ],
)
def test_what_cannot_be_is_named(transform, message):
    assert message in transform.fault(4)


def test_a_block_that_is_no_power_of_two_is_named():
    assert "power of two, got 3" in InputTransform(rotation=Rotation(torch.ones(2, 3))).fault(6)


# One handler after another --------------------------------------------------------------------


def rewrite(scale=None, rotation=None, columns=8):
    scale = torch.ones(columns) if scale is None else scale
    return Rewrite(weights={}, input_scale=scale, rotation=rotation)


def test_scales_multiply_and_a_rotation_comes_last():
    one, two = torch.full((8,), 2.0), torch.full((8,), 3.0)
    rotation = drawn(8, 0)
    total = InputTransform().then(rewrite(one), "a").then(rewrite(two), "b")
    assert total.scale.tolist() == [6.0] * 8
    total = total.then(rewrite(rotation=rotation), "c")
    assert total.rotation is rotation
    assert total.scale.tolist() == [6.0] * 8
    assert InputTransform().then(rewrite(rotation=rotation), "c").scale is None
    assert InputTransform().then(rewrite(one, rotation), "d").scale is one


@pytest.mark.parametrize("after", [rewrite(torch.full((8,), 2.0)), rewrite(rotation=drawn(8, 1))])
def test_nothing_may_come_after_a_rotation(after):
    total = InputTransform().then(rewrite(rotation=drawn(8, 0)), "first")
    with pytest.raises(UnsupportedError, match="'second' would change channels that a rotation"):
        total.then(after, "second")


# In the pipeline ------------------------------------------------------------------------------


def network():
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(48, 24), torch.nn.ReLU(), torch.nn.Linear(24, 9))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(4, 40, 48, generator=generator)
    x[..., 3] *= 30
    return net, CalibrationData.from_tensors(list(x[1:]), [x[0]])


@pytest.mark.parametrize("method", ["hadamard", "hadamard+gptq", "awq+hadamard+gptq"])
def test_rotated_networks_are_saved_loaded_and_verified(method, tmp_path):
    net, data = network()
    recipe = {
        "method": method,
        "scheme": {"num_bits": 8, "group_size": 8},
        "keep_statistics": "gptq" in method,
    }
    result = qframe.quantize(net, recipe, calibration=data, out=tmp_path / "out")
    for layer in result.report.layers:
        kept = [c for c in layer.certificates if c.claim == "function preserved"]
        assert [c.theorem for c in kept] == ["B4.f"]
        assert all(c.holds for c in layer.certificates)
    loaded = qframe.load(tmp_path / "out", module=network()[0])
    layers = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert [m.input_signs.shape for m in layers] == [(3, 16), (3, 8)]
    divides = [m.input_scale is not None for m in layers]
    assert divides == ["awq" in method, False]  # the first divides for the second
    x = data.held_out[0][0]
    assert torch.equal(loaded(x), result.module(x))
    plain = qframe.load(tmp_path / "out", module=network()[0], dequantize=True)
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    # Eight bits move outputs by far less than they vary.
    with torch.no_grad():
        for made in (loaded(x), plain(x)):
            assert float((made - net(x)).std()) < float(net(x).std()) / 8
    report = qframe.verify(tmp_path / "out")
    assert report.problems == []


@pytest.mark.parametrize("method", ["hadamard", "awq+hadamard+gptq"])
def test_certificates_of_a_rotated_folder_can_be_computed_once_more(tiny_llama, tmp_path, method):
    recipe = {
        "method": method,
        "scheme": {"num_bits": 4, "group_size": 16},
        "calibration": {"num_calibration_samples": 8, "max_seq_length": 32},
        "keep_statistics": "gptq" in method,
    }
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    report = qframe.verify(tmp_path / "out", reference=tiny_llama)
    assert report.problems == []
    assert report.unchecked == []


INT4 = {"num_bits": 4, "group_size": 16, "symmetric": False}


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        *(("rtn", scheme) for scheme in (INT4, "NVFP4", "MXFP8", "NF4")),
        *((method, INT4) for method in ("awq", "hadamard", "awq+hadamard", "smoothquant+awq")),
    ],
)
def test_what_is_stored_is_promised_before(tiny_llama, tmp_path, method, scheme):
    recipe = Recipe.parse(
        {
            "method": method,
            "scheme": scheme,
            "calibration": {"num_calibration_samples": 4, "max_seq_length": 16},
            "fold_scales": False,  # which scales go into norms is not known before
        },
        "test",
    )
    job = plan_job(tiny_llama, recipe)
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out", format="qframe")
    sizes = {name: job.network.layers[name].size for name in job.plan.schemes}
    assert bits_per_weight(job) == stored_bits_per_weight(ModelFolder(tmp_path / "out"), sizes)


def test_a_rotation_keeps_one_loud_channel_from_spoiling_the_others():
    """One weight of a row 2^6 times as large takes all codes of its group."""
    net, data = network()
    net[0].weight.data[:, 7] *= 2.0**6
    scheme = {"num_bits": 4, "group_size": -1}
    plain, turned = (
        qframe.quantize(net, {"method": m, "scheme": scheme}, calibration=data).report.layers[0]
        for m in ("rtn", "hadamard")
    )
    assert turned.error < plain.error


def test_a_handler_after_a_rotation_is_refused():
    net, data = network()
    with pytest.raises(UnsupportedError, match="'awq' cannot come after 'hadamard'"):
        qframe.quantize(net, {"method": "hadamard+awq", "scheme": "W8A16"}, calibration=data)


def test_handlers_that_do_not_say_what_they_do_are_refused_when_they_did_it():
    ones = torch.ones(4)
    rotated = Rewrite(weights={}, input_scale=ones, rotation=Rotation(torch.ones(1, 4)))
    kept = Rewrite(weights={}, input_scale=ones, kept=torch.tensor([1]))
    scaled = Rewrite(weights={}, input_scale=2 * ones)
    with pytest.raises(UnsupportedError, match="'b' would change channels"):
        InputTransform().then(rotated, "a").then(scaled, "b")
    for later in (scaled, rotated, kept):
        with pytest.raises(UnsupportedError, match="'b' comes after one that decides"):
            InputTransform().then(kept, "a").then(later, "b")
    both = InputTransform().then(scaled, "a").then(rotated, "b").then(kept, "c")
    assert both.fault(4) == ""
    assert torch.equal(both.apply(torch.ones(1, 4)), torch.tensor([[1.0, 0, 0, 0]]))
