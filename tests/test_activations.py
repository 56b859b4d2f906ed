"""Activations as codes: scales, columns that are left alone or kept, networks run with them."""

import copy
import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qframe
from qframe import (
    CalibrationData,
    Capabilities,
    Grid,
    Host,
    InputGroup,
    LayerInfo,
    Rewrite,
    Scheme,
    bounds,
    hookimpl,
    parallel,
    reference_ops,
    solve,
)
from qframe.activations import InputQuantizer, scale_of
from qframe.certificates import function_preserved
from qframe.errors import (
    CalibrationError,
    NonFiniteError,
    QframeError,
    RecipeError,
    UncalibratedLayerError,
    UnsupportedError,
)
from qframe.grids import reach_observer
from qframe.hessian import total
from qframe.scheme import ActivationScheme
from qframe.stored import QuantizedLinear, StoredLayer
from qframe.verification import verify
from qframe_conformance import check_plugin
from qframe_plugins.outliers.llm_int8 import LARGEST, SMALLEST, LLMInt8

INT8 = Grid(-127, 127)
TOKENS = InputQuantizer(ActivationScheme(), INT8)
LOUD = (5, 9)  # the columns of `tokens` that hold outliers


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).requires_grad_(False)


def tokens(*shape, seed=1):
    x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))
    x[..., list(LOUD)] *= 40
    return x


DATA = CalibrationData.from_tensors([tokens(40), tokens(30, seed=2)])


def quantized(method="rtn", scheme="W8A8", out=None, net=None, **recipe):
    recipe = {"method": method, "scheme": scheme, "ignore": [], **recipe}
    recipe["calibration"] = {"compute_dtype": "float32"}
    net = network() if net is None else net
    return qframe.quantize(net, recipe, calibration=DATA, out=out, overwrite=True)


def lost(module, x):
    return float((module(x) - network()(x)).norm() / network()(x).norm())


# Schemes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dynamic": False}, "needs strategy 'tensor', got 'token'"),
        ({"observer": "mse"}, "'mse' is for dynamic: false"),
        ({"symmetric": False}, "should be True"),
        ({"num_bit": 8}, "did you mean 'num_bits'"),
        ({"num_bits": 9}, r"must lie in 1\.\.8"),
        ({"format": "fp8_e4m3", "bits": 4}, "has type 'float' and num_bits 8"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(RecipeError, match=f"input_activations.*{message}"):
        Scheme.parse({"input_activations": fields}, "recipe")


def test_presets_say_what_becomes_of_inputs():
    says = {name: Scheme.preset(name).describe() for name in ("W8A8", "W8A8_STATIC", "FP8")}
    assert says == {
        "W8A8": "int8 symmetric, channel, minmax, inputs int8 per token",
        "W8A8_STATIC": "int8 symmetric, channel, minmax, inputs int8 per tensor, static minmax",
        "FP8": "fp8_e4m3 symmetric, tensor, minmax, inputs fp8_e4m3 per tensor, static minmax",
    }
    assert Scheme.preset("W8A8").replace(num_bits=4).input_activations == ActivationScheme()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"format": "int7x"}, "input_activations: no number format 'int7x'"),
        ({"format": "ternary", "strategy": "token"}, ""),
        (
            {"strategy": "tensor", "dynamic": False, "observer": "hessian"},
            "no observer 'hessian' that finds how far a stored scale has to reach; known: minmax",
        ),
        (
            {"strategy": "tensor", "dynamic": False, "observer": "percentil"},
            "did you mean 'percentile'",
        ),
    ],
)
def test_what_no_plugin_has_is_refused_before_any_work(inputs, message):
    scheme = {"preset": "W8A8", "input_activations": inputs}
    if message:
        with pytest.raises(UnsupportedError, match=message):
            quantized(scheme=scheme)
    else:
        assert quantized(scheme=scheme).report.layers[0].inputs["error"] > 0


