"""What other tools write of a model, made by hand: GGUF files and folders of bitsandbytes.

A second implementation of both formats, one weight or block after the other, or by the package
gguf, so that readers are compared with something that is not themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qframe_plugins.readers.bitsandbytes import NF4
from tests import tiny

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FP4 = [each / 12 for each in (0, 1 / 16, 8, 12, 4, 6, 2, 3)]
FP4 += [-each for each in FP4]


def ggml_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{suffix}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{NAMES[part]}.{suffix}"


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows as llama.cpp has them: of each head one of the first half, one of the second."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + place
        for head in range(heads)
        for place in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


def write_gguf(
    model: Path,
    file: Path,
    kind: str = "Q4_0",
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    **metadata: int,
) -> Path:
    """Write a tiny Llama as a GGUF file, its linear layers as blocks of a kind.

    change     told the tensors, ggml's name -> bytes of blocks, before they are written
    metadata   other numbers than are true, or more
    """
    config = json.loads((model / "config.json").read_text())
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    stored = gguf.GGMLQuantizationType[kind]
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        data = tensor.float().numpy()
        part = name.split(".")[-2]
        if part in heads:
            data = turned(data, heads[part])
        if part.endswith("_proj"):
            data = gguf.quants.quantize(data, stored)
        tensors[ggml_name(name)] = data
    change(tensors)
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        **metadata,
    }
    for key, value in numbers.items():
        writer.add_uint32(key if key.startswith("split") else f"llama.{key}", value)
    writer.add_token_list(["a", "b"])
    for name, data in tensors.items():
        raw = stored if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def random_blocks(kind: str, count: int, seed: int) -> np.ndarray:
    """Return blocks of any bits whose weights are finite, [count, bytes]."""
    stored = gguf.GGMLQuantizationType[kind]
    rng, found = np.random.default_rng(seed), []
    with np.errstate(all="ignore"):
        while len(found) < count:
            block = rng.integers(0, 256, (1, gguf.GGML_QUANT_SIZES[stored][1]), dtype=np.uint8)
            if np.isfinite(gguf.quants.dequantize(block, stored)).all() and block[0, 0] < 255:
                found.append(block)
    return np.concatenate(found)


def write_blocks(file: Path, blocks: dict[str, np.ndarray], rows: int = 1) -> Path:
    """Write random blocks as a GGUF file: those of each kind are up_proj of a layer."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("llama.block_count", len(blocks))
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    for number, (kind, raw) in enumerate(blocks.items()):
        name, stored = f"blk.{number}.ffn_up.weight", gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, raw.reshape(rows, -1), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_bitsandbytes(model: Path, folder: Path, kind: str = "nf4", block: int = 64) -> Path:
    """Write a tiny Llama as transformers saves one of bitsandbytes.

    kind   int8, nf4, fp4, or nested: nf4 with absmax of 8 bits
    """
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": kind == "int8",
        "load_in_4bit": kind != "int8",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
        elif kind == "int8":
            tensors |= _int8(name.removesuffix(".weight"), weight.float())
        else:
            tensors |= _four_bits(name, weight.float(), kind, block)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    half = weight.half().float()
    largest = half.abs().amax(dim=1)
    return {
        f"{name}.weight": (half / largest[:, None] * 127).round().to(torch.int8),
        f"{name}.SCB": largest,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _four_bits(name: str, weight: torch.Tensor, kind: str, block: int) -> dict[str, torch.Tensor]:
    table = torch.tensor(FP4 if kind == "fp4" else NF4)
    of_kind = "fp4" if kind == "fp4" else "nf4"
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(dim=1)
    codes = (blocks[..., None] / absmax[:, None, None] - table).abs().argmin(dim=2)
    flat = codes.flatten().to(torch.uint8)
    state = {"quant_type": of_kind, "blocksize": block, "dtype": "float32"}
    state["shape"] = list(weight.shape)
    found = {name: (flat[::2] * 16 + flat[1::2])[:, None], f"{name}.quant_map": table}
    if kind == "nested":
        mean = float(absmax.mean())
        dynamic = torch.linspace(-1, 1, 256).sign() * torch.linspace(-1, 1, 256).square()
        moved = absmax - mean
        groups = torch.nn.functional.pad(moved, (0, -len(moved) % 256)).reshape(-1, 256)
        largest = groups.abs().amax(dim=1)
        near = (groups / largest[:, None])[..., None] - dynamic
        found[f"{name}.absmax"] = near.abs().argmin(dim=2).flatten()[: len(moved)].to(torch.uint8)
        found[f"{name}.nested_absmax"] = largest
        found[f"{name}.nested_quant_map"] = dynamic
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean}
    else:
        found[f"{name}.absmax"] = absmax
    raw = json.dumps(state).encode()
    found[f"{name}.quant_state.bitsandbytes__{of_kind}"] = torch.tensor(list(raw)).to(torch.uint8)
    return found


def tiny_model(folder: Path) -> Path:
    """Write a tiny Llama whose output layer is one of its own."""
    return tiny.write_llama(folder, tied=False)
