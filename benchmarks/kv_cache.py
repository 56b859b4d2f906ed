"""What does a quantized KV cache cost, and what does it save? Writes the table of docs/kv_cache.md.

    python benchmarks/kv_cache.py

Every setting scores the demonstration's model with its weights as they are: through the cache, on
text in windows, some tokens at a time. With 8 bits it also writes on, greedily, from the beginnings
of windows. Bytes are those that the cache holds, counted buffer by buffer, in a 16-bit network of
the same shape.
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
from qframe.held import held_bytes
from qframe.kv_cache import CachedNetwork, QuantizedKVCache
from qframe.kv_scheme import KV_CHUNK

DOCUMENT = Path(__file__).parent.parent / "docs" / "kv_cache.md"
START, END = "<!-- kv-table:start -->", "<!-- kv-table:end -->"
WINDOW, PROMPT, WRITTEN, PROMPTS = 512, 64, 200, 6
LONG = 4096  # tokens whose bytes are counted, besides those of a window

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "KV8": {},
    "KV4": {},
    "KV4, keys per token": {"axis_key": "token"},
    "KV4, rotated": {"options": {"rotate": True}},
    "KV2": {},
    "KV2, keys per token": {"axis_key": "token"},
    "KV2, rotated": {"options": {"rotate": True}},
}
GREEDY = ("KV8",)  # of which greedy text is compared: with fewer bits it is another text soon


@dataclass(frozen=True)
class Found:
    """Of one setting: its score, and bytes over 16 bits after a window and after LONG tokens."""

    score: Score
    ratios: tuple[float, float]


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


def written(network: Any, prompts: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the tokens that the network writes on, greedily, [prompts, WRITTEN]."""
    tokens = network.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
    )
    return tokens[:, prompts.shape[1] :]


def agree(ours: torch.Tensor, full: torch.Tensor) -> int:
    """Return how many tokens are the same before the first that is not."""
    differ = (ours != full).nonzero()
    return int(differ[0]) if len(differ) else len(full)


def table(
    found: Mapping[str, Found], alike: Mapping[str, list[int]], full: Score, line: str
) -> str:
    lines = [
        START,
        f"| KV cache | bytes, {WINDOW} tokens | bytes, {LONG} tokens | perplexity | change "
        f"| KL mean | top-1 |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| 16 bits | 1 | 1 | {full.perplexity:.4f} | | | |",
    ]
    for name, each in found.items():
        score, (short, long) = each.score, each.ratios
        change = 100 * (score.perplexity / full.perplexity - 1)
        lines.append(
            f"| {name} | {short:.3f} | {long:.3f} | {score.perplexity:.4f} | {change:+.3f} % "
            f"| {score.kl_mean:.2e} | {100 * score.top1:.2f} % |"
        )
    lines += ["", f"SmolLM2-135M-Instruct, float32; {line}."]
    for name, same in alike.items():
        lines.append(
            f"Of {WRITTEN} tokens written greedily after {len(same)} prompts of {PROMPT}, {name} "
            f"has the first {', '.join(map(str, same))} as full precision has them."
        )
    return "\n".join([*lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=4, help="of evaluation text")
    parser.add_argument("--chunk", type=int, default=KV_CHUNK, help="tokens read at a time")
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), help="with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    given = parser.parse_args()
    folder = model_folder()
    windows, protocol = windows_of(folder, length=WINDOW, limit=given.windows)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    prompts = windows_of(folder, length=WINDOW, limit=PROMPTS)[0][:, :PROMPT]
    texts = written(network, prompts, DynamicCache(config=network.config))
    found: dict[str, Found] = {}
    alike: dict[str, list[int]] = {}
    full = None
    for name in given.only:
        scheme = scheme_of(name)
        start = partial(QuantizedKVCache, scheme)
        scores = evaluate({name: CachedNetwork(network, start, given.chunk)}, network, windows)
        full = scores[""]
        ratios = (ratio(scheme, network.config, WINDOW), ratio(scheme, network.config, LONG))
        found[name] = Found(scores[name], ratios)
        if name in GREEDY:
            ours = written(network, prompts, start())
            alike[name] = [agree(*pair) for pair in zip(ours, texts, strict=True)]
        print(name, found[name], alike.get(name), full.perplexity, flush=True)
    made = table(found, alike, full, f"{protocol.line()}, {given.chunk} tokens read at a time")
    if given.dry_run:
        print(made)
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    fresh = re.sub(f"{START}.*{END}", lambda _: made, text, flags=re.DOTALL)
    DOCUMENT.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
