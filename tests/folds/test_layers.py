"""Scales that the layer before divides by: rows and powers of two, so nothing is rounded."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import Capabilities, Host, fold_search, rounding
from qframe.contracts import RoundingProblem
from qframe.feeder_search import exponents_between
from qframe.feeders import ONE_SCALE, Feeder
from qframe.folds import Division
from qframe.grids import grid_of
from qframe.manifest import DivisionRecord
from qframe.packing import PackedWeight
from qframe.scheme import Scheme
from qframe.stored import FAINTEST, QuantizedLinear, StoredLayer
from qframe.transforms import InputTransform
from tests.folds.nets import WIDTH, Block, RMSNorm, Stack, data, quantized, scales, seeded
from tests.test_verify import checkpoint_tensors, hashed_anew, save

HOST = Host.discover()
SCHEMES = {
    "int4 in groups": Scheme(num_bits=4, group_size=8),
    "int4 asymmetric": Scheme(num_bits=4, group_size=8, symmetric=False),
    "int8 in channels": Scheme(num_bits=8, strategy="channel"),
    "float32 scales": Scheme(num_bits=3, group_size=8, scale_dtype="float32"),
    "mxfp4": Scheme.preset("MXFP4"),
    "nvfp4": Scheme.preset("NVFP4"),
    "fp8": Scheme.preset("FP8_DYNAMIC"),
}


def layer(scheme, generator, *, rows=12, kept=0, size=1.0):
    weight = torch.randn(rows, WIDTH, generator=generator) * size
    grid = grid_of(HOST, scheme)
    problem = RoundingProblem(name="layer", weight=weight, scheme=scheme, grid=grid)
    packed = PackedWeight.pack(rounding.to_nearest(problem), scheme, grid)
    if not kept:
        return StoredLayer(packed)
    columns = torch.arange(kept)
    values = torch.randn(rows, kept, generator=generator).half()
    return StoredLayer(packed, InputTransform(kept=columns), values)


# One layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("name", SCHEMES)
@given(seed=st.integers(0, 2**32), far=st.sampled_from([1, 4, 40]), bias=st.booleans())
def test_divided_rows_are_the_rows_divided_bit_for_bit(name, kept, seed, far, bias):
    generator = torch.Generator().manual_seed(seed)
    stored = layer(SCHEMES[name], generator, kept=kept)
    asked = torch.randint(-far, far + 1, (12,), generator=generator)
    values = torch.randn(12, generator=generator).bfloat16() if bias else None
    folded = Feeder("layer", torch.arange(12), stored, values).folded(2.0 ** asked.float())
    exponents = folded.division.exponents
    assert torch.equal(folded.scale, 2.0 ** exponents.float())
    assert torch.equal(folded.stored.weight() * folded.scale[:, None], stored.weight())
    assert torch.equal(folded.stored.packed.words, stored.packed.words)
    taken = exponents == asked
    assert bool((taken | (exponents == 0)).all())
    assert bool(stored.can_divide(exponents).all())
    if far == 1 and SCHEMES[name].scale_dtype != "e4m3":
        assert bool(taken.all())  # nothing is near the end of its dtype
    if bias:
        divided = folded.tensors["layer.bias"]
        assert divided.dtype == torch.bfloat16
        assert torch.equal(divided.float() * folded.scale, values.float())
    else:
        assert folded.tensors == {}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("int4 in groups", -15, 15), ("mxfp4", -95, 95), ("float32 scales", -95, 95)],
)
def test_rows_whose_scales_leave_their_dtype_keep_them(name, least, most):
    stored = layer(SCHEMES[name], torch.Generator().manual_seed(0))
    good = torch.tensor([0, 1, -1, 2, -2, 3, -3, 0, 0, 0, 0, 0])
    assert bool(stored.can_divide(good).all())
    for far in (least - 30, most + 30):
        exponents = torch.where(torch.arange(12) == 4, far, good)
        assert stored.can_divide(exponents).tolist() == [row != 4 for row in range(12)]
    divided = stored.divided(torch.full((12,), most + 30))
    assert float(divided.weight().abs().max()) < float(stored.weight().abs().max()) * FAINTEST**0.5


@pytest.mark.parametrize("name", ["float32 scales", "mxfp4"])
@pytest.mark.parametrize("power", [-115, -98, 98, 115])
def test_what_was_divided_can_be_multiplied_back(name, power):
    """As `qframe verify` does, near the ends of what scales may be, and beyond."""
    stored = layer(SCHEMES[name], torch.Generator().manual_seed(0), size=2.0**power)
    for sign in (-1, 1):
        asked = sign * torch.arange(12) * 3
        folded = Feeder("layer", torch.arange(12), stored).folded(
            torch.ldexp(torch.ones(12), asked)
        )
        exponents = folded.division.exponents
        assert bool(folded.stored.can_divide(-exponents).all())
        assert torch.equal(folded.stored.divided(-exponents).packed.scale, stored.packed.scale)


def test_kept_weights_and_biases_must_be_divisible_too():
    generator = torch.Generator().manual_seed(0)
    stored = layer(SCHEMES["float32 scales"], generator, kept=2)
    stored.kept[5, 1] = 1 + 2**-10
    exponents = torch.full((12,), 20)
    exponents[:5] = 0
    exponents[6:] = 0
    assert stored.can_divide(exponents).tolist() == [row != 5 for row in range(12)]
    plain = layer(SCHEMES["float32 scales"], generator)
    bias = torch.full((12,), 1 + 2**-10).half()
    folded = Feeder("layer", torch.arange(12), plain, bias).folded(2.0 ** exponents.float())
    assert folded.division.exponents.tolist() == [0] * 12
    assert torch.equal(folded.tensors["layer.bias"], bias)


@given(data=st.data())
def test_a_row_has_the_power_next_to_the_mean_of_its_channels(data):
    stored = layer(SCHEMES["float32 scales"], torch.Generator().manual_seed(0))
    rows = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=40))
    logs = data.draw(st.lists(st.floats(-20, 20), min_size=len(rows), max_size=len(rows)))
    scale = torch.tensor([2.0**log for log in logs])
    rows = torch.tensor(rows)
    folded = Feeder("layer", rows, stored).folded(scale)
    for row in range(12):
        mine = scale.double().log2()[rows == row]
        if not len(mine):
            assert folded.division.exponents[row] == 0
        else:
            assert abs(float(mine.mean()) - int(folded.division.exponents[row])) <= 0.5
    again = Feeder("layer", rows, stored).folded(folded.scale)
    assert torch.equal(again.scale, folded.scale)
    ones = Feeder("layer", rows, stored).folded(torch.ones(len(rows)))
    assert torch.equal(ones.scale, torch.ones(len(rows)))


@given(data=st.data())
def test_a_division_is_what_its_record_says(data):
    exponents = data.draw(st.lists(st.integers(-64, 64), min_size=1, max_size=9))
    in_order = data.draw(st.booleans())
    rows = list(range(len(exponents)))
    if not in_order:
        rows = data.draw(st.lists(st.sampled_from(rows), max_size=20))
    division = Division(torch.tensor(exponents), torch.tensor(rows, dtype=torch.int64))
    record = DivisionRecord.of(division)
    assert (record["rows"] is None) == (rows == list(range(len(exponents))))
    read = DivisionRecord.parse(record, "here").division()
    assert torch.equal(read.exponents, division.exponents)
    assert torch.equal(read.rows, division.rows)


def test_exponents_are_read_where_every_row_agrees():
    x = torch.tensor([[1.5, 0.0, -3.0], [0.7, 2.0, 1.0]])
    moved = x * torch.tensor([2.0, 0.25, 1.0])
    assert exponents_between(x, moved).tolist() == [1, -2, 0]
    assert exponents_between(x.bfloat16(), x.bfloat16() * 4).tolist() == [2, 2, 2]
    for wrong in (x * 3, -x, x + 2**-20, x[:1], moved.index_fill(0, torch.tensor([0]), 1.0), None):
        assert exponents_between(x, wrong) is None
    assert exponents_between(x, x * torch.tensor([[2.0], [4.0]])) is None  # tokens disagree
    assert exponents_between(x, x * torch.inf) is None
    silent = x * torch.tensor([1.0, 0.0, 1.0])
    assert exponents_between(silent, silent) is None


# What feeds what ------------------------------------------------------------------------------


class Queries(Block):
    """Values of 2 heads, which 4 heads of queries share, mixed over tokens."""

    def __init__(self):
        super().__init__()
        self.two = nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x):
        h = self.norm(x)
        mixed = torch.softmax(self.one(h) @ self.one(h).T / 64, -1) @ self.two(h)
        shared = mixed.unflatten(-1, (2, WIDTH // 4)).repeat_interleave(2, 1).flatten(1)
        return x + self.last(shared)


class Rectified(Block):
    """relu(2 x) = 2 relu(x), and a module in between."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.act(self.one(h))) + self.two(h)


