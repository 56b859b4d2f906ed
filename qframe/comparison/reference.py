"""The full-precision network, run once: its logits are kept on disk and read back bit for bit.

Kept as float32, window by window: window * vocabulary * 4 bytes each. What does not fit the limit
is computed anew for every cell, which changes the time and nothing else. In memory they are mapped
from the file, so the system may drop them at any time.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qframe import parallel
from qframe.comparison.store import Store, key_of

FOLDER = "logits"
DISK_BYTES = 2_000_000_000
"""What the logits of a store take at most, unless told."""


class KeptLogits(nn.Module):
    """Gives the logits of a network for known windows of tokens, from disk where they are kept.

    identity     of the network, the windows and what else its logits depend on
    windows      [windows, length] int64
    network      returns the network; called when logits are needed that are not kept
    disk_bytes   what all logits in the store may take
    """

    def __init__(
        self,
        store: Store,
        identity: Mapping[str, Any],
        windows: torch.Tensor,
        network: Callable[[], nn.Module],
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        super().__init__()
        self._store, self._key, self._limit = store, key_of(identity), disk_bytes
        self._windows = windows
        self._numbers = {_name(window): i for i, window in enumerate(windows.split(1))}
        self._make = network
        self._network: nn.Module | None = None
        self._lock = threading.Lock()
        self._kept: dict[int, torch.Tensor] = {}

    def keep(self, threads: int) -> int:
        """Compute and write what is missing and fits; return how many windows are kept."""
        with self._store.claim(f"{FOLDER}-{self._key}") as work:
            missing = [i for i in range(len(self._windows)) if not self._read(i)]
            if missing and work is not None and (room := self._room(missing[0])) > 0:
                # Not all at once: what is computed waits in memory until it is written.
                for first in range(0, min(len(missing), room), threads):
                    some = missing[first : min(first + threads, room)]
                    with parallel.one_torch_thread():
                        found = parallel.spread(self._compute, some, threads)
                    for number, logits in zip(some, found, strict=True):
                        self._store.put_array(self._file(number), logits.numpy(), work)
                        self._read(number)
        return len(self._kept)

    def release(self) -> None:
        """Free the network, which comes back when it is needed."""
        self._network = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [1, length, vocabulary] for one of the windows, [1, length]."""
        number = self._numbers[_name(tokens)]
        kept = self._kept.get(number)
        return self._compute(number) if kept is None else kept

    def _compute(self, number: int) -> torch.Tensor:
        network = self._loaded()
        with torch.no_grad():
            output: Any = network(self._windows[number : number + 1])
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits.float()

    def _loaded(self) -> nn.Module:
        with self._lock:
            if self._network is None:
                self._network = self._make()
            return self._network

    def _read(self, number: int) -> bool:
        """Map a window's logits, unless they are mapped; return whether they are kept."""
        if number not in self._kept:
            values = self._store.get_array(self._file(number))
            length = self._windows.shape[1]
            if values is None or len(values) % length:
                return False
            self._kept[number] = torch.from_numpy(values).view(1, length, -1)
        return True

    def _room(self, number: int) -> int:
        """Return how many more windows fit; the logits of other references make room first."""
        each = 4 * self._compute(number).numel()
        folder = self._store.path / FOLDER
        for other in sorted(folder.iterdir()) if folder.is_dir() else []:
            if other.name != self._key and self._limit < _bytes(folder) + each * len(self._windows):
                shutil.rmtree(other, ignore_errors=True)
        return (self._limit - _bytes(folder)) // each

    def _file(self, number: int) -> str:
        return f"{FOLDER}/{self._key}/{number:04d}.f32"


def _name(window: torch.Tensor) -> bytes:
    return hashlib.sha256(window.contiguous().numpy().tobytes()).digest()


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.f32"))
