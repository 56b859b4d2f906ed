"""Text from a network, token by token.

The loop is that of transformers' `generate`; here are the prompt, the seed and the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer, TextStreamer

from qframe.errors import ModelError, RecipeError
from qframe.growing_cache import growing_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came out.

    prompt_tokens   read before the first token
    tokens          the new ones
    text            what they stand for
    prefill         seconds until the first new token
    decode          seconds of all others
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    prefill: float
    decode: float

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt that were read in a second."""
        return self.prompt_tokens / self.prefill

    @property
    def decode_speed(self) -> float:
        """New tokens in a second, after the first; 0 if there is no other."""
        return (len(self.tokens) - 1) / self.decode if len(self.tokens) > 1 else 0.0


def generate(
    network: nn.Module,
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    cache: Any = None,
    show: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt.

    network       of transformers, such as `qframe.load` returns
    folder        where its tokenizer is
    temperature   0 takes the likeliest token each time; else tokens are drawn, from `seed` alone
    chat          the prompt is a message to an assistant, put into the tokenizer's template
    cache         an empty cache, such as `QuantizedKVCache`; None: a `GrowingKVCache`, or what the
                  network makes itself where its cache is of another kind
    show          is given the text piece by piece, as it comes

    Raises ModelError where there is no tokenizer, RecipeError for settings that make no sense.
    """
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise RecipeError(f"temperature must not be negative, got {temperature}")
    tokenizer = _tokenizer(folder)
    tokens = _tokens_of(tokenizer, folder, prompt, chat=chat)
    watch = _Watch(tokenizer, show)
    # Without top_k and top_p, which have defaults, tokens are drawn from all.
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=_end_tokens(network, folder, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        **(drawn if temperature else {"do_sample": False}),
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        watch.start()
        made = network.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            past_key_values=growing_cache(network) if cache is None else cache,
            streamer=watch,
        )
    new = tuple(made[0, tokens.shape[1] :].tolist())
    return Generated(
        prompt_tokens=tokens.shape[1],
        tokens=new,
        text=tokenizer.decode(new, skip_special_tokens=True),
        prefill=watch.first - watch.began,
        decode=watch.last - watch.first,
    )


def _tokenizer(folder: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from None


def _tokens_of(tokenizer: Any, folder: str | Path, prompt: str, *, chat: bool) -> torch.Tensor:
    """Return the prompt's tokens, [1, count] int64."""
    if chat:
        if not tokenizer.chat_template:
            raise RecipeError(f"{folder}: its tokenizer has no chat template; leave out --chat")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not tokens.numel():
        raise RecipeError("the prompt is empty: give some text to go on from")
    return torch.as_tensor(tokens)


def _end_tokens(network: Any, folder: str | Path, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: of config.json, generation_config.json, the tokenizer."""
    settings = [network.generation_config]
    if (Path(folder) / "generation_config.json").is_file():
        settings.append(GenerationConfig.from_pretrained(folder, local_files_only=True))
    found: set[int] = set()
    for ends in (*(each.eos_token_id for each in settings), tokenizer.eos_token_id):
        found.update(ends if isinstance(ends, list) else [ends] if ends is not None else [])
    return sorted(found)


class _Watch(BaseStreamer):  # type: ignore[misc]
    """Takes the time of every token, and hands text on as soon as it is whole.

    began, first, last   when it started, when the first new token came, and the last
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None] | None) -> None:
        self._text = None if show is None else _Text(tokenizer, show)
        self._prompt = True
        self.began = self.first = self.last = 0.0

    def start(self) -> None:
        """Begin to count."""
        self.began = self.first = self.last = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt at first, then a token at a time."""
        if not self._prompt:
            self.last = time.perf_counter()
            if self.first == self.began:
                self.first = self.last
        self._prompt = False
        if self._text is not None:
            self._text.put(value)

    def end(self) -> None:
        """Hand on what is left."""
        if self._text is not None:
            self._text.end()


class _Text(TextStreamer):  # type: ignore[misc]
    """Hands on text as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece."""
        self._show(text)
