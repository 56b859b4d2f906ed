"""GGUF files, whoever wrote them: llama.cpp's own quantizer, qframe, or others.

Sources: the GGUF specification; llama.cpp's names of tensors; the order of the rows of q_proj and
k_proj as its converter has it for the architecture "llama" (docs/formats.md). How blocks hold
weights: `qframe_plugins.readers.gguf_blocks`.

Layers have the names that transformers has for them. Those of other architectures, and other
tensors, keep the file's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qframe import CodedLayer, CodedWeight, Scheme, hookimpl
from qframe.errors import UnsupportedError, WeightsError
from qframe_plugins.readers.gguf_blocks import KINDS, BlockKind
from qframe_plugins.readers.gguf_file import MAGIC, FileTensor, GGUFFile

if TYPE_CHECKING:
    import numpy as np

NAME = "gguf"
PLAIN = frozenset({"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"})
INTERLEAVED = frozenset({"llama"})  # architectures with the halves of a head in turn
MOST_BLOCKS = 1 << 16
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_OF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
KNOWN = frozenset({"llama", "qwen2", "qwen3"})  # architectures with these names
HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}


class GGUFReader:
    """Opens GGUF files."""

    name: str = NAME
    writers: str = "llama.cpp and what is built on it"

    def open(self, path: Path) -> GGUFCheckpoint | None:
        """Return a GGUF file, opened; None for a folder, or another kind of file."""
        if not path.is_file():
            return None
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC and path.suffix != ".gguf":
                return None
        return GGUFCheckpoint(GGUFFile.open(path))


class GGUFCheckpoint:
    """A GGUF file, opened.

    Raises WeightsError for a part of a file, and for metadata that no network has.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        parts = file.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise WeightsError(
                f"{file.path}: one of {parts} parts of a file; join them: llama-gguf-split --merge"
            )
        self._architecture = str(file.metadata.get("general.architecture", ""))
        self._tensors: dict[str, FileTensor] = {}
        self.carried: Mapping[str, str]
        self.layers: Mapping[str, CodedLayer]
        carried, layers = {}, {}
        for tensor in file.tensors.values():
            name = self._named(tensor.name)
            own = name.removesuffix(".weight")
            if tensor.kind in PLAIN:
                carried[name] = tensor.kind
                continue
            if own in self._tensors:
                raise WeightsError(f"{file.path}: layer {own!r} is there under two names")
            self._tensors[own] = tensor
            layers[own] = _layer(own, tensor)
        self.carried, self.layers = carried, layers

    def missing(self) -> list[tuple[str, str]]:
        """Return what blocks lack that half of the blocks have, and whole blocks."""
        blocks = self._file.metadata.get(f"{self._architecture}.block_count")
        if isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 < blocks <= MOST_BLOCKS:
            return [("", f"the metadata give {blocks!r} as the number of blocks")]
        found: dict[str, set[int]] = {}
        for name in self._file.tensors:
            if match := re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name):
                found.setdefault(match[2], set()).add(int(match[1]))
        if not found:
            return [("", "it has no blocks")]
        usual = [part for part, where in found.items() if 2 * len(where) >= blocks]
        said = [
            (self._named(f"blk.{number}.{part}").removesuffix(".weight"), _MISSING)
            for part in usual
            for number in range(blocks)
            if number not in found[part]
        ]
        if not usual:
            said.append(("", f"it has tensors of a few of its {blocks} blocks alone"))
        whole = [
            name
            for name in ("token_embd", "output_norm")
            if f"{name}.weight" not in self._file.tensors
        ]
        return said + [(_WHOLE[name] if self._known else name, _MISSING) for name in whole]

    def read(self, name: str) -> CodedWeight:
        """Return the codes of a layer. Raises WeightsError for scales that are not finite."""
        import numpy as np
        import torch

        tensor = self._tensors[name]
        kind = KINDS.get(tensor.kind)
        if kind is None or len(tensor.shape) != 2:
            raise UnsupportedError(
                f"layer {name!r}: {tensor.kind} {list(tensor.shape)}; known: "
                f"{', '.join(KINDS)}, with two axes"
            )
        rows, columns = tensor.shape
        raw = self._file.data(tensor).reshape(-1, tensor.block[1])
        with np.errstate(over="ignore", invalid="ignore"):
            codes, scale, offset = kind.split(raw)
        for what, found in (("scale", scale), ("offset", offset)):
            bad = np.argwhere(~np.isfinite(found))
            if len(bad):
                block, group = (int(place) for place in bad[0])
                row, place = divmod(block, columns // tensor.block[0])
                raise WeightsError(
                    f"layer {name!r}: a {what} is {found[block, group]} (row {row} of the file, "
                    f"block {place}; {len(bad)} are not finite)"
                )
        values = kind.grid.values
        of_codes = codes if values is None else np.array(values)[codes - kind.grid.qmin]
        by_group = of_codes.reshape(len(raw), -1, kind.width).astype(np.float32)
        with np.errstate(over="ignore"):
            weight = by_group * scale[..., None] + offset[..., None]
        return CodedWeight(
            codes=torch.from_numpy(self._ordered(tensor, codes.reshape(rows, columns))),
            grid=kind.grid,
            scale=torch.from_numpy(self._ordered(tensor, _double(scale, rows))),
            offset=torch.from_numpy(self._ordered(tensor, _double(offset, rows))),
            weight=torch.from_numpy(self._ordered(tensor, weight.reshape(rows, columns))),
            scale_moved=torch.from_numpy(self._ordered(tensor, _moved(scale, kind, rows))),
            offset_moved=torch.from_numpy(self._ordered(tensor, _moved(offset, kind, rows))),
        )

    @cached_property
    def _known(self) -> bool:
        return self._architecture in KNOWN

    def _named(self, name: str) -> str:
        """Return the name that transformers has for a tensor."""
        stem, _, suffix = name.rpartition(".")
        if not self._known:
            return name
        if stem in _WHOLE:
            return f"{_WHOLE[stem]}.{suffix}"
        match = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", stem)
        if match and match[2] in _OF_BLOCK:
            return f"model.layers.{int(match[1])}.{_OF_BLOCK[match[2]]}.{suffix}"
        return name

    def _ordered(self, tensor: FileTensor, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return rows in the order of transformers, which has the halves of a head in turn."""
        import numpy as np

        match = re.fullmatch(r"blk\.\d+\.(\w+)\.weight", tensor.name)
        part = "" if match is None else match[1]
        if part not in HEADS or self._architecture not in INTERLEAVED:
            return np.ascontiguousarray(rows)
        heads = self._heads(HEADS[part])
        if len(rows) % (2 * heads):
            raise WeightsError(
                f"{self._file.path}: tensor {tensor.name!r} has {len(rows)} rows, no even number "
                f"for each of {heads} heads"
            )
        by_head = rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(by_head).reshape(rows.shape)

    def _heads(self, key: str) -> int:
        own = f"{self._architecture}.attention."
        found = self._file.metadata.get(own + key, self._file.metadata.get(f"{own}head_count"))
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise WeightsError(
                f"{self._file.path}: {own}{key} should be a positive integer, got {found!r}"
            )
        return found


_MISSING = "is not in the file"


def _double(found: np.ndarray[Any, Any], rows: int) -> np.ndarray[Any, Any]:
    """Return numbers of blocks as those of rows, [rows, groups] float64."""
    import numpy as np

    return found.reshape(rows, -1).astype(np.float64)


def _moved(found: np.ndarray[Any, Any], kind: BlockKind, rows: int) -> np.ndarray[Any, Any]:
    """Return how far numbers may have moved when they were stored, like `_double`."""
    from qframe import bounds

    exact = _double(found, rows)
    if kind.stored is None:
        return exact * 0
    return bounds.stored_apart(exact / kind.most, kind.stored) * kind.most


def _layer(name: str, tensor: FileTensor) -> CodedLayer:
    """Return what the header says of a layer."""
    kind = KINDS.get(tensor.kind)
    scheme = None if kind is None or kind.scheme is None else kind.scheme
    return CodedLayer(
        name=name,
        rows=tensor.count // tensor.shape[-1],
        columns=tensor.shape[-1],
        kind=tensor.kind,
        num_bits=kind.bits if kind is not None else 8 * tensor.block[1] // tensor.block[0],
        bytes=tensor.bytes,
        scheme=None if scheme is None else Scheme.parse(dict(scheme), NAME),
    )


@hookimpl
def qframe_readers() -> Iterable[GGUFReader]:
    """Register the reader."""
    return [GGUFReader()]