# Rounding -------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32),
    st.sampled_from([(1, 1), (3, 7), (0, 4), (5, 0), (2, 3, 16)]),
    st.sampled_from([0, -140, 100]),
)
def test_tokens_are_rounded_as_the_oracle_says(seed, shape, power):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 2.0**power).astype(np.float32)
    if x.size:
        x[..., 0, :] *= rng.integers(0, 2)  # a token of zeros
    found = TOKENS.apply(torch.from_numpy(x)).double().numpy()
    assert found.shape == x.shape
    flat = x.reshape(int(np.prod(shape[:-1])), shape[-1])
    scale = TOKENS.scales(torch.from_numpy(x)).expand(*shape[:-1], 1).double().numpy()
    absmax = np.abs(flat.astype(np.float64)).max(1, initial=0).reshape(*shape[:-1], 1)
    low, high = bounds.token_scale(absmax)
    assert ((absmax == 0) | ((low <= scale) & (scale <= high))).all()
    assert (scale[absmax == 0] == 1).all()
    codes = np.rint(found / scale)
    assert np.abs(codes).max(initial=0) <= 127
    assert bounds.ratio(found - scale * codes, bounds.decode(scale, codes)) <= 1
    slack = bounds.gamma(1) * np.abs(x.astype(np.float64))
    error, allowed = bounds.nearest(scale * codes - x, codes.astype(int), scale, INT8, slack)
    assert bounds.ratio(error, allowed) <= 1


def test_a_tensor_has_one_scale_and_tokens_have_their_own():
    x = torch.tensor([[127.0, 1.0], [1.27, 0.5]])
    whole = InputQuantizer(ActivationScheme(strategy="tensor"), INT8)
    assert whole.apply(x).tolist() == [[127, 1], [1, 0]]
    assert torch.equal(TOKENS.apply(x)[1:], TOKENS.apply(x[1:]))
    assert not torch.equal(whole.apply(x)[1:], whole.apply(x[1:]))


def test_a_stored_scale_clips_what_lies_beyond():
    static = ActivationScheme(strategy="tensor", dynamic=False)
    made = InputQuantizer.calibrated(static, INT8, torch.tensor([127.0]))
    x = torch.tensor([[200.0, -128.0, 3.4, 0.5]])
    assert made.apply(x).tolist() == [[127, -127, 3, 0]]
    assert made.clipped(x) == 0.5
    assert TOKENS.clipped(x) == 0
    nothing = InputQuantizer.calibrated(static, INT8, torch.zeros(1))
    assert nothing.apply(torch.zeros(1, 2)).tolist() == [[0, 0]]


@pytest.mark.parametrize("grid", [INT8, Grid.of([-6, -3, -1, 0, 1, 3, 6])])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_token_alone(grid, bad):
    x = tokens(3)
    x[1, 2] = bad
    found = InputQuantizer(ActivationScheme(), grid).apply(x)
    assert not torch.isfinite(found[1]).all()
    assert torch.isfinite(found[[0, 2]]).all()


def test_loud_columns_of_a_call_are_left_alone_and_stretch_no_scale():
    x = tokens(2, 7)
    found = TOKENS.apply(x, threshold=20.0)
    loud = (x.abs() >= 20).reshape(-1, 64).any(0)
    assert loud.nonzero()[:, 0].tolist() == list(LOUD)
    assert torch.equal(found[..., loud], x[..., loud])
    assert torch.equal(found[..., ~loud], TOKENS.apply(x.masked_fill(loud, 0))[..., ~loud])
    edge = float(x[..., 5].abs().max())
    assert torch.equal(TOKENS.apply(x, edge)[..., 5], x[..., 5])  # >=, as in the published code
    assert torch.equal(TOKENS.apply(x, 0.0), TOKENS.apply(x))


# Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "FP8_DYNAMIC", "W8A8_STATIC", "FP8"])
@pytest.mark.parametrize("method", ["rtn", "llm_int8", "smoothquant", "hadamard", "awq"])
def test_what_is_written_computes_what_was_made(method, scheme, tmp_path):
    made = quantized(method, scheme, out=tmp_path / "out")
    x = tokens(2, 9, seed=3)
    for dense in (False, True):
        loaded = qframe.load(tmp_path / "out", network(), dequantize=dense)
        assert torch.equal(made.module(x), loaded(x))
        assert all(isinstance(loaded[i], QuantizedLinear) for i in (0, 2))
    report = verify(tmp_path / "out", network())
    assert not report.problems
    # What a layer computes is the product of what its weight and its inputs stand for.
    layer = made.module[0]
    z = x if layer.stored.transform is None else layer.stored.transform.move(x)
    values, weight = layer.stored.quantized(z).double(), layer.weight.double()
    magnitude = (values.abs() @ weight.abs().T + layer.bias.abs()).numpy()
    error = layer(x).double() - (values @ weight.T + layer.bias)
    assert bounds.ratio(error, bounds.accumulate(magnitude, 65, bounds.UNIT["float32"])) <= 1


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "hadamard", "llm_int8", "awq+llm_int8"])
def test_the_next_layer_is_calibrated_on_what_it_will_get(method):
    """Its stored scale reaches the largest input that the finished network gives it."""
    module = quantized(method, "W8A8_STATIC").module
    second = module[2].stored

    def reach(before):
        with parallel.one_torch_thread():
            inner = torch.cat([before(x) for (x,) in DATA.inputs])
        z = inner if second.transform is None else second.transform.apply(inner)
        return (z.abs().max() / 127).reshape(1)

    assert torch.equal(second.inputs.scale, reach(module[:2]))
    assert not torch.equal(second.inputs.scale, reach(network()[:2]))


