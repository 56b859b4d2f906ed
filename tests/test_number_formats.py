"""Floats and codebooks agree with independent implementations: every code, and rounding."""

from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf.quants import MXFP4
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import (
    CalibrationData,
    Host,
    OpCall,
    RoundingProblem,
    Scheme,
    Unsupported,
    bounds,
    reference,
    rounding,
    scales,
)
from qframe.certificates import Evidence
from qframe.errors import PluginError, UnsupportedError, WeightsError
from qframe.grids import grid_of
from qframe.packing import PackedWeight
from qframe.stored import QuantizedLinear
from qframe.verification import verify
from qframe_conformance.kinds import NASTY, nudged
from qframe_plugins.rounders.rtn import RTN

HOST = Host.discover()
DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
PRESETS = ("W8A16_FP8", "MXFP8", "MXFP4", "NVFP4", "NF4")
SCHEMES = [
    *map(Scheme.preset, PRESETS),
    Scheme.preset("MXFP4", scale_rule="ocp", group_size=4),
    Scheme.preset("MXFP8", scale_rule="ocp", group_size=5),
    Scheme.preset("NVFP4", group_size=3),
    Scheme.preset("NVFP4", observer="mse", group_size=4),
    Scheme.preset("MXFP4", observer="mse", group_size=4),
    Scheme(format="fp6_e3m2", strategy="tensor", scale_dtype="float32"),
    Scheme(format="fp6_e2m3", group_size=5, scale_dtype="bfloat16"),
    Scheme(num_bits=4, group_size=4, scale_dtype="e8m0"),
    Scheme(num_bits=4, group_size=4, scale_dtype="e4m3", symmetric=False),
]
IDS = [f"{number}-{scheme.format_name}" for number, scheme in enumerate(SCHEMES)]


def grid(name):
    return HOST.get("number format", name).grid(symmetric=True, scale_rule="full")


def problem(weight, scheme):
    tensor = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    return RoundingProblem(name="layer", weight=tensor, scheme=scheme, grid=grid_of(HOST, scheme))


def encoded(numbers, name):
    """Return what numbers become at scale 1."""
    one = grid(name)
    x = torch.from_numpy(np.float32(numbers)).reshape(1, -1)
    index = torch.zeros(x.shape[1], dtype=torch.int32)
    codes = rounding.encode(x, torch.ones(1, 1), torch.zeros(1, 1), index, one)
    return np.array(one.values)[codes[0].numpy() - one.qmin]


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_has_the_value_that_ml_dtypes_gives_it(name):
    made = HOST.get("number format", name)
    codes = np.arange(1 << made.num_bits, dtype=np.uint8)
    theirs = codes.view(DTYPES[name]).astype(np.float64)
    half = 1 << (made.num_bits - 1)
    one = grid(name)
    assert one.values == tuple(np.unique(theirs[np.isfinite(theirs)] + 0.0))
    assert one.mirrored
    for code in range(one.qmax + 1):  # the k-th positive value has the bits k, and with a sign
        assert one.values[code - one.qmin] == theirs[code]
        assert one.values[-code - one.qmin] == theirs[half + code]


def test_nf4_is_float32_and_its_midpoints_are_no_float32():
    values = np.array(grid("nf4").values)
    assert np.array_equal(values, values.astype(np.float32))
    middles = (values[1:] + values[:-1]) / 2
    assert (middles != middles.astype(np.float32)).any()


def test_ternary_is_the_restricted_grid_of_two_bits():
    assert grid("ternary") == HOST.get("number format", "int2").grid(
        symmetric=True, scale_rule="restricted"
    )


@pytest.mark.parametrize("name", [*DTYPES, "nf4", "ternary"])
def test_zero_points_are_refused(name):
    with pytest.raises(UnsupportedError, match="use symmetric: true"):
        HOST.get("number format", name).grid(symmetric=False, scale_rule="full")


# Rounding -------------------------------------------------------------------------------------


def difficult(name, seed):
    """Return numbers: values, midpoints and their float32 neighbours, any, far and subnormal."""
    rng = np.random.default_rng(seed)
    values = np.array(grid(name).values)
    middles = (values[1:] + values[:-1]) / 2
    spread = rng.normal(size=2000) * 2.0 ** rng.integers(-30, 20, 2000)
    every = [values, middles, *(nudged(rng, middles) for _ in range(4)), spread]
    return np.float32(np.concatenate([*every, rng.integers(-9, 9, 40) * 2.0**-149]))