class Reversed(Block):
    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.one(h).flip(-1) * torch.sigmoid(self.two(h)))


HEADS = torch.arange(WIDTH // 2).unflatten(0, (2, WIDTH // 4)).repeat_interleave(2, 0).flatten()
FEEDERS = {
    "gated": (Block, "one", torch.arange(WIDTH)),
    "grouped heads": (Queries, "two", HEADS),
    "relu": (Rectified, "one", torch.arange(WIDTH)),
    "in another order": (Reversed, "one", torch.arange(WIDTH).flip(0)),
}


@pytest.mark.parametrize(("make", "name", "rows"), FEEDERS.values(), ids=FEEDERS)
@pytest.mark.parametrize("method", ["stretch", "stretch+hadamard", "awq+gptq"])
def test_a_layer_that_divides_is_the_same_network_bit_for_bit(host, make, name, rows, method):
    result = quantized(seeded(Stack(make())), host, method=method)
    assert result.report.folding.folded["layers.0.last"] == f"layers.0.{name}"
    division = result.report.divisions[f"layers.0.{name}"]
    assert torch.equal(division.rows, rows)
    assert scales(result.module) == set()
    assert len(set(division.exponents.tolist())) > 1 or method == "awq+gptq"
    block, x = result.module.layers[0], data().held_out[0][0]
    folded = result.module(x)
    before, reader = block.get_submodule(name), block.last
    stored = before.stored.divided(-division.exponents)
    bias = torch.ldexp(before.bias, division.exponents)
    setattr(block, name, QuantizedLinear(stored, bias))
    moves = reader.stored.transform or InputTransform()
    scaled = dataclasses.replace(moves, scale=division.scale)
    block.last = QuantizedLinear(dataclasses.replace(reader.stored, transform=scaled), reader.bias)
    assert torch.equal(result.module(x), folded)


def test_rows_that_feed_nothing_stay(host):
    class Half(Block):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(WIDTH // 2, WIDTH)

        def forward(self, x):
            h = self.norm(x)
            return x + self.last(self.one(h)[..., ::2] * torch.sigmoid(self.two(h))[..., ::2])

    report = quantized(seeded(Stack(Half())), host).report
    division = report.divisions["layers.0.one"]
    assert torch.equal(division.rows, torch.arange(0, WIDTH, 2))
    assert not division.exponents[1::2].any()
    assert division.exponents[::2].any()


class Curved(Block):
    def forward(self, x):
        h = self.norm(x)
        return x + self.last(torch.tanh(self.one(h)) * torch.sigmoid(self.two(h)))


class Summed(Block):
    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.one(h) + self.two(h))


class Joined(Block):
    """Half of the channels are of another layer."""

    def forward(self, x):
        h = self.norm(x)
        half = WIDTH // 2
        return x + self.last(torch.cat([self.one(h)[..., :half], self.two(h)[..., half:]], -1))


class Returned(Block):
    """The residual reads the layer too."""

    def forward(self, x):
        h = self.norm(x)
        y = self.one(h)
        return x + y + self.last(y * torch.sigmoid(self.two(h)))


class Normed(Block):
    """A norm in between takes no notice of sizes, and its weight is no norm of the input."""

    def __init__(self):
        super().__init__()
        self.other = RMSNorm()

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.other(self.one(h)) * torch.sigmoid(self.two(h)))


