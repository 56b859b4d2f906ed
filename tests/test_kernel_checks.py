"""The suite's checks of kernels: wrong kernels fail, right ones pass, however they compute."""

import numpy as np
import pytest
import torch

import qframe_conformance.kernel_checks  # noqa: F401 - it registers the checks
from qframe.contracts import Unsupported
from qframe.errors import UnsupportedError
from qframe.kernels import OPS, run
from qframe_conformance import check_plugin, replay
from qframe_conformance.checks import checks_of
from qframe_conformance.kernel_case import KernelCase
from qframe_conformance.kernel_frames import LAYOUTS, frame
from qframe_conformance.kernel_scenarios import scenarios, variants
from qframe_plugins.kernels.numba_ops import LinearInt8
from qframe_plugins.kernels.torch_ops import qframe_kernels
from tests.mutants import (
    kernels_activations,
    kernels_agreement,
    kernels_attention,
    kernels_dequantize,
    kernels_hadamard,
    kernels_int8,
    kernels_moments,
    kernels_newest,
    kernels_norms,
    kernels_numba,
    kernels_outliers,
    kernels_weights,
)
from tests.mutants.kernels_hadamard import Hadamard
from tests.mutants.kernels_int8 import Int8
from tests.mutants.kernels_small import changed, summed
from tests.mutants.kernels_weights import WeightOnly

MODULES = (
    kernels_dequantize,
    kernels_weights,
    kernels_activations,
    kernels_int8,
    kernels_outliers,
    kernels_hadamard,
    kernels_norms,
    kernels_attention,
    kernels_newest,
    kernels_moments,
    kernels_agreement,
)
MUTANTS = [mutant for module in MODULES for mutant in module.MUTANTS]
KERNELS = {kernel.op: kernel for kernel in qframe_kernels()}