@pytest.mark.parametrize("name", DTYPES)
@given(seed=st.integers(0, 2**32))
def test_rounding_is_the_cast_of_ml_dtypes(name, seed):
    x = difficult(name, seed)
    largest = np.float32(grid(name).values[-1])
    cast = np.clip(x, -largest, largest).astype(DTYPES[name]).astype(np.float64)
    assert np.array_equal(encoded(x, name), cast + 0.0)


@pytest.mark.parametrize("name", [*DTYPES, "nf4"])
@given(seed=st.integers(0, 2**32))
def test_nothing_nearer_is_left(name, seed):
    x = np.float64(difficult(name, seed))
    values = np.array(grid(name).values)
    error = np.abs(x - encoded(x, name))
    assert np.array_equal(error, np.abs(x - bounds.nearest_value(x, values)))


# Scales ---------------------------------------------------------------------------------------


def test_scales_of_e8m0_are_those_of_ml_dtypes():
    stored = torch.arange(256, dtype=torch.uint8)
    theirs = stored.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    mine = scales.read(stored, "e8m0").numpy()
    assert np.array_equal(mine, theirs, equal_nan=True)
    assert torch.equal(scales.store(scales.read(stored[:255], "e8m0"), "e8m0"), stored[:255])


@pytest.mark.parametrize("dtype", ["e8m0", "e4m3"])
@given(seed=st.integers(0, 2**32))
def test_rounding_up_gives_the_least_number_that_is_no_less(dtype, seed):
    every = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}[dtype]
    numbers = np.arange(256, dtype=np.uint8).view(every).astype(np.float64)
    numbers = np.unique(numbers[numbers > 0])
    rng = np.random.default_rng(seed)
    x = np.concatenate([nudged(rng, rng.choice(numbers, 300)), rng.choice(numbers, 100)])
    x = np.float32(np.concatenate([x, 2.0 ** rng.uniform(-149, 128, 300)]))
    up = rounding.round_up(torch.from_numpy(x), dtype).double().numpy()
    place = np.searchsorted(numbers, np.float64(x))
    assert np.array_equal(up, np.append(numbers, np.inf)[place])
    assert all(up[i] == reference.round_up(float(x[i]), dtype) for i in range(len(x)))


@given(seed=st.integers(0, 2**32))
def test_the_scale_of_a_tensor_times_any_of_its_groups_is_exact(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(4, 24)) * 2.0 ** rng.integers(-140, 60)
    made = RTN().round(problem(weight, Scheme.preset("NVFP4", group_size=5)), rng)
    own = made.scale / made.global_scale
    assert torch.equal(own, rounding.round_up(own, "e4m3"))
    assert torch.equal(own.double() * made.global_scale.double(), made.scale.double())


# MXFP4 of gguf --------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32))
def test_mxfp4_by_the_ocp_rule_is_that_of_gguf(seed):
    """Scales byte for byte and values but for ties, which gguf gives to the smaller value."""
    rng = np.random.default_rng(seed)
    weight = np.float32(rng.normal(size=(6, 64)) * 2.0 ** rng.integers(-20, 20, (6, 1)))
    scheme = Scheme.preset("MXFP4", scale_rule="ocp")
    asked = problem(weight, scheme)
    packed = PackedWeight.pack(RTN().round(asked, rng), scheme, asked.grid)
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.MXFP4).reshape(-1, 17)
    assert np.array_equal(packed.scale.numpy().ravel(), theirs[:, 0])
    values = gguf.quants.dequantize(theirs.reshape(6, -1), gguf.GGMLQuantizationType.MXFP4)
    mine = packed.dequantize().numpy()
    assert np.array_equal(np.abs(mine - weight), np.abs(values - weight))
    tied = np.float64(mine - weight) == -np.float64(values - weight)
    assert np.array_equal(mine[~tied], values[~tied])


