"""Mixed precision from end to end: what is measured, what it decides, and what is refused."""

import json
import types
from itertools import pairwise

import pytest
import torch
from torch import nn

import qframe
from qframe import CalibrationData, bounds, mixed, parallel, rounding, sensitivity
from qframe.contracts import RoundingProblem
from qframe.errors import (
    CalibrationError,
    MemoryLimitError,
    ModelError,
    NonFiniteError,
    RecipeError,
    UnsupportedError,
)
from qframe.grids import grid_of
from qframe.host import Host
from qframe.manifest import read_manifest
from qframe.memory import stored_bits_per_weight
from qframe.model import Network
from qframe.pipeline import plan_job
from qframe.scheme import Scheme
from qframe.sensitivity import measure, own_gradient
from qframe.trials import divergences
from qframe.weights import ModelFolder

G32 = {"preset": "W4A16", "group_size": 32}
TEXT = {"num_calibration_samples": 4, "max_seq_length": 32}
RECIPE = {"scheme": G32, "target_bits": 4.25, "calibration": TEXT}
BITS = (2, 3, 4, 6)


class Classes(nn.Module):
    """Embeds tokens, and gives logits; `unused` is never run, `silenced` counts for nothing."""

    def __init__(self, *, wide: int = 16, classes: int = 12) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.embed = nn.Embedding(20, wide)
            self.up = nn.Linear(wide, 24)
            self.act = nn.ReLU(inplace=True)
            self.silenced = nn.Linear(wide, 24)
            self.unused = nn.Linear(wide, 24)
            self.down = nn.Linear(24, classes, bias=False)

    def forward(self, tokens: torch.Tensor) -> types.SimpleNamespace:
        x = self.embed(tokens)
        hidden = self.act(self.up(x)) + 0.0 * self.silenced(x)
        return types.SimpleNamespace(logits=self.down(hidden))


def tokens(count=6, length=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 20, (count, length), generator=generator)
    return CalibrationData(inputs=[(w,) for w in windows.split(2)], source={"name": "tokens"})


def schemes_of(net, group_size=8, bits=BITS):
    network = Network(net.eval().requires_grad_(False))
    every = tuple(Scheme(num_bits=b, group_size=group_size) for b in bits)
    return network, dict.fromkeys(network.layers, every)


def measured(net, *, seed=0, threads=1, data=None, **options):
    network, schemes = schemes_of(net, **options)
    given = tokens() if data is None else data
    return measure(network, schemes, given, Host.discover(), seed=seed, threads=threads)


# What is measured -------------------------------------------------------------------------------


def test_what_counts_for_nothing_downstream_has_no_sensitivity():
    found = measured(Classes())
    assert found.measure == "KL divergence"
    assert found.losses["silenced"] == (0.0,) * len(BITS)
    for name in ("up", "down"):
        assert all(a > b > 0 for a, b in pairwise(found.losses[name]))


def test_what_no_token_reaches_is_named():
    found = measured(Classes())
    assert found.unreached == ("unused",)
    assert [(event.kind, event.layer) for event in found.events] == [("sensitivity", "unused")]


def test_without_logits_it_is_the_error_of_outputs_and_that_is_said():
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    data = CalibrationData.from_tensors(list(x))
    found = measured(net, data=data)
    assert found.measure == "output error"
    [event] = found.events
    assert (event.kind, event.layer) == ("sensitivity", "")
    assert "no output `logits`" in event.message
    [change] = changes(net[0].weight, bits=[2])
    terms = 16 + 7 * 3 + 4  # sums of a product, of its squares
    energy, error = (
        float((x.double() @ w.double().T).square().sum()) for w in (net[0].weight, change)
    )
    norms = [
        float((x.abs().double() @ w.abs().double().T).square().sum())
        for w in (net[0].weight, change)
    ]
    allowed = bounds.gamma(3 * terms) * (norms[1] / energy + error / energy * norms[0] / energy)
    assert abs(found.losses["0"][0] - error / energy) <= allowed


