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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qframe import direct
from qframe.errors import OutputError
from qframe.memory import readable_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_AT_ONCE = 4 << 20  # bytes that are written at a time past the system's memory


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


class Unread:
    """A file that is written from its beginning on and not read soon.

    It is written past the memory in which the system keeps files (`qframe.direct`), where it can.
    All but `close` raise OSError.
    """

    def __init__(self, file: Path) -> None:
        self.handle = direct.opened(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        # It begins with a page, as what is written so has to.
        self._buffer, self._filled = memoryview(mmap.mmap(-1, _AT_ONCE)), 0

    def write(self, part: memoryview) -> None:
        """Append bytes, some of which wait until there are enough of them."""
        while part:
            count = min(len(part), _AT_ONCE - self._filled)
            self._buffer[self._filled : self._filled + count] = part[:count]
            part, self._filled = part[count:], self._filled + count
            if self._filled == _AT_ONCE:
                self._write_out()

    def finish(self) -> None:
        """Write what waits; from now on the file is one like others, and `handle` can be used."""
        direct.through_memory(self.handle)
        self._write_out()

    def close(self) -> None:
        """Let the file go, without what waits."""
        os.close(self.handle)

    def _write_out(self) -> None:
        part, self._filled = self._buffer[: self._filled], 0
        while part:
            try:
                count = os.write(self.handle, part)
            except OSError as error:
                if not direct.cannot(error, self.handle):
                    raise
                continue
            part = part[count:]
            if len(part) % direct.BLOCK:  # the disk was full, or the file as long as it may be
                direct.through_memory(self.handle)


def write_unread(file: Path, parts: Iterable[memoryview]) -> None:
    """Write a file that is not read soon. Raises OSError.

    parts   the content, one after the other
    """
    unread = Unread(file)
    try:
        for part in parts:
            unread.write(part)
        unread.finish()
    finally:
        unread.close()


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
