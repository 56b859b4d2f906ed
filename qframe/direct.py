"""Files that are used past the memory in which the system keeps files, where it can.

The system would have to find and clear that memory first, which can take longer than reading or
writing; and what is read from it may not be what is on the disk. Not every file system can do
without: some say so when a file is opened, others when it is used.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

BLOCK = 4096  # bytes: places in the file and in memory are multiples; no disk has larger blocks
_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP}


def opened(file: str | Path, flags: int, mode: int = 0o600) -> int:
    """Open a file like `os.open`, past memory where that can be. Raises OSError."""
    try:
        return os.open(file, flags | _DIRECT, mode)
    except OSError as error:
        if not _DIRECT or error.errno not in _REFUSALS:
            raise
        return os.open(file, flags, mode)


def through_memory(handle: int) -> bool:
    """Use a file as ever from now on; return whether it was not so before. Raises OSError."""
    if not _DIRECT:
        return False
    import fcntl  # which systems have that have O_DIRECT

    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


def cannot(error: OSError, handle: int) -> bool:
    """Whether an error says that a file cannot be used so; from now on it is used as ever."""
    return error.errno in _REFUSALS and through_memory(handle)
