"""What is said when memory runs out in the midst of a run: where, for how much, and what helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from qframe.errors import MemoryLimitError, QframeError
from qframe.memory import readable_bytes

UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "PiB": 50, "EiB": 60}
"""As numpy names them -> the power of two."""


@dataclass(slots=True)
class Where:
    """What a run is at.

    layer        or block
    stage        what is done to it
    calibrated   whether it takes calibration text, less of which takes less memory
    """

    layer: str = ""
    stage: str = "reading the model"
    calibrated: bool = True

    def at(self, layer: str, stage: str) -> None:
        """Say what is next."""
        self.layer, self.stage = layer, stage


@contextmanager
def memory_named(where: Where) -> Iterator[None]:
    """Raise MemoryLimitError, saying what the run was at, where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError, QframeError) as error:
        # What a network raises in its forward pass comes as the cause of a ModelError.
        found = error.__cause__ if isinstance(error, QframeError) else error
        if isinstance(error, MemoryLimitError) or not _out_of_memory(found):
            raise
        raise MemoryLimitError(_message(where, str(found))) from error


def bytes_asked(text: str) -> int | None:
    """Return how much was asked for when memory ran out, as torch or numpy say it.

    >>> bytes_asked("can't allocate memory: you tried to allocate 4096 bytes. Error code 12")
    4096
    >>> bytes_asked("Unable to allocate 2.00 MiB for an array with shape (512, 1024)")
    2097152
    """
    torch_says = re.search(r"tried to allocate (\d+) bytes", text)
    if torch_says:
        return int(torch_says[1])
    numpy_says = re.search(r"Unable to allocate ([\d.]+) (\w+) for", text)
    unit = "" if numpy_says is None else numpy_says[2].replace("bytes", "B")
    if numpy_says is None or unit not in UNITS:
        return None
    return round(float(numpy_says[1]) * (1 << UNITS[unit]))


def _out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _message(where: Where, text: str) -> str:
    asked = bytes_asked(text)
    free = readable_bytes(psutil.virtual_memory().available)
    said = f"{where.layer}: " if where.layer else ""
    said += f"out of memory while {where.stage}: "
    said += f"{free} are free" if asked is None else f"{readable_bytes(asked)} asked, {free} free"
    less = "fewer --num-calibration-samples, a smaller --max-seq-length or --threads 1 take less"
    return (
        f"{said}; {less if where.calibrated else '--threads 1 takes less'}, and qframe quantize "
        f"--dry-run estimates how much"
    )
