"""The checker: looks at every access to memory before it is made.

For every byte it keeps who stored there last, two threads that have read it and two that have
changed it by atomics, with the time: the number of barriers of the whole block so far, and a clock
of the thread. Two accesses are ordered if a barrier of the block lies between them, or if the later
thread has met the earlier one since (`bar.warp.sync`, barriers of some threads): vector clocks, as
in FastTrack, and exact up to the readers, of which two are remembered. Atomics race with what is no
atomic. Lanes of a warp may store one value at one place by one instruction, as compilers let them.
That blocks are ordered by atomics and fences is not followed.

Source: Flanagan and Freund, FastTrack: efficient and precise dynamic race detection, PLDI 2009.
"""

from __future__ import annotations

from typing import Any

from numba import cfunc, int64, types

from qframe_plugins.ptx_host.findings import KIND, LOCAL, NOWHERE, SHARED, SLOTS
from qframe_plugins.ptx_host.layout import (
    ARRIVAL,
    ATOMIC,
    BLOCK,
    EPOCH,
    ISSUE,
    LOAD,
    SPACES,
    STATE,
    STORE,
    STORED,
    THREAD,
)
from qframe_plugins.ptx_host.layout import LOCAL as LOCAL_SLOT
from qframe_plugins.ptx_host.layout import SHARED as SHARED_SLOT
from qframe_plugins.ptx_host.raw import FINGERPRINT, at, compiled, put

# A cell: who stored there last (at 0), when, at which site + 1; two threads that have read it and
# two that have changed it by atomics, each with the time; and whose copy is on its way there.
CELL, PENDING_SLOT = 12, 11
WRITE_TIME, WRITE_SITE, READERS, ATOMICS = 1, 2, 3, 7
BUFFER = 4  # begin, end, cells, flags
READ_ONLY, IS_FRESH = 1, 2

# The state: where its parts are.
BUFFERS, BUFFER_COUNT, FOUND, SITES = 0, 1, 2, 3
SHARED_CELLS, SHARED_SIZE, LOCAL_SIZE, CLOCKS, THREADS = 4, 5, 6, 7, 8
STATE_SLOTS = 9

OUT, MISALIGNED, UNSET = KIND["out-of-bounds"], KIND["misaligned"], KIND["uninitialized"]
WITH_WRITE, WITH_READ = KIND["race-with-write"], KIND["race-with-read"]
PENDING, CONSTANT = KIND["missing-wait"], KIND["read-only"]
IN_SHARED, IN_LOCAL, GENERIC = SPACES["shared"], SPACES["local"], SPACES[""]


@compiled
def note(
    state: Any, kind: Any, site: Any, block: Any, thread: Any, where: Any, offset: Any, other: Any,
    other_site: Any, size: Any,
) -> None:  # fmt: skip
    """Write a finding into the table, found[kind, site]."""
    entry = at(state + 8 * FOUND) + (kind * at(state + 8 * SITES) + site) * SLOTS * 8
    if at(entry) == 0:
        put(entry + 8, block)
        put(entry + 16, thread)
        put(entry + 24, where)
        put(entry + 32, offset)
        put(entry + 40, other)
        put(entry + 48, other_site)
        put(entry + 56, size)
    put(entry, at(entry) + 1)


@compiled
def ordered(state: Any, other: Any, time: Any, me: Any, epoch: Any, in_shared: Any) -> Any:
    """Return whether an access of `other` (0: nobody) at `time` is before what `me` does now."""
    if other == 0 or other == me:
        return True
    threads = at(state + 8 * THREADS)
    if (other - 1) // threads != (me - 1) // threads:
        return in_shared  # another block's shared memory is another one
    if time >> 32 < epoch:
        return True
    clock = at(state + 8 * CLOCKS) + ((me - 1) % threads * threads + (other - 1) % threads) * 8
    return at(clock) >= time & 0xFFFFFFFF


@compiled
def byte_at(address: Any) -> Any:
    """Return the byte at an address."""
    return (at(address & ~7) >> (8 * (address & 7))) & 255


@compiled
def clash(state: Any, pair: Any, me: Any, epoch: Any, in_shared: Any) -> Any:
    """Return one of two remembered threads that is not ordered before `me`, or 0."""
    for slot in (pair, pair + 16):
        if not ordered(state, at(slot), at(slot + 8), me, epoch, in_shared):
            return at(slot)
    return int64(0)


@compiled
def remember(state: Any, pair: Any, me: Any, now: Any, in_shared: Any) -> None:
    """Remember one more thread, in the place of one that is ordered before it if there is one.

    Else rather threads of two warps than two of one.
    """
    epoch, first, second = now >> 32, at(pair), at(pair + 16)
    slot = int64(0)
    if ordered(state, first, at(pair + 8), me, epoch, in_shared):
        slot = pair
    elif (
        ordered(state, second, at(pair + 24), me, epoch, in_shared)
        or (first - 1) >> 5 == (second - 1) >> 5
    ):
        slot = pair + 16
    if slot:
        put(slot, me)
        put(slot + 8, now)


