"""Blocks whose layers are learned together: what a rounder is shown, and what becomes of it."""

import dataclasses
import filecmp
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import qframe
from qframe import CalibrationData, Capabilities, Grid, Host, Scheme, hookimpl, rounding
from qframe.blocks import BlockProblem, NetworkBlock
from qframe.bounds import UNIT
from qframe.calibration import Arrival
from qframe.contracts import RoundingProblem
from qframe.errors import ModelError, NonFiniteError, OverfitError, PluginError, UnsupportedError
from qframe.fallbacks import OVERFIT
from qframe.model import get_weight
from qframe.peak import peak_memory
from qframe.pipeline import plan_job
from qframe.stored_model import StoredModel
from tests.test_original import token_data

W3 = {"num_bits": 3, "group_size": 16, "symmetric": False}


class Gated(nn.Module):
    """x + down(tanh(up(x)) * gate(x)), and something else beside it."""

    def __init__(self, kind=nn.Linear, width=6, inner=9):
        super().__init__()
        make = (lambda i, o: Conv1D(o, i)) if kind is Conv1D else nn.Linear
        self.up, self.gate, self.down = make(width, inner), make(width, inner), make(inner, width)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False)

    def forward(self, x, scale=1.0):
        return (x + scale * self.down(torch.tanh(self.up(x)) * self.gate(x)), None)


LAYERS = ("up", "gate", "down")


def problems(module):
    scheme = Scheme(num_bits=3)
    return {
        name: RoundingProblem(
            name=name,
            weight=weight_of(module, name),
            scheme=scheme,
            grid=Grid(-4, 3),
        )
        for name in LAYERS
    }


def weight_of(module, name):
    weight = module.get_submodule(name).weight.data
    return (weight.T if isinstance(module.get_submodule(name), Conv1D) else weight).contiguous()


def arrivals(seed, *tokens, width=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        Arrival((torch.randn(1, count, width, generator=generator),), {"scale": 0.5})
        for count in tokens
    ]


def shown(module, *tokens, held_out=0, dtype=torch.float32, threads=1):
    """Return the context of a block's problem: inputs have moved by a tenth."""
    here = arrivals(1, *tokens)
    there = [Arrival((a.args[0] * 1.1,), a.kwargs) for a in here]
    block = NetworkBlock("block", module, {n: module.get_submodule(n) for n in LAYERS}, dtype)
    return block.problem(problems(module), here, there, held_out=held_out, threads=threads)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_block_runs_with_the_weights_that_are_given_and_else_with_its_own(kind):
    module = Gated(kind)
    with shown(module, 5, 3) as problem:
        own = {name: get_weight(module.get_submodule(name)) for name in LAYERS}
        x = arrivals(1, 5, 3)[1]
        expected = module(*x.args, **x.kwargs)[0]
        assert torch.equal(problem.run(1, {}), expected)
        assert torch.equal(problem.run(1, own), expected)
        assert not torch.equal(problem.run(1, own | {"up": own["up"] * 2}), expected)
        assert torch.equal(problem.targets[1], module(x.args[0] * 1.1, scale=0.5)[0])
    assert all("forward" not in vars(module.get_submodule(name)) for name in LAYERS)


def test_a_block_is_as_it_was_after_an_error():
    module = Gated()

    def fail():
        with shown(module, 5):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all("forward" not in vars(module.get_submodule(name)) for name in LAYERS)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([nn.Linear, Conv1D]), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_slopes_are_those_of_the_error(kind, seed, threads):
    """A step of t against a direction d changes the error by t <slope, d> and less than L t^2."""
    module = Gated(kind)
    rng = np.random.default_rng(seed)
    with shown(module, 4, 2, 3, threads=threads) as problem:
        weights = {n: w.double() for n, w in ((n, weight_of(module, n)) for n in LAYERS)}
        ways = {n: torch.from_numpy(rng.normal(size=w.shape)) for n, w in weights.items()}
        # In float64, so that the quotient below is the slope and not what rounding leaves of it.
        exact = dataclasses.replace(
            problem,
            run=lambda i, w: run64(module, arrivals(1, 4, 2, 3)[i], w),
            targets=[each.double() for each in problem.targets],
        )
        error, slopes = exact.slopes(weights, exact.fitted)
        assert error == exact.error(weights)
        along = sum(float((slopes[n] * ways[n]).sum()) for n in LAYERS)
        numbers = sum(each.numel() for each in exact.targets)

        def lost(t):
            return exact.error({n: w + t * ways[n] for n, w in weights.items()}) * numbers

        # Richardson: the quotient errs by t^2 times a third derivative; halving t divides it by 4.
        far, near = ((lost(t) - lost(-t)) / (2 * t) for t in (2.0**-8, 2.0**-9))
        assert abs(near - along) <= abs(far - near)


