"""Fingerprints, by which tensors and files are known again.

Those of tensors are BLAKE3 (O'Connor et al., https://github.com/BLAKE3-team/BLAKE3-specs), which is
as safe as SHA-256 and several times as fast: a run takes one of everything that it reads, and
several of what it writes. Those of files that a run leaves are SHA-256, which every system has a
command for.
"""

from __future__ import annotations

import hashlib
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
    import torch

    found = blake3()
    for piece in pieces:
        found.update(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint_of_file(file: Path) -> str:
    """Return the BLAKE3 hash of a file."""
    found, buffer = blake3(), memoryview(bytearray(BUFFER))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