@pytest.mark.parametrize("method", ["rtn", "hadamard", "llm_int8"])
def test_the_report_says_what_rounding_inputs_alone_loses(method):
    result = quantized(method, {"preset": "W8A8_STATIC", "num_bits": 3})
    report, layer = result.report.layers[0], result.module[0]
    x = torch.cat([x for (x,) in DATA.inputs])
    z = x if layer.stored.transform is None else layer.stored.transform.move(x)
    lost = total(((layer.stored.quantized(z) - z) @ layer.weight.T).square())
    whole = total((x @ network()[0].weight.T).square())
    assert report.inputs["error"] == math.sqrt(lost / whole)
    assert report.inputs["step"] == float(layer.input_step)
    assert report.inputs["clipped"] == 0  # minmax reaches all that is rounded
    halved = dataclasses.replace(layer.stored.inputs, scale=layer.input_step / 2)
    assert 0 < halved.clipped(z) < 1


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_stored_scale_is_what_its_observer_finds(observer, bits):
    fields = {"num_bits": bits, "strategy": "tensor", "dynamic": False, "observer": observer}
    made = quantized(scheme={"preset": "W8A8", "input_activations": fields}).module[0]
    grid, host = made.stored.inputs.grid, Host.discover()
    assert grid == Grid(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    finder = reach_observer(host, ActivationScheme(**fields), grid)
    group = InputGroup(layers=(LayerInfo(name="0", rows=48, columns=64),))
    statistic = finder.start(group)
    for (x,) in reversed(DATA.inputs):
        statistic.update(x)
    assert torch.equal(made.stored.inputs.scale, scale_of(statistic.value(), grid))


def test_layers_of_past_blocks_are_freed(tiny, tmp_path, monkeypatch):
    """Memory must not grow with depth: at most two blocks wait to be written."""
    made, alive = [], []

    class Watched(StoredLayer):
        def __init__(self, *parts):
            super().__init__(*parts)
            made.append(weakref.ref(self))

    def look(progress):
        alive.append(sum(each() is not None for each in made) / len(progress.layers))

    monkeypatch.setattr(solve, "StoredLayer", Watched)
    model = tiny.write_llama(tmp_path / "model", layers=6)
    settings = {"num_calibration_samples": 2, "max_seq_length": 16}
    recipe = {"method": "rtn", "scheme": "W8A8", "calibration": settings}
    qframe.quantize(model, recipe, out=tmp_path / "out", progress=look)
    assert len(alive) == 6
    assert 0 < max(alive) <= 2


def test_a_scale_that_is_stored_needs_inputs():
    with pytest.raises(CalibrationError, match="needs calibration inputs"):
        qframe.quantize(network(), {"scheme": "W8A8_STATIC", "ignore": []})

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UncalibratedLayerError, match=r"'unused'.*dynamic: true, or ignore"):
        quantized(scheme="W8A8_STATIC", net=Unused())


# Columns that are kept ------------------------------------------------------------------------


