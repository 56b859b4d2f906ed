"""Scales folded into norms: the function stays, nothing else is folded, and verify tells.

What is compared with a bound is compared with B4.i and B9.a; all else bit for bit.
"""

import dataclasses
import filecmp
import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import CalibrationData, Capabilities, Host, bounds, fold_search, hookimpl
from qframe.folds import Fold
from qframe.stored import QuantizedLinear
from qframe.weights import ModelFolder
from tests.test_verify import checkpoint_tensors, hashed_anew, rewrite_manifest, save

WIDTH = 32
W4 = {"num_bits": 4, "group_size": 8}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Scales that are no powers of two, and need no statistics."""

    name: str = "stretch"
    needs: frozenset = frozenset()
    capabilities: Capabilities = dataclasses.field(default=Capabilities())

    def rewrite(self, problem, rng):
        return problem.scaled(torch.linspace(0.3, 3, problem.columns))


@dataclasses.dataclass(frozen=True)
class Doubling(Stretch):
    """Scales that are powers of two: nothing is ever rounded."""

    name: str = "doubling"

    def rewrite(self, problem, rng):
        return problem.scaled(2.0 ** (torch.arange(problem.columns) % 5 - 2))


class Plugin:
    @hookimpl
    def qframe_outlier_handlers(self):
        return [Stretch(), Doubling()]


@pytest.fixture(scope="module")
def host():
    made = Host.discover()
    made.add(Plugin(), "stretch")
    return made


class RMSNorm(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * self.normed(x)

    def normed(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class OnePlus(RMSNorm):
    def forward(self, x):
        return (1 + self.weight) * self.normed(x)


class Block(nn.Module):
    """Two layers that read a norm, and one that does not."""

    norm_class = RMSNorm

    def __init__(self):
        super().__init__()
        self.norm = self.norm_class()
        self.one, self.two, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.one(h) * torch.sigmoid(self.two(h)))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def seeded(module, seed=0, dtype=torch.float32):
    """Give every parameter random values; weights of norms lie around 1, on both sides of 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            values = 1 + values
        parameter.data = values.to(dtype)
    return module


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 20, WIDTH, generator=generator)
    x[..., 3] *= 30
    return CalibrationData.from_tensors(list(x[1:].to(dtype)), [x[0].to(dtype)])


def quantized(net, host, inputs=None, **changes):
    recipe = {"method": "stretch", "scheme": W4, "min_coverage": 0, **changes}
    out, threads = recipe.pop("out", None), recipe.pop("threads", None)
    inputs = inputs or data()
    return qframe.quantize(net, recipe, calibration=inputs, host=host, out=out, threads=threads)


def scales(module):
    """Return the names of layers that divide when they run."""
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, QuantizedLinear)]
    return {name for name, layer in layers if layer.input_scale is not None}


def double(tensor):
    return tensor.detach().double().numpy()


# The norm -------------------------------------------------------------------------------------


def magnitudes(draw, generator, low=-12, high=12):
    exponents = torch.tensor(draw(st.lists(st.integers(low, high), min_size=WIDTH, max_size=WIDTH)))
    return torch.ldexp(1 + torch.rand(WIDTH, generator=generator), exponents)


KINDS = {
    "rms": RMSNorm,
    "layer": lambda: nn.LayerNorm(WIDTH),
    "torch rms": lambda: nn.RMSNorm(WIDTH),
}


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


