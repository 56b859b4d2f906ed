"""Norms that divide: the function stays, within B4.i and B9.a where anything is rounded."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import bounds, fold_search
from qframe.folds import Fold
from qframe.weights import ModelFolder
from tests.folds.nets import (
    KINDS,
    NAMES,
    W4,
    WIDTH,
    Block,
    Plain,
    Stack,
    data,
    double,
    quantized,
    scales,
    seeded,
)

# The norm -------------------------------------------------------------------------------------


def magnitudes(draw, generator, low=-12, high=12):
    exponents = torch.tensor(draw(st.lists(st.integers(low, high), min_size=WIDTH, max_size=WIDTH)))
    return torch.ldexp(1 + torch.rand(WIDTH, generator=generator), exponents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stored", "computing"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@given(data=st.data())
def test_a_folded_norm_returns_the_quotient_up_to_its_own_roundings(kind, stored, computing, data):
    """Whatever the dtype that it is stored in: a rounding of w / s is made up for."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    signs = torch.randint(0, 2, (WIDTH,), generator=generator) * 2 - 1
    weight = (magnitudes(data.draw, generator) * signs).to(stored)
    weight[data.draw(st.integers(0, WIDTH - 1))] = 0
    norm = KINDS[kind]()
    bias = None
    if kind == "layer":
        bias = torch.randn(WIDTH, generator=generator).to(stored)
        bias = bias if stored == torch.float32 else bias * 0
    fold = Fold("norm", weight, bias)
    assert fold.objection() == ""
    folded = fold.folded(magnitudes(data.draw, generator))
    assert {tensor.dtype for tensor in folded.tensors.values()} == {stored}
    x = torch.randn(9, WIDTH, generator=generator).to(computing)

    def run(tensors):
        for key, value in tensors.items():
            norm._parameters[key.removeprefix("norm.")] = nn.Parameter(value.to(computing))
        return double(norm(x))

    before = run({"norm.weight": weight} | ({} if bias is None else {"norm.bias": bias}))
    after = run(folded.tensors)
    scale = double(folded.scale)
    allowed = bounds.folded_norm(
        before, scale, 0 if bias is None else double(bias), dtype=NAMES[computing]
    )
    assert bounds.ratio(after - before / scale, allowed) <= 1


