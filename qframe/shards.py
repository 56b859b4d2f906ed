"""Tensors on their way into safetensors files, without waiting in memory.

A file begins with a header that says where every tensor lies, which is known only when the last
one has come. So it is written last, into room that was left for what it is expected to be, and
numbers are put down as they come. Where nobody knew what to expect, or something else came, numbers
move up through one small buffer, or the header is filled up with spaces.

The format: 8 bytes little-endian with the length of a JSON header, which says dtype, shape and
place of each tensor (https://huggingface.co/docs/safetensors/index#format), then their numbers
with nothing in between. Tensors that would leave the next one where a processor does not like to
have it come last, larger numbers first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from qframe.fingerprints import bytes_of, sha256
from qframe.weights import DTYPE_NAMES, SIZES, index_name
from qframe.writing import Unread, write_json, write_unread, written

BUFFER = 1 << 20  # bytes that are read, hashed and written at a time
ALIGNMENT = 8  # of the first number, in bytes

Expected = tuple[str, str, tuple[int, ...]]
"""Name of a tensor, dtype as safetensors has it, and shape."""


@dataclass(frozen=True, slots=True)
class _Spooled:
    """A tensor in a spool, and where its numbers begin there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class _Spool:
    """Tensors one after the other in a file, behind room for a header.

    header    that is expected, which is not written
    tensors   in the order in which they came
    size      bytes of their numbers
    digest    of the header and the numbers, as sha256 has it
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._made: Unread | None = None
        self.begin(b"")

    def begin(self, header: bytes) -> None:
        """Begin anew: there is nothing in it."""
        self.header = header
        self.tensors: list[_Spooled] = []
        self.size = 0
        self.digest = hashlib.sha256(header)

    def put_down(self, data: memoryview, size: int) -> None:
        """Append bytes; `size` of them are to come."""
        with written(self.file, size):
            self._begun().write(data)
        self.digest.update(data)

    def note(self, name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        """Note the tensor whose numbers have come."""
        self.tensors.append(_Spooled(name, dtype, shape, self.size, size))
        self.size += size

    def finish(self) -> int:
        """Return the file, which holds all that was put down."""
        made = self._begun()
        made.finish()
        return made.handle

    def close(self) -> None:
        """Let the file go, unless it has another name by now."""
        if self._made is not None:
            self._made.close()
            self._made = None
            with contextlib.suppress(OSError):  # it goes with its folder then
                self.file.unlink()
        self.begin(b"")

    def _begun(self) -> Unread:
        if self._made is None:
            self._made = Unread(self.file)
            self._made.write(memoryview(bytes(len(self.header))))
        return self._made


class Shards:
    """Tensors on their way into one or several safetensors files of a folder.

    stem      of the names: STEM.safetensors, or STEM-00001-of-0000N.safetensors and an index
    limit     bytes of a file, unless a single tensor takes more
    expected  what is expected to come, in that order; empty where that is not known
    records   tensor name -> dtype, shape and fingerprint of what has come so far
    files     name of a file -> its sha256, of those that have their names
    """

    def __init__(
        self, folder: Path, stem: str, limit: int, expected: Iterable[Expected] = ()
    ) -> None:
        self._folder, self._stem, self._limit = folder, stem, limit
        self._headers = expected_headers(expected, limit)
        self._spool = _Spool(folder / f"{stem}-spool")
        self._spool.begin(next(self._headers, b""))
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
        digest = blake3()
        for piece in pieces:
            data = bytes_of(piece)
            digest.update(data)
            spool.put_down(data, size)
        spool.note(name, kind, shape, size)
        self.records[name] = {"dtype": kind, "shape": list(shape), "blake3": digest.hexdigest()}

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
            room = len(spool.header)
            end = room + spool.size
            handle = spool.finish()
            rest = uneven.finish() if last else -1
            for each in last:
                for part in _parts(rest, each.start, each.size):
                    end = _put(handle, part, end)
                    spool.digest.update(part)
            header = header_of(order, room=room)
            put_before(handle, header, room, end)
            spool.file.rename(file)
            as_expected = header == spool.header
            digest = spool.digest.hexdigest() if as_expected else sha256(file)
        self._bytes += spool.size + uneven.size
        self._shards.append((sorted(each.name for each in order), digest))
        self.close()
        self._spool.begin(next(self._headers, b""))


def expected_headers(tensors: Iterable[Expected], limit: int) -> Iterator[bytes]:
    """Yield the headers of files of at most `limit` bytes, when tensors come in this order."""
    even: list[_Spooled] = []
    uneven: list[_Spooled] = []
    filled = 0
    for name, dtype, shape in tensors:
        size = SIZES[dtype] * math.prod(shape)
        if (even or uneven) and filled + size > limit:
            yield header_of([*even, *sorted(uneven, key=_last_if_small)])
            even, uneven, filled = [], [], 0
        (uneven if size % ALIGNMENT else even).append(_Spooled(name, dtype, shape, filled, size))
        filled += size
    if even or uneven:
        yield header_of([*even, *sorted(uneven, key=_last_if_small)])


def header_of(
    order: Iterable[_Spooled], metadata: Mapping[str, str] | None = None, room: int = 0
) -> bytes:
    """Return what comes before the numbers of tensors that lie in a file in this order.

    room   bytes that it takes at least
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    end = 0
    for each in order:
        start, end = end, end + each.size
        place = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [start, end]}
        entries[each.name] = place
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % ALIGNMENT, room - len(text) - 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a file of tensors that are at hand and not read soon; return its BLAKE3 hash."""
    order = [
        _Spooled(name, DTYPE_NAMES[each.dtype], tuple(each.shape), 0, each.nbytes)
        for name, each in tensors.items()
    ]
    order.sort(key=_last_if_small)
    header = memoryview(header_of(order, metadata))
    parts = [header, *(bytes_of(tensors[each.name]) for each in order)]
    write_unread(file, parts)
    digest = blake3()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _last_if_small(tensor: _Spooled) -> tuple[int, str]:
    """Return by what tensors are sorted to lie well whatever their number of numbers."""
    return -SIZES[tensor.dtype], tensor.name


def put_before(handle: int, header: bytes, room: int, end: int) -> None:
    """Put a header into the room that a file has for it; what is behind that moves up if need be.

    room   bytes, which the header has at least
    end    of the file
    """
    before, place, size = header, 0, max(BUFFER, len(header) - room)
    if len(header) > room:
        for part in _parts(handle, room, end - room, size):
            place = _put(handle, before, place)  # never over what has not been read
            before = part
    _put(handle, before, place)


def _parts(handle: int, start: int, size: int, at_once: int | None = None) -> Iterator[bytes]:
    """Yield some bytes of a file, in pieces."""
    at_once = at_once or BUFFER
    for place in range(start, start + size, at_once):
        wanted = min(at_once, start + size - place)
        found = os.pread(handle, wanted, place)
        if len(found) != wanted:
            raise OSError("a file was cut short while it was written")
        yield found


def _put(handle: int, part: bytes, place: int) -> int:
    """Write bytes to their place in a file; return where they end."""
    view = memoryview(part)
    while view:
        count = os.pwrite(handle, view, place)
        view, place = view[count:], place + count
    return place
