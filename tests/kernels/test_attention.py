"""Attention of numba keeps its bounds for caches of every width, axis and group."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import KVScheme
from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS, OPS
from qframe_conformance import kernel_draws_other
from qframe_plugins.kernels.numba_ops import AttentionKV

SIDES = st.builds(
    lambda bits, axis, size, symmetric: KVScheme(
        num_bits=bits, axis=axis, group_size=size, symmetric=symmetric
    ),
    st.integers(2, 8),
    st.sampled_from(["token", "channel"]),
    st.sampled_from([1, 3, 8, 16, 32, 64, 100, 128]),
    st.booleans(),
)
HEADS = st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)])
TOKENS = st.one_of(st.integers(1, 40), st.sampled_from([128, 300, 1024, 1025, 2100]))
WIDTHS = st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 80, 96, 127, 128, 130]))


def attended(operands):
    """Return the kernel's answer."""
    tensors = [
        torch.from_numpy(each) if isinstance(each, np.ndarray) else each
        for each in (operands[operand.name] for operand in OPS["attention_kv"].operands)
    ]
    return tuple(part.numpy() for part in AttentionKV()(*tensors))


@given(HEADS, TOKENS, WIDTHS, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_attention(heads, tokens, width, keys, values, seed):
    rng = np.random.default_rng(seed)
    operands = kernel_draws_other.attention(rng, heads, tokens, width, keys, values)
    judged = judge("attention_kv", operands, attended(operands), ARITHMETICS["float32"])
    broken = {theorem: each.ratio for theorem, each in judged.items() if not each.ratio <= 1}
    assert broken == {}


@given(st.sampled_from([1, 2]), TOKENS, WIDTHS, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_a_head_gets_the_same_bits_however_many_share_its_keys(
    shared, tokens, width, keys, values, seed
):
    """For few heads codes are decoded where they are added up, for many into memory before."""
    rng = np.random.default_rng(seed)
    operands = kernel_draws_other.attention(rng, (2 * shared, 2), tokens, width, keys, values)
    few = attended(operands)
    query = operands["q"].reshape(-1, 2, shared, width)
    operands["q"] = np.tile(query, (1, 1, 3, 1)).reshape(len(query), -1, width)
    for found, expected in zip(attended(operands), few, strict=True):
        each = found.reshape(len(query), 2, 3, shared, *found.shape[2:])
        for copy in range(3):
            assert np.array_equal(each[:, :, copy].reshape(expected.shape), expected)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("name", ["k_words", "v_words", "k_scale", "v_offset"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_operands_that_do_not_fit_are_refused(axis, name, dimension):
    """Else the memory beside them would be read."""
    scheme = KVScheme(num_bits=4, axis=axis, group_size=8)
    rng = np.random.default_rng(0)
    operands = kernel_draws_other.attention(rng, (2, 1), 20, 16, scheme, scheme)
    operands[name] = np.delete(operands[name], 0, dimension)
    with pytest.raises(ValueError, match=f"{name[2:]} .* do not fit 20 tokens of 16 channels"):
        attended(operands)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_an_infinite_query_of_one_head_spoils_no_other(axis):
    scheme = KVScheme(num_bits=4, axis=axis, group_size=32)
    rng = np.random.default_rng(0)
    operands = kernel_draws_other.attention(rng, (4, 2), 50, 64, scheme, scheme)
    exact = attended(operands)
    for poison in (np.nan, np.inf):
        operands["q"][1, 2, 5] = poison
        for part, whole in zip(attended(operands), exact, strict=True):
            assert not np.isfinite(part[1, 2]).any()
            part[1, 2] = whole[1, 2]
            assert np.array_equal(part, whole)
