"""Jumps, ends and barriers. Source: PTX ISA 8.5, 9.7.11, 9.7.12 and 9.7.13."""

from __future__ import annotations

from typing import Any

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.values import const


@form("bra[uni]", "label@", "jumps; one that leads back is counted, so that no loop is endless")
def bra(t: Any, m: Modifiers, label: str) -> Any:
    t.jump(label)
    return []


@form("ret[uni]", "", "ends the kernel, or a function")
@form("exit", "", "ends the thread")
def end(t: Any, m: Modifiers) -> Any:
    t.finish(0)
    return []


@form("trap", "", "ends the launch with an error")
def trap(t: Any, m: Modifiers) -> Any:
    t.finish(layout.TRAP)
    return []


@form("nanosleep.u32", "a:u32", "nothing: there is no time here")
def nanosleep(t: Any, m: Modifiers, duration: Any) -> Any:
    return []


def number(value: Any) -> Any:
    """Return how many threads a barrier waits for: 0 is all of them."""
    return const(32, 0) if value is None else value


@form("bar.sync", "a:u32 b:u32?", "waits until b threads, or all, are at barrier a", sync="barrier")
@form("barrier[cta].sync[aligned]", "a:u32 b:u32?", "the same", sync="barrier")
def barrier(t: Any, m: Modifiers, name: Any, count: Any) -> Any:
    t.wait([name, number(count), const(32, layout.SYNC), const(32, 0)])
    return []


@form("bar.arrive", "a:u32 b:u32", "counts at barrier a, and does not wait", sync="barrier")
@form("barrier[cta].arrive[aligned]", "a:u32 b:u32", "the same", sync="barrier")
def arrive(t: Any, m: Modifiers, name: Any, count: Any) -> Any:
    t.wait([name, count, const(32, layout.ARRIVE), const(32, 0)])
    return []


def reduced(t: Any, m: Modifiers, name: Any, count: Any, value: Any) -> Any:
    """Wait at a barrier; return what the op makes of all threads' predicates."""
    inputs = [name, number(count), const(32, layout.SYNC), value]
    true, threads = t.wait(inputs, outputs=2)
    if m["op"] == "popc":
        return t.b.trunc(true, const(32, 0).type)
    if m["op"] == "and":
        return t.b.icmp_unsigned("==", true, threads)
    return t.b.icmp_unsigned("!=", true, const(64, 0))


@form("bar.red.{op:popc}.u32", ">d:u32 a:u32 c:pred", "bar.sync; d = in how many threads c holds", sync="barrier")  # fmt: skip
@form("bar.red.{op:and|or}.pred", ">d:pred a:u32 c:pred", "bar.sync; d = whether c holds in all, in any", sync="barrier")  # fmt: skip
@form("barrier[cta].red.{op:popc}[aligned].u32", ">d:u32 a:u32 c:pred", "the same", sync="barrier")
@form("barrier[cta].red.{op:and|or}[aligned].pred", ">d:pred a:u32 c:pred", "the same", sync="barrier")  # fmt: skip
def reduce_all(t: Any, m: Modifiers, name: Any, value: Any) -> Any:
    return reduced(t, m, name, None, value)


@form("bar.red.{op:popc}.u32", ">d:u32 a:u32 b:u32 c:pred", "the same for b threads", sync="barrier")  # fmt: skip
@form("bar.red.{op:and|or}.pred", ">d:pred a:u32 b:u32 c:pred", "the same for b threads", sync="barrier")  # fmt: skip
def reduce_some(t: Any, m: Modifiers, name: Any, count: Any, value: Any) -> Any:
    return reduced(t, m, name, count, value)
