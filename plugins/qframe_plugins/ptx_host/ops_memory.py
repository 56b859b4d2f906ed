"""Loads, stores, atomics and cp.async. Source: PTX ISA 8.5, 9.7.9, 9.7.12 and 9.7.13.

Memory is sequentially consistent: threads take turns at places where they wait, so fences and the
orders of atomics have nothing to do. A copy of cp.async is not made before its wait.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.ops_float import arithmetic
from qframe_plugins.ptx_host.syntax import BITS
from qframe_plugins.ptx_host.values import I8, I32, I64, WORDS, const, int_op, resize

TYPED = "{T:b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64}"
SPACE = "[space:global|shared|shared::cta|local|param|const]"
HINTS = (
    "[cop:ca|cg|cs|lu|cv|wb|wt][nc]"
    "[evict:L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate]"
    "[fetch:L2::64B|L2::128B|L2::256B]"
)
SCOPE = "[scope:cta|cluster|gpu|sys]"


@form(f"ld[order:volatile|weak|relaxed|acquire]{SCOPE}{SPACE}{HINTS}[vec:v2|v4|v8].{TYPED}", ">{d:T*vec} [a:space]", "what lies at a, extended by its type")  # fmt: skip
@form(f"ldu[space:global][vec:v2|v4].{TYPED}", ">{d:T*vec} [a:space]", "what lies at a")
def load(t: Any, m: Modifiers, address: Any) -> Any:
    return t.load(address, m["space"], m["T"], int(m["vec"][1:] or 1))


@form(f"st[order:volatile|weak|relaxed|release]{SCOPE}{SPACE}{HINTS}[vec:v2|v4|v8].{TYPED}", "[a:space] {b:T*vec}", "puts b there", only=lambda m: m["space"] not in ("param", "const") and not m["nc"])  # fmt: skip
def store(t: Any, m: Modifiers, address: Any, values: list[Any]) -> Any:
    t.store(address, m["space"], m["T"], values)
    return []


# Atomics --------------------------------------------------------------------------------------

ATOMIC = f"[order:relaxed|acquire|release|acq_rel]{SCOPE}[space:global|shared|shared::cta]"
ATOMIC_TYPES = {
    "add": "u32 s32 u64 f32 f64", "min": "u32 s32 u64 s64", "max": "u32 s32 u64 s64",
    "and": "b32 b64", "or": "b32 b64", "xor": "b32 b64",
    "exch": "b32 b64", "inc": "u32", "dec": "u32",
}  # fmt: skip
OPS = "{op:" + "|".join(ATOMIC_TYPES) + "}"
ATOMIC_T = "{T:b32|b64|u32|u64|s32|s64|f32|f64}"


def atomic_exists(m: Modifiers) -> bool:
    """Return whether the operation exists for the type."""
    return m["T"] in ATOMIC_TYPES[m["op"]].split()


def updated(t: Any, m: Modifiers, address: Any, old: Any, x: Any) -> Any:
    """Return what is left in memory."""
    b, op, kind = t.b, m["op"], m["T"]
    if kind.startswith(("f", "bf")):
        made = arithmetic(t, {"T": kind, "=add": "add"}, "add", old, x)
        if kind != "f32" or m["space"].startswith("shared"):
            return made
        flushed = arithmetic(t, {"T": kind, "=add": "add", "ftz": "ftz"}, "add", old, x)
        if m["space"] == "global":
            return flushed
        inside = b.icmp_unsigned(
            "<", b.sub(address, t.of_block(layout.SHARED)), t.of_block(layout.TOTAL)
        )
        return b.select(inside, made, flushed)
    if op in ("min", "max"):
        return int_op(b, ("s" if kind[0] == "s" else "u") + op, old, x)
    if op == "exch":
        return x
    one, zero = const(BITS[kind], 1), const(BITS[kind], 0)
    if op == "inc":
        return b.select(b.icmp_unsigned(">=", old, x), zero, b.add(old, one))
    if op == "dec":
        wraps = b.or_(b.icmp_unsigned("==", old, zero), b.icmp_unsigned(">", old, x))
        return b.select(wraps, x, b.sub(old, one))
    return {"add": b.add, "and": b.and_, "or": b.or_, "xor": b.xor}[op](old, x)


@form(f"atom{ATOMIC}.{OPS}.{ATOMIC_T}", ">d:T [a:space] b:T", "d = what lay at a, which is updated; .add.f32 of global memory flushes subnormal numbers", only=atomic_exists)  # fmt: skip
@form(f"atom{ATOMIC}.{{op:add}}.noftz.{{T:f16|bf16|f16x2|bf16x2}}", ">d:T [a:space] b:T", "the same for short floats")  # fmt: skip
@form(f"red{ATOMIC}.{OPS}.{ATOMIC_T}", "[a:space] b:T", "the same without d", only=lambda m: atomic_exists(m) and m["op"] != "exch")  # fmt: skip
@form(f"red{ATOMIC}.{{op:add}}.noftz.{{T:f16|bf16|f16x2|bf16x2}}", "[a:space] b:T", "the same for short floats")  # fmt: skip
def atomic(t: Any, m: Modifiers, address: Any, x: Any) -> Any:
    bits = ir.IntType(BITS[m["T"]])
    place = t.pointer(t.allowed(address, m["space"], bits.width // 8, layout.ATOMIC), bits)
    old = t.b.load(place, align=1)
    t.b.store(updated(t, m, address, old, x), place, align=1)
    return old


@form(f"atom{ATOMIC}.cas.{{T:b16|b32|b64}}", ">d:T [a:space] b:T c:T", "d = what lay at a; c is put there if that was b")  # fmt: skip
def cas(t: Any, m: Modifiers, address: Any, expected: Any, x: Any) -> Any:
    bits = ir.IntType(BITS[m["T"]])
    place = t.pointer(t.allowed(address, m["space"], bits.width // 8, layout.ATOMIC), bits)
    old = t.b.load(place, align=1)
    same = t.b.icmp_unsigned("==", old, expected)
    t.b.store(t.b.select(same, x, old), place, align=1)
    return old


# Copies that are on their way -----------------------------------------------------------------


@form("cp.async.{cop:ca|cg}.{space:shared|shared::cta}.global[fetch:L2::64B|L2::128B|L2::256B]", "[d:shared] [a:=global] n# src:u32?", "copies n bytes, of which the first src come from a and the others are 0, when it is waited for")  # fmt: skip
def cp_async(t: Any, m: Modifiers, target: Any, source: Any, size: int, given: Any) -> Any:
    if size not in ((4, 8, 16) if m["cop"] == "ca" else (16,)):
        raise t.unsupported(f"{size} bytes are copied; .ca copies 4, 8 or 16, .cg copies 16")
    b = t.b
    target = t.allowed(target, "shared", size, layout.ISSUE)
    if given is None:
        given = const(32, size)
        source = t.allowed(source, "global", size, layout.LOAD)
    else:
        given = int_op(b, "umin", given, const(32, size))
        nothing = b.icmp_unsigned("==", given, const(32, 0))
        scratch = b.ptrtoint(b.gep(t.thread, [const(64, layout.SCRATCH)]), I64)
        place = t.cell(scratch)
        with b.if_then(b.not_(nothing)):
            b.store(t.allowed(source, "global", size, layout.LOAD), place)
        source = b.load(place)
    open_ = t.of_thread(t.copies + layout.COPIES_OPEN)
    group = t.of_thread(t.copies + layout.COPIES_GROUP)
    with b.if_then(b.icmp_signed(">=", open_, const(64, layout.COPIES_MOST)), likely=False):
        t.finish(layout.TOO_MANY_COPIES)
    first = b.add(
        b.mul(open_, const(64, layout.COPY_SLOTS)), const(64, t.copies + layout.COPIES_LIST)
    )
    entry = (target, source, const(64, size), given, group, const(64, t.site))
    for index, value in enumerate(entry):
        b.store(resize(b, value, 64), b.gep(t.thread, [b.add(first, const(64, index))]))
    t.set_thread(t.copies + layout.COPIES_OPEN, b.add(open_, const(64, 1)))
    return []


@form("cp.async.commit_group", "", "the copies since the last one are a group")
def commit(t: Any, m: Modifiers) -> Any:
    slot = t.copies + layout.COPIES_GROUP
    t.set_thread(slot, t.b.add(t.of_thread(slot), const(64, 1)))
    return []


@form("cp.async.wait_group", "n#", "makes all copies but those of the last n groups")
def wait_group(t: Any, m: Modifiers, newest: int) -> Any:
    group = t.of_thread(t.copies + layout.COPIES_GROUP)
    deliver(t, t.b.sub(group, const(64, newest)))
    return []


@form("cp.async.wait_all", "", "makes all copies")
def wait_all(t: Any, m: Modifiers) -> Any:
    deliver(t, t.b.add(t.of_thread(t.copies + layout.COPIES_GROUP), const(64, 1)))
    return []


def deliver(t: Any, limit: Any) -> None:
    """Make the copies of the groups before `limit`."""

    def build(b: Any, function: Any) -> None:
        thread, block, end = function.args
        entry, test, body, done, skip, over = (
            function.append_basic_block(name) if index else b.block
            for index, name in enumerate(("entry", "test", "body", "done", "skip", "over"))
        )

        def slot(index: Any) -> Any:
            return b.gep(thread, [index])

        count_slot = const(64, t.copies + layout.COPIES_OPEN)
        count = b.load(slot(count_slot))
        b.branch(test)
        b.position_at_end(test)
        at = b.phi(I64)
        at.add_incoming(const(64, 0), entry)
        base = const(64, t.copies + layout.COPIES_LIST)
        first = b.add(b.mul(at, const(64, layout.COPY_SLOTS)), base)
        more = b.icmp_signed("<", at, count)
        group = b.load(slot(b.add(first, const(64, 4))))
        b.cbranch(b.and_(more, b.icmp_signed("<", group, end)), body, over)
        b.position_at_end(body)
        target, source, size, given, _, site = (
            b.load(slot(b.add(first, const(64, k)))) for k in range(layout.COPY_SLOTS)
        )
        byte = I8.as_pointer()
        for k in range(16):
            value = b.load(b.inttoptr(b.add(source, const(64, k)), byte))
            zero = b.icmp_signed(">=", const(64, k), given)
            with b.if_then(b.icmp_signed("<", const(64, k), size)):
                b.store(
                    b.select(zero, const(8, 0), value),
                    b.inttoptr(b.add(target, const(64, k)), byte),
                )
        if t.options.check:
            kind = ir.FunctionType(I32, [WORDS, WORDS, I64, *[I32] * 4])
            check = b.inttoptr(const(64, t.options.check), kind.as_pointer())
            scratch = b.ptrtoint(slot(const(64, layout.SCRATCH)), I64)
            with b.if_then(b.icmp_unsigned("!=", target, scratch)):
                codes = [layout.ARRIVAL, layout.SPACES["shared"]]
                numbers = [b.trunc(size, I32), *(const(32, c) for c in codes), b.trunc(site, I32)]
                b.call(check, [thread, block, target, *numbers])
        at.add_incoming(b.add(at, const(64, 1)), b.block)
        b.branch(test)
        b.position_at_end(over)
        left = b.sub(count, at)
        b.store(left, slot(count_slot))
        moved = b.mul(left, const(64, layout.COPY_SLOTS))
        b.branch(done)
        b.position_at_end(done)
        k = b.phi(I64)
        k.add_incoming(const(64, 0), over)
        after = function.append_basic_block("after")
        b.cbranch(b.icmp_signed("<", k, moved), skip, after)
        b.position_at_end(skip)
        b.store(b.load(slot(b.add(first, k))), slot(b.add(base, k)))
        k.add_incoming(b.add(k, const(64, 1)), skip)
        b.branch(done)
        b.position_at_end(after)
        b.ret_void()

    function = t.helper(f"deliver.{t.name}", [ir.VoidType(), WORDS, WORDS, I64], build)
    t.b.call(function, [t.thread, t.block, limit])


# What has nothing to do here ------------------------------------------------------------------


@form("membar.{scope:cta|gl|sys}", "", "nothing: memory is consistent here")
@form("fence[order:sc|acq_rel].{scope:cta|cluster|gpu|sys}", "", "nothing: memory is consistent here")  # fmt: skip
def fence(t: Any, m: Modifiers) -> Any:
    return []


@form("prefetch[space:global|local].{level:L1|L2}", "[a:space]", "nothing")
@form("prefetchu.L1", "[a:=]", "nothing")
def prefetch(t: Any, m: Modifiers, address: Any) -> Any:
    return []
