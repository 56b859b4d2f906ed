"""How fast networks read a prompt and write tokens, beside one another in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qframe.errors import RecipeError
from qframe.held import held_bytes
from qframe.model import replace_module
from qframe.stored import QuantizedLinear
from qframe.timing import speedup


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a network takes.

    prefill         seconds of reading the prompt, one for each round
    decode          seconds of writing all new tokens, one for each round
    prompt_tokens   of the prompt
    new_tokens      that are written, one after the other
    nbytes          bytes of its weights and of what kernels made of them
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    nbytes: int

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt in a second, in the median round."""
        return self.prompt_tokens / float(np.median(self.prefill))

    @property
    def decode_speed(self) -> float:
        """New tokens in a second, in the median round."""
        return self.new_tokens / float(np.median(self.decode))

    def over(self, base: Speed) -> tuple[float, float]:
        """Return how many times as fast as another it reads, and writes: medians of ratios."""
        return speedup(self.prefill, base.prefill), speedup(self.decode, base.decode)


def measure(
    networks: Mapping[str, nn.Module],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    seed: int = 0,
    caches: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Speed]:
    """Return the speed of each network. They take turns in every round.

    networks   of transformers: they take `past_key_values` and return `logits`. What they read
               and write are the same tokens for all, drawn from `seed`: speed does not depend on
               them, but for networks that choose among experts
    caches     name of a network -> what returns an empty cache for it; the others have
               transformers' own

    Raises RecipeError for numbers below 1.
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("new_tokens", new_tokens),
        ("rounds", rounds),
    ):
        if value < 1:
            raise RecipeError(f"{name} must be at least 1, got {value}")
    rng = np.random.default_rng(seed)
    known = min(int(getattr(each, "config").vocab_size) for each in networks.values())  # noqa: B009
    tokens = torch.from_numpy(rng.integers(0, known, (1, prompt_tokens + new_tokens)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, network in networks.items():
                start = (caches or {}).get(name)
                cache = None if start is None else start()
                took = once(network, tokens, prompt_tokens, cache)
                if number:  # in the first round kernels are compiled and pages are fetched
                    times[name].append(took)
    return {
        name: Speed(
            prefill=tuple(read for read, _ in found),
            decode=tuple(wrote for _, wrote in found),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            nbytes=held_bytes(networks[name]),
        )
        for name, found in times.items()
    }


def once(
    network: nn.Module, tokens: torch.Tensor, prompt: int, cache: Any = None
) -> tuple[float, float]:
    """Return the seconds of reading a prompt, and of one token after another.

    tokens   [1, all] int64, of which `prompt` are read at once
    cache    an empty one; None: transformers' own
    """
    start = time.perf_counter()
    first = tokens[:, :prompt]
    made = network(first, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache = made.past_key_values
    between = time.perf_counter()
    for place in range(prompt, tokens.shape[1]):
        network(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
    return between - start, time.perf_counter() - between


def unquantized(network: nn.Module) -> nn.Module:
    """Return a network, changed in place, with ordinary linear layers of the same weights.

    They multiply with inputs as they are: what it takes is what full precision takes.
    """
    found = [(n, m) for n, m in network.named_modules() if isinstance(m, QuantizedLinear)]
    for name, module in found:
        linear = nn.Linear(module.in_features, module.out_features, device="meta")
        stored = module.stored
        linear.weight = nn.Parameter(stored.plain(stored.weight()), requires_grad=False)
        bias = module.bias
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        network = replace_module(network, name, linear)
    return network.eval()