@pytest.mark.parametrize("classes", [1, 12])
def test_logits_of_one_class_tell_nothing(classes):
    found = measured(Classes(classes=classes))
    assert (found.measure == "output error") == (classes == 1)


def changes(weight, bits=BITS, group_size=8):
    host = Host.discover()
    for each in bits:
        scheme = Scheme(num_bits=each, group_size=group_size)
        problem = RoundingProblem(
            name="layer", weight=weight.data, scheme=scheme, grid=grid_of(host, scheme)
        )
        yield rounding.dequantize(rounding.to_nearest(problem)) - weight.data


def test_along_a_row_it_is_the_second_order_of_kl():
    """Rows of one weight: D is a multiple of W, and nothing is taken as independent."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 6, bias=False)
            values = torch.linspace(-1.2, 1.7, 6)[:, None]
            self.head.weight = nn.Parameter(values, requires_grad=False)

        def forward(self, x):
            return types.SimpleNamespace(logits=self.head(x))

    net = Narrow()
    x = torch.randn(5, 4, 1, generator=torch.Generator().manual_seed(3))
    # One scale for the tensor, else one weight for itself would be rounded to itself.
    scheme = Scheme(num_bits=3, strategy="tensor")
    network = Network(net)
    data = CalibrationData.from_tensors(list(x))
    found = measure(network, {"head": (scheme,)}, data, Host.discover(), seed=7, threads=1)
    host = Host.discover()
    grid = grid_of(host, scheme)
    problem = RoundingProblem(name="head", weight=net.head.weight, scheme=scheme, grid=grid)
    change = (rounding.dequantize(rounding.to_nearest(problem)) - net.head.weight).double()
    assert bool((change != 0).any())
    expected, allowed = 0.0, 0.0
    roundings = bounds.gamma(4 + 6 + 8)
    for number, window in enumerate(x):
        generator = torch.Generator().manual_seed(sensitivity._seed(7, number))
        g = own_gradient(net(window).logits, generator).double()
        terms = g[:, :, None] * window.double()[:, None, :] * change
        total, absolute = float(terms.sum()), float(terms.abs().sum())
        expected += total**2 / 2
        off = roundings * absolute
        # and R, which rounding leaves, is less than `roundings` of D
        allowed += off * (2 * abs(total) + off) / 2 + off**2
    count = x.shape[0] * x.shape[1]
    assert abs(found.losses["head"][0] * count - expected) <= allowed
    assert found.tokens == count


def test_tokens_are_drawn_from_the_networks_own_distribution():
    """The gradient is p less 1 at the token; tokens are as frequent as p says (Hoeffding)."""
    draws = 20_000
    p = torch.tensor([0.7, 0.2, 0.1])
    logits = p.log().expand(draws, 3)
    gradient = own_gradient(logits, torch.Generator().manual_seed(0))
    own = torch.softmax(logits, -1)
    assert torch.equal(gradient.amin(-1) < 0, torch.ones(draws, dtype=torch.bool))
    taken = gradient < 0
    assert torch.equal(taken.sum(-1), torch.ones(draws, dtype=torch.int64))
    assert torch.equal(gradient[~taken], own[~taken])
    assert torch.equal(gradient[taken], own[taken] - 1)
    chance = 2.0**-30  # of being further off, for each of three
    allowed = (torch.tensor(2 / chance).log() / (2 * draws)).sqrt()
    assert bool(((taken.double().mean(0) - p).abs() <= allowed).all())


def test_a_network_that_gives_no_numbers_is_refused():
    net = Classes()
    with torch.no_grad():
        net.down.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="logits"):
        measured(net)


def test_an_input_that_is_changed_in_place_is_refused():
    class Changes(Classes):
        def forward(self, tokens):
            x = self.embed(tokens)
            y = self.up(x)
            x.mul_(2)
            return types.SimpleNamespace(logits=self.down(self.act(y)))

    with pytest.raises(ModelError, match="in place"):
        measured(Changes())


def test_a_layer_that_runs_twice_has_one_gradient():
    """Both runs change together: the loss is that of the sum of their gradients."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)
            generator = torch.Generator().manual_seed(2)
            weight = torch.randn(16, 16, generator=generator)
            self.layer.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x, sign=1.0):
            return types.SimpleNamespace(logits=self.layer(x) - sign * self.layer(x))

    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(3))
    data = CalibrationData.from_tensors(list(x))
    assert measured(Twice(), data=data).losses["layer"] == (0.0,) * len(BITS)


