"""A folder of finished results, one file each, that any number of runs may share and be killed in.

An entry is found by the hash of its *identity*: everything that determines it. It is written under
a temporary name and renamed, holds its own hash, and is trusted only where hash and identity agree;
anything else counts as missing, with an event, and is made again.

    cells/KEY.json, reference/KEY.json, ...   entries
    logits/KEY/0000.f32                       arrays
    work/NAME/, work/NAME.lock                what is being made, and who makes it

A lock is the system's (flock), so it ends with its process however that ends; what a killed process
left in `work` is removed by the next one. Where the system has no flock, runs that share a store at
the same time may do the same work twice, and no more than that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qframe.contracts import Event
from qframe.errors import OutputError
from qframe.report.layers import words_for_infinities

try:
    import fcntl
except ImportError:  # not every system has locks of this kind
    fcntl = None  # type: ignore[assignment]

STORE_VERSION = 1
_KEY_LENGTH = 32  # hexadecimal digits: 128 bits, so that keys never meet by chance
_HASH_BYTES = 32  # of a sha256, in front of an array
_PIECE = 1 << 20  # bytes that are hashed at a time


class Store:
    """A folder of entries.

    events   what was found damaged, by this object

    Raises OutputError when the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        try:
            (path / "work").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be the folder of a comparison: {error.strerror}; give another "
                f"with -o"
            ) from None
        self._clear()

    def get(self, kind: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the content of an entry; None where there is none, or none to be trusted."""
        file = self.file(kind, identity)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._damaged(file, f"cannot be read: {error}")
            return None
        try:
            entry = json.loads(text)
        except json.JSONDecodeError as error:
            self._damaged(file, f"is no JSON: {error}")
            return None
        if not isinstance(entry, dict) or entry.pop("sha256", None) != digest(entry):
            self._damaged(file, "is not what was written: its hash differs")
            return None
        if entry.get("identity") != plain(identity):
            self._damaged(file, "is the result of something else")
            return None
        content: dict[str, Any] = entry["content"]
        return content

    def put(
        self, kind: str, identity: Mapping[str, Any], content: Mapping[str, Any], work: Path
    ) -> dict[str, Any]:
        """Write an entry, and return its content as `get` will.

        work   the folder of the claim under which it was made
        """
        entry = {"store": STORE_VERSION, "identity": plain(identity), "content": plain(content)}
        text = json.dumps({**entry, "sha256": digest(entry)}, indent=1) + "\n"
        self._replace(self.file(kind, identity), text.encode(), work)
        kept: dict[str, Any] = entry["content"]
        return kept

    def file(self, kind: str, identity: Mapping[str, Any]) -> Path:
        """Return where an entry lies."""
        return self.path / kind / f"{key_of(identity)}.json"

    def count(self, kind: str) -> int:
        """Return how many entries of a kind there are."""
        return len(list((self.path / kind).glob("*.json")))

    def has(self, kind: str, key: str) -> bool:
        """Return whether there is an entry of this name, whatever is in it."""
        return bool(key) and (self.path / kind / f"{key}.json").is_file()

    def write_text(self, name: str, text: str) -> Path:
        """Write a file that is made of entries, such as a report."""
        with self.claim(f"file-{name}") as work:
            if work is not None:
                self._replace(self.path / name, text.encode(), work)
        return self.path / name

    # Arrays ------------------------------------------------------------------------------------

    def put_array(self, name: str, values: npt.NDArray[np.float32], work: Path) -> None:
        """Write an array of float32 numbers, its hash in front.

        name   of its file, below the store's folder
        """
        data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        temporary = self._temporary(work)
        try:
            with temporary.open("wb") as stream:
                stream.write(_hash_of(data))
                stream.write(data.data)
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise _not_written(self.path / name, error) from None

    def get_array(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return an array, 1-D and mapped from its file; None for one that is not whole."""
        file = self.path / name
        try:
            stored = np.memmap(file, np.uint8, mode="c")  # what is written to it stays in memory
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            self._damaged(file, f"cannot be read: {error}")
            return None
        data = stored[_HASH_BYTES:]
        if len(data) % 4 or stored[:_HASH_BYTES].tobytes() != _hash_of(data):
            self._damaged(file, "is not what was written: its hash differs")
            return None
        return data.view(np.float32)

    # Claims ------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[Path | None]:
        """Hold the right to make something, with an empty folder to work in.

        wait   until another process is done; else None is given while it is not
        """
        lock = self.path / "work" / f"{name}.lock"
        handle = _lock(lock, wait=wait)
        if handle is None:
            yield None
            return
        work = lock.with_suffix("")
        try:
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            try:
                work.mkdir()
            except OSError as error:
                raise _not_written(work, error) from None
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(handle)

    def _clear(self) -> None:
        """Remove what killed processes left; what another process works on is locked."""
        for lock in sorted((self.path / "work").glob("*.lock")):
            with self.claim(lock.stem, wait=False):
                pass

    def _replace(self, file: Path, data: bytes, work: Path) -> None:
        temporary = self._temporary(work)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, file)
        except OSError as error:
            raise _not_written(file, error) from None

    def _temporary(self, work: Path) -> Path:
        return work / "new.tmp"

    def _damaged(self, file: Path, what: str) -> None:
        message = f"{file.relative_to(self.path)} {what}; it is made again"
        event = Event(kind="damaged entry", layer="", message=message)
        if event not in self.events:
            self.events.append(event)


def plain(value: Any) -> Any:
    """Return a value as it comes back from a JSON file."""
    return json.loads(json.dumps(words_for_infinities(value), allow_nan=False))


def digest(value: Any) -> str:
    """Return the sha256 of plain values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(identity: Mapping[str, Any]) -> str:
    """Return the name of an entry."""
    return digest(plain(identity))[:_KEY_LENGTH]


def _hash_of(data: npt.NDArray[np.uint8]) -> bytes:
    found = hashlib.sha256()
    for first in range(0, len(data), _PIECE):
        found.update(np.ascontiguousarray(data[first : first + _PIECE]).data)
    return found.digest()


def _lock(file: Path, *, wait: bool) -> int | None:
    """Return a handle that holds a lock, None when another has it.

    Whoever is done removes the file, so a lock counts only on the file that has the name.
    """
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _not_written(file, error) from None
        if fcntl is None:
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_ino == file.stat().st_ino:
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        os.close(handle)


def _not_written(file: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {file}: {error.strerror}")
