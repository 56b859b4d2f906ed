"""Attention of one new token as one call of a kernel, in networks of transformers that do as Llama.

A network that writes token by token turns queries and keys, puts what is new into the cache,
attends, and changes shapes back and forth: some forty operations of PyTorch, of which each takes
longer to begin than to end. `attention_rotary` is all of them but for the cache.

Which modules it can stand for is found out twice. Their `forward` must be, instruction by
instruction, one that is known; and the first answer of each is held against the operation's
theorems (`qframe.kernel_judges`), for what `forward` calls by name, and what its layers do, may
still be something else. Whatever is not one new token after others goes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from qframe.contracts import Kernel, OpCall
from qframe.dispatch import Dispatch
from qframe.errors import UnsupportedError
from qframe.growing_cache import GrowingLayer
from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS
from qframe.kv_attention import NAME

_KNOWN = (LlamaAttention, MistralAttention, Qwen2Attention)
_OPERANDS = ("q", "k", "v", "cos", "sin", "keys", "values")
_ATTENTIONS = ("sdpa", NAME)  # of transformers; one that was chosen otherwise is left alone
_IDLE = frozenset({"position_ids", "cache_position", "use_cache", "sliding_window"})  # read by none


class NewestToken:
    """The `forward` of an attention module: a kernel's for one new token, else the usual one.

    stands   whether the kernel may stand for the module; None until there was a token to try
    """

    def __init__(self, module: nn.Module, kernel: Kernel) -> None:
        self._module, self._kernel = module, kernel
        self.stands: bool | None = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (the output [batch, tokens, columns], None), as transformers' attention does."""
        module: Any = self._module
        usual: dict[str, Any] = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **others,
        }
        layer = None
        if self.stands is not False and attention_mask is None and hidden_states.shape[1] == 1:
            layer = self._past(hidden_states, position_embeddings, past_key_values, others)
        if layer is None or position_embeddings is None:
            found: tuple[torch.Tensor, torch.Tensor | None]
            found = type(module).forward(module, hidden_states, **usual)
            return found
        operands = self._operands(hidden_states, position_embeddings, layer)
        if self.stands is None:
            with _seen(module.o_proj) as given:
                found = type(module).forward(module, hidden_states, **usual)
            self.stands = _keeps(operands, module.scaling, given, layer)
            return found
        out, key = self._kernel(*operands, module.scaling)
        past_key_values.update(key[:, :, None], operands[2][:, :, None], module.layer_idx)
        return module.o_proj(out.reshape(len(out), 1, -1)), None

    def _past(self, x: torch.Tensor, angles: Any, cache: Any, others: dict[str, Any]) -> Any:
        """Return the layer of the cache that has the tokens before, where a kernel can read it."""
        module: Any = self._module
        if cache is None or angles is None or x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        learns = x.requires_grad and torch.is_grad_enabled()
        asked = {name for name, value in others.items() if value is not None and value is not False}
        chosen = module.config._attn_implementation
        if learns or asked - _IDLE or module.training or chosen not in _ATTENTIONS:
            return None
        layers, number = getattr(cache, "layers", ()), module.layer_idx
        layer: Any = layers[number] if number < len(layers) else None
        if type(layer) not in (DynamicLayer, GrowingLayer) or not layer.is_initialized:
            return None
        keys = layer.keys
        fits = keys.ndim == 4 and len(keys) == len(x) and angles[0].dtype == torch.float32
        fits &= angles[0].shape[-1] == module.head_dim  # not a part of each head is turned
        return layer if fits and keys.dtype == torch.float32 and keys.device == x.device else None

    def _operands(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], layer: Any
    ) -> tuple[torch.Tensor, ...]:
        """Return what `attention_rotary` takes, but for the scaling."""
        module: Any = self._module
        shape = len(x), -1, module.head_dim
        newest = [each(x).view(shape) for each in (module.q_proj, module.k_proj, module.v_proj)]
        cos, sin = (each[:, 0] for each in angles)
        if len(cos) != len(x):
            cos, sin = (each.expand(len(x), -1) for each in (cos, sin))
        return *newest, cos, sin, layer.keys, layer.values


class _seen:  # noqa: N801 - a context manager, used as a function
    """What a module is given while the context lasts."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._given = module, list[torch.Tensor]()

    def __enter__(self) -> list[torch.Tensor]:
        self._hook = self._module.register_forward_pre_hook(
            lambda _, given: self._given.append(given[0])
        )
        return self._given

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def _keeps(
    operands: tuple[torch.Tensor, ...], scaling: float, given: list[torch.Tensor], layer: Any
) -> bool:
    """Return whether the usual answer is one to `attention_rotary`, by the operation's theorems.

    given   what went into the output projection
    layer   of the cache, with the newest token
    """
    q, key = operands[0], layer.keys[:, :, -1]
    if len(given) != 1 or given[0].numel() != q.numel():
        return False
    numbers = {n: each.detach().numpy() for n, each in zip(_OPERANDS, operands, strict=True)}
    answer = tuple(np.asarray(each.detach()) for each in (given[0].reshape(q.shape), key))
    arithmetic = ARITHMETICS["float32"]
    judged = judge("attention_rotary", {**numbers, "scaling": scaling}, answer, arithmetic)
    return all(comparison.ratio <= 1 for comparison in judged.values())


def fuse_attention(network: nn.Module, dispatch: Dispatch) -> nn.Module:
    """Let attention modules of a network be computed by a kernel, in place, and return it."""
    for module in _attentions(network):
        config: Any = module.config
        heads = config.num_attention_heads, config.num_key_value_heads
        shape = (1, *heads, 1, int(module.head_dim))  # type: ignore[arg-type]
        call = OpCall("attention_rotary", device="cpu", dtype="float32", scheme=None, shape=shape)
        try:
            module.forward = NewestToken(module, dispatch.choose(call))
        except UnsupportedError:  # a backend need not have it
            break
    return network


def _attentions(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose `forward` is one of those that are known."""
    known = [_instructions(each) for each in _KNOWN]
    for module in network.modules():
        if "forward" not in vars(module) and _instructions(type(module)) in known:
            yield module


def _instructions(kind: type[Any]) -> tuple[Any, ...] | None:
    """Return what the `forward` of a class does and what it names; None where that is hidden."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or code.co_freevars:
        return None
    constants = [each for each in code.co_consts if not isinstance(each, str)]
    return code.co_code, code.co_names, code.co_varnames, tuple(map(repr, constants))