def run64(module, arrival, weights):
    def layer(name, x):
        return x @ weights[name].T + module.get_submodule(name).bias.double()

    x = arrival.args[0].double()
    return x + 0.5 * layer("down", torch.tanh(layer("up", x)) * layer("gate", x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_do_not_depend_on_threads(dtype):
    module = Gated()
    found = []
    for threads in (1, 3):
        with shown(module, 5, 3, 4, 2, held_out=1, dtype=dtype, threads=threads) as problem:
            assert list(problem.fitted) == [0, 1, 2]
            weights = {n: weight_of(module, n) * 1.5 for n in LAYERS}
            found.append((problem.error(weights), problem.slopes(weights, [2, 0])))
    assert found[0][0] == found[1][0]
    assert found[0][1][0] == found[1][1][0]
    assert all(torch.equal(found[0][1][1][n], found[1][1][1][n]) for n in LAYERS)


def test_the_error_is_the_mean_over_the_numbers_of_those_inputs():
    module = Gated()
    with shown(module, 5, 3, held_out=1) as problem:
        problem = dataclasses.replace(problem, moved=None)
        assert problem.error({}) == problem.error({}, [0])
        made = [problem.run(i, {}) - problem.targets[i] for i in (0, 1)]
        squares = [float(each.double().square().sum(-1).sum()) for each in made]
        assert problem.error({}) == squares[0] / made[0].numel()
        assert problem.error({}, [0, 1]) == math.fsum(squares) / (8 * 6)


def test_a_token_that_has_moved_far_counts_less():
    module = Gated()
    with shown(module, 5, 3, held_out=1) as problem:
        moved = [each.args[0].double() * 0.1 for each in arrivals(1, 5, 3)]
        distances = [each.square().sum(-1) for each in moved]
        for found, expected in zip(problem.moved, distances, strict=True):
            # What float32 takes off x * 1.1, relative to the tenth that is left.
            assert ((found - expected).abs() <= expected * 2 * 11 * UNIT["float32"] * 2).all()
        mean = float(problem.moved[0].sum()) / 5
        assert torch.equal(problem.importance[1], mean / (mean + problem.moved[1]))
        counted = [
            (problem.run(i, {}) - problem.targets[i]).double().square().sum(-1)
            * problem.importance[i]
            for i in (0, 1)
        ]
        assert problem.error({}) == float(counted[0].sum()) / (5 * 6)
        further = [problem.moved[0], problem.moved[1] * 100]
        other = dataclasses.replace(problem, moved=further)
        assert torch.equal(other.importance[0], problem.importance[0])  # held out: no say in it


def test_tokens_that_have_not_moved_all_count_the_same():
    module = Gated()
    block = NetworkBlock(
        "block", module, {n: module.get_submodule(n) for n in LAYERS}, torch.float32
    )
    here = arrivals(1, 5)
    with block.problem(problems(module), here, here, held_out=0, threads=1) as problem:
        assert torch.equal(problem.importance[0], torch.ones(1, 5, dtype=torch.float64))


@pytest.mark.parametrize("first", [3, torch.zeros(2), torch.zeros(2, 5, 6)])
def test_a_first_argument_that_is_not_the_tokens_says_nothing_of_how_far_they_moved(first):
    class Other(Gated):
        def forward(self, given, x):
            return super().forward(x)

    module = Other()
    here, there = (
        [Arrival((first, each.args[0] * by), {}) for each in arrivals(1, 5)] for by in (1.0, 2.0)
    )
    block = NetworkBlock(
        "block", module, {n: module.get_submodule(n) for n in LAYERS}, torch.float32
    )
    with block.problem(problems(module), here, there, held_out=0, threads=1) as problem:
        assert torch.equal(problem.moved[0], torch.zeros(1, 5, dtype=torch.float64))


def test_a_layer_that_no_token_reaches_has_no_slope():
    module = Gated()
    with shown(module, 5) as problem:
        weights = {n: weight_of(module, n) for n in LAYERS} | {"spare": torch.ones(2, 3)}
        _, slopes = problem.slopes(weights, [0])
        assert torch.equal(slopes["spare"], torch.zeros(2, 3))
        assert slopes["up"].abs().sum() > 0
        error, nothing = problem.slopes({"spare": torch.ones(2, 3)}, [0])
        assert error == problem.error({}, [0])
        assert torch.equal(nothing["spare"], torch.zeros(2, 3))


def test_slopes_that_are_not_finite_are_refused_by_name():
    module = Gated()
    with shown(module, 5) as problem:
        weights = {n: weight_of(module, n) for n in LAYERS}
        weights["down"] *= 2.0**120  # its products overflow
        weights["gate"] *= 2.0**20
        with pytest.raises(NonFiniteError, match=r"block 'block': the slope of its error by"):
            problem.slopes(weights, [0])


def test_a_block_that_returns_no_tensor_is_refused_by_name():
    module = Gated()
    module.forward = lambda x, scale: {"it": x}
    with pytest.raises(ModelError, match=r"'block' returns dict"), shown(module, 5):
        pass


def test_targets_that_are_not_finite_are_refused_by_name():
    module = Gated()
    module.down.bias.data[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"block 'block'.*output"), shown(module, 5):
        pass


# In a run ---------------------------------------------------------------------------------------


class Shown:
    """Rounds to nearest, and remembers what it was shown; `returned` is what it returns instead."""

    name = "shown"
    needs = frozenset({"hessian"})
    capabilities = Capabilities()

    def __init__(self, returned=None):
        self.blocks, self.alone, self.returned = [], [], returned

    def round(self, problem, rng):
        self.alone.append(problem.name)
        return rounding.to_nearest(problem)

    def learn(self, problem, rng):
        made = {name: rounding.to_nearest(layer) for name, layer in problem.layers.items()}
        weights = {name: layer.weight for name, layer in problem.layers.items()}
        values = {name: rounding.dequantize(codes) for name, codes in made.items()}
        self.blocks.append(
            {
                "name": problem.name,
                "layers": list(problem.layers),
                "inputs": len(problem.targets),
                "held_out": problem.held_out,
                "own": problem.error(weights),
                "nearest": problem.error(values),
                "draw": rng.random(),
            }
        )
        if self.returned is not None:
            return self.returned(problem, made)
        info = {"block_error": self.blocks[-1]["nearest"]}
        return {n: dataclasses.replace(codes, info=info) for n, codes in made.items()}


def host_with(rounder):
    class Plugin:
        @hookimpl
        def qframe_rounders(self):
            return [rounder]

    host = Host.discover()
    host.add(Plugin(), "blocks")
    return host


def run(folder, out, rounder, data=None, **recipe):
    settings = {"method": rounder.name, "scheme": W3, **recipe}
    return qframe.quantize(
        folder, settings, out=out, calibration=data or token_data(), host=host_with(rounder)
    )


def test_every_block_is_shown_once_before_its_layers(tiny_llama, tmp_path):
    seen = Shown()
    report = run(tiny_llama, tmp_path / "out", seen).report
    assert [each["name"] for each in seen.blocks] == ["model.layers.0", "model.layers.1"]
    assert not seen.alone
    first, second = seen.blocks
    assert [len(each["layers"]) for each in seen.blocks] == [7, 7]
    assert (first["inputs"], first["held_out"]) == (3, 1)
    assert first["own"] == 0.0  # nothing before it is quantized
    assert second["own"] > 0  # inputs have moved, targets are those of the original network
    assert first["nearest"] > 0
    assert first["draw"] != second["draw"]
    for layer in report.layers:
        assert layer.method == "shown"
        assert layer.info["block_error"] in (first["nearest"], second["nearest"])
        assert layer.seconds["round"] > 0


def test_layers_of_a_module_without_blocks_are_one_block():
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    data = CalibrationData.from_tensors([torch.randn(9, 16), torch.randn(5, 16)])
    seen = Shown()
    settings = {"method": "shown", "scheme": W3}
    qframe.quantize(net, settings, calibration=data, host=host_with(seen))
    assert [each["layers"] for each in seen.blocks] == [["0", "2"]]


def test_a_layer_outside_all_blocks_is_rounded_alone(tiny, tmp_path):
    seen = Shown()
    run(tiny.write_llama(tmp_path / "model", tied=False), tmp_path / "out", seen, ignore=[])
    assert seen.alone == ["lm_head"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda problem, made: None, "returned NoneType for block 'model.layers.0'"),
        (lambda problem, made: dict(list(made.items())[1:]), "expected codes for"),
        (lambda problem, made: made | {problem.name: 1}, "expected codes for"),
        (lambda problem, made: dict.fromkeys(made, 1), "returned int for layer"),
    ],
)
def test_what_is_no_code_for_each_layer_is_refused(tiny_llama, tmp_path, returned, message):
    with pytest.raises(PluginError, match=message):
        run(tiny_llama, tmp_path / "out", Shown(returned))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_changed_in_place_is_refused(tiny_llama, tmp_path):
    def change(problem, made):
        next(iter(problem.layers.values())).weight[0, 0] = 0
        return made

    with pytest.raises(PluginError, match=r"changed the weight of layer 'model.layers.0"):
        run(tiny_llama, tmp_path / "out", Shown(change))


