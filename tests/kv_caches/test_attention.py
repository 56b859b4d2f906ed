"""Attention on codes: what is taken from where, and when a network uses it.

That the numbers are right is the business of the suite and of `test_machine.py`.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qframe import KVCacheScheme, KVScheme
from qframe.errors import ModelError
from qframe.kv_attention import NAME, Unread, attend_to_codes, attention
from qframe.kv_cache import QuantizedKVCache, QuantizedLayer
from qframe_plugins.kernels.numba_cpu.rows import rows_of
from qframe_plugins.kv_caches import kivi
from qframe_plugins.kv_caches.kivi import KIVI, shared_codes

SIDES = st.builds(
    lambda axis, size, window: KVScheme(axis=axis, group_size=size, residual_length=window),
    st.sampled_from(["token", "channel"]),
    st.sampled_from([1, 4, 6]),
    st.sampled_from([0, 1, 5]),
)


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def stored(scheme, pieces, heads=2, width=8):
    store = KIVI().start("key", scheme, np.random.default_rng(0))
    for number, tokens in enumerate(pieces):
        store.append(numbers(1, heads, tokens, width, seed=number))
    return store


def layer_of(*pieces, scheme="KV4", heads=2, width=8):
    """Return a layer that has tokens, and what its last update returned."""
    layer = QuantizedLayer(KIVI(), KVCacheScheme.preset(scheme), 0, 0)
    for number, tokens in enumerate(pieces):
        x = numbers(2, heads, tokens, width, seed=number)
        given = layer.update(x, x + 1)
    return layer, given


# Codes ------------------------------------------------------------------------------------------


@given(
    SIDES,
    SIDES,
    st.sampled_from([0, 3]),
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(4, 40),
)
def test_the_kernel_gets_all_codes_but_pieces_of_groups(keys, values, sinks, pieces, long):
    keys, values = (each.replace(sink_tokens=sinks) for each in (keys, values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kivi, "LONG", long)
        stores = stored(keys, pieces), stored(values, pieces)
    found = list(shared_codes(*stores))
    coded = [set() for _ in stores]
    for store, tokens in zip(stores, coded, strict=True):
        for run in store.runs:
            tokens.update(range(run.start, run.stop))
    given = [token for start, stop in found for token in range(start, stop)]
    assert given == sorted(set(given))
    assert set(given) <= coded[0] & coded[1]
    for start, stop in found:
        for store in stores:
            run = next(each for each in store.runs if each.start <= start < each.stop)
            assert stop <= run.stop
            assert (start - run.start) % store.scheme.step == 0
    together = int(np.lcm(keys.step, values.step))
    for one in stores[0].runs:
        for other in stores[1].runs:  # less than a group of both is left out
            shared = range(max(one.start, other.start), min(one.stop, other.stop))
            left_out = [token for token in shared if token not in given]
            assert len(left_out) < together
            assert left_out == list(shared)[: len(left_out)]


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_few_codes_are_copied_when_some_come(axis, monkeypatch):
    monkeypatch.setattr(kivi, "LONG", 64)
    scheme = KVScheme(axis=axis, group_size=4, residual_length=4)
    store, copied = stored(scheme, [1000]), 0
    for number in range(300):
        before = {id(run.words) for run in store.runs}
        store.append(numbers(1, 2, 1, 8, seed=number))
        assert len(store.runs) <= 2
        copied += sum(run.tokens for run in store.runs if id(run.words) not in before)
    assert copied < 300 * 64 + (300 // 64 + 1) * 1300  # short runs, and long ones now and then
    fresh = stored(scheme, [1000, *[1] * 300])
    monkeypatch.setattr(kivi, "LONG", 10**6)
    whole = stored(scheme, [1000, *[1] * 300])
    assert torch.equal(fresh.read(), whole.read())
    assert fresh.nbytes == whole.nbytes


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_words_are_not_copied_for_the_kernel(axis, batch, heads):
    scheme = KVScheme(axis=axis, group_size=4, residual_length=0)
    store = KIVI().start("key", scheme, np.random.default_rng(0))
    store.append(numbers(batch, heads, 40, 8))
    for start, stop in ((0, 40), (0, 17), (8, 40), (8, 20)):
        rows = store.rows(start, stop)
        flat = rows_of(*rows, stop - start, 8)[0]
        assert np.shares_memory(flat, store.runs[0].words.numpy())


@pytest.mark.parametrize("start", range(0, 40, 4))
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_some_tokens_are_those_of_all(axis, start):
    store = stored(KVScheme(axis=axis, group_size=4, residual_length=6, sink_tokens=2), [23, 17])
    for stop in range(start, 41):
        assert torch.equal(store.span(start, stop), store.read()[:, :, start:stop])


def test_what_was_rotated_is_read():
    """Codes stand for rotated numbers, which the query would have to meet rotated."""
    quantizer, query = KIVI(rotate=True), numbers(1, 4, 8, seed=9)
    stores = []
    for seed in (1, 2):
        stores.append(quantizer.start("key", KVScheme(residual_length=4), np.random.default_rng(0)))
        stores[-1].append(numbers(1, 2, 40, 8, seed=seed))
    wanted, _ = kivi._on_numbers(query, *(store.read() for store in stores))
    assert torch.equal(quantizer.attend(query, *stores), wanted)


# Keys and values that nobody has read -----------------------------------------------------------


def test_the_shape_is_known_without_reading(monkeypatch):
    layer, (keys, values) = layer_of(100, 1)
    monkeypatch.setattr(kivi.Store, "read", lambda self: pytest.fail("read"))
    for each in (keys, values):
        assert isinstance(each, Unread)
        assert each.shape == (2, 2, 101, 8)
        assert (each.dtype, each.device.type, each.ndim) == (torch.float32, "cpu", 4)
        assert each.size(2) == 101
    assert layer.get_seq_length() == 101


def test_whoever_looks_sees_what_is_stored():
    layer, (keys, values) = layer_of(100, 1)
    for kind, each in (("key", keys), ("value", values)):
        plain = layer.stores[kind].read()
        for seen in (each + 0, each.clone(), torch.cat((each,)), each[:], each.repeat(1, 1, 1, 1)):
            assert type(seen) is torch.Tensor
            assert torch.equal(seen, plain)
        assert each.tolist() == plain.tolist()


def test_they_cannot_be_read_when_there_are_other_tokens():
    layer, (keys, _) = layer_of(100, 1)
    layer.update(*(numbers(2, 2, 1, 8) for _ in "kv"))
    with pytest.raises(ModelError, match=r"keys of 101 tokens .* has 102"):
        keys.sum()


def test_they_cannot_be_attended_to_when_there_are_other_tokens():
    layer, old = layer_of(100, 1)
    layer.update(*(numbers(2, 2, 1, 8) for _ in "kv"))
    with pytest.raises(ModelError, match=r"keys of 101 tokens .* has 102"):
        attention(nn.Module(), numbers(2, 2, 1, 8), *old, None)


def pairs():
    """Yield keys and values that are not those of one layer."""
    _, (keys, values) = layer_of(100, 1)
    _, (_, others) = layer_of(60, 40, 1)
    yield keys, others
    yield values, keys


@pytest.mark.parametrize("pair", list(pairs()), ids=["of two layers", "exchanged"])
def test_keys_and_values_that_do_not_belong_together_are_read(pair, monkeypatch):
    query = numbers(2, 2, 1, 8, seed=5)
    wanted, _ = sdpa_attention_forward(nn.Module(), query, *(each.read() for each in pair), None)
    monkeypatch.setattr(QuantizedLayer, "attend", lambda *given: pytest.fail("attended to codes"))
    assert torch.equal(attention(nn.Module(), query, *pair, None)[0], wanted)


@pytest.mark.parametrize("pieces", [(1,), (5, 1, 7), (100,)])
def test_several_tokens_are_returned_as_they_came(pieces):
    layer, given = layer_of(*pieces)
    assert all(isinstance(each, Unread) == (pieces[-1] == 1) for each in given)
    x = numbers(2, 2, pieces[-1], 8, seed=len(pieces) - 1)
    assert torch.equal(given[0][:, :, -pieces[-1] :], x)
    assert layer.get_seq_length() == sum(pieces)


@pytest.mark.parametrize(
    "quantizer", [KIVI(rotate=True), KIVI(flush="residual")], ids=["rotated", "residual"]
)
def test_nothing_is_left_unread_where_codes_are_no_use(quantizer):
    layer = QuantizedLayer(quantizer, KVCacheScheme.preset("KV4"), 0, 0)
    for tokens in (70, 1):
        given = layer.update(*(numbers(1, 2, tokens, 8) for _ in "kv"))
        assert not any(isinstance(each, Unread) for each in given)


# Networks ---------------------------------------------------------------------------------------


@pytest.fixture
def network():
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def calls(monkeypatch):
    """How many queries met codes, by what was attended to."""
    found, real = [], QuantizedLayer.attend

    def attend(self, query):
        found.append(self.get_seq_length())
        return real(self, query)

    monkeypatch.setattr(QuantizedLayer, "attend", attend)
    return found


def generated(network, prompts, cache, tokens=12, **given):
    with torch.no_grad():
        return network.generate(
            prompts,
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **{"attention_mask": torch.ones_like(prompts), **given},
        )


PROMPT = torch.arange(150)[None] * 7 % 61


def test_a_network_attends_to_codes_and_says_the_same(network, calls):
    read = generated(network, PROMPT, QuantizedKVCache("KV4"))
    assert calls == []
    assert attend_to_codes(network)
    assert network.config._attn_implementation == NAME
    made = generated(network, PROMPT, QuantizedKVCache("KV4"))
    assert torch.equal(made, read)
    assert calls == [length for length in range(151, 162) for _ in range(2)]


def test_what_another_cache_holds_is_attended_to_as_before(network, calls):
    before = generated(network, PROMPT, DynamicCache())
    attend_to_codes(network)
    assert torch.equal(generated(network, PROMPT, DynamicCache()), before)
    assert calls == []


def test_padding_is_masked_and_so_nothing_is_left_to_the_codes(network, calls):
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    mask = torch.ones_like(prompts)
    mask[0, :9] = 0
    given = {"attention_mask": mask}
    read = generated(network, prompts, QuantizedKVCache("KV8"), **given)
    attend_to_codes(network)
    made = generated(network, prompts, QuantizedKVCache("KV8"), **given)
    assert torch.equal(made, read)
    assert calls == []


def test_another_scaling_is_not_that_of_the_codes(network, calls):
    def wide(module):
        module.self_attn.scaling = 0.5

    for layer in network.model.layers:
        wide(layer)
    read = generated(network, PROMPT, QuantizedKVCache("KV4"))
    attend_to_codes(network)
    assert torch.equal(generated(network, PROMPT, QuantizedKVCache("KV4")), read)
    assert calls == []


def test_networks_with_an_attention_of_their_choice_keep_it(network):
    network.set_attn_implementation("eager")
    assert not attend_to_codes(network)
    assert network.config._attn_implementation == "eager"
    assert not attend_to_codes(nn.Linear(2, 2))