def test_gguf_reads_the_values_of_our_codes():
    """All codes at all scales that it can express: sign bit, then the rank of the magnitude."""
    one = grid("fp4_e2m1")
    codes = np.array([*range(one.qmax + 1), *range(0, one.qmin - 1, -1)])
    ranks = np.array([*range(8), *range(8, 16)], np.uint8)  # of gguf, -0 included
    for stored in range(1, 253):  # larger scales times 6 are no float32
        low = np.concatenate([ranks, ranks[::-1]])
        block = np.concatenate([[np.uint8(stored)], low[:16] | low[16:] << 4]).astype(np.uint8)
        theirs = MXFP4.dequantize_blocks(block[None])[0]
        scale = scales.read(torch.tensor([stored], dtype=torch.uint8), "e8m0").numpy()
        mine = scale * np.float32(one.values)[codes - one.qmin]
        assert np.array_equal(theirs, np.concatenate([mine, mine[::-1]]))


# The oracle, storage, certificates --------------------------------------------------------------


def drawn(seed, scheme, shape=(4, 11)):
    rng = np.random.default_rng(seed)
    weight = np.concatenate([kind(rng, (1, shape[1])) for kind in NASTY])
    return problem(weight[rng.permutation(len(weight))[: shape[0]]], scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@given(seed=st.integers(0, 2**32))
def test_codes_and_scales_are_those_of_the_oracle(scheme, seed):
    asked = drawn(seed, scheme)
    made = RTN().round(asked, np.random.default_rng(0))
    wanted = reference.rtn(asked.weight.numpy(), scheme, asked.grid)
    if scheme.observer == "minmax":  # two clippings may have errors that are nearly the same
        assert np.array_equal(made.scale.numpy(), wanted.scale)
        assert np.array_equal(made.codes.numpy(), wanted.codes)
        assert np.array_equal(rounding.dequantize(made).numpy(), wanted.values())
    assert float(1 if made.global_scale is None else made.global_scale) == wanted.global_scale


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@given(seed=st.integers(0, 2**32))
def test_what_is_packed_comes_back_bit_for_bit_and_keeps_every_claim(scheme, seed):
    asked = drawn(seed, scheme)
    made = RTN().round(asked, np.random.default_rng(0))
    packed = PackedWeight.pack(made, scheme, asked.grid)
    rows, columns = asked.weight.shape
    read = PackedWeight.from_tensors(
        packed.tensors(), scheme, asked.grid, name="layer", rows=rows, columns=columns
    )
    assert torch.equal(read.unpack().codes, made.codes)
    assert torch.equal(read.unpack().scale, made.scale)
    assert torch.equal(read.dequantize(), rounding.dequantize(made))
    assert packed.bits == sum(scheme.storage_bits(rows, columns).values())
    certificates = Evidence(problem=asked, quantized=read.unpack()).certificates(RTN.claims)
    assert [str(each) for each in certificates if not each.holds] == []
    assert len(certificates) == (2 if scheme.observer == "mse" else 3)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 20, bias=False))


@pytest.mark.parametrize("preset", [*PRESETS, "TERNARY"])
def test_a_network_is_quantized_saved_verified_and_loaded(preset, tmp_path):
    recipe = {"method": "rtn", "scheme": {"preset": preset}, "ignore": []}
    result = qframe.quantize(network(), recipe, out=tmp_path / "out")
    found = verify(tmp_path / "out", network())
    assert found.problems == []
    assert found.unchecked == []
    claimed = {each.claim for some in found.recomputed.values() for each in some}
    assert claimed == {"half step", "scale"} | ({"coverage"} if preset != "TERNARY" else set())
    loaded = qframe.load(tmp_path / "out", network())
    plain = qframe.load(tmp_path / "out", network(), dequantize=True)
    assert all(isinstance(loaded[i], QuantizedLinear) for i in (0, 2))
    assert torch.equal(loaded[0].weight, plain[0].weight)
    x = torch.ones(3, 36)
    assert torch.equal(loaded(x), plain(x))
    assert set(loaded.state_dict()) == {f"{i}.{name}" for i in (0, 2) for name in wanted(preset, i)}
    assert result.report.layers[0].scheme == Scheme.preset(preset).describe()


def wanted(preset, layer):
    """Return the tensors of a layer that are stored."""
    more = {"weight_global_scale"} if preset == "NVFP4" else set()
    return {"weight_packed", "weight_scale"} | more | ({"bias"} if layer == 0 else set())