class Dead(Block):
    """A channel that is zero tells nothing."""

    def forward(self, x):
        h = self.norm(x)
        gate = torch.sigmoid(self.two(h)).index_fill(-1, torch.tensor([3]), 0.0)
        return x + self.last(self.one(h) * gate)


class Tied(Block):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def forward(self, x):
        h = self.norm(x)
        y = self.last(self.one(h) * torch.sigmoid(self.two(h)))
        return x + self.other(y)


class Twice(Block):
    """The layer runs for something else as well."""

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.one(h) * torch.sigmoid(self.two(h))) + self.one(x)


class Watched(Block):
    """Nothing that is returned depends on what else reads the layer, but something inside does."""

    def __init__(self):
        super().__init__()
        self.meter = RMSNorm()

    def forward(self, x):
        h = self.norm(x)
        y = self.one(h)
        self.meter(y + 1)
        return x + self.last(y * torch.sigmoid(self.two(h)))


TENSOR = {"scheme": {"num_bits": 8, "strategy": "tensor"}}
NO_FEEDERS = {
    "curved": (Curved, {}, fold_search.NOTHING),
    "summed": (Summed, {}, fold_search.NOTHING),
    "joined": (Joined, {}, fold_search.NOTHING),
    "residual": (Returned, {}, fold_search.OTHERS),
    "normed": (Normed, {}, fold_search.NOTHING),
    "dead": (Dead, {}, fold_search.NOTHING),
    "tied": (Tied, {}, fold_search.TIED),
    "twice": (Twice, {}, fold_search.NOTHING),
    "watched": (Watched, {}, fold_search.OTHERS),
    "one scale": (Block, TENSOR, ONE_SCALE),
    "not quantized": (Block, {"ignore": ["re:.*one"]}, fold_search.NOTHING),
}


