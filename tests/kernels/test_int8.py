"""Kernels of eight bits: the same integers on every processor, for every shape and thread count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features

from qframe.contracts import OpCall
from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS
from qframe_plugins.kernels import numba_ops, torch_ops
from qframe_plugins.kernels.numba_cpu import (
    few_codes,
    int8_outliers,
    int8_products,
    packed,
    tokens,
)
from qframe_plugins.kernels.numba_cpu.dot_tile import PANEL

ROOT = Path(__file__).parents[2]
COUNTS = st.one_of(st.integers(0, 19), st.sampled_from([47, 48, 49, 53, 97]))
COLUMNS = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 130, 2047, 2048, 2053, 4100]))
ROWS = st.one_of(st.integers(1, 3), st.sampled_from([63, 64, 65, 130, 200]))
SEEDS = st.integers(0, 2**32 - 1)


def codes(rng, count, columns, kind):
    """Return codes [count, columns]: of every kind, or the largest of one sign."""
    if kind == "extreme":
        return np.full((count, columns), 127 if rng.random() < 0.5 else -127, np.int8)
    return rng.integers(-127, 128, (count, columns)).astype(np.int8)


def expected(x, x_scale, w, w_scale):
    """Return the answer with the roundings that the kernel has, in its order."""
    product = x.astype(np.int64) @ w.T.astype(np.int64)
    return product.astype(np.float32) * w_scale * x_scale[:, None]


@given(COUNTS, COLUMNS, ROWS, st.sampled_from(["any", "extreme"]), SEEDS)
@example(8, 2052, 64, "extreme", 0)
def test_products_of_codes_are_exact(count, columns, rows, kind, seed):
    rng = np.random.default_rng(seed)
    x, w = codes(rng, count, columns, kind), codes(rng, rows, columns, kind)
    x_scale = np.exp2(rng.uniform(-9, 9, count)).astype(np.float32)
    w_scale = np.exp2(rng.uniform(-9, 9, rows)).astype(np.float32)
    made = int8_products.multiply(x, x_scale, packed.pack_channels(w, w_scale))
    assert np.array_equal(made, expected(x, x_scale, w, w_scale))


def test_products_are_exact_up_to_the_last_column_that_an_int32_allows():
    columns = numba_ops.LONGEST
    ones = np.ones(1, np.float32)
    for one, other in ((127, 127), (127, -127)):
        x, w = (np.full((1, columns), code, np.int8) for code in (one, other))
        made = int8_products.multiply(x, ones, packed.pack_channels(w, ones))
        assert made[0, 0] == np.float32(one * other * columns)


def test_longer_rows_are_refused():
    for kernel in (numba_ops.LinearInt8(), numba_ops.LinearInt8Outliers()):
        shape = (1, numba_ops.LONGEST, 1)
        call = OpCall(op=kernel.op, device="cpu", dtype="float32", scheme=None, shape=shape)
        assert kernel.supports(call) is None
        longer = OpCall(
            op=kernel.op, device="cpu", dtype="float32", scheme=None, shape=(1, shape[1] + 1, 1)
        )
        assert "133144 columns" in kernel.supports(longer).reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda:0"}, "on the CPU, not on cuda:0"),
        ({"dtype": "float64"}, "float16, not float64"),
        ({"op": "hadamard"}, "computes linear_int8, not hadamard"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(change, reason):
    fields = {"op": "linear_int8", "device": "cpu", "dtype": "float32", "scheme": None}
    call = OpCall(**{**fields, "shape": (1, 1, 1), **change})
    assert reason in numba_ops.LinearInt8().supports(call).reason


def near_halves(rng, count, columns):
    """Return tokens many of whose quotients are halves, or next to one."""
    x = rng.integers(-126, 127, (count, columns)) + 0.5
    x[:, -1:] = 127
    ulps = rng.integers(-2, 3, x.shape)
    x = x.astype(np.float32)
    for step in (1, 2):
        x = np.where(
            np.abs(ulps) >= step, np.nextafter(x, np.copysign(np.float32(np.inf), ulps)), x
        )
    return (x * np.exp2(rng.integers(-30, 30, (count, 1)))).astype(np.float32)


@given(COUNTS, COLUMNS, st.sampled_from([0, -149, -126, -120, 100]), SEEDS)
def test_codes_of_tokens_are_those_of_a_division(count, columns, exponent, seed):
    rng = np.random.default_rng(seed)
    any_size = (rng.normal(size=(count, columns)) * 2.0**exponent).astype(np.float32)
    for x in (any_size, near_halves(rng, count, columns), np.zeros((count, columns), np.float32)):
        made, scale = tokens.quantize(x)
        wanted, wanted_scale = torch_ops.quantize_activations(torch.from_numpy(x))
        assert np.array_equal(made, wanted.numpy())
        assert np.array_equal(scale, wanted_scale.numpy())


@given(COUNTS, COLUMNS, SEEDS)
def test_a_number_that_is_not_finite_spoils_the_scale_of_its_token_alone(count, columns, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns)).astype(np.float32)
    spoilt = rng.random(count) < 0.5
    places = rng.integers(0, columns, count)
    for token in np.flatnonzero(spoilt):
        x[token, places[token]] = rng.choice([np.nan, np.inf, -np.inf])
    _, scale = tokens.quantize(x)
    assert np.array_equal(np.isfinite(scale), ~spoilt)


@given(COUNTS, COLUMNS, ROWS, st.sampled_from([0.0, 0.5, 2.5, 6.0]), SEEDS)
def test_outliers_keep_their_bounds(count, columns, rows, threshold, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns)).astype(np.float32)
    w = rng.normal(size=(rows, columns)).astype(np.float32)
    scale = (np.abs(w).max(1) / 127).astype(np.float32)
    w_codes = np.rint(w / scale[:, None]).astype(np.int8)
    weight = int8_outliers.lay_out_both(w_codes, scale, w)
    made = int8_outliers.multiply(x, threshold, weight)
    operands = {"x": x, "threshold": threshold, "w_codes": w_codes, "w_scale": scale, "weight": w}
    judged = judge("linear_int8_outliers", operands, (made,), ARITHMETICS["float32"])
    assert {theorem: each.ratio for theorem, each in judged.items() if each.ratio > 1} == {}


@given(COUNTS, COLUMNS, ROWS, st.sampled_from([4, 127]), SEEDS)
def test_a_weight_that_codes_stand_for_is_kept_once_and_gives_the_same_bits(
    count, columns, rows, largest, seed
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns)).astype(np.float32)
    scale = (rng.random(rows) + 0.1).astype(np.float32)
    w_codes = rng.integers(-largest, largest + 1, (rows, columns)).astype(np.int8)
    w = w_codes * scale[:, None]
    once = int8_outliers.lay_out_both(w_codes, scale, w)
    assert (once.columns is None) == (once.panels.bits == 8)
    columns_of = np.zeros((columns, len(once.panels.scale) * PANEL), np.float32)
    columns_of[:, :rows] = w.T
    twice = int8_outliers.Int8AndColumns(once.panels, columns_of)
    made = [int8_outliers.multiply(x, 0.5, each) for each in (once, twice)]
    assert np.array_equal(*made)


def test_a_weight_that_codes_do_not_stand_for_is_kept():
    rng = np.random.default_rng(0)
    scale = np.ones(3, np.float32)
    w_codes = rng.integers(-127, 128, (3, 40)).astype(np.int8)
    w = w_codes * scale[:, None]
    for wrong in (np.nan, w[1, 2] + 0.5):
        w[1, 2] = wrong
        assert int8_outliers.lay_out_both(w_codes, scale, w).columns is not None


def test_without_outliers_the_answer_is_that_of_codes_alone_bit_for_bit():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(13, 130)).astype(np.float32)
    w = rng.normal(size=(70, 130)).astype(np.float32)
    scale = (np.abs(w).max(1) / 127).astype(np.float32)
    w_codes = np.rint(w / scale[:, None]).astype(np.int8)
    both = int8_outliers.lay_out_both(w_codes, scale, w)
    plain = int8_products.multiply(*tokens.quantize(x), packed.pack_channels(w_codes, scale))
    for threshold in (0.0, 100.0):
        assert np.array_equal(int8_outliers.multiply(x, threshold, both), plain)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(130, 300)).astype(np.float32)
    x[:, 7] *= 30
    w = rng.normal(size=(5 * PANEL + 3, 300)).astype(np.float32)
    scale = (np.abs(w).max(1) / 127).astype(np.float32)
    w_codes = np.rint(w / scale[:, None]).astype(np.int8)
    both = int8_outliers.lay_out_both(w_codes, scale, w)
    before, found = numba.get_num_threads(), []
    try:
        for threads in range(1, before + 1):
            numba.set_num_threads(threads)
            found.append(int8_outliers.multiply(x, 6.0, both).tobytes())
    finally:
        numba.set_num_threads(before)
    assert len(set(found)) == 1


# Groups ---------------------------------------------------------------------------------------


def in_order(x, x_scale, w, scale, zero, index):
    """Return the answer of `linear_int8_groups` with its roundings, in the kernel's order."""
    total = None
    for group in range(scale.shape[1]):
        steps = w.astype(np.int64) - zero[:, group, None]
        chosen = index == group
        sums = x[:, chosen].astype(np.int64) @ steps[:, chosen].T
        term = sums.astype(np.float32) * scale[:, group]
        total = term if total is None else total + term
    return total * x_scale[:, None]