def worse(problem, made):
    return {n: dataclasses.replace(q, codes=q.codes.roll(1, 1)) for n, q in made.items()}


def test_a_block_that_is_worse_on_held_out_tokens_is_rounded_to_nearest_on_demand(
    tiny_llama, tmp_path
):
    folder = tiny_llama
    kept = run(folder, tmp_path / "kept", Shown(worse)).report
    assert {layer.method for layer in kept.layers} == {"shown"}
    report = run(folder, tmp_path / "out", Shown(worse), on_overfit="rtn").report
    assert {layer.method for layer in report.layers} == {OVERFIT}
    events = [event for event in report.events if event.kind == "overfit"]
    assert [event.layer for event in events] == ["model.layers.0", "model.layers.1"]
    assert "on held-out tokens" in events[0].message
    with pytest.raises(OverfitError, match=r"block 'model.layers.0'.*more calibration text"):
        run(folder, tmp_path / "error", Shown(worse), on_overfit="error")
    fine = run(folder, tmp_path / "fine", Shown(), on_overfit="error").report
    assert {layer.method for layer in fine.layers} == {"shown"}


def test_no_handler_comes_before_what_learns_blocks(tiny_llama, tmp_path):
    with pytest.raises(UnsupportedError, match=r"'autoround_block' learns the layers of a block"):
        qframe.quantize(
            tiny_llama, {"method": "awq+autoround_block", "scheme": W3}, out=tmp_path / "out"
        )


