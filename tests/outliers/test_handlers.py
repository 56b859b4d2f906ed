"""AWQ and SmoothQuant, held against float64, and in the pipeline.

What any handler owes is the suite's business: `qframe check awq`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qframe
from qframe import (
    Capabilities,
    Grid,
    Host,
    RewriteProblem,
    RoundingProblem,
    Scheme,
    bounds,
    hookimpl,
    rounding,
)
from qframe.calibration import CalibrationData
from qframe.claims.handlers import Rewriting, root_of_loss
from qframe.errors import FallbackError, UncalibratedLayerError
from qframe.ranks import SLOTS
from qframe_conformance import check_plugin
from qframe_conformance.outlier_cases import HandlerCase
from qframe_plugins.outliers.awq import AWQ, PART
from qframe_plugins.outliers.smoothquant import RANGE, SmoothQuant
from tests.mutants import handlers as reference

W4 = Scheme(group_size=8)


def problem(seed, rows=(3, 2), columns=16, tokens=48, schemes=(W4, W4)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns)) * np.exp(2 * rng.normal(size=columns))
    statistics = {
        "hessian": torch.from_numpy((2 / tokens) * x.T @ x),
        "absmax": torch.from_numpy(np.float32(np.abs(x).max(0))),
    }
    layers = {}
    for name, count, scheme in zip("qk", rows, schemes, strict=True):
        half = 1 << (scheme.num_bits - 1)
        layers[name] = RoundingProblem(
            name=name,
            weight=torch.from_numpy(rng.normal(size=(count, columns)).astype(np.float32)),
            scheme=scheme,
            grid=Grid(-half, half - 1) if scheme.symmetric else Grid(0, 2 * half - 1),
            statistics=statistics,
            tokens=tokens,
        )
    return RewriteProblem(layers=layers)


def rewriting(given, rewrite):
    layer = given.layers[given.name]
    hessian = given.statistics["hessian"].numpy()
    root = np.sqrt(hessian.diagonal())
    return Rewriting(
        weights=given.weights,
        rewrite=rewrite,
        scheme=layer.scheme,
        grid=layer.grid,
        hessian=hessian,
        magnitude=np.outer(root, root),  # Cauchy and Schwarz
        absmax=given.statistics["absmax"].double().numpy(),
        inputs=np.zeros((0, given.columns), np.float32),  # what is asked here does not look at them
    )


OPTIONS = [
    AWQ(),
    AWQ(candidates=1),
    SmoothQuant(),
    SmoothQuant(alpha=1),
    SmoothQuant(alpha="search"),
]


@pytest.mark.parametrize("handler", OPTIONS)
def test_the_suite_holds_whatever_the_options(handler):
    report = check_plugin(handler, seed=7, shrink=False)
    assert report.ok, str(report)


# AWQ ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([W4, Scheme(num_bits=3, strategy="channel")]))
def test_awq_finds_what_a_search_in_float64_finds(seed, scheme):
    """The reference sums in float64, so of losses that are next to equal it may take another."""
    given = problem(seed, schemes=(scheme, scheme))
    rng = np.random.default_rng(0)
    mine, other = (handler.rewrite(given, rng) for handler in (AWQ(), reference.AWQ()))
    if torch.equal(mine.input_scale, other.input_scale):
        return
    found, sigma = root_of_loss(rewriting(given, mine), "float32")
    best, its_sigma = root_of_loss(rewriting(given, other), "float32")
    assert bounds.ratio(found, best + sigma + its_sigma) <= 1


def test_every_layer_counts_with_its_own_scheme():
    fine = W4.replace(num_bits=8)
    rng, swayed = np.random.default_rng(0), 0
    for seed in range(20):
        mixed = problem(seed, schemes=(W4, fine))
        mine, other = (handler.rewrite(mixed, rng) for handler in (AWQ(), reference.AWQ()))
        assert torch.equal(mine.input_scale, other.input_scale)
        swayed += not torch.equal(mine.input_scale, AWQ().rewrite(problem(seed), rng).input_scale)
    assert swayed


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_all_rows_of_a_layer_decide_however_many_there_are(strategy):
    """The first rows, which are searched together, do not use the loud channels at all."""
    scheme = Scheme(strategy=strategy, group_size=8 if strategy == "group" else None)
    rng, swayed = np.random.default_rng(0), 0
    for seed in range(5):
        given = problem(seed, rows=(2 * PART + 5, 0), schemes=(scheme, scheme))
        layer, loudness = given.layers["q"], given.statistics["hessian"].diagonal()
        layer.weight[:PART, loudness > loudness.median()] = 0
        layer.weight[-1] *= 4  # with one scale for all rows, all must be seen to know it
        mine, other = (handler.rewrite(given, rng) for handler in (AWQ(), reference.AWQ()))
        assert torch.equal(mine.input_scale, other.input_scale)
        layer.weight[PART:] = layer.weight[:1]
        swayed += not torch.equal(mine.input_scale, AWQ().rewrite(given, rng).input_scale)
    assert swayed


def test_a_hessian_beyond_float32_changes_no_choice():
    given = problem(3)
    scaled = {
        name: dataclasses.replace(
            layer, statistics={"hessian": given.statistics["hessian"] * 2.0**200}
        )
        for name, layer in given.layers.items()
    }
    rng = np.random.default_rng(0)
    mine, loud = (AWQ().rewrite(p, rng) for p in (given, RewriteProblem(layers=scaled)))
    assert torch.equal(mine.input_scale, loud.input_scale)


def test_a_candidate_whose_scales_cannot_be_stored_is_none():
    """Float16 holds scales up to 65504, and the loudest channel has the largest weight."""
    given = problem(3, rows=(3, 0))
    loudest = int(given.statistics["hessian"].diagonal().argmax())
    for layer in given.layers.values():
        layer.weight[:, loudest] = 400_000
    made = AWQ().rewrite(given, np.random.default_rng(0))
    assert bool(torch.isfinite(made.input_scale).all())
    layer = dataclasses.replace(given.layers["q"], weight=made.weights["q"])
    assert bool(torch.isfinite(rounding.to_nearest(layer).scale).all())


@pytest.mark.parametrize("power", [2.0**-40, 2.0**-5, 2.0**4, 2.0**40])
def test_losses_that_a_float32_could_not_hold_decide_alike_for_all_sizes_of_weights(power):
    """The channel that has weights is 10^18 times as quiet as the one that has none."""
    weight = torch.tensor([[0.06286511, 0.0], [0.32021132, 0.0], [-0.2678347, 0.0]])
    case = HandlerCase(
        AWQ(),
        weights={"block.q": weight},
        inputs=np.array([[1.1310397e-18, 3.7883239]], np.float32),
        scheme=Scheme(group_size=8, scale_dtype="bfloat16"),
        seed=0,
        loud=(),
        quiet=(),
        poison=None,
    )
    times = case.again({"block.q": weight * power})
    assert torch.equal(times.input_scale, case.rewrite.input_scale)
    assert torch.equal(times.weights["block.q"], case.rewrite.weights["block.q"] * power)


# Scales that fold -----------------------------------------------------------------------------


def fourths(scale):
    """Return the powers of four next to a scale, as if a layer could divide by no others."""
    return 4.0 ** (scale.double().log2() / 2).round().float()


@given(st.integers(0, 2**32))
def test_awq_compares_scales_as_they_will_be(seed):
    given = problem(seed)
    rng = np.random.default_rng(0)
    coarse = dataclasses.replace(given, foldable=fourths)
    found = AWQ().rewrite(coarse, rng)
    assert torch.equal(fourths(found.input_scale), found.input_scale)
    for other in (fourths(AWQ().rewrite(given, rng).input_scale), torch.ones(given.columns)):
        least, sigma = root_of_loss(rewriting(given, found), "float32")
        loss, its_sigma = root_of_loss(rewriting(given, given.scaled(other)), "float32")
        assert bounds.ratio(least, loss + sigma + its_sigma) <= 1


@given(st.integers(0, 2**32))
def test_smoothquant_compares_scales_as_they_will_be(seed):
    int8 = {"num_bits": 8, "strategy": "channel", "input_activations": {}}
    given = problem(seed, schemes=(Scheme(**int8), Scheme(**int8)))
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(9, 16)).astype(np.float32))
    layers = {
        name: dataclasses.replace(
            layer,
            input_grid=Grid(-127, 127),
            statistics={"absmax": x.abs().amax(0), "sample": x},
        )
        for name, layer in given.layers.items()
    }
    handler = SmoothQuant(alpha="search")
    found = handler.rewrite(RewriteProblem(layers=layers, foldable=fourths), rng=None)
    assert torch.equal(fourths(found.input_scale), found.input_scale)


# SmoothQuant ----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
def test_smoothquant_is_its_formula(seed, alpha):
    given = problem(seed)
    found = SmoothQuant(alpha=alpha).rewrite(given, np.random.default_rng(0)).input_scale
    x = given.statistics["absmax"].numpy().astype(np.float64)
    w = torch.cat(list(given.weights.values())).abs().amax(0).numpy().astype(np.float64)
    expected = np.clip(x**alpha / w ** (1 - alpha), 1 / RANGE, RANGE)
    error = np.abs(found.numpy() - expected)
    assert bounds.ratio(error, bounds.gamma(2) * expected) <= 1


def test_half_way_makes_inputs_and_weights_equally_large():
    given = problem(5)
    made = SmoothQuant().rewrite(given, np.random.default_rng(0))
    x = given.statistics["absmax"].double() / made.input_scale
    w = torch.cat(list(made.weights.values())).abs().amax(0).double()
    assert bounds.ratio((x - w).numpy(), bounds.gamma(4) * w.numpy()) <= 1


# In the pipeline ------------------------------------------------------------------------------


def network():
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(4, 40, 32, generator=generator)
    x[..., 3] *= 30  # a salient channel
    return net, CalibrationData.from_tensors(list(x))


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "smoothquant", "smoothquant+awq+rtn"])
def test_handlers_compose_with_rounders_and_keep_the_function(method):
    net, data = network()
    recipe = {"method": method, "scheme": {"num_bits": 4, "group_size": 8, "symmetric": False}}
    result = qframe.quantize(net, recipe, calibration=data)
    for layer in result.report.layers:
        [kept] = [c for c in layer.certificates if c.claim == "function preserved"]
        assert kept.holds
        assert not [c for c in layer.certificates if not c.holds]
    assert not result.report.fallbacks()


def test_awq_saves_what_rounding_takes_from_a_salient_channel():
    net, data = network()
    scheme = {"num_bits": 4, "group_size": 8, "symmetric": False}
    result = qframe.quantize(net, {"method": "awq", "scheme": scheme}, calibration=data)
    first = result.report.layers[0]
    assert first.error < first.rtn_error


class Idle(torch.nn.Module):
    """One of its layers is never called, as an expert may be that no token is sent to."""

    def __init__(self):
        super().__init__()
        self.busy, self.idle = torch.nn.Linear(32, 24), torch.nn.Linear(32, 24)

    def forward(self, x):
        return self.busy(x)


@pytest.mark.parametrize("method", ["awq", "smoothquant", "smoothquant+awq", "awq+gptq"])
def test_without_tokens_layers_stay_as_they_are_and_the_report_says_so(method):
    _, data = network()
    recipe = {"method": method, "scheme": {"group_size": 8}, "max_fallback_frac": 1 / 2}
    net = Idle()
    result = qframe.quantize(net, recipe, calibration=data)
    said = [(event.layer, event.message.split(":")[0]) for event in result.report.fallbacks()]
    solved = [("idle", "rounded to nearest instead")] if "gptq" in method else []
    handlers = [part for part in method.split("+") if part != "gptq"]
    assert said == [("idle", "not rewritten")] * len(handlers) + solved
    assert all(name in str(result.report.fallbacks()) for name in handlers)
    assert getattr(result.module.idle, "input_scale", None) is None
    assert result.module.busy.input_scale is not None
    with pytest.raises(FallbackError, match="1 of 2 layers got a weaker method"):
        qframe.quantize(net, {**recipe, "max_fallback_frac": 0.4}, calibration=data)
    with pytest.raises(UncalibratedLayerError, match="layer 'idle'"):
        qframe.quantize(net, {**recipe, "on_fallback": "error"}, calibration=data)


@pytest.mark.parametrize("first", ["smoothquant", "awq"])
def test_a_handler_is_given_statistics_of_what_those_before_it_left(first):
    """A maximum of quotients is the quotient of the maximum, bit for bit."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy:
        name: str = "spy"
        needs: frozenset = frozenset({"absmax"})
        capabilities: Capabilities = dataclasses.field(default_factory=Capabilities)

        def rewrite(self, problem, rng):
            seen.append(problem.statistics["absmax"])
            return problem.scaled(torch.ones(problem.columns))

    class Plugin:
        @hookimpl
        def qframe_outlier_handlers(self):
            return [Spy()]

    host = Host.discover()
    host.add(Plugin(), "spy")
    net, data = network()
    result = qframe.quantize(
        net,
        {"method": f"{first}+spy", "scheme": W4, "calibration": {"compute_dtype": "float32"}},
        calibration=data,
        host=host,
    )
    largest = torch.stack([x.abs().amax(0) for (x,) in data.inputs]).amax(0)
    scale = result.module[0].input_scale
    assert not torch.equal(scale, torch.ones(32))
    assert torch.equal(seen[0], largest / scale)


@pytest.mark.parametrize(
    ("method", "passes"), [("gptq", 1), ("awq", 1), ("awq+gptq", 2), ("smoothquant+awq", 2)]
)
def test_second_moments_of_the_same_inputs_are_observed_once(method, passes):
    """One pass for the first handler and the report, another for inputs that were rewritten."""
    started = []

    @dataclasses.dataclass(frozen=True)
    class Counting:
        name: str = "hessian"
        observer: object = None

        def start(self, group):
            started.append(group.name)
            return self.observer.start(group)

    host = Host.discover(disable=["hessian"])
    installed = Host.discover().get("observer", "hessian")

    class Plugin:
        @hookimpl
        def qframe_observers(self):
            return [Counting(observer=installed)]

    host.add(Plugin(), "counting")
    net, data = network()
    qframe.quantize(net, {"method": method, "scheme": W4}, calibration=data, host=host)
    slots = min(SLOTS, len(data.inputs))
    assert sorted(started) == sorted(["0", "2"] * passes * slots)