@given(
    COUNTS,
    COLUMNS,
    ROWS,
    st.sampled_from([2, 3, 4, 5, 8]),
    st.sampled_from([1, 3, 32, 64, 100, 128, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
@example(7, 4100, 65, 3, None, True, False, False, 0)
@example(7, 2053, 65, 2, 128, False, True, False, 0)
@example(13, 300, 65, 4, 32, True, False, True, 0)
@example(13, 4100, 65, 8, None, True, False, True, 0)
def test_sums_of_groups_are_exact(count, columns, rows, bits, size, signed, scattered, far, seed):
    assume(columns <= 300 or size is None or size >= 32)
    rng = np.random.default_rng(seed)
    x = codes(rng, count, columns, "any")
    lowest = -(1 << bits - 1) if signed else 0
    highest = lowest + (1 << bits) - 1
    w = rng.integers(lowest, highest + 1, (rows, columns)).astype(np.int16)
    index = (np.arange(columns) // (size or columns)).astype(np.int32)
    groups = int(index[-1]) + 1
    if scattered:
        index = rng.permutation(index)
    shape = (int(rng.choice([1, rows])), groups)
    scale = np.exp2(rng.uniform(-9, 9, shape)).astype(np.float32)
    zero = rng.integers(lowest, highest + 1, shape).astype(np.int16)
    if far:  # zero points need not be codes
        zero += rng.integers(-300, 300, shape).astype(np.int16)
    x_scale = np.exp2(rng.uniform(-9, 9, count)).astype(np.float32)
    made = int8_products.multiply(x, x_scale, packed.pack(w, scale, zero, index))
    whole = [np.broadcast_to(each, (rows, groups)) for each in (scale, zero.astype(np.int64))]
    assert np.array_equal(made, in_order(x, x_scale, w, *whole, index))


@given(
    COLUMNS,
    ROWS,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([3, 32, 128, None]),
    st.booleans(),
    SEEDS,
)
@example(2053, 65, 8, None, False, 0)
@example(2053, 65, 3, None, True, 0)
def test_how_many_tokens_there_are_changes_no_bit(columns, rows, bits, size, signed, seed):
    """Up to some number they are multiplied in another way, in tiles of other heights."""
    assume(columns <= 300 or size is None or size >= 32)
    rng = np.random.default_rng(seed)
    most = few_codes.few(bits)
    x = rng.normal(size=(most + 5, columns)).astype(np.float32)
    lowest = -(1 << bits - 1) if signed else 0
    w = rng.integers(lowest, lowest + (1 << bits), (rows, columns)).astype(np.int16)
    index = (np.arange(columns) // (size or columns)).astype(np.int32)
    shape = rows, int(index[-1]) + 1
    scale = rng.random(shape).astype(np.float32)
    zero = rng.integers(lowest, lowest + (1 << bits), shape).astype(np.int16)
    laid = packed.pack(w, scale, zero, index)
    many = int8_products.multiply_activations(x, laid)
    for count in range(1, most + 5):
        assert np.array_equal(int8_products.multiply_activations(x[:count], laid), many[:count])
        made = int8_products.multiply(*tokens.quantize(x[-count:]), laid)
        assert np.array_equal(made, many[-count:])


@pytest.mark.parametrize(("bits", "bytes_"), [(2, 16), (3, 24), (4, 32), (8, 64)])
def test_a_packed_weight_takes_as_many_bits_as_it_promises(bits, bytes_):
    columns = 64
    w = (np.arange(PANEL * columns) % (1 << bits)).reshape(PANEL, columns).astype(np.int16)
    one = np.ones((PANEL, 1))
    made = packed.pack(w, one.astype(np.float32), one.astype(np.int16), np.zeros(columns, int))
    assert sum(plane.nbytes for plane in made.planes) == PANEL * bytes_


def test_codes_of_more_than_eight_bits_are_refused():
    w, one = np.array([[0, 256]]), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="codes from 0 to 256 take more than 8 bits"):
        packed.pack(w, one, one.astype(np.int16), np.zeros(2, int))


# Processors -----------------------------------------------------------------------------------

_AVX2 = ("avx", "avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")

ALL_BITS = "2348"

# name -> (processor, its features that the kernels ask for, instruction, widest register, the bits
# of weights and caches that are compiled for it in every run, none for a processor between two
# others; every night all are)
PROCESSORS = {
    "avx512-vnni": ("cascadelake", (*_AVX512, "avx512vnni"), "vpdpbusd", "zmm", "48"),
    "avx512": ("skylake-avx512", _AVX512, "vpmaddwd", "zmm", ""),
    "avx-vnni": ("alderlake", (*_AVX2, "avxvnni"), "vpdpbusd", "ymm", "2"),
    "avx2": ("haswell", _AVX2, "vpmaddwd", "ymm", "48"),
    "generic": ("x86-64", ("sse2",), "pmaddwd", "xmm", "23"),
}


def ran_on(processor, features, bits, folder):
    """Return what instructions.py says of a processor; None: as numba finds this one."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "NUMBA_CACHE_DIR": str(folder),  # what others compiled meanwhile is not told apart
    }
    if processor is not None:
        given = ",".join(f"+{feature}" for feature in features)
        environment |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": given}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("instructions.py")), bits],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def of_this_processor(tmp_path_factory):
    return ran_on(None, (), ALL_BITS, tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_gives_the_same_integers(name, of_this_processor, tmp_path):
    processor, needed, instruction, register, bits = PROCESSORS[name]
    bits = ALL_BITS if os.environ.get("QFRAME_TEST_PROFILE") == "nightly" else bits
    if not bits:
        pytest.skip("compiled for this processor every night")
    here = get_host_cpu_features()
    lacking = [feature for feature in needed if not here.get(feature)]
    if lacking:
        pytest.skip(f"this processor cannot run programs for {processor}: no {lacking}")
    found = ran_on(processor, needed, bits, tmp_path)
    assert {f"linear_int8_groups {each}" for each in bits} < found["same"].keys()
    assert found["same"].items() <= of_this_processor["same"].items()
    assert all(ratio <= 1 for ratio in found["worst"].values()), found["worst"]
    assert instruction in found["instructions"]
    assert register in found["registers"]
