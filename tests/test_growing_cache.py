"""A cache with room for tokens to come holds what transformers' own holds, after anything."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from qframe.growing_cache import GrowingKVCache, GrowingLayer, growing_cache

CHANGES = st.one_of(
    st.tuples(st.just("nothing"), st.none()),
    st.tuples(st.just("crop"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=3)),
    st.tuples(st.just("reorder"), st.integers(0, 7)),
    st.tuples(st.just("reset"), st.none()),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("dtype"), st.sampled_from((torch.float32, torch.bfloat16))),
)
NEW = st.one_of(st.integers(1, 3), st.integers(60, 90))
STEPS = st.lists(st.tuples(CHANGES, NEW, st.booleans()), min_size=2, max_size=8)


class Both:
    """Our cache and transformers' own, which are told the same."""

    def __init__(self):
        self.caches = GrowingKVCache(), DynamicCache()
        self.generator = torch.Generator().manual_seed(0)
        self.batch, self.tokens, self.dtype = 2, 0, torch.bfloat16
        self.returned = []  # (what was returned, what it was), since tokens were last taken away

    def update(self, tokens):
        shape = (self.batch, 3, tokens, 4)
        new = [torch.randn(shape, generator=self.generator).to(self.dtype) for _ in "kv"]
        self.tokens += tokens
        for ours, theirs in zip(*(each.update(*new, 0) for each in self.caches), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
            self.returned.append((ours, theirs.clone()))
        assert self.caches[0].get_seq_length() == self.tokens
        for ours, before in self.returned:
            assert torch.equal(ours, before)

    def change(self, what, how):
        if what == "dtype":
            self.dtype = how
        elif what == "reset":
            for each in self.caches:
                each.reset()
            self.batch, self.tokens = 2, 0
        elif what == "copy":
            self.caches = copy.deepcopy(self.caches)
        elif not self.tokens:
            return
        elif what == "crop" and how < self.tokens:
            for each in self.caches:
                each.crop(-how)
            self.tokens, self.returned = self.tokens - how, []
        elif what == "repeat":
            for each in self.caches:
                each.batch_repeat_interleave(how)
            self.batch *= how
        elif what == "select":
            chosen = torch.tensor([one % self.batch for one in how])
            for each in self.caches:
                each.batch_select_indices(chosen)
            self.batch = len(chosen)
        elif what == "reorder":
            for each in self.caches:
                each.reorder_cache(torch.full((self.batch,), how % self.batch))


@given(steps=STEPS)
def test_it_holds_what_transformers_cache_holds(steps):
    """Also after sequences were chosen or repeated, and tokens taken away."""
    both = Both()
    for (what, how), tokens, inference in steps:
        with torch.inference_mode() if inference else torch.no_grad():
            both.change(what, how)
            both.update(tokens)


def test_what_is_held_keeps_its_dtype_when_narrower_tokens_come():
    both = Both()
    both.change("dtype", torch.float32)
    both.update(5)
    both.change("reorder", 0)  # so that memory is made anew for the next ones
    both.change("dtype", torch.bfloat16)
    both.update(3)


def test_sequences_that_were_not_there_are_refused():
    layer = GrowingLayer()
    layer.update(torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 4))
    with pytest.raises(RuntimeError, match="must match"):
        layer.update(torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4))


def test_it_copies_only_when_its_memory_is_full():
    layer = GrowingLayer()
    places, tokens = [], 0
    with torch.inference_mode():
        layer.update(torch.ones(1, 2, 100, 4), torch.ones(1, 2, 100, 4))
        while tokens < 400:
            keys, values = layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
            places.append((keys.data_ptr(), values.data_ptr()))
            tokens = keys.shape[2]
            room = keys.untyped_storage().nbytes() // keys[:, :, :1].nbytes
            assert room <= max(tokens + 64, tokens * 5 // 4)
    assert len(set(places)) <= 5


def test_what_needs_gradients_gets_them():
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    x = torch.ones(1, 2, 2, 4, requires_grad=True)
    keys, _ = layer.update(x, x)
    keys, _ = layer.update(x, x)
    (3 * keys).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 6))


@pytest.fixture(scope="module")
def network():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generate_gives_the_same_tokens(network, how):
    prompt = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6]])
    given = {
        "attention_mask": (prompt != 0).long(),
        "do_sample": False,
        "max_new_tokens": 80,
        **how,
    }
    expected = network.generate(prompt, **given)
    found = network.generate(prompt, past_key_values=growing_cache(network), **given)
    assert torch.equal(found, expected)


def test_layers_with_windows_stay_those_of_transformers():
    cache = GrowingKVCache(MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert [type(each) for each in cache.layers] == [DynamicSlidingWindowLayer] * 2
    cache = GrowingKVCache(LlamaConfig(num_hidden_layers=2))
    assert [type(each) for each in cache.layers] == [GrowingLayer] * 2


def test_a_network_with_a_cache_of_its_own_kind_gets_none(network):
    assert isinstance(growing_cache(network), GrowingKVCache)
    assert growing_cache(torch.nn.Linear(2, 2)) is None
