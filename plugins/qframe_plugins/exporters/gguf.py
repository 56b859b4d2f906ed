"""GGUF, the files of llama.cpp: codes and scales go into its blocks as they are.

Sources: the GGUF specification and ggml's `block_q4_0`, `block_q5_0`, `block_q8_0`, `block_q4_1`,
`block_q5_1` and `block_mxfp4`; names of tensors, metadata and the order of the rows of q_proj and
k_proj as llama.cpp's converter has them (the package `gguf` holds the table of names).

A block is 32 weights of a row. With d, m float16 it stands for

Q4_0, Q5_0   d (q - 8), d (q - 16)        symmetric integers of up to 4, and of 5 bits
Q8_0         d q                          of 6 to 8 bits
Q4_1, Q5_1   d q + m                      zero points z of up to 4, and of 5 bits: m = -z d
MXFP4        2^(e - 127) times a number   MXFP4

Scales of longer groups are repeated in each of their blocks, so nothing is rounded: a layer whose
scales, or -z d, are no float16 is refused. Every other tensor keeps its dtype, but for norms and
biases, which llama.cpp wants in float32. What llama.cpp does to activations is its own affair: it
rounds them to eight bits, in blocks of 32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qframe import LayerOutline, Scheme, hookimpl
from qframe.errors import UnsupportedError, WeightsError
from qframe.layouts import objections_of, said_of_extras

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qframe.stored import StoredLayer
    from qframe.stored_model import StoredModel

BLOCK = 32
ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
"""model_type -> (the package's name of the architecture, whether rows of heads are interleaved)."""

FILE_TYPES: Mapping[str, str] = {
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q5_0": "MOSTLY_Q5_0",
    "Q5_1": "MOSTLY_Q5_1",
    "Q8_0": "MOSTLY_Q8_0",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}
PAD, NORMAL, CONTROL, USER, UNUSED = "[PAD{}]", 1, 3, 4, 5  # kinds of tokens, as ggml numbers them


class GGUF:
    """Files that llama.cpp runs."""

    name = "gguf"
    readers = "llama.cpp and what is built on it"
    suffix = ".gguf"

    def objections(self, layers: Sequence[LayerOutline], config: Mapping[str, Any]) -> list[str]:
        """Return what blocks of 32 cannot hold, and what is not known of the network."""
        return [*_objections_to_network(config), *objections_of(layers, _objections)]

    def write(self, model: StoredModel, file: Path) -> None:
        """Write the network, tensor by tensor.

        Raises UnsupportedError for a tokenizer that llama.cpp does not know, a tensor without a
        name there, or a layer whose scales are no float16.
        """
        import gguf

        kind, interleaved = ARCHITECTURES[model.config["model_type"]]
        architecture = gguf.MODEL_ARCH[kind]
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
        tensors = list(_tensors(model, architecture, interleaved))
        kinds = Counter(tensor.kind for tensor in tensors if tensor.kind in FILE_TYPES)
        most = FILE_TYPES[min(kinds, key=lambda each: (-kinds[each], each))]
        _write_metadata(writer, model, gguf.LlamaFileType[most])
        for tensor in tensors:
            stored = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(
                tensor.name, tensor.stored_shape, tensor.dtype, tensor.nbytes, raw_dtype=stored
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor.make())
        finally:
            writer.close()


# What a layer becomes -----------------------------------------------------------------------------


def block_of(scheme: Scheme) -> str:
    """Return ggml's name of the block that holds a scheme's codes, "" for none."""
    if scheme.format_name == "fp4_e2m1" and scheme.scale_dtype == "e8m0":
        return "MXFP4"
    if scheme.type != "int" or scheme.format is not None:
        return ""
    bits = scheme.num_bits
    if scheme.symmetric:
        return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"
    return "Q4_1" if bits <= 4 else "Q5_1" if bits == 5 else ""


def _objections(layer: LayerOutline) -> list[str]:
    """Return why a layer has no blocks."""
    scheme, columns = layer.scheme, layer.info.columns
    said = said_of_extras(layer)
    if not block_of(scheme):
        said.append(
            f"scheme {scheme.describe()!r} is in no block of it; it has symmetric integers, zero "
            f"points of up to 5 bits, and MXFP4"
        )
    if scheme.group_size is not None and scheme.group_size % BLOCK:
        said.append(f"group_size={scheme.group_size} is no multiple of {BLOCK}; use one that is")
    if columns % BLOCK:
        said.append(f"{columns} columns are no multiple of {BLOCK}; ignore these layers")
    if scheme.input_activations is not None:
        said.append(
            "activations are quantized, which llama.cpp does in its own way; use a scheme of "
            "weights alone"
        )
    return said


def _objections_to_network(config: Mapping[str, Any]) -> list[str]:
    """Return what is not known of a network."""
    kind, activation = config.get("model_type"), config.get("hidden_act", "silu")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        return [f"model_type {kind!r} is not known; known: {', '.join(ARCHITECTURES)}"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = (
        rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    )
    if scaling != "default":
        return [f"rotary embeddings of type {scaling!r} are not known; the default ones are"]
    if activation != "silu":
        return [f"hidden_act {activation!r} is not known; silu is"]
    return []


def blocks(layer: StoredLayer, name: str) -> np.ndarray[Any, Any]:
    """Return the blocks of a layer, [rows, columns / 32 * bytes of a block] uint8.

    Raises UnsupportedError when a scale, or the offset of a zero point, is no float16.
    """
    import numpy as np

    packed = layer.packed
    scheme, rows, columns = packed.scheme, packed.rows, packed.columns
    found = packed.unpack()
    per_row = columns // BLOCK
    of_block = found.group_index[::BLOCK].long()  # groups are multiples of blocks
    codes = found.codes.numpy().reshape(rows, per_row, BLOCK)
    kind = block_of(scheme)
    if kind == "MXFP4":
        exponents = packed.scale.expand(rows, -1)[:, of_block].numpy()[..., None]
        # ggml halves 2^(e - 127) and doubles the numbers; what is stored is the same.
        nibbles = np.where(codes < 0, 8 - codes, codes).astype(np.uint8)
        halves = nibbles[..., :16] | nibbles[..., 16:] << 4
        return _joined(exponents, halves)
    scale = found.scale.expand(rows, -1)[:, of_block].numpy()
    d = _float16(scale, "a scale", name)
    if scheme.symmetric:
        if kind == "Q8_0":
            return _joined(d, codes.astype(np.int8))
        half = 8 if kind == "Q4_0" else 16
        return _joined(d, *_low_and_high(codes + half, five=kind == "Q5_0"))
    zero = found.zero_point.expand(rows, -1)[:, of_block].numpy()
    m = _float16(-zero.astype(np.float32) * scale, "a scale times its zero point", name)
    return _joined(d, m, *_low_and_high(codes, five=kind == "Q5_1"))


def _float16(values: np.ndarray[Any, Any], what: str, name: str) -> np.ndarray[Any, Any]:
    """Return numbers as float16, [..., 1]. Raises UnsupportedError when that rounds one."""
    import numpy as np

    with np.errstate(over="ignore", under="ignore"):
        stored = values.astype(np.float16)
    wrong = stored.astype(np.float32) != values
    if wrong.any():
        raise UnsupportedError(
            f"layer {name!r}: {what} is {float(values[wrong][0]):.9g}, which is no float16, and "
            f"GGUF stores such; use symmetric: true with scale_dtype: float16, or with zero points "
            f"scale_dtype: e8m0"
        )
    return stored[..., None]


def _low_and_high(codes: np.ndarray[Any, Any], *, five: bool) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the fifth bits of a block as one word, where there are such, and the low four."""
    import numpy as np

    low = (codes & 15).astype(np.uint8)
    halves = low[..., :16] | low[..., 16:] << 4
    if not five:
        return (halves,)
    fifth = (codes.astype(np.uint32) >> 4 & 1) << np.arange(BLOCK, dtype=np.uint32)
    return fifth.sum(-1, dtype=np.uint32, keepdims=True), halves


def _joined(*parts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bytes of each block, its parts one after the other, row by row."""
    import numpy as np

    as_bytes = [
        np.ascontiguousarray(part.astype(part.dtype.newbyteorder("<"))).view(np.uint8)
        for part in parts
    ]
    joined = np.concatenate(as_bytes, axis=-1)
    return joined.reshape(len(joined), -1)


# The network --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file.

    stored_shape   as the package wants it: of bytes where there are blocks
    kind           ggml's name of its type
    make           makes the data, when they are written
    """

    name: str
    stored_shape: tuple[int, ...]
    kind: str
    dtype: Any
    nbytes: int
    make: Callable[[], np.ndarray[Any, Any]]


def _tensors(model: StoredModel, architecture: Any, interleaved: bool) -> Iterator[_Tensor]:
    """Yield the tensors of the file, layers in their order and then the rest."""
    import gguf
    import numpy as np

    names = gguf.get_tensor_name_map(architecture, _count(model.config, "num_hidden_layers"))
    queries = _count(model.config, "num_attention_heads")
    heads = {"q_proj": queries, "k_proj": _count(model.config, "num_key_value_heads", queries)}

    def named(name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        found = names.get_name(stem, try_suffixes=())
        if found is None:
            raise UnsupportedError(f"tensor {name!r} has no name in GGUF's architecture")
        return f"{found}.{suffix}"

    def ordered(stem: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        count = heads.get(stem.rpartition(".")[2])
        return _interleaved(rows, count) if interleaved and count is not None else rows

    for name, outline in model.outlines.items():
        kind = gguf.GGMLQuantizationType[block_of(outline.scheme)]
        bytes_of_block = gguf.GGML_QUANT_SIZES[kind][1]
        shape = (outline.info.rows, outline.info.columns // BLOCK * bytes_of_block)

        def layer(name: str = name) -> np.ndarray[Any, Any]:
            return ordered(name, blocks(model.layer(name), name))

        nbytes = shape[0] * shape[1]
        yield _Tensor(named(f"{name}.weight"), shape, kind.name, np.dtype(np.uint8), nbytes, layer)
    for name in model.carried():
        stored = model.source.tensors[name]
        stem, _, suffix = name.rpartition(".")
        if stem == "model.rotary_emb" or suffix.startswith("rotary_emb"):
            continue  # old checkpoints hold what llama.cpp computes
        kind_name = "F32" if len(stored.shape) < 2 else _PLAIN.get(stored.dtype, "")
        if not kind_name:
            raise UnsupportedError(
                f"tensor {name!r} has dtype {stored.dtype}, GGUF has no such one"
            )

        def plain(name: str = name, stem: str = stem, kind: str = kind_name) -> Any:
            return ordered(stem, _plain(model.source.read(name), kind))

        size, dtype = (4, np.float32) if kind_name == "F32" else (2, np.float16)
        count = int(np.prod(stored.shape))
        yield _Tensor(named(name), stored.shape, kind_name, np.dtype(dtype), size * count, plain)


_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # dtype in a folder -> ggml's name


def _plain(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Return a tensor in its own dtype; bfloat16 as the bytes of it."""
    import torch

    if kind == "F32":
        return tensor.float().numpy()
    if kind == "BF16":
        return tensor.contiguous().view(torch.int16).numpy()
    return tensor.numpy()


def _interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows [heads * head_dim, ...] with the two halves of each head in turn.

    llama.cpp turns neighbours where transformers turns the halves of a head.
    """
    import numpy as np

    if len(rows) % (2 * heads):
        raise WeightsError(f"config.json: {heads} heads, but {len(rows)} rows, no even number each")
    by_head = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(by_head).reshape(rows.shape)


def _count(config: Mapping[str, Any], key: str, otherwise: int | None = None) -> int:
    """Return a positive integer of config.json. Raises WeightsError for what is none."""
    found = config.get(key)
    found = otherwise if found is None else found
    if isinstance(found, bool) or not isinstance(found, int) or not 0 < found < 1 << 31:
        raise WeightsError(f"config.json: {key} should be a positive integer, got {found!r}")
    return found


def _number(config: Mapping[str, Any], key: str, otherwise: float) -> float:
    """Return a positive number of config.json. Raises WeightsError for what is none."""
    found = config.get(key, otherwise)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < 1e38:
        raise WeightsError(f"config.json: {key} should be a positive number, got {found!r}")
    return float(found)


def _write_metadata(writer: Any, model: StoredModel, file_type: int) -> None:
    """Write what llama.cpp needs to know of the network, and its tokenizer."""
    config = model.config
    rope = config.get("rope_parameters") or {}
    heads = _count(config, "num_attention_heads")
    head_dim = _count(config, "head_dim", _count(config, "hidden_size") // heads)
    writer.add_name(model.source.path.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(_count(config, "num_hidden_layers"))
    writer.add_context_length(_count(config, "max_position_embeddings"))
    writer.add_embedding_length(_count(config, "hidden_size"))
    writer.add_feed_forward_length(_count(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(_count(config, "num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    theta = rope if "rope_theta" in rope else config
    writer.add_rope_freq_base(_number(theta, "rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(_number(config, "rms_norm_eps", 1e-6))
    writer.add_vocab_size(_count(config, "vocab_size"))
    if model.manifest is not None:
        writer.add_string("qframe.version", str(model.manifest["qframe"]))
        writer.add_string("qframe.recipe", json.dumps(model.manifest["recipe"], sort_keys=True))
    try:
        _write_tokenizer(writer, model.source.path, _count(config, "vocab_size"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{model.source.path}: tokenizer.json and tokenizer_config.json are not what a "
            f"tokenizer is stored as: {type(error).__name__}: {error}"
        ) from None


# The tokenizer ------------------------------------------------------------------------------------


def _write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Write a tokenizer of byte-level pieces (BPE), as tokenizer.json has it."""
    from qframe.weights import read_json

    where = folder / "tokenizer.json"
    content = read_json(where)
    model = content.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else model
        raise UnsupportedError(f"{where}: a tokenizer of type {kind!r} is not known; BPE is")
    settings = read_json(folder / "tokenizer_config.json")
    tokens, kinds = _vocabulary(content, size, where)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(content, where))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if not model.get("merges"):
        raise UnsupportedError(f"{where}: no merges, without which llama.cpp loads no tokenizer")
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    ids = {token: number for number, token in enumerate(tokens)}
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        found = settings.get(key)
        text = found.get("content") if isinstance(found, Mapping) else found
        if text in ids:
            add(ids[text])
    template = settings.get("chat_template")
    file = folder / "chat_template.jinja"
    if template is None and file.is_file():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _vocabulary(content: Mapping[str, Any], size: int, where: Path) -> tuple[list[str], list[int]]:
    """Return every token and its kind, by number; numbers without a token are unused."""
    tokens = [PAD.format(number) for number in range(size)]
    kinds = [UNUSED] * size
    added = content.get("added_tokens") or ()
    entries = [(text, number, NORMAL) for text, number in content["model"]["vocab"].items()]
    entries += [(t["content"], t["id"], CONTROL if t["special"] else USER) for t in added]
    for text, number, kind in entries:
        if not 0 <= number < size:
            raise WeightsError(
                f"{where}: token {text!r} has number {number}, but the network has {size} tokens"
            )
        tokens[number], kinds[number] = text, kind
    return tokens, kinds


_PRE: Mapping[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits:True", "ByteLevel"): "smollm",
    (
        "Split:(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
        " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "ByteLevel:plain",
    ): "llama-bpe",
    (
        "Split:(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
        " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "ByteLevel:plain",
    ): "qwen2",
}
"""How text is cut before pieces are merged -> llama.cpp's name of it."""


def _pre(content: Mapping[str, Any], where: Path) -> str:
    """Return llama.cpp's name of how text is cut. Raises UnsupportedError when it has none."""
    cut = content.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    described = tuple(_step(step) for step in steps)
    if described not in _PRE:
        raise UnsupportedError(
            f"{where}: its pre_tokenizer, {' and then '.join(described)}, is not known to be one "
            f"of llama.cpp's ({', '.join(_PRE.values())})"
        )
    return _PRE[described]


def _step(step: Mapping[str, Any]) -> str:
    """Return a step of a pre_tokenizer in a word."""
    kind = str(step.get("type"))
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            return "ByteLevel:prefix"
        return kind if step.get("use_regex", True) else "ByteLevel:plain"
    if kind == "Digits":
        return f"Digits:{bool(step.get('individual_digits'))}"
    if kind == "Split":
        pattern = step.get("pattern") or {}
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        return f"Split:{pattern.get('Regex')}" if isolated else "Split"
    return kind


@hookimpl
def qframe_exporters() -> Iterable[GGUF]:
    """Register the exporter."""
    return [GGUF()]
