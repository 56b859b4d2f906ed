"""A KV cache for transformers that stores keys and values as a quantizer of the host does.

    cache = QuantizedKVCache("KV4")
    model.generate(**inputs, past_key_values=cache)

New tokens are attended to as they came, and past ones as the store gives them back: in a prompt all
tokens see each other in full precision, as in KIVI, and what is generated sees the prompt as codes.

A quantizer that attends to codes (`FusedAttention`) does so for every token that comes alone, if
the network's attention is that of `qframe.kv_attention`. Such a token is put into the store first,
and what becomes codes by that is attended to as codes at once.

A cache is told nothing of the attention mask. Padding is stored like any token, counts into the
range of its group where tokens share one, and takes the places of sinks when it stands on the left.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from qframe.claims import ExactWindow, FusedAttention
from qframe.contracts import KVAttention, KVCacheQuantizer, KVStore
from qframe.errors import NonFiniteError, RecipeError
from qframe.host import Host
from qframe.kv_attention import Unread
from qframe.kv_scheme import KV_CHUNK, KVCacheScheme
from qframe.manifest import parse_manifest
from qframe.recipe import kv_quantizer
from qframe.weights import ModelFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class KVMemory:
    """What a cache takes.

    tokens        of each sequence
    nbytes        bytes that are held: codes, scales, offsets, and the kept tokens as they came
    promised      what the quantizer promises where the network's numbers have 16 bits: the same but
                  after crops, and in a float32 network, where a kept token takes twice as much
    nbytes_16bit  bytes of the same tokens in 16 bits a number
    """

    tokens: int
    nbytes: int
    promised: int
    nbytes_16bit: int

    @property
    def ratio(self) -> float:
        """`promised` over the bytes of a 16-bit cache; 1 for an empty one."""
        return self.promised / self.nbytes_16bit if self.nbytes_16bit else 1.0


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, in a store each."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self, quantizer: KVCacheQuantizer, scheme: KVCacheScheme, number: int, seed: int
    ) -> None:
        super().__init__()
        self._quantizer, self._scheme = quantizer, scheme
        self._number, self._seed = number, seed
        claims = getattr(quantizer, "claims", ())
        self._attends = any(isinstance(each, FusedAttention) for each in claims) and any(
            isinstance(each, ExactWindow) and all(map(each.kept, scheme.parts.values()))
            for each in claims  # so the newest token stays as it came
        )
        self.stores: dict[str, KVStore] = {}
        self._shapes: dict[str, tuple[int, int]] = {}  # kind -> heads and head_dim
        self.batch = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start the stores; transformers asks for this before the first tokens."""
        states = {"key": key_states, "value": value_states}
        for place, (kind, scheme) in enumerate(self._scheme.parts.items()):
            rng = np.random.default_rng([self._seed, self._number, place])
            self.stores[kind] = self._quantizer.start(kind, scheme, rng)
            self._shapes[kind] = (states[kind].shape[1], states[kind].shape[3])
        self.batch = key_states.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in [batch, heads, tokens, head_dim] each, return the past and these.

        Raises NonFiniteError that names the layer; the cache is of no use then.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given = {"key": key_states, "value": value_states}
        if self._attends and key_states.shape[2] == 1:
            for kind, states in given.items():
                self._append(kind, states)
            return Unread.of(self, "key", key_states), Unread.of(self, "value", value_states)
        keys, values = (self._with_past(kind, states) for kind, states in given.items())
        for kind, states in given.items():
            self._append(kind, states)
        return keys, values

    def _with_past(self, kind: str, states: torch.Tensor) -> torch.Tensor:
        store = self.stores[kind]
        if not store.length:
            return states
        return torch.cat((store.read().to(states.device), states), dim=2)

    def _append(self, kind: str, states: torch.Tensor) -> None:
        try:
            self.stores[kind].append(states.detach().cpu().contiguous())
        except NonFiniteError as error:
            message = f"KV cache, layer {self._number}, {kind}: {error}"
            raise NonFiniteError(message) from error

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Return what the newest token attends to, from codes: `KVAttention.attend`."""
        quantizer = cast(KVAttention, self._quantizer)
        found = quantizer.attend(query.cpu(), self.stores["key"], self.stores["value"])
        return found.to(query.device)

    def get_seq_length(self) -> int:
        """Return the tokens of each sequence."""
        return self.stores["key"].length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens the next update returns, and the first of them."""
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self) -> int:
        """Return -1: there is no most."""
        return -1

    get_max_cache_shape = get_max_length  # what older versions of transformers call it

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; a positive number is how many stay.

        Older versions of transformers say it in the second way, newer ones in the first.
        """
        length = self.get_seq_length()
        stay = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if stay < length:
            for store in self.stores.values():
                store.crop(max(stay, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each sequence go on from that of its index, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of these indices, in their order."""
        if not self.is_initialized:
            return
        chosen = torch.arange(self.batch)[indices.cpu()]  # a mask of bool is taken as well
        for store in self.stores.values():
            store.select(chosen)
        self.batch = len(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence so many times, beside one another."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, also the shape."""
        self.stores, self.is_initialized = {}, False

    def offload(self) -> None:
        """Do nothing: stores are in main memory."""

    def prefetch(self) -> None:
        """Do nothing: what is read is moved to where it is needed."""

    def memory(self) -> KVMemory:
        """Return what the layer takes."""
        tokens, promised, whole = self.get_seq_length(), 0, 0
        for kind in self.stores:
            heads, head_dim = self._shapes[kind]
            shape = (self.batch, heads, tokens, head_dim)
            promised += self._quantizer.nbytes(self._scheme.parts[kind], shape, 2)
            whole += 2 * math.prod(shape)
        held = sum(store.nbytes for store in self.stores.values())
        return KVMemory(tokens=tokens, nbytes=held, promised=promised, nbytes_16bit=whole)


class QuantizedKVCache(Cache):  # type: ignore[misc]
    """A cache that `generate(past_key_values=...)` and `forward` of transformers take.

    scheme   a KVCacheScheme, its fields, or the name of a preset: "KV8", "KV4", "KV2"
    host     where the quantizer comes from; default: all installed plugins
    seed     of a quantizer's random choices

    Layers are those of full attention: a network with sliding windows gives the same tokens, and
    the cache keeps what its windows would drop. Raises as `kv_quantizer` does.
    """

    def __init__(
        self,
        scheme: KVCacheScheme | Mapping[str, Any] | str = "KV4",
        *,
        host: Host | None = None,
        seed: int = 0,
    ) -> None:
        self.scheme = as_kv_scheme(scheme)
        self.quantizer = kv_quantizer(self.scheme, host or Host.discover())
        self.seed = seed
        super().__init__(layer_class_to_replicate=self._layer)

    @classmethod
    def of_folder(cls, folder: str | Path, *, host: Host | None = None) -> Self:
        """Return an empty cache with the scheme that the folder was quantized with.

        Raises RecipeError when its recipe has none, VerifyError when it is no qframe folder.
        """
        recipe = parse_manifest(ModelFolder(folder)).recipe
        if recipe.kv_cache_scheme is None:
            raise RecipeError(
                f"{folder}: its recipe has no kv_cache_scheme; give one, e.g. "
                f"QuantizedKVCache('KV4')"
            )
        return cls(recipe.kv_cache_scheme, host=host, seed=recipe.seed)

    def _layer(self) -> QuantizedLayer:
        return QuantizedLayer(self.quantizer, self.scheme, len(self.layers), self.seed)

    def memory(self) -> KVMemory:
        """Return what all layers take together."""
        each = [layer.memory() for layer in self.layers]
        return KVMemory(
            tokens=max((one.tokens for one in each), default=0),
            nbytes=sum(one.nbytes for one in each),
            promised=sum(one.promised for one in each),
            nbytes_16bit=sum(one.nbytes_16bit for one in each),
        )


def as_kv_scheme(scheme: KVCacheScheme | Mapping[str, Any] | str) -> KVCacheScheme:
    """Return the scheme that fields or a preset's name stand for. Raises RecipeError."""
    if isinstance(scheme, KVCacheScheme):
        return scheme
    given = {"preset": scheme} if isinstance(scheme, str) else scheme
    return KVCacheScheme.parse(given, "kv_cache_scheme")


class CachedNetwork(nn.Module):
    """A network that reads a window through a cache, so that every token sees a quantized past.

    network   of transformers: it takes `past_key_values` and returns `logits`
    start     returns an empty cache
    chunk     tokens that it reads at a time. Those of a chunk see each other as they came: with 1
              each is scored as it would be generated, with more the newest up to `chunk` are exact

    memory    what the cache took at the end of the last window; None before the first
    """

    def __init__(
        self, network: nn.Module, start: Callable[[], QuantizedKVCache], chunk: int = KV_CHUNK
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise RecipeError(f"chunk must be at least 1, got {chunk}")
        self.network, self._start, self._chunk = network, start, chunk
        self.memory: KVMemory | None = None
        self._lock = threading.Lock()

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Return the logits of tokens [batch, length], [batch, length, vocabulary]."""
        cache = self._start()
        found = [
            self.network(part, past_key_values=cache, use_cache=True).logits
            for part in window.split(self._chunk, dim=1)
        ]
        with self._lock:
            self.memory = cache.memory()
        return torch.cat(found, dim=1)
