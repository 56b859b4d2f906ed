"""What is no fold is none, and the report says why; every other comparison is bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn

from qframe import fold_search
from tests.folds.nets import (
    WIDTH,
    Block,
    OnePlus,
    RMSNorm,
    Stack,
    data,
    double,
    quantized,
    scales,
    seeded,
)

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
    "cloned": (lambda: Stack(Cloned()), {}, fold_search.NOTHING),
}


@pytest.mark.parametrize(("make", "changes", "why"), NO_FOLDS.values(), ids=NO_FOLDS)
def test_what_is_no_fold_is_none_and_the_report_says_why(host, make, changes, why):
    net = seeded(make())
    for name, parameter in net.named_parameters():
        if "router" in name and parameter.ndim == 2:  # so weak that scaling turns no choice
            parameter.data *= 2.0**-20
    changes = {**changes, "method": "doubling"}  # what does fold changes no bit
    result = quantized(net, host, **changes)
    folding = result.report.folding
    assert set(folding.folded) <= {"layers.0.last"}  # into another layer
    assert folding.left["layers.0.one"] == why
    unfolded = quantized(net, host, **changes, fold_scales=False)
    x = data().held_out[0][0]
    ours, theirs = result.module(x.clone()), unfolded.module(x.clone())
    ours, theirs = (getattr(y, "x", y) for y in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert scales(result.module) == scales(unfolded.module) - set(folding.folded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_calibrated_in_bfloat16_is_searched_in_float32(host, dtype):
    """A router so weak that bfloat16 does not show it still reads the norm."""
    make, changes, why = NO_FOLDS["router"]
    net = seeded(make())
    for name, parameter in net.named_parameters():
        if "router" in name and parameter.ndim == 2:
            parameter.data *= 2.0**-20
    changes = {**changes, "method": "doubling", "calibration": {"compute_dtype": dtype}}
    assert quantized(net, host, **changes).report.folding.left["layers.0.one"] == why


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
    assert folding.folded == {f"layers.{i}.last": f"layers.{i}.one" for i in (0, 1)}
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
    assert folding.folded == {
        f"layers.{good}.one": f"layers.{good}.norm",
        **{f"layers.{i}.last": f"layers.{i}.one" for i in (0, 1)},
    }
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
    assert folding.folded == {"layers.0.two": "layers.0.second", "layers.0.last": "layers.0.two"}
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
    folding = quantized(seeded(Stack(Dropped())), host).report.folding
    assert folding.folded["layers.0.one"] == "layers.0.norm"


def test_parameters_are_back_even_when_the_trial_fails():
    block = seeded(Block())
    before = {name: parameter for name, parameter in block.named_parameters()}
    values = {name: value.clone() for name, value in block.state_dict().items()}
    norm, layer = fold_search.Source("norm"), fold_search.Source("one", torch.arange(WIDTH))
    trials = [
        fold_search._Trial("one", norm, block.norm, (block.one, block.two)),
        fold_search._Trial("last", layer, block.one, (block.last,)),  # `one` is scaled twice
    ]

    def interrupted():
        with fold_search._scaled(trials):
            for name in before:
                same = torch.equal(block.get_parameter(name), values[name])
                assert same == (name in ("two.bias", "last.bias"))
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
    assert len(folded.report.folding.folded) == 4
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
