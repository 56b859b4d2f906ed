"""Fingerprints, by which tensors and files are known again.

Those of tensors are BLAKE3 (O'Connor et al., https://github.com/BLAKE3-team/BLAKE3-specs), which is
as safe as SHA-256 and several times as fast: a run takes one of everything that it reads, and
several of what it writes. Those of files that a run leaves are SHA-256, which every system has a
command for.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    import torch

BUFFER = 1 << 18  # bytes of a file at a time: they stay in the cache


@dataclass(frozen=True, slots=True)
class Origin:
    """The weight that a layer was made of, as it was stored.

    dtype         as safetensors names it
    fingerprint   of its bytes
    """

    dtype: str
    fingerprint: str


def sha256(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the BLAKE3 hash of a tensor's bytes, row by row and little-endian, as files have them.

    It has 64 hexadecimal digits.
    """
    return fingerprint_of([tensor])


def fingerprint_of(pieces: Iterable[torch.Tensor]) -> str:
    """Return the same of a tensor that comes some of its rows at a time."""
    found = blake3()
    for piece in pieces:
        found.update(bytes_of(piece))
    return found.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, row by row, as its file has them; no copy if they lie so."""
    import torch

    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class InParts:
    """The fingerprint of a tensor some rows of which come at a time, in any order, from any thread.

    What comes too early is held until those before it have come.
    """

    def __init__(self, rows: int) -> None:
        self._rows, self._next = rows, 0
        self._early: dict[int, tuple[int, torch.Tensor]] = {}  # first row -> where they end, they
        self._hash, self._taken = blake3(), False
        self._lock = threading.Lock()

    def add(self, first: int, part: torch.Tensor) -> str | None:
        """Take in rows from the first on; return the fingerprint if these were the last missing.

        Rows that have come before are left out, if they come as they did.
        """
        with self._lock:
            if first >= self._next:
                self._early[first] = first + len(part), part
            if self._taken:  # another thread has the hash, and goes on to these
                return None
            self._taken = True
        while True:
            with self._lock:
                after = self._early.pop(self._next, None)
                if after is None:
                    self._taken = False
                    return self._hash.hexdigest() if self._next == self._rows else None
                self._next = after[0]
            self._hash.update(bytes_of(after[1]))


def fingerprint_of_file(file: Path) -> str:
    """Return the BLAKE3 hash of a file."""
    found, buffer = blake3(), memoryview(bytearray(BUFFER))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
