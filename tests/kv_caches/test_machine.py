"""A quantized cache of transformers lives beside one in full precision, whatever is done to it.

Keys and values are random, so every bound is that of theorems (docs/bounds.md, B7); of what is
exact, bits are compared.
"""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qframe import KVCacheScheme, bounds
from qframe.claims.kv import KVHalfStep
from qframe.held import held_bytes
from qframe.kv_attention import Unread
from qframe.kv_cache import QuantizedLayer
from qframe.kv_evidence import KVClaim, KVEvidence
from qframe_conformance.kv_attention import Attention, decoding
from qframe_conformance.kv_lanes import LANES, lanes
from qframe_plugins.kv_caches import kivi
from qframe_plugins.kv_caches.kivi import KIVI

DTYPES = ("float32", "float16", "bfloat16")
PART = st.fixed_dictionaries(
    {
        "num_bits": st.sampled_from([2, 3, 4, 8]),
        "axis": st.sampled_from(["token", "channel"]),
        "group_size": st.sampled_from([1, 4, 5]),
        "symmetric": st.booleans(),
        "residual_length": st.sampled_from([0, 1, 6]),
        "sink_tokens": st.sampled_from([0, 0, 3]),
        "scale_dtype": st.sampled_from(DTYPES),
    }
)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """Let few tokens be a long run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kivi, "LONG", 8)
        yield


class Caches(RuleBasedStateMachine):
    """The cache of one layer, and all its keys and values as they came."""

    @initialize(
        key=PART,
        value=PART,
        flush=st.sampled_from(["group", "residual"]),
        batch=st.integers(1, 3),
        heads=st.integers(1, 2),
        head_dim=st.sampled_from([1, 4, 7, 16]),
        dtype=st.sampled_from(DTYPES),
        seed=SEEDS,
    )
    def begin(self, key, value, flush, batch, heads, head_dim, dtype, seed):
        self.scheme = KVCacheScheme(key=key, value=value, options={"flush": flush})
        self.quantizer = KIVI(flush=flush)
        self.layer = QuantizedLayer(self.quantizer, self.scheme, 0, 0)
        self.shape, self.dtype = (heads, head_dim), dtype
        self.only_grew = True
        self.x = {kind: None for kind in ("key", "value")}
        self.append(0, seed, batch)

    def append(self, tokens, seed, batch=None):
        """Let new tokens in, and look at what attention is given."""
        rng, (heads, head_dim) = np.random.default_rng(seed), self.shape
        batch = batch or self.batch
        first = int(rng.integers(len(LANES)))
        shape = (batch, heads, tokens, head_dim)
        new = {
            kind: lanes(rng, shape, self.dtype, first + n)
            for n, kind in enumerate(self.scheme.parts)
        }
        past = self.read() if self.layer.is_initialized else None
        given = self.layer.update(new["key"], new["value"])
        for kind, seen in zip(self.scheme.parts, given, strict=True):
            whole = new[kind] if past is None else torch.cat((past[kind], new[kind]), dim=2)
            if isinstance(seen, Unread):  # what it pushed out of the window is codes already
                assert tokens == 1
                assert seen.shape == whole.shape
                assert torch.equal(seen[:, :, -1:], new[kind])
                whole = self.layer.stores[kind].read()
            assert torch.equal(seen, whole)
            old = self.x[kind]
            self.x[kind] = new[kind] if old is None else torch.cat((old, new[kind]), dim=2)

    def read(self):
        return {kind: store.read() for kind, store in self.layer.stores.items()}

    def evidence(self):
        return {
            kind: KVEvidence.of(scheme, self.x[kind], self.layer.stores[kind])
            for kind, scheme in self.scheme.parts.items()
        }

    @property
    def length(self):
        return self.x["key"].shape[2]

    @property
    def batch(self):
        return self.x["key"].shape[0]

    # What is done

    @rule(seed=SEEDS)
    def generate(self, seed):
        self.append(1, seed)

    @rule(tokens=st.integers(0, 17), seed=SEEDS)
    def prompt(self, tokens, seed):
        self.append(tokens, seed)

    @rule(tokens=st.integers(0, 12))
    def take_back(self, tokens):
        before = self.read()
        self.layer.crop(-tokens)
        stay = max(self.length - tokens, 0)
        self.x = {kind: x[:, :, :stay] for kind, x in self.x.items()}
        self.stays(before, lambda x: x[:, :, :stay])
        self.only_grew &= tokens == 0

    @rule(data=st.data())
    def reorder(self, data):
        """Beam search: as many as before, in any order, left out or repeated."""
        number = st.integers(0, self.batch - 1)
        beams = torch.tensor(data.draw(st.lists(number, min_size=self.batch, max_size=self.batch)))
        self.choose(self.layer.reorder_cache, beams, beams)

    @rule(data=st.data())
    def keep_some(self, data):
        some = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.choose(self.layer.batch_select_indices, torch.tensor(some), torch.tensor(some))

    @rule(repeats=st.integers(1, 2))
    @precondition(lambda self: self.batch <= 3)
    def repeat(self, repeats):
        chosen = torch.arange(self.batch).repeat_interleave(repeats)
        self.choose(self.layer.batch_repeat_interleave, repeats, chosen)

    def choose(self, call, argument, chosen):
        before = self.read()
        call(argument)
        self.x = {kind: x[chosen] for kind, x in self.x.items()}
        self.stays(before, lambda x: x[chosen])

    def stays(self, before, change):
        for kind, read in self.read().items():
            assert torch.equal(read, change(before[kind]))

    # What must be so

    @rule(shared=st.integers(1, 3), seed=SEEDS, loud=st.sampled_from([1.0, 64.0]))
    @precondition(lambda self: self.length)
    def attend(self, shared, seed, loud):
        """B7.d for what was quantized, B7.e for float32: PyTorch's attention on what is read."""
        heads, head_dim = self.shape
        rng = np.random.default_rng(seed)
        query = rng.normal(size=(self.batch, heads * shared, head_dim)) * loud
        query = torch.from_numpy(query.astype(np.float32))
        found, claim = self.evidence(), KVHalfStep()
        read = {kind: each.read.float() for kind, each in found.items()}
        got = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None], read["key"], read["value"], enable_gqa=True
        )[:, :, 0]
        exact, stored = (
            Attention.of(query, *(each[kind].double().numpy() for kind in ("key", "value")))
            for each in (self.x, read)
        )
        errors = {kind: np.repeat(claim.element(e), shared, axis=1) for kind, e in found.items()}
        logits = bounds.kv_logits(exact.query, errors["key"])
        own = [a + b for a, b in zip(exact.rounding, stored.rounding, strict=True)]
        moved = bounds.softmax(2 * logits.max(-1)) + own[0]
        allowed = bounds.kv_output(stored.weights, errors["value"], moved, exact.values)
        assert bounds.ratio(stored.output - exact.output, allowed + own[1]) <= 1
        _, rounded = bounds.kv_attention(
            stored.query, stored.keys, stored.values, stored.weights, rescalings=self.length
        )
        error = got.double().numpy() - stored.output
        assert bounds.ratio(error, rounded + stored.rounding[1]) <= 1
        assert bounds.ratio(error + stored.output - exact.output, allowed + own[1] + rounded) <= 1
        got = self.layer.attend(query).double().numpy()
        # What is read is rounded, and what the kernel makes of codes in its own way.
        off = [2 * np.repeat(decoding(each), shared, axis=1) for each in found.values()]
        _, rounded = bounds.kv_attention(
            stored.query,
            stored.keys,
            stored.values,
            stored.weights,
            (off[0], off[1]),
            rescalings=self.length,
        )
        assert bounds.ratio(got - stored.output, rounded + stored.rounding[1]) <= 1

    @invariant()
    @precondition(lambda self: hasattr(self, "layer"))
    def no_number_is_further_than_half_a_step(self):
        for each in self.evidence().values():
            error = each.read.double().numpy() - each.x.double().numpy()
            assert bounds.ratio(error, KVHalfStep().element(each)) <= 1

    @invariant()
    @precondition(lambda self: hasattr(self, "layer"))
    def kept_tokens_are_as_they_came(self):
        for each in self.evidence().values():
            kept = torch.ones(self.length, dtype=torch.bool)
            for block in each.blocks:
                kept[block.start : block.stop] = False
            assert torch.equal(each.read[:, :, kept], each.x[:, :, kept])

    @invariant()
    @precondition(lambda self: hasattr(self, "layer") and self.only_grew)
    def scales_and_windows_are_those_of_the_theorems(self):
        """But after a crop: of what was in a group before, nothing is known."""
        for each in self.evidence().values():
            for claim in self.quantizer.claims:
                if isinstance(claim, KVClaim):
                    assert claim.certify(each).holds

    @invariant()
    @precondition(lambda self: hasattr(self, "layer"))
    def lengths_and_bytes_are_as_said(self):
        assert self.layer.get_seq_length() == self.length
        assert self.layer.get_mask_sizes(5) == (self.length + 5, 0)
        memory = self.layer.memory()
        assert memory.nbytes == held_bytes(list(self.layer.stores.values()))
        assert memory.nbytes_16bit == 2 * sum(x.numel() for x in self.x.values())
        if self.only_grew and self.dtype != "float32":
            assert memory.nbytes == memory.promised


TestCaches = Caches.TestCase
TestCaches.settings = settings(stateful_step_count=20)