@pytest.mark.parametrize(("make", "changes", "why"), NO_FEEDERS.values(), ids=NO_FEEDERS)
def test_what_cannot_divide_does_not_and_the_report_says_why(host, make, changes, why):
    net = make()
    seeded(net)
    if make is Tied:
        net.other.weight = net.one.weight
    changes = {"method": "doubling", **changes}
    result = quantized(Stack(net), host, **changes)
    assert result.report.folding.left["layers.0.last"] == why
    assert not {"layers.0.one", "layers.0.two"} & result.report.divisions.keys()
    unfolded = quantized(Stack(net), host, **changes, fold_scales=False)
    x = data().held_out[0][0]
    assert torch.equal(result.module(x), unfolded.module(x))


# Handlers -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Asking:
    """A handler that asks what becomes of a scale."""

    name: str = "asking"
    needs: frozenset = frozenset()
    capabilities: Capabilities = dataclasses.field(default=Capabilities())
    asked: dict = dataclasses.field(default_factory=dict)

    def rewrite(self, problem, rng):
        scale = torch.linspace(0.3, 3, problem.columns)
        self.asked[problem.name] = problem.foldable(scale)
        assert torch.equal(problem.foldable(torch.ones(WIDTH)), torch.ones(WIDTH))
        return problem.scaled(scale)


@pytest.fixture
def asking():
    """The handler, and a host that has it."""
    handler = Asking()

    class Plugin:
        @qframe.hookimpl
        def qframe_outlier_handlers(self):
            return [handler]

    host = Host.discover()
    host.add(Plugin(), "asking")
    return handler, host


@pytest.mark.parametrize("fold", [True, False])
def test_a_handler_can_ask_what_becomes_of_a_scale(asking, fold):
    handler, host = asking
    net = seeded(Stack(Block()))
    result = quantized(net, host, method="asking", fold_scales=fold)
    plain = torch.linspace(0.3, 3, WIDTH)
    if not fold:
        assert all(torch.equal(scale, plain) for scale in handler.asked.values())
        return
    norms = net.layers[0].norm.weight / result.module.layers[0].norm.weight
    assert torch.equal(handler.asked["layers.0.one"], norms)
    division = result.report.divisions["layers.0.one"]
    assert torch.equal(handler.asked["layers.0.last"], division.scale)
    assert not torch.equal(division.scale, plain)


def test_the_scale_of_a_second_handler_comes_on_top_of_the_first(asking):
    handler, host = asking
    made = {}
    for method in ("smoothquant", "smoothquant+asking"):
        net = seeded(Stack(Block()), dtype=torch.bfloat16)
        products = {"compute_dtype": "bfloat16"}
        result = quantized(net, host, data(torch.bfloat16), method=method, calibration=products)
        norm = result.module.layers[0].norm.weight
        made[method] = (
            net.layers[0].norm.weight.float() / norm.float(),
            result.report.divisions["layers.0.one"].scale,
        )
    for name, first, both in zip(("one", "last"), *made.values(), strict=True):
        assert torch.equal(handler.asked[f"layers.0.{name}"], both / first)
        assert not torch.equal(first, torch.ones(WIDTH))


# Verifying ------------------------------------------------------------------------------------


def test_a_bias_that_was_not_divided_with_its_rows_is_named(host, tmp_path):
    net = seeded(Stack(Block()))
    out = tmp_path / "out"
    quantized(net, host, out=out)
    assert qframe.verify(out, net, host=host).problems == []
    tensors = checkpoint_tensors(out)
    tensors["layers.0.one.bias"][3] *= 2
    save(out, tensors)
    with hashed_anew(out):
        assert qframe.verify(out, host=host).problems == []
        report = qframe.verify(out, net, host=host)
    assert [(p.kind, p.name) for p in report.problems] == [("tensor", "layers.0.one.bias")]