def test_memory_counts_what_learning_takes(tiny_llama):
    folder = tiny_llama

    def peak(method):
        return peak_memory(plan_job(folder, {"method": method, "scheme": W3}))

    plain, learned = peak("gptq"), peak("autoround_block")
    assert learned["largest block"] > plain["largest block"]
    assert learned["activations"] > 2 * plain["activations"]


def test_the_files_are_the_same_on_any_number_of_threads(tiny_llama, tmp_path):
    recipe = {"method": "autoround_block", "options": {"iterations": 6}, "scheme": W3}
    folder = tiny_llama
    for threads in (1, 3):
        qframe.quantize(
            folder,
            recipe,
            out=tmp_path / str(threads),
            calibration=token_data(),
            threads=threads,
        )
    names = sorted(file.name for file in (tmp_path / "1").iterdir())
    same, other, failed = filecmp.cmpfiles(tmp_path / "1", tmp_path / "3", names, shallow=False)
    assert (same, other, failed) == (names, [], [])


def test_a_block_that_is_learned_loses_less_of_its_outputs(tiny_llama, tmp_path):
    """Measured by transformers itself, on the first block: there inputs have not moved."""
    folder = tiny_llama
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = token_data()
    block = original.model.layers[0]
    lost, said = {}, {}
    for method, options in (
        ("rtn", {}),
        ("autoround", {"iterations": 60, "sweeps": 0}),  # the descent alone, as for the block
        ("autoround_block", {"iterations": 60}),
    ):
        out = tmp_path / method
        recipe = {"method": method, "options": options, "scheme": W3}
        recipe["calibration"] = {"compute_dtype": "float32"}
        report = qframe.quantize(folder, recipe, out=out, calibration=data).report
        said[method] = report.layers[0].info
        weights = {n: e.weight() for n, e in StoredModel.open(out).layers()}
        lost[method] = squared_error(original, block, weights, data.inputs)
    assert lost["autoround_block"] < lost["autoround"] < lost["rtn"]
    assert said["autoround_block"]["block_error"] < said["autoround_block"]["block_error_nearest"]


def squared_error(network, block, weights, inputs):
    """Return the squared error of the first block's output, over all tokens."""
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    total = 0.0
    for (tokens,) in inputs:
        handle = block.register_forward_hook(keep)
        own = {}
        with torch.no_grad():
            network(tokens)
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    own[name] = layer.weight.data
                    layer.weight.data = weights[f"model.layers.0.{name}"]
            network(tokens)
            for name, weight in own.items():
                block.get_submodule(name).weight.data = weight
        handle.remove()
        before, after = outputs[-2:]
        total += float((after - before).double().square().sum())
    return total


def test_a_problem_of_no_fitted_inputs_has_no_error():
    problem = BlockProblem(name="b", layers={}, run=lambda i, w: torch.zeros(1), targets=[])
    assert problem.error({}) == 0.0
