"""The scheduler: lets threads run in a given order until all wait or have ended, then resolves.

One block runs after another. What it finds is written to the same table as the checker's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64

from qframe_plugins.ptx_host.findings import KIND, SLOTS
from qframe_plugins.ptx_host.layout import (
    ACTIVE,
    ARRIVE,
    BARRIER,
    BLOCK,
    CTAID,
    EPOCH,
    FUEL,
    INPUT,
    LANE,
    LOCAL,
    NCTAID,
    NTID,
    OUTPUT,
    PARTIAL,
    READS_OTHERS,
    THREAD,
    TID,
    WARP,
    WARP_OPERATION,
)
from qframe_plugins.ptx_host.raw import at, compiled, put, run_thread, run_warp

DEADLOCK, PARTIAL_WARP, LONE_LANE = -10, -11, -12
"""What ends a launch, beside what threads return."""

DIVERGENT, BAD_MASK, ENDED = KIND["divergent-barrier"], KIND["bad-mask"], KIND["ended-lane"]
ABSENT, STUCK, BAD_BARRIER = KIND["absent-lane"], KIND["deadlock"], KIND["bad-barrier"]
EVERY = (1 << 32) - 1


@compiled
def note(found: Any, count: Any, kind: Any, site: Any, block: Any, thread: Any) -> None:
    """Write a finding into the table, found[kind, site]."""
    entry = found + (kind * count + site) * SLOTS * 8
    if at(entry) == 0:
        put(entry + 8, block)
        put(entry + 16, thread)
    put(entry, at(entry) + 1)


@compiled
def join(clocks: Any, members: Any, gone: Any) -> None:
    """What any member has seen, all have: they meet.

    Of those that went on, gone[thread] is the time of it: they give what they had seen, and get
    nothing.
    """
    count = clocks.shape[0]
    for other in range(count):
        latest = int64(0)
        for thread in range(count):
            if members[thread]:
                seen = gone[thread] if gone[thread] and thread == other else clocks[thread, other]
                latest = max(latest, seen)
        for thread in range(count):
            if members[thread] and not gone[thread]:
                clocks[thread, other] = latest
    for thread in range(count):
        if members[thread] and not gone[thread]:
            clocks[thread, thread] += 1


@compiled
def meet_warps(
    contexts: Any,
    sites: Any,
    waiting: Any,
    arrived: Any,
    clocks: Any,
    members: Any,
    block: Any,
    found: Any,
) -> Any:
    """Carry out what all lanes of a mask wait for; return how many, or what ends the launch."""
    threads, many, met = waiting.size, found.shape[1], int64(0)
    base, findings = contexts.ctypes.data, found.ctypes.data
    stride = contexts.shape[1]
    for thread in range(threads):
        place = waiting[thread]
        if place <= 0 or sites[place, 0] != WARP_OPERATION:
            continue
        first = thread & ~31
        lanes = min(int64(32), threads - first)
        mask = contexts[thread, INPUT] & EVERY
        site = sites[place, 2]
        if not (mask >> (thread - first)) & 1:
            note(findings, many, BAD_MASK, site, block, thread)
            return int64(LONE_LANE)
        ready, present, ended = True, int64(0), False
        for lane in range(lanes):
            if (mask >> lane) & 1:
                there = waiting[first + lane]
                if there == place and contexts[first + lane, INPUT] & EVERY == mask:
                    present |= int64(1) << lane
                elif there == -1:
                    ended = True
                else:
                    ready = False
        if not ready:
            continue
        if ended:
            note(findings, many, ENDED, site, block, thread)
        if mask >> lanes and mask != EVERY:
            note(findings, many, BAD_MASK, site, block, thread)
        seen = run_warp(sites[place, 1], base + first * stride * 8, stride, lanes, present)
        if seen & PARTIAL:
            note(findings, many, BAD_MASK, site, block, thread)
            return int64(PARTIAL_WARP)
        if seen & READS_OTHERS:
            note(findings, many, ABSENT, site, block, thread)
        members[:] = False
        for lane in range(lanes):
            if (present >> lane) & 1:
                waiting[first + lane] = 0
                members[first + lane] = True
        if sites[place, 3] and clocks.shape[0] == threads:
            join(clocks, members, arrived[16])
        met += 1
    return met


@compiled
def meet_active(contexts: Any, sites: Any, waiting: Any) -> Any:
    """Carry out `activemask` for the lanes that wait at one, when no lane can go on."""
    threads, met = waiting.size, int64(0)
    base, stride = contexts.ctypes.data, contexts.shape[1]
    for thread in range(threads):
        place = waiting[thread]
        if place <= 0 or sites[place, 0] != ACTIVE:
            continue
        first = thread & ~31
        lanes, present = min(int64(32), threads - first), int64(0)
        for lane in range(lanes):
            if waiting[first + lane] == place:
                present |= int64(1) << lane
        run_warp(sites[place, 1], base + first * stride * 8, stride, lanes, present)
        for lane in range(lanes):
            if (present >> lane) & 1:
                waiting[first + lane] = 0
        met += 1
    return met


@compiled
def meet_barriers(
    contexts: Any,
    sites: Any,
    waiting: Any,
    arrived: Any,
    clocks: Any,
    members: Any,
    row: Any,
    found: Any,
) -> Any:
    """Open the barriers at which enough threads are; return how many."""
    threads, many, met = waiting.size, found.shape[1], int64(0)
    findings, block = found.ctypes.data, row[BLOCK]
    ended = int64(0)
    for thread in range(threads):
        ended += waiting[thread] == -1
    for name in range(16):
        there, true, place, needed = int64(0), int64(0), int64(0), int64(0)
        differ, last = False, int64(0)
        for thread in range(threads):
            members[thread] = arrived[name, thread] != 0
        for thread in range(threads):
            here = waiting[thread]
            if here <= 0 or sites[here, 0] != BARRIER or contexts[thread, INPUT] & EVERY != name:
                continue
            differ = differ or (there > 0 and here != place)
            place, last = here, thread
            needed = contexts[thread, INPUT + 1] & EVERY
            there += 1
            true += contexts[thread, INPUT + 3] & 1
            members[thread] = True
        total = int64(0)
        for thread in range(threads):
            total += members[thread]
        if there == 0 or total < (needed if needed else threads - ended):
            continue
        if ended and not needed:
            note(findings, many, DIVERGENT, sites[place, 2], block, last)
        for thread in range(threads):
            here = waiting[thread]
            if differ and here > 0 and members[thread] and sites[here, 0] == BARRIER:
                note(findings, many, DIVERGENT, sites[here, 2], block, thread)
        if needed % 32 or total > (needed if needed else threads):
            note(findings, many, BAD_BARRIER, sites[place, 2], block, last)
        for thread in range(threads):
            here = waiting[thread]
            if members[thread] and here > 0 and not arrived[name, thread]:
                contexts[thread, OUTPUT] = true
                contexts[thread, OUTPUT + 1] = there
                waiting[thread] = 0
        if there == threads:
            row[EPOCH] += 1
        elif clocks.shape[0] == threads:
            join(clocks, members, arrived[name])
        arrived[name] = 0
        met += 1
    return met


@compiled
def run_block(
    code: Any,
    contexts: Any,
    params: Any,
    sites: Any,
    order: Any,
    waiting: Any,
    arrived: Any,
    clocks: Any,
    row: Any,
    found: Any,
    members: Any,
) -> Any:
    """Run one block to its end; return 0, or what ended the launch."""
    threads, many = waiting.size, found.shape[1]
    resume = np.zeros(threads, np.int64)
    waiting[:] = 0
    arrived[:] = 0
    base, stride = contexts.ctypes.data, contexts.shape[1] * 8
    while True:
        ran = False
        for position in range(threads):
            thread = order[position]
            while waiting[thread] == 0:
                place = run_thread(
                    code, base + thread * stride, row.ctypes.data, params, resume[thread]
                )
                if place < 0:
                    row[EPOCH] = thread
                    return place
                resume[thread] = place
                waiting[thread] = place if place else -1
                ran = True
                if place and sites[place, 0] == BARRIER:
                    name = contexts[thread, INPUT] & EVERY
                    if name > 15:
                        note(
                            found.ctypes.data,
                            many,
                            BAD_BARRIER,
                            sites[place, 2],
                            row[BLOCK],
                            thread,
                        )
                        return int64(DEADLOCK)
                    if contexts[thread, INPUT + 2] == ARRIVE:
                        arrived[name, thread] = 1
                        if clocks.shape[0] == threads:
                            arrived[name, thread] = clocks[thread, thread]
                            clocks[thread, thread] += 1
                        waiting[thread] = 0
        met = meet_warps(contexts, sites, waiting, arrived, clocks, members, row[BLOCK], found)
        if met < 0:
            return met
        if met:
            continue
        if meet_active(contexts, sites, waiting):
            continue
        if meet_barriers(contexts, sites, waiting, arrived, clocks, members, row, found):
            continue
        if ran:
            continue
        stuck = False
        for thread in range(threads):
            if waiting[thread] > 0:
                stuck = True
                note(found.ctypes.data, many, STUCK, sites[waiting[thread], 2], row[BLOCK], thread)
        return int64(DEADLOCK) if stuck else int64(0)


@compiled
def run_blocks(
    code: Any,
    contexts: Any,
    params: Any,
    sites: Any,
    orders: Any,
    waiting: Any,
    arrived: Any,
    clocks: Any,
    row: Any,
    found: Any,
    members: Any,
    memory: Any,
    local: Any,
    first: Any,
    last: Any,
    fuel: Any,
) -> Any:
    """Run the blocks first .. last - 1; return 0, or what ended the launch."""
    for number in range(first, last):
        row[CTAID] = number % row[NCTAID]
        row[CTAID + 1] = number // row[NCTAID] % row[NCTAID + 1]
        row[CTAID + 2] = number // row[NCTAID] // row[NCTAID + 1]
        row[BLOCK], row[EPOCH] = number, 1
        row[FUEL] = fuel
        memory[:] = 0xA5  # so that nothing works by luck
        local[:] = 0xA5
        for thread in range(waiting.size):
            contexts[thread, TID] = thread % row[NTID]
            contexts[thread, TID + 1] = thread // row[NTID] % row[NTID + 1]
            contexts[thread, TID + 2] = thread // row[NTID] // row[NTID + 1]
            contexts[thread, LANE], contexts[thread, WARP] = thread & 31, thread >> 5
            contexts[thread, THREAD] = thread
            contexts[thread, LOCAL] = local.ctypes.data + thread * local.shape[1]
            contexts[thread, LOCAL + 1 :] = 0
        for thread in range(clocks.shape[0]):
            clocks[thread] = 0
            clocks[thread, thread] = 1
        ended = run_block(
            code, contexts, params, sites, orders[number % orders.shape[0]], waiting, arrived,
            clocks, row, found, members,
        )  # fmt: skip
        if ended:
            return ended
    return int64(0)
