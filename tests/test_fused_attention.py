"""Attention of one new token by a kernel: within its bounds, where it may stand for a module."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

import qframe
from qframe.dispatch import Dispatch
from qframe.fused_attention import NewestToken, fuse_attention
from qframe.growing_cache import GrowingKVCache
from qframe.host import Host
from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS
from tests.tiny import write_llama

KERNELS = [Host.discover().get("kernel", name) for name in Host.discover().names("kernel")]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "pad_token_id": 0,
}
LIKE_LLAMA = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


def network_of(config, kind, others=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(config(**SIZES, **(others or {}))).eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def fused(network, backend="auto"):
    return fuse_attention(copy.deepcopy(network), Dispatch(KERNELS, backend))


def stand_ins(network):
    return [m.forward for m in network.modules() if isinstance(vars(m).get("forward"), NewestToken)]


def written(network, tokens, start, cache=None, **others):
    """Return the logits of tokens that are read at once up to `start`, and one by one then."""
    cache = GrowingKVCache(network.config) if cache is None else cache
    found = [network(tokens[:, :start], past_key_values=cache, **others).logits]
    for place in range(start, tokens.shape[1]):
        found.append(network(tokens[:, place : place + 1], past_key_values=cache, **others).logits)
    return torch.cat(found, 1), cache


def some_tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=generator)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", LIKE_LLAMA)
@given(batch=st.integers(1, 3), start=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_the_kernels_answer_keeps_the_bounds_and_goes_into_the_cache(
    name, backend, batch, start, seed
):
    network = fused(network_of(*LIKE_LLAMA[name]), backend)
    tokens = some_tokens(batch, start + 2, seed)
    _, cache = written(network, tokens[:, :-1], start)
    assert [each.stands for each in stand_ins(network)] == [True, True]
    module, layer = network.model.layers[0].self_attn, cache.layers[0]
    before = [each.clone() for each in (layer.keys, layer.values)]
    seen = {}
    for part in ("q_proj", "k_proj", "v_proj"):
        hook = lambda m, a, y, part=part: seen.update({part: y})  # noqa: E731
        getattr(module, part).register_forward_hook(hook)
    module.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    angles = []
    network.model.rotary_emb.register_forward_hook(lambda m, a, y: angles.append(y))
    network(tokens[:, -1:], past_key_values=cache)
    newest = [seen[f"{part}_proj"].view(batch, -1, 20) for part in "qkv"]
    cos, sin = (each[:, 0].expand(batch, -1) for each in angles[0])
    assert torch.equal(layer.values[:, :, -1], newest[2])
    for kept, now in zip(before, (layer.keys, layer.values), strict=True):
        assert torch.equal(now[:, :, :-1], kept)
    names = ("q", "k", "v", "cos", "sin", "keys", "values")
    operands = dict(zip(names, map(np.asarray, (*newest, cos, sin, *before)), strict=True))
    answer = np.asarray(seen["out"].view(batch, -1, 20)), np.asarray(layer.keys[:, :, -1])
    operands["scaling"] = module.scaling
    judged = judge("attention_rotary", operands, answer, ARITHMETICS["float32"])
    assert {name: each.ratio <= 1 for name, each in judged.items()} == {"B7.e": True, "B13.b": True}


def test_a_token_asks_for_the_kernel_once_in_a_layer_after_the_first():
    asked = []

    class Counted:
        op, backend = "attention_rotary", "counted"

        def supports(self, call):
            return None

        def __call__(self, *operands):
            asked.append(operands[5].shape[2])
            kernel = next(k for k in KERNELS if k.op == self.op and k.backend == "torch")
            return kernel(*operands)

    network = network_of(*LIKE_LLAMA["llama"])
    fuse_attention(network, Dispatch([Counted()]))
    written(network, some_tokens(1, 8), 5)
    assert asked == [6, 6, 7, 7]  # the sixth token was tried, and answered as usual


NOT_LIKE_LLAMA = {
    "norms of heads": (Qwen3Config, Qwen3ForCausalLM, {}),
    "sliding": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "half of a head": (GlmConfig, GlmForCausalLM, {}),
    "other pairs": (Ernie4_5Config, Ernie4_5ForCausalLM, {}),
    "eager": (LlamaConfig, LlamaForCausalLM, {"attn_implementation": "eager"}),
}


@pytest.mark.parametrize("name", NOT_LIKE_LLAMA)
def test_what_is_not_like_llama_gives_the_bits_that_it_gave(name):
    network = network_of(*NOT_LIKE_LLAMA[name])
    tried, tokens = fused(network), some_tokens(2, 12)
    assert torch.equal(written(tried, tokens, 8)[0], written(network, tokens, 8)[0])
    assert not any(each.stands for each in stand_ins(tried))
    assert bool(stand_ins(tried)) == (name != "norms of heads")


def test_a_module_that_turns_otherwise_is_found_out():
    """Ernie's `forward` is Llama's, word by word, but calls another function by the same name."""
    tried = fused(network_of(*NOT_LIKE_LLAMA["other pairs"]))
    written(tried, some_tokens(1, 6), 4)
    assert [each.stands for each in stand_ins(tried)] == [False, False]


def test_what_nobody_asks_for_is_no_reason_and_what_somebody_does_is_one():
    tried, tokens = fused(network_of(*LIKE_LLAMA["llama"])), some_tokens(1, 6)
    written(tried, tokens, 4, output_attentions=False)
    module = tried.model.layers[0].self_attn
    assert module.forward.stands
    given = {}
    module.register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    _, cache = written(tried, tokens, 4)
    asked = []
    module.forward._kernel = lambda *operands: asked.append(len(operands))
    given["past_key_values"] = cache
    usual = LlamaAttention.forward(module, **copy.deepcopy(given), softcap=None)[0]
    assert torch.equal(module(**copy.deepcopy(given), is_causal=True)[0], usual)
    assert not asked


@pytest.mark.parametrize("case", ["padding", "no cache", "several tokens", "bfloat16", "training"])
def test_what_is_not_one_new_token_goes_the_usual_way(case):
    network = network_of(*LIKE_LLAMA["llama"])
    tried, tokens, start = fused(network), some_tokens(2, 9), 6
    written(tried, tokens, start)
    assert all(each.stands for each in stand_ins(tried))
    for each in (network, tried):
        each.to(torch.bfloat16) if case == "bfloat16" else None
        each.train(case == "training")
    if case == "no cache":
        assert torch.equal(tried(tokens).logits, network(tokens).logits)
        return
    if case == "several tokens":
        start = tokens.shape[1]
    if case == "padding":
        cache = [GrowingKVCache(network.config) for _ in range(2)]
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        for place in (slice(0, 6), slice(6, 7)):
            given = {"attention_mask": mask[:, : place.stop]}
            made, wanted = (
                one(tokens[:, place], past_key_values=kept, **given).logits
                for one, kept in zip((tried, network), cache, strict=True)
            )
            assert torch.equal(made, wanted)
        return
    made, wanted = (written(each, tokens, start)[0] for each in (tried, network))
    assert torch.equal(made, wanted)


def test_any_cache_of_numbers_will_do_and_copies_stand_alone():
    network = fused(network_of(*LIKE_LLAMA["llama"]))
    tokens = some_tokens(2, 9)
    found = [
        written(network, tokens, 6, kind(config=network.config))[0]
        for kind in (GrowingKVCache, GrowingKVCache, DynamicCache)
    ]
    assert torch.equal(found[1], found[2])
    other = copy.deepcopy(network)
    assert all(each._module is not m for each in stand_ins(other) for m in network.modules())
    for parameter in other.parameters():
        parameter.mul_(0.5)
    assert torch.equal(written(network, tokens, 6)[0], found[1])
    assert not torch.equal(written(other, tokens, 6)[0], found[1])


def test_an_attention_or_a_cache_that_somebody_made_is_asked():
    """The same tokens again: what was found out before is no reason to pass them by."""
    network, tokens = fused(network_of(*LIKE_LLAMA["llama"])), some_tokens(2, 9)
    written(network, tokens, 6)
    asked = []

    class Layer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            asked.append(keys.shape[2])
            return super().update(keys, values, *args, **kwargs)

    kernel, seen = stand_ins(network)[0]._kernel, []
    for each in stand_ins(network):
        each._kernel = lambda *operands: seen.append(len(operands)) or kernel(*operands)
    cache = DynamicCache(config=network.config)
    cache.layers = [Layer() for _ in cache.layers]
    written(network, tokens, 6, cache)
    assert (asked, seen) == ([6, 6, 1, 1, 1, 1, 1, 1], [])
    AttentionInterface.register("somebody's", sdpa_attention_forward)
    AttentionMaskInterface.register("somebody's", sdpa_mask)
    network.set_attn_implementation("somebody's")
    written(network, tokens, 6)
    assert seen == []


def test_a_cache_of_other_texts_is_the_error_that_it_was():
    network, tokens = fused(network_of(*LIKE_LLAMA["llama"])), some_tokens(2, 9)
    _, cache = written(network, tokens, 6, DynamicCache(config=network.config))
    with pytest.raises(RuntimeError, match="must match"):
        network(tokens[:1, -1:], past_key_values=cache)


def test_gradients_go_the_usual_way():
    network = network_of(*LIKE_LLAMA["llama"])
    tried, tokens = fused(network), some_tokens(1, 5)
    written(tried, tokens, 3)
    for each in (network, tried):
        each.requires_grad_(True)
    found = []
    for each in (network, tried):
        logits, _ = written(each, tokens, 3, DynamicCache(config=each.config))
        weight = each.model.layers[0].self_attn.k_proj.weight
        found.append((logits, *torch.autograd.grad(logits.sum(), weight)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_backend_without_the_operation_leaves_attention_alone():
    network = network_of(*LIKE_LLAMA["llama"])
    fuse_attention(network, Dispatch([k for k in KERNELS if k.op != "attention_rotary"]))
    assert not stand_ins(network)


def test_a_loaded_network_has_it_and_writes(tmp_path):
    model, out = write_llama(tmp_path / "MODEL"), tmp_path / "OUT"
    qframe.quantize(model, {"method": "rtn", "scheme": "W8A8"}, out=out)
    network = qframe.load(out, kernels="auto")
    ids = torch.arange(9)[None]
    text = network.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 15)
    assert all(each.stands for each in stand_ins(network))
    assert not stand_ins(qframe.load(out))
