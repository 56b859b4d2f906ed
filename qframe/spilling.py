"""Activations of chunks that wait, put on the disk where together they take too much memory.

While a chunk runs, a dispatch mode takes down which storages its operations make. When it has to
wait, and what all waiting chunks hold is more than the budget, the numbers of those that are still
alive go into a file, one after another, and their storages are emptied; before it goes on they are
filled again. Tensors that are views of one storage stay that, so a forward pass never notices, and
the bits are the same ones. Parameters, buffers, inputs and whatever else the chunk has not made
itself stay where they are.

What a chunk has made may be read by others: a module may keep it. So whoever runs operations does
it under the mode, which fills what is empty before it is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from qframe.errors import OutputError
from qframe.writing import written

Storage = torch.UntypedStorage


@dataclass(slots=True)
class _Chunk:
    """What is known of a chunk.

    made      address of a storage -> weak references to the tensors that it has had
    places    storages that are in its file -> where, and how many bytes
    waiting   bytes that it holds in memory while it waits
    """

    made: dict[int, list[weakref.ref[torch.Tensor]]] = field(default_factory=dict)
    places: dict[int, tuple[Storage, int, int]] = field(default_factory=dict)
    waiting: int = 0


class Spill:
    """Keeps the activations of waiting chunks within a budget; use as a context manager.

    budget   bytes that waiting chunks may hold in memory together
    folder   where files are made, in a folder of their own that is removed in the end

    Raises OutputError, naming the file, where there is no room for one.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self._budget, self._parent = budget, folder
        self._folder: Path | None = None
        self._chunks: dict[int, _Chunk] = {}
        self._owner: dict[int, int] = {}  # address of a storage -> the chunk that made it
        self._lock = threading.RLock()
        self.spilled = 0  # bytes that were written
        self.most = 0  # bytes that waiting chunks held in memory at the same time

    def __enter__(self) -> Spill:
        with written(self._parent):
            self._folder = Path(tempfile.mkdtemp(prefix="activations.", dir=self._parent))
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def running(self, number: int | None = None) -> Iterator[None]:
        """Take down what a chunk makes in this thread; with None, only fill what is read."""
        if number is not None:
            with self._lock:
                self._chunks[number] = _Chunk()
        try:
            with _Watching(self, number):
                yield
        finally:
            if number is not None:
                self._forget(number)

    def park(self, number: int) -> None:
        """Account for a chunk that is about to wait; put what it holds on the disk if need be."""
        with self._lock, _disable_current_modes():
            chunk = self._chunks[number]
            alive = _alive(chunk)
            held = sum(storage.nbytes() for storage in alive.values())
            waiting = sum(each.waiting for each in self._chunks.values())
            if waiting + held <= self._budget:
                chunk.waiting = held
                self.most = max(self.most, waiting + held)
            else:
                self._write(number, chunk, alive)

    def wake(self, number: int) -> None:
        """Fill the storages of a chunk again."""
        with self._lock, _disable_current_modes():
            chunk = self._chunks[number]
            chunk.waiting = 0
            for address in list(chunk.places):
                self._fill(number, chunk, address)

    def read(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of a waiting chunk: itself, or where it is on the disk, a copy."""
        with self._lock:
            chunk = self._chunks.get(number)
            address = tensor.untyped_storage()._cdata
            if chunk is None or address not in chunk.places:
                return tensor
            _, start, size = chunk.places[address]
            storage = Storage(size)
            self._read(number, start, storage)
        found = torch.empty(0, dtype=tensor.dtype)
        return found.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    # What the mode asks --------------------------------------------------------------------------

    def about_to_read(self, number: int | None, given: Iterable[int]) -> None:
        """Fill what is empty of the operands' storages; what others made is theirs no more.

        It stays in memory then, as nobody knows when it is read next.

        number   of the chunk that reads; None for none
        given    addresses
        """
        with self._lock:
            for address in given:
                owner = self._owner.get(address, number)
                if owner is None or owner == number:
                    continue
                del self._owner[address]
                chunk = self._chunks.get(owner)
                if chunk is not None:
                    if address in chunk.places:
                        self._fill(owner, chunk, address)
                    chunk.made.pop(address, None)

    def has_made(self, number: int, given: Collection[int], result: Any) -> None:
        """Take down the tensors of a result: new storages, and views of those that are known.

        given   addresses of the operands' storages. An address may have been that of another
                storage before, which is gone: then none of its tensors is there any more.
        """
        with self._lock:
            made = self._chunks[number].made
            for tensor in _tensors(result):
                address = tensor.untyped_storage()._cdata
                known = made.get(address, [])
                if address not in given:
                    made[address] = [weakref.ref(tensor)]
                    self._owner[address] = number
                elif any(each() is not None for each in known):
                    known.append(weakref.ref(tensor))

    # Files ---------------------------------------------------------------------------------------

    def _file(self, number: int) -> Path:
        if self._folder is None:
            raise OutputError("activations are put on the disk only while a run is on")
        return self._folder / str(number)

    def _write(self, number: int, chunk: _Chunk, alive: Mapping[int, Storage]) -> None:
        file = self._file(number)
        with written(file, sum(storage.nbytes() for storage in alive.values())):
            start = 0
            with file.open("wb", buffering=0) as stream:
                for address, storage in alive.items():
                    size = storage.nbytes()
                    data = _bytes_of(storage)
                    while data:
                        data = data[stream.write(data) :]
                    chunk.places[address] = storage, start, size
                    start += size
            # Only now: a disk that is full leaves everything in memory.
            for storage in alive.values():
                storage.resize_(0)
            self.spilled += start

    def _fill(self, number: int, chunk: _Chunk, address: int) -> None:
        storage, start, size = chunk.places.pop(address)
        storage.resize_(size)
        self._read(number, start, storage)

    def _read(self, number: int, start: int, storage: Storage) -> None:
        file = self._file(number)
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            data = _bytes_of(storage)
            while data:
                count = stream.readinto(data)
                if not count:
                    raise OutputError(
                        f"{file} ended while activations were read from it; leave the folder "
                        f"alone while the run is on"
                    )
                data = data[count:]

    def _forget(self, number: int) -> None:
        with self._lock:
            self._chunks.pop(number, None)
            with contextlib.suppress(OSError):
                os.unlink(self._file(number))


class _Watching(TorchDispatchMode):
    """Takes down the storages that operations make, and has those filled that they read."""

    def __init__(self, spill: Spill, number: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spill, self._number = spill, number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        self._spill.about_to_read(self._number, given)
        result = func(*args, **kwargs)
        if self._number is not None:
            self._spill.has_made(self._number, given, result)
        return result


def _alive(chunk: _Chunk) -> dict[int, Storage]:
    """Return address -> storage of what the chunk has made and still holds; forget the others."""
    found = {}
    for address, tensors in list(chunk.made.items()):
        there = [tensor for each in tensors if (tensor := each()) is not None]
        if not there:
            del chunk.made[address]
            continue
        chunk.made[address] = [weakref.ref(tensor) for tensor in there]
        storage = there[0].untyped_storage()
        if storage.nbytes() and storage.resizable() and not storage.is_shared():
            found[address] = storage
    return found


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested values that are in the processor's memory."""
    for each in tree_iter(values):
        if isinstance(each, torch.Tensor) and each.device.type == "cpu":
            yield each


def _bytes_of(storage: Storage) -> memoryview:
    """Return the bytes of a storage; not through numpy, with which it could not be emptied."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