@given(data=st.data())
def test_what_is_left_for_the_layers_is_what_was_asked_up_to_a_rounding_of_the_norm(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    for dtype, name in NAMES.items():
        asked = magnitudes(data.draw, generator, -6, 6)
        weight = (1 + torch.rand(WIDTH, generator=generator)).to(dtype)
        folded = Fold("norm", weight).folded(asked)
        s, exact = double(folded.scale), double(asked)
        # The quotient in float32, its rounding, what stays, and one more: w / v.
        lost = (1 + bounds.gamma(3)) * (1 + bounds.gamma(1, bounds.UNIT[name])) - 1
        assert bounds.ratio(s - exact, lost * exact) <= 1


@pytest.mark.parametrize("dtype", NAMES)
def test_channels_whose_scale_does_not_survive_stay_as_they_are(dtype):
    info = torch.finfo(dtype)
    weight = torch.tensor([0.0, -0.0, 1.0, info.max, info.smallest_normal, 2.0]).to(dtype)
    small, large = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 4
    asked = torch.tensor([3.0, 3.0, large, small, large, 4.0])
    folded = Fold("norm", weight).folded(asked)
    stored = folded.tensors["norm.weight"]
    assert torch.equal(folded.scale[[0, 1, 3, 4]], torch.ones(4))
    assert torch.equal(stored[[0, 1, 3, 4]], weight[[0, 1, 3, 4]])
    assert torch.equal(torch.signbit(stored), torch.signbit(weight))
    assert folded.scale[5] == 4
    assert stored[5] == 0.5
    assert bool((torch.isfinite(stored) & torch.isfinite(folded.scale)).all())


def test_a_bias_in_16_bits_cannot_be_divided_and_one_of_zeros_can():
    weight, bias = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
    assert Fold("norm", weight, bias).objection() == ""
    bias[2] = 1
    assert Fold("norm", weight, bias).objection() == "comes from a norm with a bias in bfloat16"
    assert Fold("norm", weight.double()).objection() == "comes from a norm in float64"


# The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stretch", "smoothquant", "awq", "awq+gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_network_is_the_one_that_divides_at_run_time(host, kind, method):
    """B4.i for the norm, one rounding for the quotient, B9.a for two sums and a bias."""
    net = seeded(Plain(KINDS[kind]()))
    net.norm.weight.data[5] = 0
    made = quantized(net, host, method=method).module
    assert scales(made) == set()
    assert not torch.equal(made.norm.weight, net.norm.weight)
    before, scale = double(net.norm(data().inputs[0][0])), double(net.norm.weight)
    scale = np.where(scale == 0, 1, scale / np.where(scale == 0, 1, double(made.norm.weight)))
    scale = scale.astype(np.float32)
    bias = getattr(net.norm, "bias", None)
    one = bounds.folded_norm(before, scale, 0 if bias is None else double(bias))
    unit, tiny = bounds.UNIT["float32"], bounds.ETA["float32"]
    quotient = before / scale
    apart = one + unit * np.abs(quotient) + tiny
    weight = np.abs(double(made.linear.weight))
    reached = (np.abs(quotient) + apart) @ weight.T + np.abs(double(made.linear.bias))
    allowed = apart @ weight.T + 2 * bounds.accumulate(reached, WIDTH + 1)

    after = double(made(data().inputs[0][0]))
    made.norm.load_state_dict(net.norm.state_dict())
    made.linear.input_scale = torch.from_numpy(scale)
    assert bounds.ratio(after - double(made(data().inputs[0][0])), allowed) <= 1


MOVES = {"input_signs", "input_kept", "weight_kept", "input_threshold"}
LLM_INT8 = {"scheme": "W8A8", "options": {"threshold": 2.0}}
EXACT = {
    "doubling": ({}, set()),
    "doubling+gptq": ({}, set()),
    "doubling+hadamard": ({"scheme": "W8A8"}, {"input_signs"}),
    "doubling+hadamard+gptq": ({}, {"input_signs"}),
    "doubling+llm_int8": (LLM_INT8, {"input_kept", "weight_kept"}),
    "doubling+hadamard+llm_int8": (LLM_INT8, {"input_signs", "input_kept", "weight_kept"}),
    "doubling+llm_int8+gptq": (
        {"scheme": "W8A8", "options": {"threshold": 2.0, "outliers": "dynamic"}},
        {"input_threshold"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "given"), EXACT.items(), ids=EXACT)
def test_powers_of_two_change_no_bit_whatever_comes_after_them(host, kind, method, given):
    changes, parts = given
    net = seeded(Plain(KINDS[kind]()))
    folded = quantized(net, host, method=method, **changes)
    plain = quantized(net, host, method=method, **changes, fold_scales=False)
    mine, its = folded.module.linear.state_dict(), plain.module.linear.state_dict()
    assert its.keys() - mine.keys() == {"input_scale"}
    assert parts == mine.keys() & MOVES
    assert all(torch.equal(value, its[name]) for name, value in mine.items())
    for (x,) in data().inputs:
        assert torch.equal(folded.module(x), plain.module(x))
    kept = [c for c in folded.report.layers[0].certificates if c.claim == "function preserved"]
    assert kept == [c for c in plain.report.layers[0].certificates if c.claim == kept[0].claim]


@pytest.mark.parametrize("scheme", ["W8A8", W4], ids=["activations", "weights"])
def test_layers_after_a_fold_are_calibrated_on_what_the_folded_network_gives_them(host, scheme):
    """While the pass runs the norm is as it was, so its layers still have to divide."""
    net = seeded(Stack(Block(), Block()))
    given = {"method": "doubling+gptq", "scheme": scheme}
    folded, plain = quantized(net, host, **given), quantized(net, host, **given, fold_scales=False)
    assert len(folded.report.folding.folded) == 4
    for mine, its in zip(folded.report.layers, plain.report.layers, strict=True):
        assert (mine.error, mine.held_out_error) == (its.error, its.held_out_error)
    mine, its = folded.module.state_dict(), plain.module.state_dict()
    packed = [name for name in mine if name.endswith("weight_packed")]
    assert all(torch.equal(mine[name], its[name]) for name in packed)


class Curved(Block):
    """The last layer reads what no layer can divide."""

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(torch.tanh(self.one(h)) * torch.sigmoid(self.two(h)))


def test_what_is_stored_and_counted_and_said(host, tmp_path):
    net = seeded(Stack(Curved(), Curved()))
    result = quantized(net, host, out=tmp_path / "out")
    layers = {layer.name: layer for layer in result.report.layers}
    stored = ModelFolder(tmp_path / "out").tensors
    assert {n for n in stored if n.endswith("input_scale")} == {
        "layers.0.last.input_scale",
        "layers.1.last.input_scale",
    }
    assert scales(result.module) == {"layers.0.last", "layers.1.last"}
    assert layers["layers.0.one"].folded == layers["layers.0.two"].folded == "layers.0.norm"
    assert layers["layers.0.last"].folded is None
    one, last = layers["layers.1.one"], layers["layers.1.last"]
    assert (last.bits_per_weight - one.bits_per_weight) * WIDTH**2 == 32 * WIDTH
    assert result.report.folding.folded == {
        "layers.0.one": "layers.0.norm",
        "layers.1.one": "layers.1.norm",
    }
    assert result.report.folding.line() == (
        "2 of 4 input scales are folded into norms and layers, the others stay in the layers: 2, "
        "as the input comes from neither a norm nor a quantized layer that could divide"
    )
    assert all(c.holds for layer in layers.values() for c in layer.certificates)
    record = json.loads((tmp_path / "out" / "qframe_report.json").read_text())
    assert record["folding"]["left"] == result.report.folding.left
    assert record["layers"][0]["folded"] == "layers.0.norm"


@pytest.mark.parametrize("method", ["rtn", "hadamard", "gptq"])
def test_without_scales_nothing_is_looked_for(host, method, monkeypatch):
    monkeypatch.setattr(fold_search, "find", None)
    report = quantized(seeded(Stack(Block())), host, method=method).report
    assert report.folding is None


def test_scales_stay_where_the_recipe_says_so(host, monkeypatch):
    monkeypatch.setattr(fold_search, "find", None)
    net = seeded(Stack(Block()))
    result = quantized(net, host, fold_scales=False)
    assert result.report.folding is None
    assert scales(result.module) == {"layers.0.one", "layers.0.two", "layers.0.last"}
    assert torch.equal(result.module.layers[0].norm.weight, net.layers[0].norm.weight)
    assert torch.equal(result.module.layers[0].one.input_scale, torch.linspace(0.3, 3, WIDTH))


def test_without_calibration_no_input_is_known(host):
    result = qframe.quantize(seeded(Stack(Block())), {"method": "stretch", "scheme": W4}, host=host)
    assert set(result.report.folding.left.values()) == {fold_search.UNSEEN}
    assert len(scales(result.module)) == 3


def test_the_given_network_and_its_norms_are_as_before(host):
    net = seeded(Stack(Block()))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quantized(net, host)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
