"""PyTorch's kernels: sums of codes without error on every processor, weights in any groups."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS, OPS, run
from qframe.packing import pack_codes
from qframe_plugins.kernels import torch_ops
from qframe_plugins.kernels.torch_native import attention, groups
from qframe_plugins.kernels.torch_native import codes as native

TOKENS = st.sampled_from([0, 1, 2, 5, 17, 33])
COLUMNS = st.one_of(st.integers(0, 9), st.sampled_from([63, 64, 130, 517, 1033, 2100]))
ROWS = st.sampled_from([0, 1, 2, 8, 65])
SEEDS = st.integers(0, 2**32 - 1)
KERNELS = {kernel.op: kernel for kernel in torch_ops.qframe_kernels()}


def answer(op, operands):
    given_ = [
        torch.from_numpy(operands[o.name]) if o.is_tensor else operands[o.name]
        for o in OPS[op].operands
    ]
    return run(KERNELS[op], given_).numpy()


def broken(op, operands, made):
    """Return theorem -> ratio of those that the answer breaks."""
    judged = judge(op, operands, (made,), ARITHMETICS["float32"])
    return {theorem: each.ratio for theorem, each in judged.items() if each.ratio > 1}


# Products of codes ----------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False], ids=["as it is", "where PyTorch's is wrong"])
@given(TOKENS, COLUMNS, ROWS, st.sampled_from([1, 127, 128, 255, 256, 257, 30_000]), SEEDS)
@example(17, 1041, 8, 127, 0)
@example(2, 519, 2, 255, 0)
@example(2, 2100, 2, 257, 1)
def test_products_are_exact_for_steps_of_any_size(exact, tokens, columns, rows, largest, seed):
    rng = np.random.default_rng(seed)
    x = np.full((tokens, columns), rng.choice([-127, 127]), np.int8)
    w = np.full((rows, columns), rng.choice([-1, 1]) * largest)
    if seed % 2:  # else sums are as large as they can be
        x[:], w[:] = rng.integers(-127, 128, x.shape), rng.integers(-largest, largest + 1, w.shape)
    narrow = np.int8 if largest <= 127 else np.int16
    with pytest.MonkeyPatch.context() as patch:
        if not exact:
            patch.setattr(native, "int_mm_is_exact", lambda: False)
        made = native.integer_product(
            torch.from_numpy(x), torch.from_numpy(w.astype(narrow)), largest
        )
    assert np.array_equal(made.double().numpy(), (x.astype(np.int64) @ w.T).astype(np.float64))


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "DEFAULT"])
def test_processors_that_add_bytes_in_16_bits_give_the_same_sums(isa):
    """oneDNN saturates there; the variable makes it take such instructions on any x86."""
    code = """
import torch
from qframe_plugins.kernels.torch_native import codes
for tokens, columns, rows in ((1, 2, 1), (1, 300, 65), (17, 300, 65), (130, 64, 8), (3, 2100, 2)):
    for x, w in ((127, 127), (127, -127), (-127, 127), (-127, -127)):
        left = torch.full((tokens, columns), x, dtype=torch.int8)
        right = torch.full((rows, columns), w, dtype=torch.int8)
        made = codes.integer_product(left, right, 127)
        wrong = made[made != columns * x * w]
        if len(wrong):
            raise SystemExit(f"{tokens}, {columns}, {rows}: {wrong[0]}, not {columns * x * w}")
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_sums_that_an_int32_does_not_hold_are_exact_too():
    """A row of -128, which no token has, is full before one of 127 is."""
    columns = 132_500
    x, w = (torch.full((1, columns), code, dtype=torch.int8) for code in (127, -128))
    assert int(native.integer_product(x, w, 128)) == 127 * -128 * columns


# Weights in groups ----------------------------------------------------------------------------


def weight(rng, rows, columns, bits, size, kind):
    """Return a weight whose groups are even, ragged, scattered, or of any size, some empty."""
    lowest = -(1 << (bits - 1)) if rng.random() < 0.5 else 0
    index = (np.arange(columns) // size).astype(np.int32)
    groups = int(index.max(initial=0)) + 1
    if kind == "scattered":
        index = rng.permutation(index)
    elif kind == "any":
        groups += 2
        index = rng.integers(0, groups, columns).astype(np.int32)
    shape = (int(rng.choice([1, rows])), groups)
    zero = rng.integers(lowest, lowest + (1 << bits), shape)
    if rng.random() < 0.3:  # zero points need not be codes
        zero = zero + rng.choice([-30_000, -300, 300], shape)
    return {
        "codes": rng.integers(lowest, lowest + (1 << bits), (rows, columns)).astype(np.int16),
        "scale": np.exp2(rng.uniform(-9, 9, shape)).astype(np.float32),
        "zero_point": zero.astype(np.int16),
        "group_index": index,
    }


@given(
    TOKENS,
    st.sampled_from([1, 7, 64, 65, 130, 256]),
    st.sampled_from([1, 2, 65]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1, 3, 32, 64, 128]),
    st.sampled_from(["plain", "scattered", "any"]),
    SEEDS,
)
def test_weights_in_any_groups_keep_their_bounds(tokens, columns, rows, bits, size, kind, seed):
    rng = np.random.default_rng(seed)
    parts = weight(rng, rows, columns, bits, size, kind)
    x = {"x": rng.normal(size=(tokens, columns)).astype(np.float32)}
    x_codes = {
        "x_codes": rng.integers(-127, 128, (tokens, columns)).astype(np.int8),
        "x_scale": np.exp2(rng.uniform(-9, 9, tokens)).astype(np.float32),
    }
    for op, operands in (
        ("linear_weight_only", x | parts),
        ("linear_int8_groups", x_codes | parts),
        ("dequantize", parts),
    ):
        assert broken(op, operands, answer(op, operands)) == {}, op


@given(st.sampled_from([1, 300, 1000, 4000]), st.sampled_from(["plain", "scattered"]), SEEDS)
def test_a_weight_that_is_decoded_in_pieces_is_whole(chunk, kind, seed):
    rng = np.random.default_rng(seed)
    operands = {
        "x": rng.normal(size=(3, 130)).astype(np.float32),
        **weight(rng, 23, 130, 4, 32, kind),
    }
    x, *parts = (torch.from_numpy(each) for each in operands.values())
    made = groups.multiply_floats(x, groups.lay_out(*parts), chunk)
    assert broken("linear_weight_only", operands, made.numpy()) == {}


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [(4, True, torch.int8), (4, False, torch.int8), (8, True, torch.int8), (8, False, torch.int16)],
)
def test_steps_take_the_fewest_bytes(bits, symmetric, dtype):
    lowest = -(1 << (bits - 1)) if symmetric else 0
    codes = torch.arange(lowest, lowest + (1 << bits), dtype=torch.int16)[None]
    zero = torch.full((1, 1), 0 if symmetric else (1 << bits) - 1, dtype=torch.int16)
    laid = KERNELS["linear_weight_only"].prepare(
        codes, torch.ones(1, 1), zero, torch.zeros(codes.shape[1], dtype=torch.int32)
    )
    assert laid.steps.dtype == dtype


# Caches ---------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(1, 130), st.integers(0, 5), SEEDS)
def test_words_give_the_codes_that_were_packed(bits, count, rows, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    words = pack_codes(torch.from_numpy(codes.astype(np.int16)), bits)
    assert np.array_equal(attention.unpacked(words, bits, count).numpy(), codes)
    other = words.T.contiguous().T[None]  # any strides, any number of dimensions
    assert np.array_equal(attention.unpacked(other, bits, count)[0].numpy(), codes)