@compiled
def touch(
    state: Any,
    cells: Any,
    offset: Any,
    size: Any,
    access: Any,
    site: Any,
    thread: Any,
    block: Any,
    epoch: Any,
    where: Any,
    needs_writer: Any,
    address: Any,
    stored: Any,
) -> None:
    """Compare an access with what is known of its bytes, and remember it."""
    threads, in_shared, none = at(state + 8 * THREADS), where == SHARED, int64(0)
    me = block * threads + thread + 1
    now = epoch << 32 | at(at(state + 8 * CLOCKS) + (thread * threads + thread) * 8)
    for byte in range(offset, offset + size):
        cell = cells + byte * CELL * 8
        readers, atomics = cell + 8 * READERS, cell + 8 * ATOMICS
        writer, pending = at(cell), at(cell + 8 * PENDING_SLOT)
        if pending and (pending - 1) // threads != block:
            pending = none
        if pending and not (access == ARRIVAL and pending == me):
            note(state, PENDING, site, block, thread, where, byte, pending, none, size)
            if access == LOAD:
                continue
        if access == ARRIVAL:
            put(cell + 8 * PENDING_SLOT, none)
        if access in (LOAD, ATOMIC) and needs_writer:
            known = False
            for one in (writer, at(atomics)):
                known = known or (one != 0 and not (in_shared and (one - 1) // threads != block))
            if not known:
                note(state, UNSET, site, block, thread, where, byte, none, none, size)
        other, other_site = none, none
        if not ordered(state, writer, at(cell + 8 * WRITE_TIME), me, epoch, in_shared):
            other, other_site = writer, at(cell + 8 * WRITE_SITE)
            in_warp = (writer - 1) // threads == block and other_site == site + 1
            in_warp = in_warp and (writer - 1) % threads >> 5 == thread >> 5
            if access == STORE and in_warp:  # one store of a warp, perhaps of one value
                place = byte - offset
                if byte_at(address + place) == byte_at(stored + place):
                    other = none
        elif access != ATOMIC:
            other = clash(state, atomics, me, epoch, in_shared)
        if other:
            note(state, WITH_WRITE, site, block, thread, where, byte, other, other_site, size)
        if access == LOAD:
            remember(state, readers, me, now, in_shared)
            continue
        other = clash(state, readers, me, epoch, in_shared)
        if other:
            note(state, WITH_READ, site, block, thread, where, byte, other, none, size)
        if access == ISSUE:
            put(cell + 8 * PENDING_SLOT, me)
        elif access == ATOMIC:
            remember(state, atomics, me, now, in_shared)
        else:
            put(cell, me)
            put(cell + 8 * WRITE_TIME, now)
            put(cell + 8 * WRITE_SITE, site + 1)


def check(
    thread: Any, row: Any, address: Any, size: Any, access: Any, space: Any, site: Any
) -> Any:
    """Return 1 if an access may be made, and write down what is wrong with it."""
    state, block, number = at(row + 8 * STATE), at(row + 8 * BLOCK), at(thread + 8 * THREAD)
    size, site, none = int64(size), int64(site), int64(0)
    stored = thread + 8 * STORED
    if address % size:
        note(state, MISALIGNED, site, block, number, int64(NOWHERE), address, none, none, size)
        return 0
    base, most = at(row + 8 * SHARED_SLOT), at(state + 8 * SHARED_SIZE)
    epoch = at(row + 8 * EPOCH)
    offset = address - base
    fits = offset >= 0 and offset + size <= most
    if space == IN_SHARED or (space == GENERIC and fits):
        if not fits:
            note(state, OUT, site, block, number, int64(SHARED), offset, none, none, size)
            return 0
        cells = at(state + 8 * SHARED_CELLS)
        touch(
            state, cells, offset, size, access, site, number, block, epoch, int64(SHARED), True,
            address, stored,
        )  # fmt: skip
        return 1
    offset = address - at(thread + 8 * LOCAL_SLOT)
    fits = offset >= 0 and offset + size <= at(state + 8 * LOCAL_SIZE)
    if space == IN_LOCAL or (space == GENERIC and fits):
        if not fits:
            note(state, OUT, site, block, number, int64(LOCAL), offset, none, none, size)
        return 1 if fits else 0
    table = at(state + 8 * BUFFERS)
    for index in range(at(state + 8 * BUFFER_COUNT)):
        entry = table + index * BUFFER * 8
        if address >= at(entry) and address + size <= at(entry + 8):
            offset, flags = address - at(entry), at(entry + 24)
            if flags & READ_ONLY and access != LOAD:
                note(state, CONSTANT, site, block, number, index, offset, none, none, size)
                return 0
            fresh = flags & IS_FRESH != 0
            cells = at(entry + 16)
            touch(
                state, cells, offset, size, access, site, number, block, epoch, index, fresh,
                address, stored,
            )  # fmt: skip
            return 1
    nearest, gap = int64(NOWHERE), int64(1) << 62
    for index in range(at(state + 8 * BUFFER_COUNT)):
        entry = table + index * BUFFER * 8
        away = at(entry) - address if address < at(entry) else address - at(entry + 8)
        if away < gap and away < 128:
            nearest, gap, offset = index, away, address - at(entry)
    offset = offset if nearest != NOWHERE else address
    note(state, OUT, site, block, number, nearest, offset, none, none, size)
    return 0


_compiled: list[Any] = []


def address() -> int:
    """Return the address of `check`, compiled when it is first asked for."""
    if not _compiled:
        check.__qualname__ += f"_{FINGERPRINT}"
        kinds = [types.int64] * 3 + [types.int32] * 4
        _compiled.append(cfunc(types.int32(*kinds), cache=True)(check))
    found: int = _compiled[0].address
    return found
