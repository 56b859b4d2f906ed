"""Files that appear whole or not at all, and what is said when one cannot be written.

A file is written under another name, handed to the disk, and renamed: whoever looks sees the old
content or the new one, also after the machine lost its power in between.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qframe.errors import OutputError
from qframe.memory import readable_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


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


def to_disk(path: Path, *, read_soon: bool = True) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    read_soon   whether the system is to keep it in memory as well
    """
    flags = os.O_RDONLY | (getattr(os, "O_DIRECTORY", 0) if path.is_dir() else 0)
    try:
        handle = os.open(path, flags)
    except PermissionError:  # not every system opens folders
        return
    try:
        with contextlib.suppress(OSError):  # nor does every file system know of this
            os.fsync(handle)
            if not read_soon and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def put_in_place(temporary: Path, file: Path, *, read_soon: bool = True) -> None:
    """Give a file its name, in the place of the one that has it, once it is on the disk."""
    to_disk(temporary, read_soon=read_soon)
    os.replace(temporary, file)
    to_disk(file.parent)


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