def test_ternary_is_for_every_method_of_integers(tmp_path):
    recipe = {"method": "gptq", "scheme": {"preset": "TERNARY"}, "ignore": []}
    generator = torch.Generator().manual_seed(1)
    data = CalibrationData.from_tensors([torch.randn(40, 36, generator=generator)])
    qframe.quantize(network(), recipe, out=tmp_path / "out", calibration=data)
    codes = qframe.load(tmp_path / "out", network())[0].stored.packed.unpack().codes
    assert set(codes.unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "smoothquant+gptq"])
@pytest.mark.parametrize("preset", ["NF4", "NVFP4"])
def test_methods_for_integers_refuse_floats_before_any_work(method, preset, tmp_path):
    recipe = {"method": method, "scheme": {"preset": preset}, "ignore": []}
    with pytest.raises(UnsupportedError, match=r"type='float' is not supported.*layers: 0, 2"):
        qframe.quantize(network(), recipe, out=tmp_path / "out")


@pytest.mark.parametrize("dtype", ["e8m0", "e4m3"])
def test_methods_that_know_no_scales_of_eight_bits_say_so(dtype, tmp_path):
    recipe = {"method": "gptq", "scheme": {"scale_dtype": dtype}, "ignore": []}
    with pytest.raises(UnsupportedError, match=f"scale_dtype='{dtype}' is not supported"):
        qframe.quantize(network(), recipe, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"format": "ternary", "symmetric": False}, "ternary has no zero point"),
        ({"format": "fp5", "num_bits": 5, "type": "float"}, r"no number format 'fp5' \(known"),
        ({"format": "int8", "num_bits": 4}, "has type='int' and num_bits=8, the scheme says"),
        ({"type": "float", "num_bits": 6}, "no number format 'float6'"),
    ],
)
def test_a_format_that_cannot_serve_a_scheme_is_named(scheme, message, tmp_path):
    recipe = {"method": "rtn", "scheme": scheme, "ignore": []}
    with pytest.raises(UnsupportedError, match=message):
        qframe.quantize(network(), recipe, out=tmp_path / "out")


@pytest.mark.parametrize("name", HOST.names("kernel"))
def test_kernels_for_integers_refuse_floats(name):
    kernel = HOST.get("kernel", name)
    asked = [
        OpCall(op=kernel.op, device="cpu", dtype="float32", scheme=scheme, shape=(2, 64, 64))
        for scheme in (Scheme(), Scheme.preset("NF4"))
    ]
    objections = [kernel.supports(call) for call in asked]
    assert isinstance(objections[1], Unsupported)
    everywhere = kernel.backend in ("torch", "numba")
    if everywhere and kernel.op in ("dequantize", "linear_weight_only"):
        assert objections[0] is None


# Errors ---------------------------------------------------------------------------------------


def test_codes_without_their_values_are_refused():
    scheme = Scheme.preset("NF4")
    asked = problem(np.ones((2, 64)), scheme)
    made = RTN().round(asked, np.random.default_rng(0))
    with pytest.raises(PluginError, match=r"grid=problem\.grid"):
        PackedWeight.pack(replace(made, grid=None), scheme, asked.grid)


def test_a_scale_of_the_tensor_is_there_exactly_where_it_is_needed():
    scheme = Scheme.preset("NVFP4")
    asked = problem(np.ones((2, 32)), scheme)
    made = RTN().round(asked, np.random.default_rng(0))
    with pytest.raises(PluginError, match="needs global_scale"):
        PackedWeight.pack(replace(made, global_scale=None), scheme, asked.grid)
    tensors = PackedWeight.pack(made, scheme, asked.grid).tensors()
    tensors["weight_global_scale"] = torch.tensor([-1.0])
    with pytest.raises(WeightsError, match="expected > 0"):
        PackedWeight.from_tensors(tensors, scheme, asked.grid, name="x", rows=2, columns=32)
    plain = problem(np.ones((2, 32)), Scheme.preset("MXFP4"))
    other = replace(RTN().round(plain, np.random.default_rng(0)), global_scale=torch.ones(1))
    with pytest.raises(PluginError, match="has no global_scale"):
        PackedWeight.pack(other, plain.scheme, plain.grid)