def test_outlier_columns_stay_in_sixteen_bits_and_plain_rounding_collapses():
    x = tokens(2, 9, seed=3)
    plain, kept = quantized(), quantized("llm_int8", options={"threshold": 20.0})
    assert kept.report.layers[0].inputs["kept_columns"] == len(LOUD)
    more = len(LOUD) * (16 * 48 + 32)  # of weights in float16, and of which columns they are
    bits = [round(r.report.layers[0].bits_per_weight * 48 * 64) for r in (plain, kept)]
    assert bits[1] == bits[0] + more
    assert lost(kept.module, x) < lost(plain.module, x) / 2
    layer, original = kept.module[0], network()[0]
    assert not layer.stored.packed.dequantize()[:, list(LOUD)].any()
    alone = torch.zeros(3, 64)
    alone[:, list(LOUD)] = tokens(3)[:, list(LOUD)]
    weight = original.weight.half().float()
    assert torch.equal(layer.weight[:, list(LOUD)], weight[:, list(LOUD)])
    magnitude = (alone.abs().double() @ weight.abs().double().T + layer.bias.abs()).numpy()
    error = layer(alone).double() - (alone.double() @ weight.double().T + layer.bias)
    assert bounds.ratio(error, bounds.accumulate(magnitude, 65, bounds.UNIT["float32"])) <= 1


def test_outliers_of_a_call_depend_on_the_others_of_its_batch():
    options = {"outliers": "dynamic", "threshold": 20.0}
    layer = quantized("llm_int8", options=options).module[0]
    quiet, loud = torch.full((1, 64), 0.3), tokens(1)
    quiet[0, 5] = 7.7
    together = layer(torch.cat([quiet, loud]))[:1]
    assert not torch.equal(together, layer(quiet))
    x, weight = torch.cat([quiet, loud]), layer.weight.double().numpy()
    outlier = reference_ops.outlier_columns(x, 20.0)
    scale = reference_ops.token_scale(np.where(outlier, 0, x))
    allowed = bounds.int8_output(x, weight, weight, scale, outlier)
    own = bounds.accumulate((layer(x).abs() + layer.bias.abs()).numpy(), 1)  # of adding the bias
    error = layer(x).double() - layer.bias - torch.from_numpy(x.double().numpy() @ weight.T)
    assert bounds.ratio(error, allowed + own) <= 1


@pytest.mark.parametrize("outliers", ["calibrated", "dynamic"])
def test_threshold_0_is_plain_int8_bit_for_bit(outliers):
    x = tokens(2, 9, seed=3)
    options = {"outliers": outliers, "threshold": 0}
    assert torch.equal(quantized("llm_int8", options=options).module(x), quantized().module(x))


def test_outliers_at_run_time_need_activations_that_are_rounded():
    with pytest.raises(UnsupportedError, match="only schemes with input_activations"):
        quantized("llm_int8", "W8A16", options={"outliers": "dynamic"})


def test_the_handler_holds_in_every_form():
    rough = LLMInt8(6.7), LLMInt8(0.7, "dynamic")  # thresholds that are no float32 numbers
    for handler in (LLMInt8(threshold=0.0), LLMInt8(2.5), LLMInt8(outliers="dynamic"), *rough):
        report = check_plugin(handler)
        assert report.ran
        assert not report.failures


@pytest.mark.parametrize("threshold", [-1, 1e-50, 1e39, float("nan"), float("inf")])
def test_a_threshold_that_float32_does_not_hold_is_refused(threshold):
    with pytest.raises(
        RecipeError, match=r"option 'threshold': .*must be 0, or from 1\.175e-38 to"
    ):
        quantized("llm_int8", options={"threshold": threshold})


@pytest.mark.parametrize("outliers", ["calibrated", "dynamic"])
def test_the_least_and_the_largest_threshold_are_stored_and_loaded(outliers, tmp_path):
    for threshold in (SMALLEST, LARGEST):
        options = {"outliers": outliers, "threshold": threshold}
        made = quantized("llm_int8", out=tmp_path / "out", options=options)
        x = tokens(2, 9, seed=3)
        assert torch.equal(qframe.load(tmp_path / "out", network())(x), made.module(x))
        assert not verify(tmp_path / "out", network()).problems


def test_what_keeps_columns_comes_last():
    for method in ("hadamard+llm_int8", "awq+llm_int8", "smoothquant+hadamard+llm_int8"):
        assert lost(quantized(method).module, tokens(2, 9, seed=3)) < 1
    for method in ("llm_int8+awq", "llm_int8+hadamard", "llm_int8+llm_int8"):
        with pytest.raises(UnsupportedError, match=r"cannot come after 'llm_int8'.* last of all"):
            qframe.quantize(network(), {"method": method, "scheme": "W8A8"})  # before any text


