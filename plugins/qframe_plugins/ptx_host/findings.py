"""What can be found in a run, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "out-of-bounds",  # an access to memory that belongs to no argument, or to none of that size
    "misaligned",  # an address that is no multiple of the access's size
    "uninitialized",  # shared memory, or an argument marked `Fresh`, read before it is written
    "race-with-write",  # another thread wrote there, and nothing orders the two
    "race-with-read",  # another thread read there, and nothing orders the two
    "missing-wait",  # bytes that a cp.async is to deliver, which has not been waited for
    "read-only",  # a store to an array that must not be written
    "divergent-barrier",  # threads wait at different instructions, or some have ended
    "bad-mask",  # a mask that leaves the lane itself out, or names lanes that do not exist
    "ended-lane",  # a mask that names a lane that has ended
    "absent-lane",  # a shuffle from a lane that takes no part
    "deadlock",  # a wait for threads that never come
    "bad-barrier",  # a count that is no multiple of 32, or a number above 15
)
KIND = {name: number for number, name in enumerate(KINDS)}
SLOTS = 8  # count, block, thread, where, offset, other thread + 1, its site + 1, bytes
SHARED, LOCAL, NOWHERE = -1, -2, -3
"""`where`, if it is not the number of a buffer."""


@dataclass(frozen=True)
class Finding:
    """One mistake at one instruction: the first time, and how often."""

    kind: str
    kernel: str
    instruction: str
    place: str
    count: int
    block: int
    thread: int
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.kernel}, {self.place}: {self.instruction!r}; {self.detail}"
            f"first in block {self.block}, thread {self.thread}; {self.count} times"
        )
