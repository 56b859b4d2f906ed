"""Activations of 16 bits: rounded once, at the end; what rounds otherwise is found out."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays

from qframe import Scheme, Unsupported, bounds
from qframe.host import Host
from qframe.kernel_comparisons import of_output, rounded_to
from qframe.kernels import ACTIVATIONS, OPS
from qframe_conformance import check_plugin, kernel_draws, kernel_rounds
from qframe_conformance.kernel_scenarios import scenarios, variants
from qframe_plugins.kernels import numba_ops, torch_ops
from qframe_plugins.kernels.short import through_float32

SHORT = ACTIVATIONS[1:]
FLOATS = arrays.arrays(np.uint32, 40, elements=st.integers(0, 2**32 - 1))
KERNELS = [*torch_ops.qframe_kernels(), *numba_ops.qframe_kernels()]
TAKERS = [each for each in KERNELS if OPS[each.op].takes_activations]


def of_16_bits(kernel):
    return [each.id for each in scenarios(kernel) if each.id.endswith(SHORT)]


@pytest.mark.parametrize("dtype", SHORT)
@given(FLOATS)
def test_numbers_are_rounded_as_torch_rounds_them(dtype, bits):
    numbers = bits.view(np.float32)
    wanted = torch.from_numpy(numbers).to(getattr(torch, dtype)).double().numpy()
    with np.errstate(invalid="ignore"):
        made = rounded_to(numbers.astype(np.float64), dtype)
    assert np.array_equal(made, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", SHORT)
@given(FLOATS, st.floats(0, 2.0**-6))
def test_what_was_off_and_is_rounded_keeps_the_bound(dtype, bits, share):
    computed = bits.view(np.float32).astype(np.float64)
    computed = np.where(np.isfinite(computed), computed, 1.0)
    off = np.abs(computed) * share
    for expected in (computed - off, computed + off):
        held = of_output("", rounded_to(computed, dtype), expected, off * (1 + 2.0**-50), dtype)
        assert held.ratio <= 1


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 255 * 2.0**120)])
def test_infinities_are_right_where_numbers_are_too_large_and_nowhere_else(dtype, largest):
    limit = bounds.OVERFLOW[dtype]
    both = np.array([limit, np.nextafter(np.float32(limit), np.float32(0))])
    assert rounded_to(both, dtype).tolist() == [np.inf, largest]

    def ratio(answer, expected, allowed=0.0):
        given = np.array([answer]), np.array([expected]), np.array([allowed])
        return of_output("", *given, dtype).ratio

    assert ratio(np.inf, limit) == 0
    assert ratio(-np.inf, limit) == ratio(np.inf, -limit) == np.inf
    assert ratio(largest, limit) == np.inf  # cut off at the largest number
    assert ratio(np.inf, largest) == np.inf
    assert ratio(np.inf, largest, limit - largest) == 0
    assert ratio(largest, limit, limit - largest) <= 1
    assert ratio(np.nan, 1.0) == np.inf


@pytest.mark.parametrize("kernel", TAKERS, ids=lambda each: f"{each.op}-{each.backend}")
def test_kernels_of_the_cpu_take_16_bits(kernel):
    ids = of_16_bits(kernel)
    assert {each.rpartition(", ")[2] for each in ids} == set(SHORT)
    report = check_plugin(kernel, profile="fast", scenarios=ids[:2])
    assert report.ok, str(report)


class Wrong:
    """An operation in float32 that turns its outputs into 16 bits in a wrong way."""

    backend, activations = "wrong", ACTIVATIONS

    def __init__(self, finish, begin=lambda x: x.float(), op="hadamard"):
        self.op, self.finish, self.begin = op, finish, begin
        [self.kernel] = [each for each in torch_ops.qframe_kernels() if each.op == op]

    def supports(self, call):
        return self.kernel.supports(call) if call.device == "cpu" else Unsupported("another device")

    def __call__(self, x, *others):
        made = self.kernel.function(self.begin(x), *others)
        return made if x.dtype == torch.float32 else self.finish(made, x.dtype)


def nearest(y, dtype):
    return y.to(dtype)


def cut(y, dtype):
    made = y.to(dtype)
    beyond = made.float().abs() > y.abs()
    return torch.where(beyond, (made.view(torch.int16) - 1).view(dtype), made)


def through_the_other(y, dtype):
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    return y.to(other).to(dtype)


def saturated(y, dtype):
    largest = torch.finfo(dtype).max
    return y.clamp(-largest, largest).to(dtype)


def twice(y, dtype):
    """Round to 13 bits first, as if sums were kept in something between."""
    bits = y.contiguous().view(torch.int32)
    return ((bits + (1 << 10)) & -(1 << 11)).view(torch.float32).to(dtype)


def without_subnormals(y, dtype):
    made = y.to(dtype)
    return torch.where(made.float().abs() < torch.finfo(dtype).tiny, torch.zeros_like(made), made)


MISTAKES = {
    "cut": (cut,),
    "through the other one": (through_the_other,),
    "left in 32 bits": (lambda y, dtype: y,),
    "saturated": (saturated,),
    "rounded twice": (twice,),
    "without subnormals": (without_subnormals,),
    "inputs lose bits": (nearest, lambda x: x.to(torch.float8_e5m2).float()),
    "NaN becomes 0": (lambda y, dtype: torch.nan_to_num(y, posinf=torch.inf).to(dtype),),
}


@pytest.mark.parametrize("op", ["hadamard", "rms_norm"])
def test_what_rounds_once_is_right(op):
    right = Wrong(nearest, op=op)
    assert check_plugin(right, profile="fast", scenarios=of_16_bits(right)).ok


@pytest.mark.parametrize("name", MISTAKES)
def test_what_rounds_otherwise_is_found(name):
    op = "linear_int8_outliers" if name == "rounded twice" else "hadamard"
    wrong = Wrong(*MISTAKES[name], op=op)
    report = check_plugin(wrong, profile="default", scenarios=of_16_bits(wrong), shrink=False)
    assert not report.ok


def test_kernels_of_32_bits_alone_are_asked_for_nothing_else():
    class Narrow(Wrong):
        activations = ("float32",)  # as where a kernel knows of nothing else

    narrow = Narrow(nearest)
    assert not of_16_bits(narrow)
    assert check_plugin(narrow, profile="fast").ok


def test_what_is_declared_and_not_supported_is_not_asked_for():
    class Half(Wrong):
        def supports(self, call):
            if call.dtype == "float16":
                return Unsupported("no float16")
            return super().supports(call)

    assert {each.rpartition(", ")[2] for each in of_16_bits(Half(nearest))} == {"bfloat16"}


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("op", ["linear_int8", "linear_int8_groups"])
def test_products_of_activations_are_rounded_once(op, dtype):
    """The bits are those of 32 bits, rounded: the check of `from_activations` asks for them."""
    [kernel] = [each for each in numba_ops.qframe_kernels() if each.op == op]
    ids = [each for each in of_16_bits(kernel) if each.endswith(dtype)]
    report = check_plugin(kernel, profile="fast", only=["takes_activations"], scenarios=ids)
    assert report.ran
    assert report.ok, str(report)


def test_a_kernel_that_makes_no_codes_takes_no_16_bits_for_them():
    [plain] = [each for each in KERNELS if (each.op, each.backend) == ("linear_int8", "torch")]
    _, call, _ = next(variants(plain))
    said = plain.supports(replace(call, dtype="bfloat16"))
    assert said.reason == "activations must be float32, not bfloat16"


def test_a_detour_leaves_what_is_no_activation_as_it_is():
    class Pair:
        op = "attention_kv"

        @through_float32
        def __call__(self, q):
            assert q.dtype == torch.float32
            return q, q[..., 0]

    out, lse = Pair()(torch.ones(1, 2, 3, dtype=torch.bfloat16))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_every_installed_kernel_says_why_not():
    host = Host.discover()
    for name in host.names("kernel"):
        kernel = host.get("kernel", name)
        _, call, _ = next(variants(kernel))
        said = kernel.supports(replace(call, dtype="float64"))
        assert said is not None, name


@given(st.integers(0, 2**32), st.sampled_from(kernel_rounds.HALVES), st.sampled_from(SHORT))
def test_a_sum_that_is_cut_once_is_another_output(seed, family, dtype):
    """Of tokens whose largest number is half way in this dtype: nothing else changes their sums."""
    _, bits, size, shape = family
    scheme = Scheme(num_bits=bits, symmetric=False, group_size=size)
    made = kernel_draws.halves(np.random.default_rng(seed), *shape, scheme)
    half = kernel_draws.HALF_STEP * kernel_draws.HALVES[SHORT.index(dtype)]
    x = made["x"][np.abs(made["x"]).max(1) == half]
    assert np.array_equal(rounded_to(x, dtype), x)
    weight = made["codes"] * made["scale"][:, made["group_index"]]
    outputs = np.zeros((len(x), len(weight)), np.float32)
    for column in range(x.shape[1]):
        outputs += x[:, column, None] * weight[:, column]
    assert np.array_equal(np.abs(outputs), np.full(outputs.shape, 3 * half * made["scale"].max()))
    cut = np.nextafter(outputs, np.float32(0))
    assert not np.any(rounded_to(outputs, dtype) == rounded_to(cut, dtype))
