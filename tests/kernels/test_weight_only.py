"""Float kernels of numba keep their bounds on shapes that no tile, step or group divides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Scheme
from qframe.contracts import OpCall
from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS, OPS, run
from qframe_conformance import kernel_draws
from qframe_plugins.kernels import numba_ops
from qframe_plugins.kernels.numba_cpu import weight_only
from qframe_plugins.kernels.numba_cpu.dot_tile import BLOCK
from qframe_plugins.kernels.numba_cpu.few_tokens import FEW

COUNTS = st.one_of(st.integers(0, 14), st.sampled_from([47, 49, 97]))
COLUMNS = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 130, 700]))
ROWS = st.one_of(st.integers(1, 3), st.sampled_from([64, 65, 130]))
SIZES = st.sampled_from([1, 3, 32, 100, 128, None])
SEEDS = st.integers(0, 2**32 - 1)


def broken(name, operands, kernel):
    """Return theorem -> ratio of what does not hold of the kernel's answer."""
    op = OPS[name]
    tensors = [
        torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for value in (operands[operand.name] for operand in op.operands)
    ]
    answer = (np.asarray(run(kernel, tensors)),)
    judged = judge(name, operands, answer, ARITHMETICS["float32"])
    return {theorem: each.ratio for theorem, each in judged.items() if each.ratio > 1}


def weight(rng, bits, size, symmetric, rows, columns, scattered):
    strategy = "channel" if size is None else "group"
    scheme = Scheme(num_bits=bits, group_size=size, symmetric=symmetric, strategy=strategy)
    made = kernel_draws.weight(rng, scheme, rows, columns)
    return kernel_draws.shuffled_groups(rng, made) if scattered else made


@given(COUNTS, COLUMNS, ROWS, st.sampled_from([2, 3, 4, 8]), SIZES, *[st.booleans()] * 2, SEEDS)
def test_products_with_a_weight(count, columns, rows, bits, size, symmetric, scattered, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns)).astype(np.float32)
    operands = {"x": x, **weight(rng, bits, size, symmetric, rows, columns, scattered)}
    assert broken("linear_weight_only", operands, numba_ops.LinearWeightOnly()) == {}


@given(COLUMNS, ROWS, st.sampled_from([2, 3, 4, 8]), SIZES, *[st.booleans()] * 2, SEEDS)
def test_few_tokens_have_the_bits_of_many(columns, rows, bits, size, symmetric, scattered, seed):
    """They are multiplied in another way."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(FEW + 5, columns)).astype(np.float32))
    parts = weight(rng, bits, size, symmetric, rows, columns, scattered)
    kernel = numba_ops.LinearWeightOnly()
    laid = kernel.prepare(*(torch.from_numpy(each) for each in parts.values()))
    many = kernel(x, laid)
    for count in range(1, FEW + 2):
        assert torch.equal(kernel(x[:count], laid), many[:count])
    assert torch.equal(kernel(x[-2:], laid), many[-2:])


@pytest.mark.parametrize("size", [3, 100, 128, None])
def test_blocks_of_tokens_change_no_bit(size, monkeypatch):
    """Of many tokens some lie together; what comes out does not say which."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2 * BLOCK + 5, 300)).astype(np.float32))
    parts = weight(rng, 4, size, False, 70, 300, False)
    kernel = numba_ops.LinearWeightOnly()
    laid = kernel.prepare(*(torch.from_numpy(each) for each in parts.values()))
    together = kernel(x, laid)
    monkeypatch.setattr(weight_only, "_WORDS", 1)
    assert torch.equal(kernel(x, laid), together)


@given(COLUMNS, ROWS, st.sampled_from([2, 4, 8]), SIZES, *[st.booleans()] * 2, SEEDS)
def test_what_codes_stand_for(columns, rows, bits, size, symmetric, scattered, seed):
    rng = np.random.default_rng(seed)
    operands = weight(rng, bits, size, symmetric, rows, columns, scattered)
    assert broken("dequantize", operands, numba_ops.Dequantize()) == {}


@given(COUNTS, st.sampled_from([1, 2, 8, 64, 256]), st.integers(1, 3), SEEDS)
def test_transforms(count, block, blocks, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, block * blocks)).astype(np.float32)
    signs = rng.choice([-1, 1], block * blocks).astype(np.float32)
    operands = {"x": x, "signs": signs, "block": block}
    assert broken("hadamard", operands, numba_ops.Hadamard()) == {}


@pytest.mark.parametrize("block", [3, 0, 128])
def test_a_block_that_cannot_be_transformed_is_refused(block):
    call = OpCall(op="hadamard", device="cpu", dtype="float32", scheme=None, shape=(1, 64, block))
    assert f"block={block}" in numba_ops.Hadamard().supports(call).reason
