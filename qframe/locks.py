"""A lock on a folder that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qframe.errors import LockedError
from qframe.writing import written

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which others may read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _try_lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked_folder(folder: Path, what: str) -> Iterator[None]:
    """Make a folder that is this process's alone; it is removed if nothing is in it in the end.

    what   the folder is for, in messages

    Raises LockedError, naming process and machine, where another run has it: in this process, in
    another, and on another machine where the file system passes locks on. OutputError where it
    cannot be made.
    """
    file = folder / "lock"
    with written(folder):
        handle = _take(folder, file, what)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [path.name for path in folder.iterdir()] == [file.name]:
                file.unlink()  # before the lock ends, or it would be that of the next run
                folder.rmdir()
        os.close(handle)


def _take(folder: Path, file: Path, what: str) -> int:
    """Return a handle that holds the lock.

    Whoever is done removes the file, so a lock counts only on the file that has the name.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another run has just removed the folder
            continue
        try:
            _try_lock(handle)
            if os.fstat(handle).st_ino == file.stat().st_ino:
                return handle
        except (BlockingIOError, PermissionError):
            said = os.read(handle, 1000).decode(errors="replace").split()
            os.close(handle)
            who = f"process {said[0]} on {said[1]}" if len(said) == 2 else "another process"
            raise LockedError(
                f"{what} is being written by {who}; wait for it to end, stop it, or choose "
                f"another folder"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