def test_an_empty_list_of_columns_is_none(tmp_path):
    class Empty:
        name, needs, capabilities = "empty", frozenset(), Capabilities()

        def rewrite(self, problem, rng):
            kept = torch.zeros(0, dtype=torch.int64)
            return Rewrite(
                weights=problem.weights, input_scale=torch.ones(problem.columns), kept=kept
            )

    class Plugin:
        @hookimpl
        def qframe_outlier_handlers(self):
            return [Empty()]

    host = Host.discover()
    host.add(Plugin(), "empty")
    recipe = {"method": "empty", "scheme": "W8A8", "ignore": []}
    recipe["calibration"] = {"compute_dtype": "float32"}
    made = qframe.quantize(
        network(), recipe, calibration=DATA, out=tmp_path / "out", overwrite=True, host=host
    )
    x = tokens(2, 9, seed=3)
    assert torch.equal(made.module(x), quantized().module(x))
    assert torch.equal(qframe.load(tmp_path / "out", network())(x), made.module(x))


@given(st.floats(-60000, 60000, width=32), st.sampled_from([1.0, 2.0**-12, 2.0**-24]))
def test_kept_weights_are_as_near_as_the_bound_says(number, size):
    weight = np.float32(number * size)
    stored = np.float16(weight).astype(np.float64)
    assert bounds.ratio(stored - weight, bounds.kept_weight(stored)) <= 1


def test_the_bound_of_kept_weights_is_attained_and_one_step_more_breaks_it():
    middle = np.float32(1 + 2.0**-11)  # between two numbers of float16
    assert bounds.ratio(1 - np.float64(middle), bounds.kept_weight(1.0)) > 0.99
    layer, weight = quantized("llm_int8").module[0].stored, network()[0].weight
    made = layer.transform.rewrite(weight)
    held = function_preserved(weight, made, layer.transform, layer.kept)
    assert held.holds
    assert held.ratio > 0.9
    for change in (1.0, -1.0):
        other = layer.kept.clone()
        place = other[3, 1]
        other[3, 1] = torch.nextafter(place, place + change)
        assert not function_preserved(weight, made, layer.transform, other).holds
    whole = layer.transform.whole(weight)  # its columns were not taken out
    assert not function_preserved(weight, whole, layer.transform, layer.kept).holds


def test_a_weight_that_sixteen_bits_cannot_hold_is_named():
    net = network()
    net[0].weight[3, LOUD[0]] = 1e5
    with pytest.raises(NonFiniteError, match=r"layer '0': .* does not fit float16.*1e\+05"):
        quantized("llm_int8", net=net)


@pytest.mark.parametrize(
    "part", ["input_kept", "weight_kept", "input_step", "input_threshold", "weight_packed"]
)
def test_verify_names_what_was_changed(part, tmp_path):
    options = {"outliers": "dynamic"} if part == "input_threshold" else {}
    quantized("llm_int8", "W8A8_STATIC", tmp_path / "out", options=options)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    bits = tensors[f"0.{part}"].view(torch.uint8)
    bits.reshape(-1)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    problems = verify(tmp_path / "out").problems
    assert f"0.{part}" in [problem.name for problem in problems]


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("input_kept", lambda t: t.flip(0), "ascending"),
        ("input_kept", None, "come together"),
        ("weight_kept", lambda t: t[:, :1].contiguous(), r"should be float16 \[48, 2\]"),
        ("weight_kept", lambda t: t / 0, "non-finite"),
        ("input_step", lambda t: -t, "must be positive and finite"),
        ("input_step", None, "need it"),
        ("input_step", lambda t: t.repeat(2), r"should be float32 \[1\]"),
    ],
)
def test_a_folder_that_cannot_be_is_not_loaded(part, changed, message, tmp_path):
    quantized("llm_int8", "W8A8_STATIC", tmp_path / "out", options={"threshold": 20.0})
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    old = tensors.pop(f"0.{part}")
    if changed is not None:
        tensors[f"0.{part}"] = changed(old)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QframeError, match=message):
        qframe.load(tmp_path / "out", network())


def test_a_network_is_copied_with_its_quantized_layers():
    made = quantized("llm_int8").module
    x = tokens(1, 4)
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    with torch.no_grad():
        again = network()
        again.load_state_dict(network().state_dict())
    assert made.state_dict().keys() >= {"0.weight_packed", "0.input_kept", "0.weight_kept"}
    assert made(x.bfloat16().float()).dtype == torch.float32
