"""KIVI: bytes that are really there, codes that no piecing changes, and what it refuses.

What any KV cache owes is the suite's business: `qframe check kivi`.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import KVCacheScheme, KVScheme, bounds, rounding
from qframe.claims.kv import KVRotatedHalfStep
from qframe.errors import NonFiniteError
from qframe.held import held_bytes
from qframe.kv_evidence import KVEvidence
from qframe.transforms import block_of
from qframe_conformance import check_plugin
from qframe_plugins.kv_caches.kivi import KIVI, LARGEST, turned

CHANNEL = {"axis": "channel", "group_size": 32}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numbers(*shape, seed=0, dtype=torch.float32):
    """Keys as networks have them: some channels are large in all tokens."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + 8 * (rng.random(shape[-1]) < 1 / 8)
    return torch.from_numpy(x.astype(np.float32)).to(dtype)


def filled(x, pieces=None, plugin=None, **fields):
    store = (plugin or KIVI()).start("key", KVScheme(**fields), np.random.default_rng(0))
    for piece in x.split(pieces or [x.shape[2]], dim=2):
        store.append(piece)
    return store


@pytest.mark.parametrize("plugin", [KIVI(), KIVI(flush="residual"), KIVI(rotate=True)])
def test_the_suite_holds_whatever_the_options(plugin):
    report = check_plugin(plugin, seed=7, shrink=False)
    assert report.ok, str(report)


# Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_codes_take_their_bits(num_bits):
    """Of 128 channels, or tokens, no bit is lost to padding."""
    x = numbers(2, 3, 128, 128)
    for axis in ({"axis": "token"}, {"axis": "channel", "group_size": 128}):
        store = filled(x, num_bits=num_bits, residual_length=0, symmetric=True, **axis)
        scales = 2 * 2 * 3 * 128
        assert 8 * (held_bytes(store) - scales) == num_bits * x.numel()


@pytest.mark.parametrize("shape", [(1, 8, 4096, 128), (1, 4, 8192, 64), (2, 2, 4096, 128)])
@pytest.mark.parametrize(("preset", "percent"), [("KV8", 53), ("KV4", 30), ("KV2", 24)])
def test_a_cache_takes_so_much_less_than_one_in_16_bits(preset, percent, shape):
    """Scales, offsets and kept tokens included; shapes of Llama 3, Qwen 2.5 and SmolLM2."""
    x, held = numbers(*shape, dtype=torch.bfloat16), 0
    for kind, scheme in KVCacheScheme.preset(preset).parts.items():
        store = KIVI().start(kind, scheme, np.random.default_rng(0))
        store.append(x)
        assert held_bytes(store) == store.nbytes == KIVI().nbytes(scheme, shape, 2)
        held += held_bytes(store)
    assert 100 * held <= percent * (2 * x.nbytes)


@given(
    st.sampled_from([1, 3, 20, 64]),
    st.integers(0, 70),
    st.booleans(),
    st.sampled_from([0, 1, 7, 32]),
    st.integers(0, 5),
    st.sampled_from(["group", "residual"]),
)
def test_promised_bytes_are_held_bytes(head_dim, tokens, channel, window, sinks, flush):
    fields = {"residual_length": window, "sink_tokens": sinks, "num_bits": 3}
    fields |= CHANNEL if channel else {"group_size": 8}
    x, plugin = numbers(1, 2, tokens, head_dim), KIVI(flush=flush)
    store = filled(x, [1] * tokens or [0], plugin, **fields)
    assert held_bytes(store) == plugin.nbytes(KVScheme(**fields), tuple(x.shape), 4)


# Codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", ["group", "residual"])
@pytest.mark.parametrize("axis", [CHANNEL, {"axis": "token", "group_size": 24}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_gives_the_codes_that_its_tokens_give_one_by_one(flush, axis, dtype):
    x, plugin = numbers(2, 2, 133, 40, dtype=dtype), KIVI(flush=flush)
    fields = {"residual_length": 20, "sink_tokens": 3, "num_bits": 2, **axis}
    whole = filled(x, None, plugin, **fields)
    for pieces in ([1] * 133, [100, *[1] * 33], [7] * 19):
        other = filled(x, pieces, plugin, **fields)
        assert torch.equal(whole.read(), other.read())
        for mine, its in zip(whole.blocks(), other.blocks(), strict=True):
            assert all(
                torch.equal(getattr(mine, part), getattr(its, part))
                for part in ("codes", "scale", "offset")
            )


def test_the_smallest_and_the_largest_number_of_a_group_get_the_end_codes():
    x = numbers(1, 1, 64, 16)
    [block] = filled(x, residual_length=0, num_bits=4, **CHANNEL).blocks()
    groups = block.codes.reshape(2, 32, 16)
    assert bool((groups.amin(1) == 0).all())
    assert bool((groups.amax(1) == 15).all())


def test_the_residual_of_the_paper_goes_all_at_once():
    fields = {"residual_length": 64, **CHANNEL}
    for tokens, coded in ((63, 0), (64, 64), (127, 64), (128, 128)):
        blocks = filled(numbers(1, 1, tokens, 8), None, KIVI(flush="residual"), **fields).blocks()
        assert sum(block.codes.shape[2] for block in blocks) == coded


def test_nothing_that_is_read_overflows_float16():
    """A scale that was rounded up reaches beyond 65504."""
    x = torch.full((1, 1, 64, 8), 65504.0).to(torch.float16)
    x[:, :, ::2] *= -0.7
    for symmetric, axis in itertools.product((False, True), (CHANNEL, {"axis": "token"})):
        read = filled(x, residual_length=0, num_bits=8, symmetric=symmetric, **axis).read()
        assert bool(torch.isfinite(read).all())


def test_a_number_beyond_every_scale_is_refused_before_it_counts():
    store = filled(numbers(1, 1, 8, 4), residual_length=2)
    before = store.read()
    for value in (2 * LARGEST["float16"], np.nan, np.inf):
        with pytest.raises(NonFiniteError, match="append"):
            store.append(torch.full((1, 1, 1, 4), value))
    assert torch.equal(store.read(), before)
    wide = KVScheme(residual_length=0, scale_dtype="bfloat16")
    wide_store = KIVI().start("key", wide, np.random.default_rng(0))
    wide_store.append(torch.full((1, 1, 1, 4), 2 * LARGEST["float16"]))
    assert wide_store.length == 1


# What caches do -------------------------------------------------------------------------------


def test_a_group_that_was_cropped_never_grows():
    x, more = numbers(1, 2, 70, 8), numbers(1, 2, 70, 8, seed=1)
    store = filled(x, residual_length=0, **CHANNEL)
    kept = store.read()[:, :, :40]
    store.crop(40)
    store.append(more)
    assert torch.equal(store.read()[:, :, :40], kept)
    assert [(block.start, block.stop) for block in store.blocks()] == [(0, 40), (40, 104)]


def test_sinks_that_were_cropped_are_sinks_when_they_come_again():
    x = numbers(1, 1, 20, 8)
    store = filled(x, residual_length=2, sink_tokens=4)
    store.crop(1)
    store.append(x[:, :, 1:])
    assert torch.equal(store.read()[:, :, :4], x[:, :, :4])
    assert store.blocks()[0].start == 4


# Rotation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (96, 32), (80, 16), (5, 1), (1, 1)])
def test_blocks_are_powers_of_two_that_divide(head_dim, block):
    assert block_of(head_dim) == block
    x = torch.randint(-100, 100, (2, 3, head_dim)).float()
    assert torch.equal(turned(turned(x)), x * block)  # in whole numbers nothing is rounded


def test_a_rotation_helps_tokens_with_an_outlier():
    x = numbers(1, 2, 200, 64)
    x[..., 5] += 60
    fields = {"num_bits": 4, "residual_length": 0}
    plain, turned = (filled(x, None, KIVI(rotate=rotate), **fields) for rotate in (False, True))
    assert (turned.read() - x).square().sum() < (plain.read() - x).square().sum() / 4


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 6, 48, 64]), st.sampled_from(DTYPES))
def test_a_rotated_number_comes_back_as_near_as_b7_h_says(seed, head_dim, dtype):
    rng = np.random.default_rng(seed)
    x = numbers(1, 2, 40, head_dim, seed=seed, dtype=dtype)
    scheme = KVScheme(num_bits=int(rng.integers(2, 9)), residual_length=0, scale_dtype="float32")
    evidence = KVEvidence.of(scheme, x, filled(x, None, KIVI(rotate=True), **scheme.model_dump()))
    error = evidence.read.double().numpy() - x.double().numpy()
    assert bounds.ratio(error, KVRotatedHalfStep().element(evidence)) <= 1


# Offsets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_next_number_of_a_dtype_is_above_what_was_rounded_down(dtype):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.float32(rng.normal(size=10_000) * 2.0 ** rng.integers(-30, 14, 10_000)))
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1.0, 2.0**-24, -(2.0**-24), 2.0**-25])))
    down = rounding.round_down(x, dtype)
    kind = getattr(torch, dtype)
    assert torch.equal(down.to(kind).float(), down)
    assert bool((down <= x).all())
    above = torch.nextafter(down.to(kind), torch.tensor(torch.inf, dtype=kind)).float()
    assert bool((above > x).all())


def test_what_is_below_every_number_of_a_dtype_has_none():
    ends = torch.tensor([-1e6, 1e6])
    assert rounding.round_down(ends, "float16").tolist() == [-np.inf, 65504.0]
    assert torch.equal(rounding.round_down(ends, "float32"), ends)
