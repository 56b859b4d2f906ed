"""Fingerprints: the sha256 of files and of tensors' bytes, by which both are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Origin:
    """The weight that a layer was made of, as it was stored.

    dtype    as safetensors names it
    sha256   of its bytes
    """

    dtype: str
    sha256: str


def sha256(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes, row by row and little-endian, as files have them."""
    return fingerprint_of([tensor])


def fingerprint_of(pieces: Iterable[torch.Tensor]) -> str:
    """Return the same of a tensor that comes some of its rows at a time."""
    import torch

    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
