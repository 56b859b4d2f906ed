"""The embedded model's GGUF file as an ordinary Hugging Face folder in float32.

`gguf` reads and dequantizes, `safetensors` writes; here is the mapping of one architecture, Llama
as in SmolLM2: names, the order of rows, config and tokenizer. The same file gives the same bytes
on every machine.

Source: llama.cpp's `convert_hf_to_gguf.py` for the names and for the order of the rows of q_proj
and k_proj, ggml's `block_q4_1` and `block_q8_0` for the weights.
Error:  none: d * q is exact in float32 (11 bits times at most 8), d * q + m is rounded once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_folder(gguf_file: Path, folder: Path) -> None:
    """Write weights, config and tokenizer of `gguf_file` into `folder`, which exists.

    The tied lm_head is not stored: `tie_word_embeddings` stands in config.json.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    metadata, tensors = _read(gguf_file)
    files = {
        "config.json": _config(metadata),
        "generation_config.json": _special_ids(metadata) | {"_from_model_config": True},
        "tokenizer.json": _tokenizer(metadata),
        "tokenizer_config.json": _tokenizer_config(metadata),
    }
    for name, value in files.items():
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(text.encode())
    weights = {_hf_name(name): _hf_rows(name, each, metadata) for name, each in tensors.items()}
    weights_file = folder / "model.safetensors"
    try:
        save_file(weights, weights_file, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    # safetensors lets only the owner read its files; a cache may be shared.
    weights_file.chmod((folder / "config.json").stat().st_mode)


def _read(gguf_file: Path) -> tuple[dict[str, Any], dict[str, Float32]]:
    """Return (metadata, tensors in float32).

    All of it is copied. The reader, and with it the map of the file, goes when this returns: a
    file that is still mapped cannot be deleted on Windows.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        for tensor in reader.tensors
    }
    return metadata, tensors


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor.

    >>> _hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    *block, part, suffix = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_NAMES[part]}.{suffix}"


def _hf_rows(name: str, values: Float32, metadata: dict[str, Any]) -> Float32:
    """Return a tensor with Hugging Face's order of rows, contiguous.

    llama.cpp interleaves the two halves of each head of q_proj and k_proj, because its rotary
    embedding turns neighbours where Hugging Face's turns the halves: (heads, half, 2) there,
    (heads, 2, half) here.
    """
    heads_of = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    key = heads_of.get(name.split(".")[-2])
    if key is None:
        return values
    rows, columns = values.shape
    by_head = values.reshape(metadata[key], -1, 2, columns).swapaxes(1, 2)
    return np.ascontiguousarray(by_head.reshape(rows, columns))


def _special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def llama(key: str) -> Any:
        value = metadata[f"llama.{key}"]
        if isinstance(value, float):  # the shortest decimal of the float32: 1e-05, not 9.99..e-06
            return float(str(np.float32(value)))
        return value

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": llama("vocab_size"),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": llama("attention.layer_norm_rms_epsilon"),
        "rope_theta": llama("rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    } | _special_ids(metadata)


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE in which every digit is a token (GGUF's "smollm")."""
    tokens = metadata["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **plain, "special": True} for i in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    } | {name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()}