def test_it_depends_on_the_seed_alone_and_touches_no_global_generator():
    before = torch.get_rng_state()
    one, two, other = (
        measured(Classes(), threads=threads, seed=seed)
        for threads, seed in ((1, 0), (3, 0), (1, 1))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert one == two
    assert one.losses["up"] != other.losses["up"]


def test_hooks_are_gone_afterwards_and_weights_as_they_were():
    net = Classes()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measured(net)
    assert all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


# What it decides --------------------------------------------------------------------------------


def bits_of(result):
    return {name: layer.num_bits for name, layer in result.report.allocation.layers.items()}


def run(folder, out, **changes):
    return qframe.quantize(folder, {**RECIPE, **changes}, out=out)


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """A tiny model, where it was written to, and the result."""
    folder = tmp_path_factory.mktemp("mixed")
    model = tiny.write_llama(folder / "model")
    return model, folder / "out", run(model, folder / "out", method="gptq")


def test_the_folder_has_as_many_bits_as_are_said_and_no_more(quantized):
    model, out, result = quantized
    found = result.report.allocation
    sizes = {layer.name: layer.rows * layer.columns for layer in result.report.layers}
    assert stored_bits_per_weight(ModelFolder(out), sizes) == found.average_bits <= 4.25
    schemes = {
        n: r["scheme"]["num_bits"] for n, r in read_manifest(ModelFolder(out))["layers"].items()
    }
    assert schemes == bits_of(result)
    assert len(set(schemes.values())) > 1
    assert qframe.verify(out, model).exit_code == 0


def test_the_report_says_what_was_measured_and_chosen(quantized):
    _, out, result = quantized
    record = json.loads((out / "qframe_report.json").read_text())["allocation"]
    assert record == json.loads(json.dumps(result.report.allocation.record()))
    assert record["measure"] == "KL divergence"
    assert record["predicted"] == sum(
        layer["losses"][str(layer["num_bits"])] for layer in record["layers"].values()
    )
    assert set(record["uniform"]) == {"2", "3"}  # 4 bits everywhere take 4.5
    assert record["tried"][record["chosen"]] == min(record["tried"].values())
    assert {"least predicted", "3 bits everywhere"} <= set(record["tried"])
    assert sum(record["counts"].values()) == len(record["layers"])


def test_it_is_the_same_to_the_byte_with_any_number_of_threads(quantized, tmp_path):
    model, out, _ = quantized
    recipe = {**RECIPE, "method": "gptq"}
    qframe.quantize(model, recipe, out=tmp_path / "other", threads=1)
    contents = [
        {f.name: f.read_bytes() for f in each.iterdir()} for each in (out, tmp_path / "other")
    ]
    assert contents[0] == contents[1]


def test_the_recipe_of_the_folder_gives_the_folder_again(quantized, tmp_path):
    model, out, result = quantized
    kept = read_manifest(ModelFolder(out))["recipe"]
    assert (kept["target_bits"], kept["candidate_bits"]) == (4.25, None)
    again = qframe.quantize(model, kept, out=tmp_path / "again")
    assert again.report.allocation == result.report.allocation


def changed_llama(tiny, folder, layer, factor):
    tiny.write_llama(folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    weights = tiny.llama_weights(tied=True, vocab_size=size)
    weights[f"{layer}.weight"] *= factor
    tiny.save_weights(folder, weights)
    return folder


def test_layers_whose_outputs_are_silenced_get_the_fewest_bits(tiny, tmp_path):
    model = changed_llama(tiny, tmp_path / "model", "model.layers.1.mlp.down_proj", 0)
    result = run(model, tmp_path / "out")
    for name in ("up_proj", "gate_proj"):
        layer = result.report.allocation.layers[f"model.layers.1.mlp.{name}"]
        assert layer.losses == dict.fromkeys((2, 3, 4, 5, 6, 8), 0.0)
        assert layer.num_bits == 2


@pytest.mark.parametrize("block", [0, 1])
def test_layers_whose_outputs_weigh_more_get_no_fewer_bits(tiny, tmp_path, block):
    """Ten times the weights that follow: ten times the gradient, so a hundred times the loss."""
    downs = f"model.layers.{block}.mlp.down_proj"
    plain = run(tiny.write_llama(tmp_path / "plain"), tmp_path / "a")
    result = run(changed_llama(tiny, tmp_path / "model", downs, 10), tmp_path / "b")
    before, after = bits_of(plain), bits_of(result)
    for name in ("up_proj", "gate_proj"):
        layer = f"model.layers.{block}.mlp.{name}"
        assert after[layer] >= before[layer]
    assert sum(after[f"model.layers.{block}.mlp.{n}"] for n in ("up_proj", "gate_proj")) > sum(
        before[f"model.layers.{block}.mlp.{n}"] for n in ("up_proj", "gate_proj")
    )


def only_by_prediction(monkeypatch):
    monkeypatch.setattr(mixed, "CAUTIONS", (0,))
    monkeypatch.setattr(mixed, "divergences", lambda network, choices, *rest: {})


def test_a_larger_target_has_no_larger_prediction(tiny_llama, tmp_path, monkeypatch):
    """As far as predictions decide; what is tried decides by what it measures."""
    only_by_prediction(monkeypatch)
    found = [
        run(tiny_llama, tmp_path / f"{target}", target_bits=target).report.allocation
        for target in (3, 3.5, 4.5, 8.5)
    ]
    predicted = [each.predicted for each in found]
    assert predicted == sorted(predicted, reverse=True)
    assert all(each.predicted <= min(each.uniform.values()) for each in found)


def test_what_does_best_when_it_is_tried_is_taken(tiny_llama, tmp_path, monkeypatch):
    for best in ("4 bits everywhere", "least predicted"):

        def told(network, choices, *rest, best=best):
            return {way: float(way != best) for way in choices}

        monkeypatch.setattr(mixed, "divergences", told)
        result = run(tiny_llama, tmp_path / best, target_bits=4.75)
        assert result.report.allocation.chosen == best
        assert (set(bits_of(result).values()) == {4}) == (best == "4 bits everywhere")
        assert result.report.allocation.tried[best] == 0


def test_trying_measures_the_network_as_it_would_be_and_leaves_it_as_it_was(tiny_llama):
    """The same as scoring a folder that was rounded to nearest, on the same tokens."""
    network = Network.from_folder(ModelFolder(tiny_llama))
    network.load(network.module, recurse=True)
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    scheme = Scheme(num_bits=3, group_size=32)
    layers = [name for name in network.layers if name != "lm_head"]
    windows = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    host = Host.discover()
    found = [
        divergences(
            network,
            {"rounded": dict.fromkeys(layers, scheme), "itself": {}},
            [(windows,)],
            host,
            threads,
        )
        for threads in (1, 2)
    ]
    assert found[0] == found[1]
    assert found[0]["itself"] == 0
    after = network.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    def distributions():
        return [
            torch.log_softmax(network.module(w[None], use_cache=False).logits[0], -1)
            for w in windows
        ]

    with torch.no_grad(), parallel.one_torch_thread():
        own = distributions()
        for name in layers:
            weight = network.module.get_submodule(name).weight
            [change] = changes(weight, bits=[3], group_size=32)
            weight.copy_(weight + change)
        other = distributions()
    expected = sum(
        float((p.exp() * (p - q)).double().sum()) for p, q in zip(own, other, strict=True)
    )
    terms = [(p.exp() * (p - q).abs()).double().sum() for p, q in zip(own, other, strict=True)]
    allowed = bounds.gamma(4) * float(sum(terms))  # the same products, added in another order
    assert abs(found[0]["rounded"] * windows.numel() - expected) <= allowed


def test_an_override_of_num_bits_is_kept_and_one_of_other_fields_is_no_choice(tiny_llama, tmp_path):
    overrides = {"re:.*down_proj": {"bits": 8}, "re:.*v_proj": {"symmetric": False}}
    result = run(
        tiny_llama, tmp_path / "out", overrides=overrides, candidate_bits=[3, 4], target_bits=5
    )
    layers = result.report.allocation.layers
    for name, layer in layers.items():
        if name.endswith("down_proj"):
            assert (layer.num_bits, set(layer.losses)) == (8, {8})
            assert layer.why
            assert layer.loss > 0
        else:
            assert set(layer.losses) == {3, 4}
            assert not layer.why
    described = {layer.name: layer.scheme for layer in result.report.layers}
    assert "asymmetric" in described["model.layers.0.self_attn.v_proj"]
    assert result.report.allocation.average_bits <= 5


def test_text_that_only_measures_is_no_calibration(tiny_llama, tmp_path):
    recipe = {"scheme": G32, "target_bits": 4, "method": "rtn"}
    result = qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    assert result.report.calibration is None
    assert result.report.allocation.tokens > 0


def test_a_module_in_memory_needs_inputs_and_keeps_what_no_token_reaches():
    recipe = {"scheme": {"group_size": 8}, "target_bits": 5, "candidate_bits": [2, 3, 6, 8]}
    with pytest.raises(CalibrationError, match="target_bits needs calibration inputs"):
        qframe.quantize(Classes(), recipe)
    result = qframe.quantize(Classes(), recipe, calibration=tokens())
    layers = result.report.allocation.layers
    assert layers["silenced"].num_bits == 2
    assert (layers["unused"].num_bits, layers["unused"].why) == (4, "no token reached it")
    assert layers["down"].num_bits > layers["silenced"].num_bits
    assert [e.layer for e in result.report.events if e.kind == "sensitivity"] == ["unused"]


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_bits": 2.25}, RecipeError, r"the smallest is 2\.5 bits per weight"),
        ({"target_bits": 9}, RecipeError, r"the largest is 8\.5 bits per weight"),
        ({"candidate_bits": [3, 4], "target_bits": 5}, RecipeError, r"largest is 4\.5"),
        ({"target_bits": 0}, RecipeError, "target_bits"),
        ({"target_bits": "many"}, RecipeError, "target_bits"),
        ({"candidate_bits": []}, RecipeError, "candidate_bits"),
        ({"candidate_bits": [9]}, RecipeError, "candidate_bits"),
        ({"candidate_bits": [4], "target_bits": None}, RecipeError, "say with target_bits"),
        ({"target_bit": 4}, RecipeError, "did you mean 'target_bits'"),
        ({"scheme": "NF4"}, RecipeError, "nothing to choose"),
        ({"overrides": {"Linear": {"num_bits": 4}}}, RecipeError, "nothing to choose"),
        ({"method": "optimal_rtn", "candidate_bits": [4, 8]}, UnsupportedError, "num_bits=8"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(tiny_llama, changes, error, message):
    recipe = {key: value for key, value in {**RECIPE, **changes}.items()}
    with pytest.raises(error, match=message):
        plan_job(tiny_llama, recipe)


def test_candidates_are_those_that_the_method_can_do(tiny_llama):
    job = plan_job(tiny_llama, {**RECIPE, "method": "optimal_rtn"})
    assert {s.num_bits for each in job.candidates.schemes.values() for s in each} == {2, 3, 4}


def test_too_little_memory_is_said_beforehand(tiny_llama, tmp_path, monkeypatch):
    free = types.SimpleNamespace(available=1_000_000)
    monkeypatch.setattr(sensitivity.psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryLimitError, match=r"1\.00 MB are free"):
        run(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
