"""Memory that was freed, and that the C library keeps for later: handed back to the system.

glibc keeps what is freed in pieces, and a run that frees a layer before it takes the next one would
grow with the number of layers all the same. Asked for, it gives back every page that is free.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import cache


def hand_back() -> None:
    """Hand free memory back to the system, where the C library can be asked to."""
    _trim()(0)


def tidy_up() -> None:
    """Collect garbage that Python would collect some time later, and hand free memory back.

    Importing libraries leaves a good deal of it.
    """
    gc.collect()
    hand_back()


@cache
def _trim() -> Callable[[int], object]:
    """Return what does it: glibc's malloc_trim, or nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return lambda _: None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim  # type: ignore[no-any-return]
