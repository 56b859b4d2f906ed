"""A tiny Llama as a Hugging Face folder: two layers, hidden size 64, a tokenizer of bytes.

Nothing is downloaded and transformers is not imported to write it. The tests get it through the
fixture `tiny_llama` in conftest.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""Linear layer of a block -> (rows, columns)."""

LINEAR_LAYERS = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in SHAPES]


def llama_config(*, tied: bool, vocab_size: int, layers: int = LAYERS) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def llama_weights(
    *, tied: bool, vocab_size: int, seed: int = 0, layers: int = LAYERS
) -> dict[str, torch.Tensor]:
    """Random weights under the names that they have in a folder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights = {"model.embed_tokens.weight": normal(vocab_size, HIDDEN) * 8}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        weights |= {f"{prefix}.{name}.weight": normal(*shape) for name, shape in SHAPES.items()}
        weights[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN)
        weights[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    if not tied:
        weights["lm_head.weight"] = normal(vocab_size, HIDDEN)
    return weights


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, so that it needs no training."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_llama(
    folder: Path, *, tied: bool = True, shards: int = 1, seed: int = 0, layers: int = LAYERS
) -> Path:
    """Write the folder; `shards` files of weights, with an index when there are several."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "config.json": llama_config(tied=tied, vocab_size=size, layers=layers),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "generation_config.json": {"eos_token_id": 0},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    weights = llama_weights(tied=tied, vocab_size=size, seed=seed, layers=layers)
    save_weights(folder, weights, shards=shards)
    return folder


def save_weights(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1) -> None:
    """Write (or replace) the weights of a folder."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