# Right and wrong kernels ----------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_outputs_are_those_of_ordinary_calls(module):
    for base in {mutant.correct for mutant in module.MUTANTS}:
        first, second = (module.outputs(base()) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(np.isfinite(each).all() for each in first)


def test_every_check_has_a_mutant_that_it_alone_is_meant_for():
    meant = {mutant.killed_by for mutant in (*MUTANTS, *kernels_numba.MUTANTS)}
    checks = {check.name for check in checks_of("kernel")}
    assert {"answers", "norms"} < checks  # they are there once `kernel_checks` is imported
    assert checks - meant == set()


def test_there_is_a_default_kernel_for_every_operation():
    assert KERNELS.keys() == OPS.keys()


# What is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_operands_are_what_the_operation_says(op):
    """Of every family of variants, one with its first and one with its last shape."""
    families = {}
    for name, call, draw in variants(KERNELS[op]):
        families.setdefault(name, []).append((call, draw))
    for found in families.values():
        for call, draw in (found[0], found[-1]):
            operands = draw(np.random.default_rng(0))
            assert list(operands) == [operand.name for operand in OPS[op].operands]
            case = KernelCase(KERNELS[op], operands)
            for operand in OPS[op].operands:
                if operand.is_tensor:
                    assert operands[operand.name].dtype == operand.dtype
            numbers = {word: operands.get(word) for word in ("block", "tokens")}
            sizes = {**numbers, **case.sizes()}
            assert tuple(sizes[word] for word in OPS[op].call) == call.shape


def test_only_what_a_kernel_supports_is_tried():
    def four_bits(self, call):
        if call.op != self.op or call.device != "cpu":
            return Unsupported("linear_weight_only on the cpu")
        return Unsupported("4 bits only") if call.scheme.num_bits != 4 else None

    kernel = changed(WeightOnly, supports=four_bits)()
    assert {scenario.id.partition("-")[0] for scenario in scenarios(kernel)} == {"int4"}
    assert check_plugin(kernel).ok


def test_a_kernel_that_supports_nothing_is_not_ok():
    """Zero checks are no pass."""
    kernel = changed(Int8, supports=lambda self, call: Unsupported("nothing"))()
    assert not check_plugin(kernel).ok


def tree(self, x, w):
    """Return x w^T, products added in pairs, and pairs in pairs."""
    terms = x[:, None] * w[None]
    while terms.shape[2] > 1:
        odd = terms.shape[2] % 2
        terms = np.pad(terms, ((0, 0), (0, 0), (0, odd)))
        terms = terms[:, :, 0::2] + terms[:, :, 1::2]
    return terms[:, :, 0]


def test_a_chain_of_sums_that_claims_the_depth_of_a_tree_is_found():
    def depth(self, operands):
        return 1 + len(operands["group_index"]).bit_length()

    chain = changed(WeightOnly, multiply=lambda self, x, w: summed(x, w), depth=depth)
    found = check_plugin(chain(), only=["weight_only_sums"], shrink=False)
    assert {record.check for record in found.failures} == {"weight_only_sums"}
    assert check_plugin(changed(WeightOnly, multiply=tree, depth=depth)()).ok


def test_scattered_groups_may_be_refused_in_the_call():
    def compute(self, x, codes, scale, zero_point, group_index):
        if (np.diff(group_index) < 0).any():
            raise UnsupportedError("groups must be neighbouring columns")
        return WeightOnly.compute(self, x, codes, scale, zero_point, group_index)

    assert check_plugin(changed(WeightOnly, compute=compute)()).ok


def test_what_is_supported_must_not_be_refused_in_the_call():
    def compute(self, *operands):
        raise UnsupportedError("not today")

    report = check_plugin(changed(Int8, compute=compute)(), shrink=False)
    assert {record.check for record in report.failures} == {"answers", "few_tokens"}
    assert "not today" in report.failures[0].message


def test_a_block_that_is_refused_is_not_tried():
    def small(self, call):
        said = Hadamard.supports(self, call)
        return Unsupported("blocks up to 16") if said is None and call.shape[2] > 16 else said

    assert {s.id for s in scenarios(changed(Hadamard, supports=small)())} == {"short"}


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 1), (5,), (0, 3), (2, 3, 4, 5)])
def test_a_frame_holds_the_numbers_and_poison_around_them(layout, shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    framed = frame(array, layout)
    assert np.array_equal(framed.tensor.numpy(), array)
    assert np.isnan(framed.buffer.numpy()).sum() == framed.buffer.numel() - array.size
    assert framed.unchanged()


def test_a_change_beside_the_numbers_is_seen():
    framed = frame(np.zeros((2, 3), np.int16), "strided")
    framed.buffer[-1] = 0
    assert not framed.unchanged()


def test_a_change_that_is_allowed_is_forgiven_and_no_other():
    framed = frame(np.zeros((2, 2)), "packed")
    framed.tensor += 1
    below = torch.ones(2, 2, dtype=torch.bool).tril()
    framed.restore(below)
    assert not framed.unchanged()
    framed.tensor[0, 1] = 0
    assert framed.unchanged()
    assert framed.tensor.tolist() == [[1, 0], [1, 1]]


# Reports --------------------------------------------------------------------------------------


def test_a_counterexample_is_small_and_can_be_shown_again():
    wrong = changed(Int8, rescale=lambda self, p, a, b: p * a[:, None] * b * 2)()
    report = check_plugin(wrong, only=["eight_bit_decode"])
    [record, *_] = report.failures
    arrays = record.counterexample.arrays
    assert arrays["x_codes"].size < 100
    case = KernelCase(wrong, dict(arrays))
    assert replay("eight_bit_decode", case).startswith("eight_bit_decode is violated")
    assert "KernelCase(plugin, operands" in record.counterexample.snippet


def test_a_case_can_be_run_by_hand():
    operands = {
        "x_codes": np.array([[1, 2]], np.int8),
        "x_scale": np.ones(1, np.float32),
        "w_codes": np.array([[3, 4]], np.int8),
        "w_scale": np.ones(1, np.float32),
    }
    tensors = [torch.from_numpy(each) for each in operands.values()]
    assert run(KERNELS["linear_int8"], tensors).tolist() == [[11]]
    assert KernelCase(KERNELS["linear_int8"], operands).judged["B5.b"].ratio == 0


# Refusals -------------------------------------------------------------------------------------


class Picky(LinearInt8):
    """The kernel of numba, but for what the test wants refused or answered otherwise."""

    def from_activations(self, x, *constants):
        return self.otherwise(super().from_activations(x, *constants))

    def otherwise(self, made):
        raise UnsupportedError("not these")


class Halves(Picky):
    def otherwise(self, made):
        return made[: len(made) // 2]


@pytest.mark.parametrize(
    ("kernel", "check", "said"),
    [
        (Picky(), "takes_activations", "refused: UnsupportedError: not these"),
        (Halves(), "takes_activations", "expected float32"),
    ],
)
def test_what_one_call_answers_a_call_like_it_may_not_refuse(kernel, check, said):
    report = check_plugin(kernel, profile="fast", only=[check])
    assert not report.ok
    assert {failure.check for failure in report.failures} == {check}
    assert said in str(report.failures[0].message)


def test_a_call_that_supports_has_refused_may_be_refused():
    class Large(LinearInt8):
        def supports(self, call):
            if call.op == self.op and call.shape[0] < 2:
                return Unsupported("fewer than two tokens")
            return super().supports(call)

        def __call__(self, x_codes, *rest):
            if len(x_codes) < 2:
                raise UnsupportedError("fewer than two tokens")
            return super().__call__(x_codes, *rest)

        def from_activations(self, x, *constants):
            if len(x) < 2:
                raise UnsupportedError("fewer than two tokens")
            return super().from_activations(x, *constants)

    report = check_plugin(Large(), profile="fast")
    assert report.ok, report.line()
