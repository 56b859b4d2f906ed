"""Tensors on their way into safetensors files, without waiting in memory.

A file begins with a header that says where every tensor lies, which is known only when the last
one has come. So numbers are put down in a spool as they come, and when a file has enough of them,
header and spool are put together, through one small buffer, and hashed on the way.

The format: 8 bytes little-endian with the length of a JSON header, which says dtype, shape and
place of each tensor (https://huggingface.co/docs/safetensors/index#format), then their numbers
with nothing in between. Larger numbers come first, and the header is filled up with spaces, so
that all lie where a processor likes to have them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qframe.weights import DTYPE_NAMES, SIZES, index_name
from qframe.writing import write_json, written

BUFFER = 1 << 20  # bytes that are read, hashed and written at a time
ALIGNMENT = 8  # of the first number, in bytes


@dataclass(frozen=True, slots=True)
class _Spooled:
    """A tensor in the spool."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """Tensors on their way into one or several safetensors files of a folder.

    stem      of the names: STEM.safetensors, or STEM-00001-of-0000N.safetensors and an index
    limit     bytes of a file, unless a single tensor takes more
    records   tensor name -> dtype, shape and sha256 of what has come so far
    files     name of a file -> its sha256, of those that have their names
    """

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self._folder, self._stem, self._limit = folder, stem, limit
        self._spool = folder / f"{stem}-spool"
        self._stream: int | None = None
        self._spooled: list[_Spooled] = []
        self._filled = 0  # bytes in the spool
        self._shards: list[tuple[list[str], str]] = []  # names of tensors, sha256 of the file
        self._bytes = 0
        self.records: dict[str, dict[str, Any]] = {}
        self.files: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor. Raises OutputError."""
        self.add_pieces(name, tensor.dtype, tuple(tensor.shape), (tensor,))

    def add_pieces(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[torch.Tensor]
    ) -> None:
        """Take in a tensor that comes in pieces, one after another. Raises OutputError.

        pieces   of that dtype; with all their numbers in a row they are the tensor
        """
        kind = DTYPE_NAMES[dtype]
        size = SIZES[kind] * math.prod(shape)
        if self._spooled and self._filled + size > self._limit:
            self._put_together()
        digest = hashlib.sha256()
        for piece in pieces:
            flat = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(flat.data)
            self._put_down(memoryview(flat.data), size)
        self._spooled.append(_Spooled(name, kind, shape, self._filled, size))
        self._filled += size
        self.records[name] = {"dtype": kind, "shape": list(shape), "sha256": digest.hexdigest()}

    def finish(self) -> None:
        """Write what is left, and give the files their names; no file for no tensors."""
        if self._spooled:
            self._put_together()
        self.close()
        total = len(self._shards)
        weight_map = {}
        for number, (names, digest) in enumerate(self._shards, 1):
            final = f"{self._stem}-{number:05d}-of-{total:05d}.safetensors"
            final = f"{self._stem}.safetensors" if total == 1 else final
            self._shard(number).rename(self._folder / final)
            self.files[final] = digest
            weight_map.update(dict.fromkeys(names, final))
        if total > 1:
            index = {
                "metadata": {"total_size": self._bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self._folder / index_name(self._stem), index)

    def close(self) -> None:
        """Let the spool go, with what is in it."""
        if self._stream is not None:
            os.close(self._stream)
            self._stream = None
            with contextlib.suppress(OSError):  # it goes with its folder then
                self._spool.unlink()
        self._spooled, self._filled = [], 0

    def _shard(self, number: int) -> Path:
        return self._folder / f"{self._stem}-shard-{number}"

    def _put_down(self, data: memoryview, size: int) -> None:
        """Append bytes to the spool; `size` of them are to come."""
        with written(self._spool, size):
            if self._stream is None:
                self._stream = os.open(self._spool, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            while data:
                data = data[os.write(self._stream, data) :]

    def _put_together(self) -> None:
        """Make a file of what is in the spool, and empty it."""
        order = sorted(self._spooled, key=lambda each: (-SIZES[each.dtype], each.name))
        file = self._shard(len(self._shards) + 1)
        with written(file, self._filled):
            digest = write_safetensors(file, header_of(order), self._numbers(order))
            if self._stream is not None:
                os.ftruncate(self._stream, 0)
                os.lseek(self._stream, 0, os.SEEK_SET)
        self._bytes += self._filled
        self._shards.append((sorted(each.name for each in order), digest))
        self._spooled, self._filled = [], 0

    def _numbers(self, order: Iterable[_Spooled]) -> Iterator[bytes]:
        for each in order:
            for start in range(each.start, each.start + each.size, BUFFER):
                yield self._piece(start, min(BUFFER, each.start + each.size - start))

    def _piece(self, start: int, size: int) -> bytes:
        found = b"" if self._stream is None else os.pread(self._stream, size, start)
        if len(found) != size:
            raise OSError(f"{self._spool} was cut short while it was read")
        return found


def header_of(order: Iterable[_Spooled]) -> bytes:
    """Return what comes before the numbers of tensors that lie in a file in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in order:
        start, end = end, end + each.size
        place = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [start, end]}
        entries[each.name] = place
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(file: Path, header: bytes, numbers: Iterable[bytes]) -> str:
    """Write a file and return its sha256."""
    digest = hashlib.sha256()
    with file.open("wb", buffering=BUFFER) as stream:
        for part in itertools.chain((header,), numbers):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()
