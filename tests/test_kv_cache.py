"""The cache in transformers: greedy, beams, padded batches, rollbacks; recipes; scores.

What a quantized cache must give is computed by `recomputed`, which keeps all tokens as they came
and quantizes them anew for every step: codes depend on the tokens alone (docs/bounds.md, B7.g).
Tokens that come alone are in the store when it is read, and others not yet.
"""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import qframe
from qframe import Capabilities, Host, KVCacheScheme, Recipe, hookimpl
from qframe.errors import NonFiniteError, RecipeError, UnknownNameError, UnsupportedError
from qframe.evaluation import evaluate
from qframe.held import held_bytes
from qframe.kv_cache import CachedNetwork, QuantizedKVCache
from qframe_plugins.kv_caches.kivi import KIVI

EVERYTHING = {"residual_length": 1000}  # is kept: a cache in full precision
COARSE = {"preset": "KV2", "group_size": 4, "residual_length": 6, "sink_tokens": 2}
SCHEMES = {
    "KIVI": COARSE,
    "symmetric": {**COARSE, "num_bits": 3, "symmetric": True},
    "keys per token": {**COARSE, "axis_key": "token", "value": {"group_size": 5}},
    "no window": {**COARSE, "residual_length": 0, "sink_tokens": 0},
    "residual": {**COARSE, "options": {"flush": "residual"}},
    "rotated": {**COARSE, "options": {"rotate": True}},
}


class RecomputedLayer(DynamicLayer):
    """Keeps all tokens, and quantizes those of the past whenever they are asked for."""

    def __init__(self, scheme, quantizer):
        super().__init__()
        self.scheme, self.quantizer = scheme, quantizer

    def update(self, key_states, value_states, *args, **kwargs):
        new, past = (key_states, value_states), None
        if self.get_seq_length():
            past = (self.keys, self.values)
        super().update(*new)
        if past is None:
            return new
        parts = list(zip(self.scheme.parts.items(), past, new, strict=True))
        kept = all(part.residual_length for part in self.scheme.parts.values())
        if key_states.shape[2] == 1 and kept and self.quantizer == KIVI():  # which attends to codes
            return tuple(self.stored(*kind, torch.cat((p, n), dim=2)) for kind, p, n in parts)
        return tuple(torch.cat((self.stored(*kind, p), n), dim=2) for kind, p, n in parts)

    def stored(self, kind, scheme, x):
        store = self.quantizer.start(kind, scheme, np.random.default_rng(0))
        store.append(x)
        return store.read()


def recomputed(scheme):
    """Return a cache in which nothing is kept as codes."""
    scheme = QuantizedKVCache(scheme).scheme
    cache = DynamicCache()
    cache.layer_class_to_replicate = lambda: RecomputedLayer(scheme, KIVI(**scheme.options))
    return cache


@pytest.fixture(scope="module")
def llama():
    return network()


def network(head_dim=16, heads=4, kv_heads=2, dtype=torch.float32, seed=0):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config).to(dtype).eval()
        for parameter in made.parameters():  # so that attention matters, and tokens differ
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.25)
    return made


def prompts(batch=2, tokens=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (batch, tokens), generator=generator)


def generated(model, tokens, cache, **given):
    given = {"max_new_tokens": 25, "do_sample": False, **given}
    given.setdefault("attention_mask", torch.ones_like(tokens))
    found = model.generate(
        tokens, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **given
    )
    return found.sequences, torch.stack(found.logits)


def same(one, other):
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams that return all": {"num_beams": 4, "num_return_sequences": 4},
}


# Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_keeps_everything_is_one_in_full_precision(llama, way):
    cache = QuantizedKVCache(EVERYTHING)
    full = generated(llama, prompts(), DynamicCache(), **WAYS[way])
    same(generated(llama, prompts(), cache, **WAYS[way]), full)


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_generated_is_what_the_codes_of_all_tokens_give(llama, scheme, way):
    fields, cache = SCHEMES[scheme], QuantizedKVCache(SCHEMES[scheme])
    ours = generated(llama, prompts(), cache, **WAYS[way])
    same(ours, generated(llama, prompts(), recomputed(fields), **WAYS[way]))
    full = generated(llama, prompts(), DynamicCache(), **WAYS[way])
    assert not torch.equal(ours[1], full[1])  # or nothing was quantized


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padded_batches(llama, scheme):
    tokens = prompts(batch=3)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 3, 11)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    fields, given = SCHEMES[scheme], {"attention_mask": mask}
    full = generated(llama, tokens, DynamicCache(), **given)
    same(generated(llama, tokens, QuantizedKVCache(EVERYTHING), **given), full)
    ours = generated(llama, tokens, QuantizedKVCache(fields), **given)
    same(ours, generated(llama, tokens, recomputed(fields), **given))


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(6, 4, 4), (10, 6, 2), (34, 3, 1)])
def test_any_head_size_and_any_number_of_heads(head_dim, heads, kv_heads):
    model = network(head_dim, heads, kv_heads)
    for fields in SCHEMES.values():
        ours = generated(model, prompts(), QuantizedKVCache(fields))
        same(ours, generated(model, prompts(), recomputed(fields)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_networks_of_16_bits(dtype):
    model = network(dtype=dtype)
    cache = QuantizedKVCache(COARSE)
    same(generated(model, prompts(), cache), generated(model, prompts(), recomputed(COARSE)))
    memory = cache.memory()
    held = sum(held_bytes(store) for each in cache.layers for store in each.stores.values())
    assert held == memory.nbytes == memory.promised < memory.nbytes_16bit
    assert memory.tokens == cache.get_seq_length() == 19 + 25 - 1


def test_guesses_are_taken_back(llama):
    """Prompt look-up appends several tokens and crops those that were wrong."""
    tokens = prompts(batch=1, tokens=6).repeat(1, 5)
    given = {"prompt_lookup_num_tokens": 4, "output_logits": False}
    crops = []

    class Watched(QuantizedKVCache):
        def crop(self, tokens_to_remove):
            crops.append(tokens_to_remove)
            super().crop(tokens_to_remove)

    found = [
        llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            **given,
        )
        for cache in (DynamicCache(), Watched(EVERYTHING))
    ]
    assert torch.equal(*found)
    assert crops


def test_a_prompt_that_was_read_serves_many(llama):
    """As with a common system prompt: a copy of the cache goes on, the cache stays."""
    tokens = prompts(batch=1, tokens=30)
    cache = QuantizedKVCache(COARSE)
    with torch.no_grad():
        llama(tokens[:, :20], past_key_values=cache)
    first = cache.layers[0].stores["key"].read()
    one, two = (generated(llama, tokens, copy.deepcopy(cache)) for _ in range(2))
    same(one, two)
    assert cache.get_seq_length() == 20
    assert torch.equal(first, cache.layers[0].stores["key"].read())


# The interface --------------------------------------------------------------------------------


def layer_with(tokens, batch=2):
    cache = QuantizedKVCache(COARSE)
    x = torch.randn(batch, 2, tokens, 8, generator=torch.Generator().manual_seed(0))
    cache.update(x, -x, 0)
    return cache


def test_crops_in_the_words_of_both_versions():
    """Newer transformers say how many tokens go, older ones how many stay."""
    for said, stay in ((-3, 27), (0, 30), (12, 12), (40, 30), (-40, 0)):
        cache = layer_with(30)
        cache.crop(said)
        assert cache.get_seq_length() == stay


def test_sequences_are_chosen_by_index_or_by_mask():
    by_mask, by_index = layer_with(30), layer_with(30)
    by_mask.batch_select_indices(torch.tensor([False, True]))
    by_index.batch_select_indices(torch.tensor([1]))
    stores = [cache.layers[0].stores["value"].read() for cache in (by_mask, by_index)]
    assert torch.equal(*stores)
    by_index.batch_repeat_interleave(3)
    assert by_index.layers[0].stores["value"].read().shape[0] == 3


def test_a_cache_can_be_emptied():
    cache = layer_with(30)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().nbytes == 0
    cache.update(*torch.zeros(2, 5, 1, 3, 4), 0)  # another shape
    assert cache.get_seq_length() == 3


def test_an_empty_cache_is_no_obstacle():
    cache = QuantizedKVCache()
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.get_mask_sizes(7, 0) == (7, 0)
    assert cache.memory().ratio == 1
    assert cache.get_max_length(0) == -1


def test_what_is_not_finite_names_its_layer():
    cache = QuantizedKVCache()
    good, bad = torch.zeros(1, 1, 3, 4), torch.full((1, 1, 3, 4), torch.nan)
    cache.update(good, good, 0)
    with pytest.raises(NonFiniteError, match="layer 1, value"):
        cache.update(good, bad, 1)


# Schemes --------------------------------------------------------------------------------------


def test_the_fields_of_a_scheme_go_to_both_and_to_each():
    scheme = KVCacheScheme.preset("KV4", nbits=8, value={"residual_length": 7, "sym": True})
    assert (scheme.key.num_bits, scheme.value.num_bits) == (8, 8)
    assert (scheme.key.residual_length, scheme.value.residual_length) == (32, 7)
    assert (scheme.key.symmetric, scheme.value.symmetric) == (False, True)
    assert (scheme.key.axis, scheme.value.axis) == ("channel", "token")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ("KV3", "unknown preset 'KV3'"),
        ({"residual_lenght": 4}, "did you mean 'residual_length'"),
        ({"key": {"residual_lenght": 4}}, "did you mean 'residual_length'"),
        ({"nbits": 2, "num_bits": 4}, "given twice"),
        ({"axis_key": "token", "key": {"axis": "channel"}}, "both given"),
        ({"num_bits": 9}, "num_bits must lie in 2..8"),
        ({"axis_value": "channel", "value": {"group_size": None}}, "needs group_size"),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(fields, why):
    with pytest.raises(RecipeError, match=why):
        Recipe.parse({"kv_cache_scheme": fields}, "recipe")


@pytest.mark.parametrize("fields", ["KV2", COARSE, {"key": {"num_bits": 3}}, {}])
def test_a_scheme_is_the_same_when_it_was_written_and_read(fields):
    recipe = Recipe.parse({"kv_cache_scheme": fields}, "recipe")
    again = Recipe.parse(json.loads(recipe.model_dump_json()), "again")
    assert again.kv_cache_scheme == recipe.kv_cache_scheme
    assert recipe.replace(seed=1).kv_cache_scheme == recipe.kv_cache_scheme


def test_schemes_of_keys_and_values_may_be_objects():
    part = qframe.KVScheme(num_bits=8)
    scheme = KVCacheScheme(key=part, value=part)
    assert scheme.key == scheme.value == part
    assert Recipe(kv_cache_scheme=scheme).replace(seed=2).kv_cache_scheme == scheme


class TokensOnly(KIVI):
    name = "tokens_only"
    capabilities = Capabilities(num_bits=frozenset({4}), strategies=frozenset({"token"}))


class Plugin:
    @hookimpl
    def qframe_kv_caches(self):
        return [TokensOnly()]


def test_a_quantizer_is_asked_for_what_it_declares():
    host = Host.discover()
    host.add(Plugin(), "tokens")
    with pytest.raises(UnsupportedError, match=r"kv_cache_scheme\.key: tokens_only: strategy"):
        QuantizedKVCache({"method": "tokens_only"}, host=host)
    with pytest.raises(UnknownNameError, match="kiwi"):
        QuantizedKVCache({"method": "kiwi"})
    with pytest.raises(RecipeError, match="did you mean 'rotate'"):
        QuantizedKVCache({"options": {"rotated": True}})


def test_a_folder_keeps_the_scheme_of_its_recipe(tiny_llama, tmp_path):
    recipe = {"scheme": {"group_size": 32}, "kv_cache_scheme": COARSE}
    out = tmp_path / "out"
    qframe.quantize(tiny_llama, recipe, out=out, format="qframe")
    cache = QuantizedKVCache.of_folder(out)
    assert cache.scheme == QuantizedKVCache(COARSE).scheme
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert KVCacheScheme.parse(section["kv_cache_scheme"], "config") == cache.scheme
    plugins = json.loads((out / "qframe.json").read_text())["plugins"]
    assert ("kv cache", "kivi") in {(each["kind"], each["name"]) for each in plugins}
    qframe.verify(out).check()
    tokens = prompts()
    ours = generated(qframe.load(out), tokens, cache, pad_token_id=0)
    same(ours, generated(qframe.load(out), tokens, recomputed(COARSE), pad_token_id=0))


def test_a_scheme_that_nobody_can_do_stops_a_run_before_any_work(tiny_llama, tmp_path):
    recipe = {"kv_cache_scheme": {"method": "kiwi"}}
    with pytest.raises(UnknownNameError, match="kiwi"):
        qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_scheme_says_so(tiny_llama, tmp_path):
    qframe.quantize(tiny_llama, {"scheme": {"group_size": 32}}, out=tmp_path / "out")
    with pytest.raises(RecipeError, match="has no kv_cache_scheme"):
        QuantizedKVCache.of_folder(tmp_path / "out")


# Scores ---------------------------------------------------------------------------------------


def test_a_window_in_one_piece_never_meets_its_codes(llama):
    network = CachedNetwork(llama, lambda: QuantizedKVCache(COARSE), chunk=40)
    windows = prompts(batch=3, tokens=40)
    score = evaluate({"one": network}, llama, windows)
    assert score["one"].kl_mean == 0


def test_pieces_see_the_codes_of_those_before(llama):
    tokens, chunk = prompts(batch=1, tokens=40), 7
    network = CachedNetwork(llama, lambda: QuantizedKVCache(COARSE), chunk)
    with torch.no_grad():
        cache = recomputed(COARSE)
        parts = [llama(part, past_key_values=cache).logits for part in tokens.split(chunk, dim=1)]
        assert torch.equal(network(tokens), torch.cat(parts, dim=1))
    assert network.memory.tokens == 40


def test_fewer_bits_cost_more_and_threads_change_nothing(llama):
    windows = prompts(batch=3, tokens=60)
    networks = {
        bits: CachedNetwork(llama, lambda bits=bits: QuantizedKVCache({**COARSE, "nbits": bits}), 1)
        for bits in (8, 4, 2)
    }
    scores = evaluate(networks, llama, windows, threads=2)
    assert scores[8].kl_mean < scores[4].kl_mean < scores[2].kl_mean
    assert scores == evaluate(networks, llama, windows, threads=1)
    with pytest.raises(RecipeError, match="chunk"):
        CachedNetwork(llama, QuantizedKVCache, 0)
