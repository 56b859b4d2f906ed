"""Files that appear whole or not at all, and what is said when one cannot be written.

A file is written under another name, handed to the disk, and renamed: whoever looks sees the old
content or the new one, also after the machine lost its power in between.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qframe.errors import OutputError
from qframe.memory import readable_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_SO = {errno.EINVAL, errno.EOPNOTSUPP}  # files, or a length, cannot be written past memory
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_AT_ONCE = 4 << 20  # bytes that are written at a time past the system's memory
_BLOCK = 4096  # bytes of which that has to be a multiple: no disk has larger blocks


@contextmanager
def written(file: Path, size: int | None = None) -> Iterator[None]:
    """Raise OutputError, naming the file, for what the system refuses meanwhile.

    file   that is written, or the folder of several
    size   bytes that it takes; None where that is not known
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(_objection(file, error, size)) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file. Raises OutputError."""
    with written(file):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    flags = os.O_RDONLY | (getattr(os, "O_DIRECTORY", 0) if path.is_dir() else 0)
    try:
        handle = os.open(path, flags)
    except PermissionError:  # not every system opens folders
        return
    try:
        with contextlib.suppress(OSError):  # nor does every file system know of this
            os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(temporary: Path, file: Path) -> None:
    """Give a file its name, in the place of the one that has it, once it is on the disk."""
    to_disk(temporary)
    os.replace(temporary, file)
    to_disk(file.parent)


def write_unread(file: Path, parts: Sequence[memoryview]) -> None:
    """Write a file that is not read soon: past the memory in which the system keeps files.

    The system would have to find and clear that first, which can take longer than writing. Where it
    cannot write so, it writes as ever. Raises OSError.

    parts   the content, one after the other
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        handle = os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o600)
        try:
            _write_blocks(handle, parts)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
        with file.open("wb", buffering=0) as stream:
            for part in parts:
                _write_all(stream.fileno(), part)


def _write_blocks(handle: int, parts: Sequence[memoryview]) -> None:
    """Write to a file in whole blocks, from memory that begins with a page, and cut it then."""
    buffer, filled = memoryview(mmap.mmap(-1, _AT_ONCE)), 0
    for part in parts:
        rest = part
        while rest:
            count = min(len(rest), _AT_ONCE - filled)
            buffer[filled : filled + count] = rest[:count]
            rest, filled = rest[count:], filled + count
            if filled == _AT_ONCE:
                _write_all(handle, buffer)
                filled = 0
    _write_all(handle, buffer[: -(-filled // _BLOCK) * _BLOCK])
    os.ftruncate(handle, sum(map(len, parts)))


def _write_all(handle: int, part: memoryview) -> None:
    while part:
        part = part[os.write(handle, part) :]


def _objection(file: Path, error: OSError | SafetensorError, size: int | None) -> str:
    code = error.errno if isinstance(error, OSError) else _code_in(str(error))
    where = getattr(error, "filename2", None) or getattr(error, "filename", None) or file
    said = f"cannot write {where}: {error if code is None else os.strerror(code)}"
    if code in _FULL:
        takes = "" if size is None else f"it takes {readable_bytes(size)}, and "
        said += f"; {takes}{readable_bytes(_free(file))} are free there; make room"
    if code in _FORBIDDEN:
        said += "; choose a place that you may write to"
    return said


def _code_in(text: str) -> int | None:
    """Return the number of the system's error that safetensors tells of."""
    found = re.search(r"os error (\d+)", text)
    return None if found is None else int(found[1])


def _free(path: Path) -> int:
    """Return the free bytes of the file system that a path is on, or would be."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free
