"""What numba compiles, once for an installation: under which name it is kept, and word of it.

Word goes to the logger "qframe.compiling", level INFO: a first record when the first kernel is not
in numba's cache, and `record.compiled`, (kernels, seconds), on one that follows the last so far. It
is a warning where numba has no place to keep anything.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

log = logging.getLogger("qframe.compiling")

_placeless = False  # whether numba has no folder to keep anything in


class _Watch(event.Listener):  # type: ignore[misc]
    """Counts compilations; one that another one asks for is part of it."""

    def __init__(self) -> None:
        self.kernels, self.seconds = 0, 0.0
        self._depth, self._began = 0, 0.0

    def on_start(self, event: Any) -> None:
        """Say so the first time."""
        if not self.kernels and not self._depth:
            log.info("compiling kernels%s", "" if _placeless else ", once for this installation")
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1

    def on_end(self, event: Any) -> None:
        """Count it."""
        self._depth -= 1
        self.kernels += 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._began
            log.info(
                "%d kernels compiled in %.1f s%s",
                self.kernels,
                self.seconds,
                "" if _placeless else "; the next run has them from numba's cache",
                extra={"compiled": (self.kernels, self.seconds)},
            )


@cache
def watch() -> None:
    """Tell of compilations from now on."""
    event.register("numba:compile", _Watch())


def kept(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function when it is called, and keep that on the disk where there is a place.

    options   of `numba.njit`
    """
    watch()
    try:
        found: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:  # of all folders that numba knows it may write to none
        _tell_of_no_place()
        found = njit(**options)(function)
    return found


def _tell_of_no_place() -> None:
    global _placeless
    if not _placeless:
        _placeless = True
        log.warning(
            "numba has no folder to keep what it compiles in, so every run compiles again; set "
            "NUMBA_CACHE_DIR to one that can be written to"
        )


def fingerprint(file: str) -> str:
    """Return what tells the sources of a file's folder from any others. Watches, too.

    numba keys its cache on disk by the file of a function alone: an edited callee in another file,
    or an edited intrinsic, would leave stale machine code behind. So this is made part of the name
    of every function that is kept.
    """
    watch()
    sources = sorted(Path(file).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
