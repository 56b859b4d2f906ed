"""Tensors on their way into safetensors files, without waiting in memory.

A file begins with a header that says where every tensor lies, which is known only when the last
one has come. So numbers are put down as they come, and when a file has enough of them they move up,
through one small buffer in which they are hashed, and make room for the header.

The format: 8 bytes little-endian with the length of a JSON header, which says dtype, shape and
place of each tensor (https://huggingface.co/docs/safetensors/index#format), then their numbers
with nothing in between. Tensors that would leave the next one where a processor does not like to
have it come last, larger numbers first, and the header is filled up with spaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qframe.weights import DTYPE_NAMES, SIZES, index_name
from qframe.writing import write_json, write_unread, written

BUFFER = 1 << 20  # bytes that are read, hashed and written at a time
ALIGNMENT = 8  # of the first number, in bytes


@dataclass(frozen=True, slots=True)
class _Spooled:
    """A tensor in a spool, and where its numbers begin there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class _Spool:
    """Tensors one after the other in a file without a header.

    tensors   in the order in which they came
    size      bytes of their numbers
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle: int | None = None
        self.tensors: list[_Spooled] = []
        self.size = 0

    @property
    def handle(self) -> int:
        """The file, which is made if need be."""
        if self._handle is None:
            self._handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        return self._handle

    def put_down(self, data: memoryview, size: int) -> None:
        """Append bytes; `size` of them are to come."""
        with written(self.file, size):
            while data:
                data = data[os.write(self.handle, data) :]

    def note(self, name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        """Note the tensor whose numbers have come."""
        self.tensors.append(_Spooled(name, dtype, shape, self.size, size))
        self.size += size

    def read(self, start: int, size: int, at_once: int) -> Iterator[bytes]:
        """Yield some of the file in pieces."""
        for place in range(start, start + size, at_once):
            wanted = min(at_once, start + size - place)
            found = os.pread(self.handle, wanted, place)
            if len(found) != wanted:
                raise OSError(f"{self.file} was cut short while it was read")
            yield found

    def close(self) -> None:
        """Let the file go, unless it has another name by now."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            with contextlib.suppress(OSError):  # it goes with its folder then
                self.file.unlink()
        self.tensors, self.size = [], 0


class Shards:
    """Tensors on their way into one or several safetensors files of a folder.

    stem      of the names: STEM.safetensors, or STEM-00001-of-0000N.safetensors and an index
    limit     bytes of a file, unless a single tensor takes more
    records   tensor name -> dtype, shape and sha256 of what has come so far
    files     name of a file -> its sha256, of those that have their names
    """

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self._folder, self._stem, self._limit = folder, stem, limit
        self._spool = _Spool(folder / f"{stem}-spool")
        self._uneven = _Spool(folder / f"{stem}-uneven")  # what leaves the next one badly placed
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
        filled = self._spool.size + self._uneven.size
        if (self._spool.tensors or self._uneven.tensors) and filled + size > self._limit:
            self._put_together()
        spool = self._uneven if size % ALIGNMENT else self._spool
        digest = hashlib.sha256()
        for piece in pieces:
            data = _bytes_of(piece)
            digest.update(data)
            spool.put_down(data, size)
        spool.note(name, kind, shape, size)
        self.records[name] = {"dtype": kind, "shape": list(shape), "sha256": digest.hexdigest()}

    def finish(self) -> None:
        """Write what is left, and give the files their names; no file for no tensors."""
        if self._spool.tensors or self._uneven.tensors:
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
        """Let the spools go, with what is in them."""
        self._spool.close()
        self._uneven.close()

    def _shard(self, number: int) -> Path:
        return self._folder / f"{self._stem}-shard-{number}"

    def _put_together(self) -> None:
        """Make a file of what is in the spools, and empty them."""
        spool, uneven = self._spool, self._uneven
        last = sorted(uneven.tensors, key=_last_if_small)
        order = [*spool.tensors, *last]
        file = self._shard(len(self._shards) + 1)
        with written(file, spool.size + uneven.size):
            rest = (uneven.read(each.start, each.size, BUFFER) for each in last)
            digest = write_safetensors(spool, header_of(order), itertools.chain.from_iterable(rest))
            spool.file.rename(file)
        self._bytes += spool.size + uneven.size
        self._shards.append((sorted(each.name for each in order), digest))
        self.close()


def header_of(order: Iterable[_Spooled], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what comes before the numbers of tensors that lie in a file in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    end = 0
    for each in order:
        start, end = end, end + each.size
        place = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [start, end]}
        entries[each.name] = place
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a file of tensors that are at hand and not read soon; return its sha256."""
    order = [
        _Spooled(name, DTYPE_NAMES[each.dtype], tuple(each.shape), 0, each.nbytes)
        for name, each in tensors.items()
    ]
    order.sort(key=_last_if_small)
    header = memoryview(header_of(order, metadata))
    parts = [header, *(_bytes_of(tensors[each.name]) for each in order)]
    write_unread(file, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _last_if_small(tensor: _Spooled) -> tuple[int, str]:
    """Return by what tensors are sorted to lie well whatever their number of numbers."""
    return -SIZES[tensor.dtype], tensor.name


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, row by row."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_safetensors(spool: _Spool, header: bytes, rest: Iterable[bytes]) -> str:
    """Put a header before what is in a spool, and the rest after it; return the file's sha256."""
    digest, end, size = hashlib.sha256(), 0, max(BUFFER, len(header))

    def write(part: bytes) -> None:
        nonlocal end
        digest.update(part)
        view = memoryview(part)
        while view:
            count = os.pwrite(spool.handle, view, end)
            view, end = view[count:], end + count

    before = header  # what is written next: never over what has not been read
    for part in spool.read(0, spool.size, size):
        write(before)
        before = part
    for part in itertools.chain((before,), rest):
        write(part)
    return digest.hexdigest()
