"""Memory that was freed, and that the C library keeps for later: handed back to the system.

glibc keeps what is freed in pieces, more of it the longer a run takes, so that a network of many
layers would take more than one of few though each layer is let go before the next one comes. It can
be told to hand back large pieces at once, and asked for all pages that are free. Other C libraries
are left alone.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psutil

LARGE = 1 << 20  # bytes that are handed back at once; smaller pieces are faster to use again
LARGER = 1 << 22  # bytes, where nothing stays between pieces that come and go
SMALL = 1 << 14  # bytes, where pieces are not used at all
WORTH = 32 << 20  # bytes that a process has grown by when it is worth looking for garbage
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_handing_back = False  # whether large pieces are handed back at once
_tidied = -WORTH  # bytes that the process had after the last time; it has not been done yet


def hand_back_large() -> None:
    """From now on, let the C library hand back large pieces as soon as they are freed.

    Else it takes the size of what was freed last, up to 32 MiB, as one to keep. That is for the
    whole process, and for its speed and size alone.
    """
    global _handing_back
    if _library() is not None:
        _library().mallopt(_MMAP_THRESHOLD, LARGE)
        _library().mallopt(_TRIM_THRESHOLD, LARGE)
        _handing_back = True


@contextmanager
def keep_more() -> Iterator[None]:
    """Let the C library keep larger pieces meanwhile, where it was told which to hand back.

    Only where all that is made of layer after layer is let go: among pieces that stay, such as
    activations that wait, larger holes would be left.
    """
    if not _handing_back:
        yield
        return
    _library().mallopt(_MMAP_THRESHOLD, LARGER)
    _library().mallopt(_TRIM_THRESHOLD, LARGER)
    try:
        yield
    finally:
        hand_back_large()


@contextmanager
def hand_back_small() -> Iterator[None]:
    """Do the same with smaller pieces meanwhile, where it is done with large ones.

    Of pieces that come and go among objects that stay, holes are left which nothing fits into.
    """
    if not _handing_back:
        yield
        return
    _library().mallopt(_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        _library().mallopt(_MMAP_THRESHOLD, LARGE)


def hand_back() -> None:
    """Hand free memory back to the system, where the C library can be asked to."""
    if _library() is not None:
        _library().malloc_trim(0)


def tidy_up() -> None:
    """Collect garbage that Python would collect some time later, and hand free memory back.

    Importing libraries leaves a good deal of it, and so does a network that was used. Looking for
    it takes a while: where the process is hardly larger than after the last time, it is left out.
    """
    global _tidied
    process = psutil.Process()
    if process.memory_info().rss < _tidied + WORTH:
        return
    gc.collect()
    hand_back()
    _tidied = process.memory_info().rss


@cache
def _library() -> Any:
    """Return glibc; None where the C library is another one."""
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    if found is None or not all(hasattr(found, name) for name in ("malloc_trim", "mallopt")):
        return None
    found.malloc_trim.argtypes = [ctypes.c_size_t]
    return found