class Plain(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.linear(self.norm(x))


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


def test_what_is_stored_and_counted_and_said(host, tmp_path):
    net = seeded(Stack(Block(), Block()))
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
        "2 of 4 input scales are folded into norms, the others stay in the layers: 2, as the "
        "input is not the output of a norm"
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


# What is no fold ------------------------------------------------------------------------------


class Residual(Block):
    def forward(self, x):
        h = self.norm(x)
        return h + self.last(self.one(h) * torch.sigmoid(self.two(h)))


class Routed(Block):
    """A router that is not quantized, and of which only the larger of two outputs is seen."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        nn.init.zeros_(self.router.weight)

    def forward(self, x):
        h = self.norm(x)
        first = self.router(h).argmax(-1, keepdim=True) == 0
        return x + torch.where(first, self.one(h), self.last(self.two(h)))


class OnePlusBlock(Block):
    norm_class = OnePlus


class Squared(Block):
    class norm_class(RMSNorm):  # noqa: N801 - stands in for the class of the base
        def forward(self, x):
            return self.weight.square() * self.normed(x)


class Twice(Block):
    """One norm before two groups."""

    def forward(self, x):
        x = x + self.one(self.norm(x))
        return x + self.last(self.two(self.norm(x)))


class Tied(Block):
    """Two norms with one weight."""

    def __init__(self):
        super().__init__()
        self.other = RMSNorm()
        self.other.weight = self.norm.weight

    def forward(self, x):
        x = x + self.one(self.norm(x))
        return x + self.last(self.two(self.other(x)))


class Silent(Block):
    """A channel that is zero on all tokens tells nothing."""

    def forward(self, x):
        x = x.index_fill(-1, torch.tensor([7]), 0.0)
        h = self.norm(x)
        return self.last(self.one(h) * torch.sigmoid(self.two(h)))


class Sometimes(Block):
    """A layer reads the norm too, but not on the input that is looked at."""

    def forward(self, x):
        h = self.norm(x)
        y = self.one(h)
        return x + (self.last(self.two(h.clone())) if float(x[0, 0]) < 0 else y)


class Again(Block):
    """A layer of the group reads something else as well."""

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.two(self.one(h) * self.two(h)))


class Opaque(Block):
    """What it returns cannot be compared."""

    class Found:
        def __init__(self, x):
            self.x = x

    def forward(self, x):
        h = self.norm(x)
        self.seen = Opaque.Found(self.last(self.one(h) * torch.sigmoid(self.two(h))))
        return self.seen


class OpaqueStack(Stack):
    def forward(self, x):
        for block in self.layers:
            x = block(x).x
        return x


class Leaking(Block):
    """Nothing that it returns depends on what also reads the norm, but something inside does."""

    def __init__(self):
        super().__init__()
        self.meter = nn.Sigmoid()

    def forward(self, x):
        h = self.norm(x)
        self.meter(h)
        return x + self.last(self.one(h) * torch.sigmoid(self.two(h)))


class InPlace(Block):
    """What it is given is not what it was given."""

    def forward(self, x):
        h = self.norm(x)
        x[..., 0] += 1
        return self.last(self.one(h) * torch.sigmoid(self.two(h)))


class Caching(Block):
    """It reads what it has put aside before, as attention does with keys."""

    class Cache:
        rows = None

    def forward(self, x, cache):
        h = self.norm(x)
        y, z = self.one(h), self.two(h)
        cache.rows = z if cache.rows is None else cache.rows
        return x + self.last(y * torch.sigmoid(cache.rows))


class CachingStack(Stack):
    def forward(self, x):
        for block in self.layers:
            x = block(x, Caching.Cache())
        return x


class Cloned(Block):
    """The layers read a copy: the norm is not found."""

    def forward(self, x):
        h = self.norm(x).clone()
        return x + self.last(self.one(h) * torch.sigmoid(self.two(h)))


NO_FOLDS = {
    "residual": (lambda: Stack(Residual()), {}, fold_search.OTHERS),
    "router": (lambda: Stack(Routed()), {"ignore": ["re:.*router"]}, fold_search.OTHERS),
    "ignored layer": (lambda: Stack(Block()), {"ignore": ["re:.*two"]}, fold_search.OTHERS),
    "1 + w": (lambda: Stack(OnePlusBlock()), {}, fold_search.OTHERS),
    "w^2": (lambda: Stack(Squared()), {}, fold_search.OTHERS),
    "again": (lambda: Stack(Again()), {}, fold_search.OTHERS),
    "opaque": (lambda: OpaqueStack(Opaque()), {}, fold_search.OTHERS),
    "leaking": (lambda: Stack(Leaking()), {}, fold_search.OTHERS),
    "in place": (lambda: Stack(InPlace()), {}, fold_search.STATE),
    "cache": (lambda: CachingStack(Caching()), {}, fold_search.STATE),
    "twice": (lambda: Stack(Twice()), {}, fold_search.AGAIN),
    "tied": (lambda: Stack(Tied()), {}, fold_search.TIED),
    "silent": (lambda: Stack(Silent()), {}, fold_search.ZERO),
    "sometimes": (lambda: Stack(Sometimes()), {}, fold_search.IDLE),
    "cloned": (lambda: Stack(Cloned()), {}, fold_search.NO_NORM),
}


@pytest.mark.parametrize(("make", "changes", "why"), NO_FOLDS.values(), ids=NO_FOLDS)
def test_what_is_no_fold_is_none_and_the_report_says_why(host, make, changes, why):
    net = seeded(make())
    for name, parameter in net.named_parameters():
        if "router" in name and parameter.ndim == 2:  # so weak that scaling turns no choice
            parameter.data *= 2.0**-20
    result = quantized(net, host, **changes)
    folding = result.report.folding
    assert folding.folded == {}
    assert folding.left["layers.0.one"] == why
    unfolded = quantized(net, host, **changes, fold_scales=False)
    x = data().held_out[0][0]
    ours, theirs = result.module(x.clone()), unfolded.module(x.clone())
    ours, theirs = (getattr(y, "x", y) for y in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert scales(result.module) == scales(unfolded.module)


class Shared(Stack):
    """Two blocks, each with its norm, of one weight."""

    def __init__(self):
        super().__init__(Block(), Block())
        self.layers[1].norm.weight = self.layers[0].norm.weight


def test_a_weight_that_norms_of_two_blocks_share_is_left(host):
    net = Shared()
    seeded(net)
    net.layers[1].norm.weight = net.layers[0].norm.weight
    folding = quantized(net, host).report.folding
    assert folding.folded == {}
    assert folding.left["layers.1.one"] == fold_search.TIED


class Picky(Block):
    """Of one make with others, but only some of them add what the norm returned."""

    def __init__(self, *, adds):
        super().__init__()
        self.adds = adds

    def forward(self, x):
        h = self.norm(x)
        return (h if self.adds else x) + self.last(self.one(h) * torch.sigmoid(self.two(h)))


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_every_block_is_tried_and_not_one_of_each_make(host, order):
    net = seeded(Stack(*(Picky(adds=adds) for adds in order)))
    folding = quantized(net, host).report.folding
    good, bad = (order.index(adds) for adds in (False, True))
    assert folding.folded == {f"layers.{good}.one": f"layers.{good}.norm"}
    assert folding.left[f"layers.{bad}.one"] == fold_search.OTHERS


class Pair(Block):
    """A norm whose output is added, and one that is a fold."""

    def __init__(self):
        super().__init__()
        self.second = RMSNorm()

    def forward(self, x):
        h = self.norm(x)
        x = h + self.one(h)
        return x + self.last(self.two(self.second(x)))


def test_a_fold_beside_one_that_is_none_is_found(host):
    folding = quantized(seeded(Stack(Pair())), host).report.folding
    assert folding.folded == {"layers.0.two": "layers.0.second"}
    assert folding.left["layers.0.one"] == fold_search.OTHERS


class Dropped(Block):
    """Dropout returns the very tensor, where nothing is dropped."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x):
        h = self.dropout(self.norm(x))
        return x + self.last(self.one(h) * torch.sigmoid(self.two(h)))


def test_a_module_that_hands_on_the_norms_tensor_is_no_reader(host):
    assert len(quantized(seeded(Stack(Dropped())), host).report.folding.folded) == 1


def test_parameters_are_back_even_when_the_trial_fails():
    block = seeded(Block())
    before = {name: parameter for name, parameter in block.named_parameters()}
    values = {name: value.clone() for name, value in block.state_dict().items()}
    trial = fold_search._Trial("norm", block.norm, (block.one, block.two))

    def interrupted():
        with fold_search._scaled([trial]):
            assert not torch.equal(block.norm.weight, values["norm.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(before[name] is parameter for name, parameter in block.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in block.state_dict().items())


def test_every_channel_is_tried_and_none_like_its_neighbours():
    powers = fold_search._powers(48)
    assert bool((powers != 1).all())
    assert bool((powers[1:] != powers[:-1]).all())
    assert bool((torch.frexp(powers).mantissa == 0.5).all())


def test_digests_tell_values_shapes_dtypes_and_kinds_apart():
    x = torch.arange(6.0)
    values = [x, x.bfloat16(), x.reshape(2, 3), x + 1, [x], (x,), {"x": x}, (x, None), (x, 1), -x]
    digests = [fold_search.digest(value) for value in values]
    assert None not in digests
    assert len(set(digests)) == len(values)
    assert fold_search.digest([x, object()]) is None
    assert fold_search.digest({"x": x.clone()}) == fold_search.digest({"x": x})


class Repeated(nn.Module):
    """A block that runs twice; its norm is folded once, when nothing runs any more."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for number in (0, 1, 0, 1):
            x = self.layers[number](x)
        return x


def test_a_module_whose_blocks_run_again_is_folded_in_the_end(host):
    net = seeded(Repeated())
    folded, plain = quantized(net, host), quantized(net, host, fold_scales=False)
    assert len(folded.report.folding.folded) == 2
    again = [event.layer for event in folded.report.events if event.kind == "runs again"]
    assert again == [event.layer for event in plain.report.events if event.kind == "runs again"]
    twin = unfolded_again(folded.module, net)
    x = data().inputs[0][0]
    both = double(folded.module(x)), double(twin(x)), double(plain.module(x))
    # Four blocks are chaotic in their last bits: near, against what quantizing the network moves.
    assert np.abs(both[0] - both[1]).max() < np.abs(both[2] - double(net(x))).max() / 2**8


def unfolded_again(module, net):
    """Return a copy that divides at run time, by what lies between its norms and the first ones."""
    import copy

    twin = copy.deepcopy(module)
    for mine, its in zip(twin.layers, net.layers, strict=True):
        scale = its.norm.weight.detach() / mine.norm.weight.detach()
        mine.norm.load_state_dict(its.norm.state_dict())
        mine.one.input_scale = mine.two.input_scale = scale
    return twin


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
    """Llama folders whose norms are not all ones, by the dtype of their norms."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tiny.write_llama(tmp_path_factory.mktemp("llama") / "model")
        tensors = checkpoint_tensors(folder)
        generator = torch.Generator().manual_seed(2)
        for name in tensors:
            if "norm" in name:
                values = 1 + torch.randn(tensors[name].shape, generator=generator)
                tensors[name] = values.to(dtype)
        save(folder, tensors)
        made[dtype] = folder
    return made


def run(model, method, out, **changes):
    recipe = {"method": method, "calibration": CALIBRATION, **METHODS[method]}
    threads = changes.pop("threads", None)
    return qframe.quantize(model, {**recipe, **changes}, out=out, threads=threads)


NORMS = {f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_keeps_the_norms_dtype_and_can_be_verified(models, tmp_path, method, dtype):
    result = run(models[dtype], method, tmp_path / "out")
    assert set(result.report.folding.folded.values()) == NORMS
    made, source = ModelFolder(tmp_path / "out"), ModelFolder(models[dtype])
    for norm in NORMS:
        assert made.tensors[f"{norm}.weight"].dtype == source.tensors[f"{norm}.weight"].dtype
        assert not torch.equal(made.read(f"{norm}.weight"), source.read(f"{norm}.weight"))
    scaled = {n for n in made.tensors if n.endswith("input_scale")}
    assert {n.split(".")[-2] for n in scaled} == {"o_proj", "down_proj"}
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
    assert set(result.report.folding.folded.values()) == NORMS
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
    assert made.report.folding.folded == {"layers.0.one": "layers.0.norm"}
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
        ({"folded": None}, "disagree on which norm"),
        ({"folded": "model.norm"}, "disagree on which norm"),
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
        ("self_attn.o_proj", "model.norm", "divides by the scale of its input, and so does it"),
    ],
)
def test_norms_that_cannot_be_are_found_by_the_structure(folder, group, norm, message):
    rewrite_manifest(folder, all_of(f"model.layers.0.{group}", folded=norm))
    report = qframe.verify(folder)
    assert report.problems
    assert all(message in p.message for p in report.problems)


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
