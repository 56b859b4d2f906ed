"""Exact counters of a run: instructions, sectors of global memory, conflicts of banks, bytes.

A request is one instruction of a warp: the accesses of its lanes that come together. Lanes come
together by their number of executions of that instruction, as on a GPU that reconverges.

Source: CUDA C++ Best Practices Guide, 10.2 (sectors of 32 bytes, 32 banks of 4 bytes).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.arguments import Buffer
from qframe_plugins.ptx_host.errors import LaunchError
from qframe_plugins.ptx_host.flow import Program
from qframe_plugins.ptx_host.forms import Instruction

ENTRIES = 1 << 20  # accesses of one block that are kept
SECTOR, BANKS, WORD = 32, 32, 4


@dataclass(frozen=True)
class Access:
    """What one instruction asked of memory, in all.

    `units` are sectors of global memory, or turns of the banks of shared memory; `least` is what
    the same bytes would need at best.
    """

    instruction: str
    place: str
    space: str
    requests: int
    bytes: int
    units: int
    least: int


@dataclass(frozen=True)
class Counters:
    """Counters of a whole run. `instructions` counts threads' executions, by opcode."""

    instructions: dict[str, int]
    accesses: tuple[Access, ...]
    bytes_read: dict[str, int]
    bytes_written: dict[str, int]


class Recorder:
    """Takes what the code of a block has written down."""

    def __init__(self, program: Program, row: np.ndarray[Any, Any], buffers: list[Buffer]) -> None:
        self.program, self.row, self.buffers = program, row, buffers
        self.counts = np.zeros(len(program.code), np.int64)
        self.trace = np.empty((ENTRIES, layout.TRACE_SLOTS), np.int64)
        row[layout.COUNTS] = self.counts.ctypes.data
        row[layout.TRACE], row[layout.TRACE_MOST] = self.trace.ctypes.data, ENTRIES
        self.sums: dict[tuple[int, str], np.ndarray[Any, Any]] = {}
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def take(self, shared: int) -> None:
        """Add the block that has run."""
        count = int(self.row[layout.TRACE_COUNT])
        self.row[layout.TRACE_COUNT] = 0
        if count > ENTRIES:
            raise LaunchError(
                f"{self.program.name}: a block makes {count} accesses, counters keep {ENTRIES}; "
                "count a smaller problem"
            )
        thread, site, address, code = self.trace[:count].T
        size, space = code & 255, code >> 8
        key = thread * len(self.program.code) + site
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        turn = np.empty(count, np.int64)
        lengths = np.diff(np.append(starts, count))
        turn[order] = np.arange(count) - np.repeat(starts, lengths)
        total = int(self.row[layout.TOTAL])
        inside = (address >= shared) & (address < shared + total)
        in_shared = (space == layout.SPACES["shared"]) | ((space == 1) & inside)
        for number in np.unique(site):
            here = site == number
            for name, chosen in (("shared", here & in_shared), ("global", here & ~in_shared)):
                chosen = chosen & (space != layout.SPACES["local"])
                if chosen.any():
                    warp = thread[chosen] >> 5
                    self.add(int(number), name, warp, turn[chosen], address[chosen],
                             int(size[chosen][0]))  # fmt: skip

    def add(
        self,
        site: int,
        space: str,
        warp: np.ndarray[Any, Any],
        turn: np.ndarray[Any, Any],
        address: np.ndarray[Any, Any],
        size: int,
    ) -> None:
        """Add the accesses of one instruction in one block."""
        unit = WORD if space == "shared" else SECTOR
        _, request = np.unique(np.stack([warp, turn]), axis=1, return_inverse=True)
        request = request.reshape(-1)
        requests = int(request.max()) + 1
        touched = np.concatenate(
            [
                np.stack([request, (address + offset) // unit])
                for offset in range(0, max(size, 1), min(unit, size))
            ],
            axis=1,
        )
        touched = np.unique(touched, axis=1)
        if space == "global":
            units = touched.shape[1]
        else:
            banks = np.zeros((requests, BANKS), np.int64)
            np.add.at(banks, (touched[0], touched[1] % BANKS), 1)
            units = int(banks.max(axis=1).sum())
        distinct = np.unique(np.stack([request, address]), axis=1)[0]
        bytes_each = np.bincount(distinct, minlength=requests) * size
        width = SECTOR if space == "global" else BANKS * WORD
        least = int((-(-bytes_each // width)).sum())
        sums = self.sums.setdefault((site, space), np.zeros(4, np.int64))
        sums += [requests, address.size * size, units, least]
        if space == "global":
            self.by_buffer(site, address, size)

    def by_buffer(self, site: int, address: np.ndarray[Any, Any], size: int) -> None:
        """Add the bytes to what is read of, or written to, each buffer."""
        piece = self.program.code[site]
        name = piece.form.name if isinstance(piece, Instruction) else ""
        for buffer in self.buffers:
            inside = (address >= buffer.address) & (address < buffer.address + buffer.memory.size)
            many = int(inside.sum()) * size
            if many and name not in ("st", "red"):
                self.read[buffer.name] += many
            if many and name in ("st", "red", "atom"):
                self.written[buffer.name] += many

    def counters(self) -> Counters:
        """Return the sums."""
        mix: Counter[str] = Counter()
        accesses = []
        for site, piece in enumerate(self.program.code):
            if isinstance(piece, Instruction):
                mix[piece.statement.opcode] += int(self.counts[site])
                for space in ("global", "shared"):
                    if (site, space) in self.sums:
                        numbers = map(int, self.sums[site, space])
                        text, place = piece.statement.text, str(piece.statement.place)
                        accesses.append(Access(text, place, space, *numbers))
        counted = {opcode: count for opcode, count in mix.items() if count}
        return Counters(counted, tuple(accesses), dict(self.read), dict(self.written))
