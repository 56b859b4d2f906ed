"""Operations of kernels: what is written down, the oracles, and the bounds they are judged by."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import KVScheme, bounds, kernels, reference_ops
from qframe.errors import UnsupportedError
from qframe.host import KINDS, objection
from qframe.kernel_judges import THEOREMS, judge
from qframe.kernels import ARITHMETICS, OPS, Arithmetic, arithmetic_of
from qframe_conformance.kernel_draws_other import packed

DOCUMENT = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
FLOAT32 = ARITHMETICS["float32"]


# What is written down -------------------------------------------------------------------------


def table():
    """Return operation -> (operands, answer, call, theorems) of docs/kernels.md."""
    found = {}
    for line in DOCUMENT.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            name, operands, answer, call, theorems = cells
            found[name.strip("`")] = (
                re.findall(r"`(\w+)`", operands),
                re.findall(r"`(\w+)`", answer),
                tuple(call.split(", ")),
                tuple(theorems.split(", ")),
            )
    return found


def test_every_operation_is_in_the_document():
    assert table() == {
        name: (
            [operand.name for operand in op.operands],
            [part.name for part in op.answer],
            op.call,
            THEOREMS[name],
        )
        for name, op in OPS.items()
    }


def test_every_word_for_an_arithmetic_is_in_the_documents():
    hooks = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert all(f"`{word}`" in hooks for word in ARITHMETICS)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_constants_stand_last_so_that_one_thing_can_take_their_place(op):
    constant = [operand.constant for operand in op.operands]
    assert constant == sorted(constant)


@pytest.mark.parametrize("module", ["kernels", "reference_ops", "kernel_judges"])
def test_operations_and_oracles_need_neither_torch_nor_numba(module):
    code = f"import sys, qframe.{module}; print(sorted(sys.modules.keys() & {{'torch', 'numba'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_operation_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UnsupportedError, match="no operation 'linear_int7'; there are dequantize"):
        kernels.op_of("linear_int7")


def test_an_arithmetic_that_is_not_known_is_an_error():
    class Odd:
        op, backend, accumulator = "dequantize", "odd", "float17"

    with pytest.raises(UnsupportedError, match=r"dequantize/odd: accumulator='float17'"):
        arithmetic_of(Odd())


def test_a_kernel_may_name_its_operands():
    class Named:
        op, backend = "linear_int8", "named"

        def supports(self, call):
            return None

        def __call__(self, x_codes, x_scale, w_codes, w_scale):
            return None

    assert objection(Named(), KINDS["kernel"][1]) is None


def test_what_prepare_returns_takes_the_place_of_the_constants():
    class Prepared:
        op, backend = "linear_int8", "prepared"

        def prepare(self, w_codes, w_scale):
            return w_codes, w_scale

        def __call__(self, *operands):
            return operands

    assert kernels.run(Prepared(), [1, 2, 3, 4]) == (1, 2, (3, 4))


# The oracles ----------------------------------------------------------------------------------


def test_the_weight_is_scale_times_code_minus_zero_point():
    made = reference_ops.dequantize([[1, 2, 3]], [[2.0, 0.5]], [[1, -1]], [0, 0, 1])
    assert made.tolist() == [[0, 2, 2]]


def test_one_row_of_scales_serves_all_rows():
    made = reference_ops.dequantize([[1], [2]], [[3.0]], [[0]], [0])
    assert made.tolist() == [[3], [6]]


@given(st.integers(0, 6), st.integers(0, 2**32))
def test_the_matrix_of_hadamard_is_orthogonal_and_built_by_doubling(levels, seed):
    matrix = np.ones((1, 1))
    for _ in range(levels):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    assert np.array_equal(reference_ops.hadamard_matrix(1 << levels), matrix)
    assert np.array_equal(matrix @ matrix.T, (1 << levels) * np.eye(1 << levels))


def test_signs_come_before_the_matrix_and_blocks_are_apart():
    made = reference_ops.hadamard([[1, 2, 3, 5]], [1, -1, 1, 1], 2)
    assert np.array_equal(made * np.sqrt(2), [[-1, 3, 8, -2]])


def test_an_outlier_is_at_the_threshold_or_beyond_in_any_token():
    x = [[6.0, -6.0, 5.9, 0], [0, 0, 0, 7]]
    assert reference_ops.outlier_columns(x, 6.0).tolist() == [True, True, False, True]
    assert not reference_ops.outlier_columns(x, 0.0).any()


def test_outliers_are_not_in_the_scale_of_a_token():
    """x = (127, 600): the outlier leaves the code of 127 at 127, and meets the weight as it is."""
    y = reference_ops.linear_int8_outliers([[127, 600]], 200.0, [[1, 1]], [1.0], [[1.25, 0.1]])
    assert y.tolist() == [[127 + 600 * 0.1]]


@given(st.integers(0, 2**32))
def test_attention_is_a_mean_of_values_with_the_weights_of_softmax(seed):
    """One head after another, one token after another."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, 4, 3))
    codes = rng.integers(0, 16, (2, 2, 5, 3))
    scale, offset = rng.random((2, 2, 2, 2, 5, 1)) + 1 / 2
    scheme = KVScheme(num_bits=4)
    words = packed(codes, scheme)
    made, lse = reference_ops.attention_kv(
        q, words, scale[0], offset[0], scheme, words, scale[1], offset[1], scheme, 5
    )
    for b in range(2):
        for h in range(4):
            k, v = (codes[b, h // 2] * scale[i, b, h // 2] + offset[i, b, h // 2] for i in (0, 1))
            powers = [np.exp(q[b, h] @ k[t] / np.sqrt(3)) for t in range(5)]
            mean = sum(p * v[t] for t, p in enumerate(powers)) / sum(powers)
            allowed = bounds.gamma(100, bounds.UNIT["float64"]) * np.abs(v).max() * np.exp(1)
            allowed *= 1 + np.abs(k @ q[b, h]).max()
            assert bounds.ratio(made[b, h] - mean, allowed) <= 1
            assert bounds.ratio(lse[b, h] - np.log(sum(powers)), allowed) <= 1


def test_groups_of_a_cache_may_span_tokens_or_channels_and_be_ragged():
    by_token = KVScheme(axis="token", group_size=2)
    spread = reference_ops.spread_groups(np.arange(6.0).reshape(3, 2), by_token, (3, 3))
    assert spread.tolist() == [[0, 0, 1], [2, 2, 3], [4, 4, 5]]
    by_channel = KVScheme(axis="channel", group_size=2)
    spread = reference_ops.spread_groups(np.arange(6.0).reshape(2, 3), by_channel, (3, 3))
    assert spread.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_words_of_a_cache_are_those_that_its_store_packs(bits, axis):
    """The oracle takes words apart bit by bit; it finds what was packed, of a cut group too."""
    for symmetric, tokens in ((False, 10), (True, 8)):
        scheme = KVScheme(num_bits=bits, axis=axis, group_size=5, symmetric=symmetric)
        rng, grid = np.random.default_rng(bits), scheme.grid
        codes = rng.integers(grid.qmin, grid.qmax + 1, (2, 3, 10, 7))
        words = packed(codes - grid.qmin, scheme)
        if axis == "token":
            words = words[:, :, :tokens]
        found = reference_ops.unpacked(words, scheme, tokens, 7)
        assert np.array_equal(found, codes[:, :, :tokens])


def test_second_moments_are_added_on_and_below_the_diagonal():
    made = reference_ops.hessian_update([[1, 9], [1, 1]], [[1, 2], [3, 4]])
    assert made.tolist() == [[11, 9], [15, 21]]


# The bounds -----------------------------------------------------------------------------------


def test_an_int32_holds_133144_products_of_codes():
    """B5.c; the 133,152 that is often quoted overflows."""
    assert bounds.int32_columns(127 * 127) == 133_144
    assert 133_144 * 127 * 127 <= 2**31 - 1 < 133_145 * 127 * 127


def test_float32_sums_of_codes_are_exact_up_to_1040_columns():
    """B5.c and B9.c."""
    assert bounds.exact_sum(1040 * 127 * 127, 1)
    assert not bounds.exact_sum(1041 * 127 * 127, 1)


def test_two_tokens_attain_the_bound_of_softmax():
    """B7.c is sharp: weights 1 / (1 + e^(osc / 2)) and the rest, of which one gains osc."""
    for osc in (1 / 1024, 1.0, 3.0, 20.0):
        small = 1 / (1 + np.exp(osc / 2))
        z = np.log([small, 1 - small])
        moved = np.abs(
            reference_ops.softmax(z + np.array([osc, 0])) - reference_ops.softmax(z)
        ).sum()
        own = bounds.gamma(64, bounds.UNIT["float64"])
        assert abs(moved - bounds.softmax(osc)) <= own * (1 + osc)


@given(st.integers(0, 2**32), st.sampled_from([16, 64, 256]))
def test_hidden_spikes_stay_below_what_random_signs_promise(seed, block):
    """B8.c on a row of H, which without signs is turned into a single spike."""
    rng = np.random.default_rng(seed)
    row = reference_ops.hadamard_matrix(block)[rng.integers(block)]
    y = reference_ops.hadamard([row], rng.choice([-1, 1], block), block)
    allowed = bounds.incoherence(np.linalg.norm(row), block, block, 2.0**-60)
    assert bounds.ratio(y, allowed) <= 1
    assert np.abs(reference_ops.hadamard([row], np.ones(block), block)).max() > allowed or (
        block < 128
    )


def test_a_sum_that_loses_every_term_comes_close_to_b9_b():
    """1, then numbers just below half its last bit: a sum from left to right drops them all."""
    columns = 4096
    x = np.full((1, columns), np.nextafter(np.float32(2.0**-24), np.float32(0)), np.float32)
    x[0, 0] = 1
    operands = {
        "x": x,
        "codes": np.ones((1, columns), np.int16),
        "scale": np.ones((1, 1), np.float32),
        "zero_point": np.zeros((1, 1), np.int16),
        "group_index": np.zeros(columns, np.int32),
    }
    y = np.float32(0)
    for value in x[0]:
        y = np.float32(y + value)
    ratio = judge("linear_weight_only", operands, (np.array([[y]]),), FLOAT32)["B9.b"].ratio
    assert 0.99 < ratio <= 1


def test_a_constant_without_its_last_digit_is_found_by_decode_and_not_by_output():
    """B5.b and B5.a: 6.200124e-05 for 1 / 127^2."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(n, 64)).astype(np.float32) for n in (4, 8))
    w_scale = (np.abs(w).max(1) / 127).astype(np.float32)
    operands = {
        "x": x,
        "threshold": 0.0,
        "w_codes": np.rint(w / w_scale[:, None]).astype(np.int8),
        "w_scale": w_scale,
        "weight": w,
    }
    y = reference_ops.linear_int8_outliers(*operands.values())
    wrong = (y * (6.200124e-05 * 127**2)).astype(np.float32)
    right, found = (
        judge("linear_int8_outliers", operands, (answer,), FLOAT32)
        for answer in (y.astype(np.float32), wrong)
    )
    assert right["B5.b"].ratio <= 1
    assert right["B5.a"].ratio <= 1
    assert found["B5.a"].ratio <= 1 < found["B5.b"].ratio


def test_what_is_not_finite_must_not_become_finite():
    operands = {"x": np.array([[np.nan, 1]]), "signs": np.ones(2), "block": 2}
    assert judge("hadamard", operands, (np.full((1, 2), np.nan),), FLOAT32)["B8.a"].ratio <= 1
    assert judge("hadamard", operands, (np.zeros((1, 2)),), FLOAT32)["B8.a"].ratio == np.inf


def test_coarser_arithmetic_is_allowed_more_and_only_that():
    """B9.b grows with what is declared, in this order."""
    words = ("float64", "float32", "float32 truncated", "tf32", "bfloat16")
    allowed = [
        bounds.weight_only(1.0, 100, ARITHMETICS[w].unit, ARITHMETICS[w].inputs) for w in words
    ]
    assert allowed == sorted(allowed)
    assert len(set(map(float, allowed))) == len(words)
    assert ARITHMETICS["float32"] == Arithmetic(bounds.UNIT["float32"])


def test_a_tree_is_allowed_less_than_a_chain_and_a_chain_never_more():
    """B9.b and B9.d with a depth: up to that of any order, in which none is asked for."""
    unit = bounds.UNIT["float32"]
    depths = (10, 50, 102, 103, 10**6, None)
    allowed = [float(bounds.weight_only(1.0, 100, unit, 0.0, depth)) for depth in depths]
    assert allowed[0] < allowed[1] < allowed[2] == allowed[3] == allowed[4] == allowed[5]
    allowed = [
        float(bounds.second_moments(1.0, 0.0, 100, unit, 0.0, h)) for h in (8, 100, 999, None)
    ]
    assert allowed[0] < allowed[1] == allowed[2] == allowed[3]


def test_a_kernel_says_its_depth_for_the_operands_of_a_call():
    class Tree:
        op, backend = "linear_weight_only", "tree"

        def depth(self, operands):
            return len(operands["group_index"])

    assert arithmetic_of(Tree()).depth is None
    asked = arithmetic_of(Tree(), {"group_index": np.zeros(7, np.int32)})
    assert asked == Arithmetic(bounds.UNIT["float32"], depth=7)


# The default kernels --------------------------------------------------------------------------


def meaningless(tensor):
    """Return the tensor with stride 0 wherever its size is 1."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.as_strided(tensor.shape, [0 if size == 1 else s for size, s in strides])


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("columns", [1, 2, 65])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_of_codes_do_not_depend_on_strides_that_mean_nothing(tokens, columns, rows):
    """Where a size is 1 its stride may be anything; torch._int_mm minds (pytorch issue 195066)."""
    from qframe_plugins.kernels.torch_native.codes import integer_product

    rng = np.random.default_rng(0)
    x, w = (
        torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8))
        for shape in ((tokens, columns), (rows, columns))
    )
    expected = x.double() @ w.double().T
    odd = [meaningless(each.T.contiguous().T) for each in (x, w)]
    assert torch.equal(integer_product(*odd, 127).double(), expected)


def test_columns_beyond_an_int32_are_added_exactly():
    from qframe_plugins.kernels.torch_native.codes import integer_product

    codes = torch.full((1, 140_000), 127, dtype=torch.int8)
    assert int(integer_product(codes, codes, 127)) == 140_000 * 127**2
