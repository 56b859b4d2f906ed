"""What does a quantized KV cache cost, and what does it save? Writes the table of docs/kv_cache.md.

    python benchmarks/kv_cache.py

Every setting scores the demonstration's model with its weights as they are: through the cache, on
text in windows, some tokens at a time. Then it writes on, greedily, from the beginnings of the same
text. Bytes are those that the cache holds, counted buffer by buffer, for a 16-bit network of the
same shape.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from qframe.embedded import model_folder
from qframe.evaluation import Score, evaluate, windows_of
from qframe.kv_cache import CachedNetwork, QuantizedKVCache
from qframe.kv_scheme import KV_CHUNK
from qframe_conformance.held import held_bytes

DOCUMENT = Path(__file__).parent.parent / "docs" / "kv_cache.md"
START, END = "<!-- kv-table:start -->", "<!-- kv-table:end -->"
WINDOW, PROMPT, WRITTEN, PROMPTS = 512, 64, 200, 4
LONG = 4096  # tokens whose bytes are counted, besides those of a window

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "KV8": {},
    "KV4": {},
    "KV4, keys per token": {"axis_key": "token"},
    "KV4, 4 sinks": {"sink_tokens": 4},
    "KV4, rotated": {"options": {"rotate": True}},
    "KV2": {},
    "KV2, keys per token": {"axis_key": "token"},
    "KV2, 32 tokens kept": {"residual_length": 32},
    "KV2, rotated": {"options": {"rotate": True}},
}


@dataclass(frozen=True)
class Found:
    """Of one setting: its score, bytes over 16 bits after a window and after LONG, tokens alike."""

    score: Score
    ratios: tuple[float, float]
    alike: list[int]


def scheme_of(name: str) -> dict[str, Any]:
    return {"preset": name.partition(",")[0], **SETTINGS[name]}


def ratio(scheme: Mapping[str, Any], config: Any, tokens: int) -> float:
    """Return the bytes that a filled cache holds over those of the same tokens in bfloat16."""
    cache = QuantizedKVCache(scheme)
    width = config.hidden_size // config.num_attention_heads
    x = torch.randn(1, config.num_key_value_heads, tokens, width).to(torch.bfloat16)
    for layer in range(config.num_hidden_layers):
        cache.update(x, x, layer)
    memory = cache.memory()
    held = sum(held_bytes(store) for each in cache.layers for store in each.stores.values())
    if not held == memory.nbytes == memory.promised:
        raise SystemExit(f"{scheme}: {held} bytes are held, {memory} is said")
    return held / memory.nbytes_16bit


def written(network: Any, prompt: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the tokens that the network writes on, greedily."""
    given = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    mask = torch.ones_like(prompt)
    tokens = network.generate(prompt, attention_mask=mask, past_key_values=cache, **given)
    return tokens[0, prompt.shape[1] :]


def agree(ours: torch.Tensor, full: torch.Tensor) -> int:
    """Return how many tokens are the same before the first that is not."""
    differ = (ours != full).nonzero()
    return int(differ[0]) if len(differ) else len(full)


def table(found: Mapping[str, Found], full: Score, line: str) -> str:
    lines = [
        START,
        f"| KV cache | bytes, {WINDOW} tokens | bytes, {LONG} tokens | perplexity | change "
        f"| KL mean | top-1 | greedy tokens alike, of {WRITTEN} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        f"| 16 bits | 1 | 1 | {full.perplexity:.4f} | | | | |",
    ]
    for name, each in found.items():
        score, (short, long) = each.score, each.ratios
        change = 100 * (score.perplexity / full.perplexity - 1)
        lines.append(
            f"| {name} | {short:.3f} | {long:.3f} | {score.perplexity:.4f} | {change:+.3f} % "
            f"| {score.kl_mean:.2e} | {100 * score.top1:.2f} % "
            f"| {', '.join(map(str, each.alike))} |"
        )
    return "\n".join([*lines, "", f"SmolLM2-135M-Instruct, float32; {line}.", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help="of evaluation text")
    parser.add_argument("--chunk", type=int, default=KV_CHUNK, help="tokens read at a time")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    folder = model_folder()
    windows, protocol = windows_of(folder, length=WINDOW, limit=given.windows)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    prompts = windows[:PROMPTS, None, :PROMPT]
    texts = [written(network, p, DynamicCache(config=network.config)) for p in prompts]
    found: dict[str, Found] = {}
    full = None
    for name in SETTINGS:
        scheme = scheme_of(name)
        start = partial(QuantizedKVCache, scheme)
        scores = evaluate({name: CachedNetwork(network, start, given.chunk)}, network, windows)
        full = scores[""]
        ratios = (ratio(scheme, network.config, WINDOW), ratio(scheme, network.config, LONG))
        alike = [
            agree(written(network, p, start()), t) for p, t in zip(prompts, texts, strict=True)
        ]
        found[name] = Found(scores[name], ratios, alike)
        print(name, found[name], full.perplexity, flush=True)
    line = f"{protocol.line()}, {given.chunk} tokens read at a time; {len(prompts)} prompts of "
    made = table(found, full, f"{line}{PROMPT} tokens")
    if given.dry_run:
        print(made)
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    fresh = re.sub(f"{START}.*{END}", lambda _: made, text, flags=re.DOTALL)
    DOCUMENT.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
