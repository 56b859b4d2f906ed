"""A KV cache for transformers that has room for tokens to come.

    model.generate(**inputs, past_key_values=GrowingKVCache(model.config))

transformers' own cache copies all keys and values of a layer for every token that it takes in. This
one copies them when its memory is full, which then grows by a quarter. Numbers are as they come:
what attends to them sees the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST = 64  # tokens for which there is more room than is needed
_SHARE = 4  # and this part of those that are there


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, each at the start of memory for more tokens.

    `keys` and `values` are views, [batch, heads, tokens, head_dim]. What was returned before stays
    as it was, until tokens are taken away by `crop` and others come in their place.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in [batch, heads, tokens, head_dim] each, return the past and these."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # What is written over has no gradient.
            both: tuple[torch.Tensor, torch.Tensor]
            both = super().update(key_states, value_states, *args, **kwargs)
            return both
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._grown("keys", self.keys, key_states)
        self.values = self._grown("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens, and give their memory back."""
        self._rooms = {}
        super().reset()

    def _grown(self, kind: str, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return `held` and, after it, `new`, in memory that has room for more."""
        length = held.shape[2] if held.numel() else 0
        total = length + new.shape[2]
        room = self._rooms.get(kind)
        if room is None or total > room.shape[2] or not _starts(room, held, new):
            batch, heads, _, width = new.shape
            space = total + max(_LEAST, total // _SHARE)
            wide = torch.promote_types(held.dtype, new.dtype)
            room = new.new_empty(batch, heads, space, width, dtype=wide)
            self._rooms[kind] = room
            if length:
                room[:, :, :length] = held
        room[:, :, length:total] = new
        return room[:, :, :total]


def _starts(room: torch.Tensor, held: torch.Tensor, new: torch.Tensor) -> bool:
    """Return whether `held` lies where `room` starts, and room may be written to.

    It does not after sequences were chosen or repeated; and what was made in inference mode must
    not be changed outside it.
    """
    return (
        (not held.numel() or held.data_ptr() == room.data_ptr())
        and room.shape[:2] == new.shape[:2]
        and torch.promote_types(room.dtype, new.dtype) == room.dtype
        and torch.is_inference_mode_enabled() >= room.is_inference()
    )


class GrowingKVCache(DynamicCache):  # type: ignore[misc]
    """A cache that `generate(past_key_values=...)` and `forward` of transformers take.

    config   of the network: its layers with sliding windows keep those of transformers; None: all
             layers see all tokens
    """

    layers: list[Any]
    layer_class_to_replicate: type[Any] | None

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer


def growing_cache(network: nn.Module) -> GrowingKVCache | None:
    """Return an empty cache for a network; None for one whose cache is of another kind."""
    usual = getattr(network, "_supports_default_dynamic_cache", None)
    config = getattr(network, "config", None)
    if usual is None or not usual() or getattr(config, "is_encoder_decoder", True):
        return None
    return GrowingKVCache(config)
