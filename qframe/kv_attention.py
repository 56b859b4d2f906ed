"""Attention of a transformers network over a quantized KV cache: on the codes, where that can be.

What a cache returns for one new token are keys and values that nobody has read yet, `Unread`. The
attention that is registered here as "qframe" lets the cache's quantizer attend to its codes
(`KVAttention`). Whatever else looks at such a tensor, another attention among them, reads it first
and sees what it always saw. So does this one where it is asked for more than a softmax over all
tokens: with a mask, as padding and sliding windows have, with dropout, or another scaling.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qframe.contracts import KVStore
from qframe.errors import ModelError

NAME = "qframe"
_DEFAULT = "sdpa"  # of transformers; an attention that was chosen otherwise is left alone

log = logging.getLogger(__name__)

_SHAPE = (  # what is known of a tensor without its numbers
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
)


class Stores(Protocol):
    """Keys and values of a layer, and who attends to them."""

    stores: Mapping[str, KVStore]

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Return the output for a query [batch, query heads, head_dim] float32, as float32."""
        ...


class Unread(torch.Tensor):
    """Keys or values [batch, heads, tokens, head_dim] that are read when something looks at them.

    layer   whose they are
    kind    "key" or "value"

    They must be used before the layer gets other tokens: later, ModelError is raised.
    """

    layer: Stores
    kind: str

    @classmethod
    def of(cls, layer: Stores, kind: str, newest: torch.Tensor) -> Self:
        """Return what is in a store; newest went in last: it has the shape, dtype and device."""
        batch, heads, _, width = newest.shape
        shape = (batch, heads, layer.stores[kind].length, width)
        made = newest.new_empty(1).expand(shape).as_subclass(cls)
        made.layer, made.kind = layer, kind
        return made

    def read(self) -> torch.Tensor:
        """Return the numbers, as an ordinary tensor. Raises ModelError where they are old."""
        return self.store().read().to(self.device)

    def store(self) -> KVStore:
        """Return where they are. Raises ModelError where other tokens have come since."""
        store, tokens = self.layer.stores[self.kind], self.shape[2]
        if store.length != tokens:
            raise ModelError(
                f"the {self.kind}s of {tokens} tokens are read when the cache has {store.length}; "
                f"a network must use what a cache returns before it goes on"
            )
        return store

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Read what is looked at."""
        if func not in _SHAPE:
            args, kwargs = tree_map(_read, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _read(one: Any) -> Any:
    return one.read() if isinstance(one, Unread) else one


def _together(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether these are all keys and values of one layer. Raises ModelError as `read`."""
    if not isinstance(key, Unread) or not isinstance(value, Unread) or key.layer is not value.layer:
        return False
    stores = key.layer.stores
    return key.store() is stores["key"] and value.store() is stores["value"]


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' "sdpa" does, and to codes where nobody has read them."""
    width = query.shape[3]
    plain = (
        attention_mask is None
        and not dropout
        and (scaling is None or math.isclose(scaling, 1 / math.sqrt(width)))
        and all(others.get(name) is None for name in ("softcap", "position_bias", "cache"))
    )
    if plain and query.shape[2] == 1 and _together(key, value):
        found = key.layer.attend(query[:, :, 0].float())  # type: ignore[attr-defined]
        return found.to(query.dtype)[:, None], None
    made: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
        module,
        query,
        _read(key),
        _read(value),
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        **others,
    )
    return made


def attend_to_codes(network: nn.Module) -> bool:
    """Let a network of transformers use this attention; return whether it does.

    It does not where another one than the default was chosen, or the network has one of its own.
    """
    config = getattr(network, "config", None)
    choose = getattr(network, "set_attn_implementation", None)
    if choose is None or getattr(config, "_attn_implementation", None) != _DEFAULT:
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    choose(NAME)
    done = getattr(config, "_attn_implementation", None) == NAME
    if not done:
        log.info("attention is computed by %s itself", type(network).__name__)
    return done
