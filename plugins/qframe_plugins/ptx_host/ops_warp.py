"""What the lanes of a warp do together. Source: PTX ISA 8.5, 9.7.8.6, 9.7.12 and 9.7.14.

A lane that comes to such an instruction waits until all lanes that the mask names are there. What
each brings is in its context, and a function over those contexts (`warp.Warp`) carries it out.
"""

from __future__ import annotations

from typing import Any

from qframe_plugins.ptx_host import layout
from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.values import I1, I32, I64, const, int_op, intrinsic, resize

ALL = const(32, 0xFFFFFFFF)


def resolve_shfl(w: Any, m: Modifiers) -> None:
    """Brought: mask, value, lane or distance, clamp | segment << 8."""
    b = w.b

    def one(lane: Any) -> None:
        distance = b.and_(w.brought(lane, 2, 64), const(64, 31))
        control = w.brought(lane, 3, 64)
        clamp = b.and_(control, const(64, 31))
        segment = b.and_(b.lshr(control, const(64, 8)), const(64, 31))
        own = b.and_(lane, segment)
        most = b.or_(own, b.and_(clamp, b.xor(segment, const(64, 31))))
        if m["mode"] == "up":
            source = b.sub(lane, distance)
            fine = b.icmp_signed(">=", source, most)
        else:
            free = b.xor(segment, const(64, 31))
            source = {
                "down": lambda: b.add(lane, distance),
                "bfly": lambda: b.xor(lane, distance),
                "idx": lambda: b.or_(own, b.and_(distance, free)),
            }[m["mode"]]()
            fine = b.icmp_signed("<=", source, most)
        source = b.select(fine, source, lane)
        absent = b.not_(w.takes_part(source))
        w.report(absent, layout.READS_OTHERS)
        source = b.select(absent, lane, source)
        w.give(lane, 0, w.brought(source, 1))
        w.give(lane, 1, resize(b, fine, 64))

    w.each(one)


@form("shfl.sync.{mode:up|down|bfly|idx}.b32", ">d:b32|pred a:b32 b:b32 c:b32 mask:b32", "d = a of another lane, p = whether there is one", sync="warp", resolve=resolve_shfl)  # fmt: skip
def shfl(t: Any, m: Modifiers, value: Any, lane: Any, control: Any, mask: Any) -> Any:
    made, fine = t.wait([mask, value, lane, control], outputs=2)
    return t.b.trunc(made, I32), t.b.trunc(fine, I1)


def resolve_vote(w: Any, m: Modifiers) -> None:
    """Brought: mask, predicate. Given: the ballot."""
    b = w.b
    ballot = w.cell(const(64, 0))

    def gather(lane: Any) -> None:
        bit = b.shl(b.and_(w.brought(lane, 1, 64), const(64, 1)), lane)
        b.store(b.or_(b.load(ballot), bit), ballot)

    w.each(gather)
    w.each(lambda lane: w.give(lane, 0, b.load(ballot)))


@form("vote.sync.{op:all|any|uni}.pred", ">d:pred a:pred mask:b32", "whether a holds in all lanes, in any, in all or none", sync="warp", resolve=resolve_vote)  # fmt: skip
def vote(t: Any, m: Modifiers, value: Any, mask: Any) -> Any:
    b = t.b
    [ballot] = t.wait([mask, value], outputs=1)
    whole = b.icmp_unsigned("==", ballot, t.of_thread(layout.INPUT))
    none = b.icmp_unsigned("==", ballot, const(64, 0))
    return {"all": whole, "any": b.not_(none), "uni": b.or_(whole, none)}[m["op"]]


@form("vote.sync.ballot.b32", ">d:b32 a:pred mask:b32", "the lanes in which a holds", sync="warp", resolve=resolve_vote)  # fmt: skip
def ballot(t: Any, m: Modifiers, value: Any, mask: Any) -> Any:
    return t.b.trunc(t.wait([mask, value], outputs=1)[0], I32)


def resolve_match(w: Any, m: Modifiers) -> None:
    """Brought: mask, value. Given: the lanes with the same value."""
    b = w.b

    def one(lane: Any) -> None:
        same = w.cell(const(64, 0))
        b.store(const(64, 0), same)
        mine = w.brought(lane, 1, 64)

        def other(peer: Any) -> None:
            equal = resize(b, b.icmp_unsigned("==", mine, w.brought(peer, 1, 64)), 64)
            b.store(b.or_(b.load(same), b.shl(equal, peer)), same)

        w.each(other)
        w.give(lane, 0, b.load(same))

    w.each(one)


@form("match.any.sync.{T:b32|b64}", ">d:b32 a:T mask:b32", "the lanes that have the same a", sync="warp", resolve=resolve_match)  # fmt: skip
def match_any(t: Any, m: Modifiers, value: Any, mask: Any) -> Any:
    return t.b.trunc(t.wait([mask, value], outputs=1)[0], I32)


@form("match.all.sync.{T:b32|b64}", ">d:b32|pred a:T mask:b32", "the mask if all lanes have the same a, else 0; p = whether", sync="warp", resolve=resolve_match)  # fmt: skip
def match_all(t: Any, m: Modifiers, value: Any, mask: Any) -> Any:
    [same] = t.wait([mask, value], outputs=1)
    whole = t.b.icmp_unsigned("==", same, t.of_thread(layout.INPUT))
    return t.b.select(whole, t.b.trunc(same, I32), const(32, 0)), whole


def resolve_redux(w: Any, m: Modifiers) -> None:
    """Brought: mask, value. Given: the sum, or what it is."""
    b = w.b
    neutral = {"and": -1, "min": -1, "max": 0}.get(m["op"], 0)
    if m["T"] == "s32":
        neutral = {"min": (1 << 31) - 1, "max": 1 << 31}.get(m["op"], neutral)
    total = w.cell(const(32, neutral))
    sign = "s" if m["T"] == "s32" else "u"
    combine = {
        "add": b.add, "and": b.and_, "or": b.or_, "xor": b.xor,
        "min": lambda x, y: int_op(b, sign + "min", x, y),
        "max": lambda x, y: int_op(b, sign + "max", x, y),
    }[m["op"]]  # fmt: skip
    w.each(lambda lane: b.store(combine(b.load(total), w.brought(lane, 1)), total))
    w.each(lambda lane: w.give(lane, 0, b.load(total)))


@form("redux.sync.{op:add|min|max}.{T:u32|s32}", ">d:T a:T mask:b32", "the sum, least or greatest of all lanes' a", sync="warp", resolve=resolve_redux)  # fmt: skip
@form("redux.sync.{op:and|or|xor}.{T:b32}", ">d:T a:T mask:b32", "all lanes' a, combined", sync="warp", resolve=resolve_redux)  # fmt: skip
def redux(t: Any, m: Modifiers, value: Any, mask: Any) -> Any:
    return t.b.trunc(t.wait([mask, value], outputs=1)[0], I32)


def resolve_nothing(w: Any, m: Modifiers) -> None:
    """The lanes have met, and that is all."""


@form("bar.warp.sync", "mask:b32", "waits for the lanes of the mask", sync="warp", resolve=resolve_nothing)  # fmt: skip
def warp_barrier(t: Any, m: Modifiers, mask: Any) -> Any:
    t.wait([mask])
    return []


def resolve_mask(w: Any, m: Modifiers) -> None:
    """Given: the lanes that take part."""
    w.each(lambda lane: w.give(lane, 0, w.mask))


@form("elect.sync", ">d:b32|pred mask:b32", "the first lane of the mask; p = whether it is this one", sync="warp", resolve=resolve_mask)  # fmt: skip
def elect(t: Any, m: Modifiers, mask: Any) -> Any:
    [made] = t.wait([mask], outputs=1)
    first = intrinsic(t.b, "llvm.cttz.i64", I64, [made, const(1, 0)])
    return t.b.trunc(first, I32), t.b.icmp_unsigned("==", first, t.of_thread(layout.LANE))


@form("activemask.b32", ">d:b32", "the lanes that come here before any lane of the warp can go on elsewhere", sync="active", resolve=resolve_mask)  # fmt: skip
def activemask(t: Any, m: Modifiers) -> Any:
    return t.b.trunc(t.wait([ALL], outputs=1)[0], I32)


# Matrices of 8 x 8 halves ---------------------------------------------------------------------

COUNT = "{count:x1|x2|x4}"


def provides(t: Any, count: int) -> Any:
    """Return whether this lane's address is that of a row."""
    return t.b.icmp_signed("<", t.of_thread(layout.LANE), const(64, 8 * count))


def half_at(w: Any, lane: Any, index: Any, half: Any) -> Any:
    """Return one half of a word that a lane brings, as 32 bits."""
    b = w.b
    word = w.brought(lane, index)
    return b.and_(b.lshr(word, resize(b, b.mul(half, const(64, 16)), 32)), const(32, 0xFFFF))


def resolve_ldmatrix(w: Any, m: Modifiers) -> None:
    """Brought: mask, the four words of a row. Given: a word of each matrix."""
    b = w.b
    w.needs_all()

    def one(lane: Any) -> None:
        row, column = b.lshr(lane, const(64, 2)), b.and_(lane, const(64, 3))
        for matrix in range(int(m["count"][1:])):
            first = const(64, 8 * matrix)
            if not m["trans"]:
                w.give(lane, matrix, w.brought(b.add(first, row), b.add(column, const(64, 1))))
                continue
            made = const(32, 0)
            for k in range(2):
                source = b.add(first, b.add(b.shl(column, const(64, 1)), const(64, k)))
                word = b.add(b.lshr(row, const(64, 1)), const(64, 1))
                half = half_at(w, source, word, b.and_(row, const(64, 1)))
                made = b.or_(made, b.shl(half, const(32, 16 * k)))
            w.give(lane, matrix, made)

    w.each(one)


@form(f"ldmatrix.sync.aligned.m8n8.{COUNT}[trans].{{space:shared|shared::cta}}.b16", ">{d:b32*count} [a:space]", "8 x 8 matrices of halves, a row from each lane's address", sync="warp", resolve=resolve_ldmatrix)  # fmt: skip
def ldmatrix(t: Any, m: Modifiers, address: Any) -> Any:
    b, count = t.b, int(m["count"][1:])
    for index in range(4):
        t.set_thread(layout.INPUT + 1 + index, const(64, 0))
    with b.if_then(provides(t, count)):
        for index, word in enumerate(t.load(address, "shared", "b32", 4)):
            t.set_thread(layout.INPUT + 1 + index, word)
    return [b.trunc(made, I32) for made in t.wait([ALL], outputs=count)]


def resolve_stmatrix(w: Any, m: Modifiers) -> None:
    """Brought: mask, a word of each matrix. Given: the four words of a row."""
    b = w.b
    w.needs_all()

    def one(lane: Any) -> None:
        matrix = b.add(b.lshr(lane, const(64, 3)), const(64, 1))
        row = b.and_(lane, const(64, 7))
        for word in range(4):
            if not m["trans"]:
                source = b.add(b.shl(row, const(64, 2)), const(64, word))
                w.give(lane, word, w.brought(source, matrix))
                continue
            made = const(32, 0)
            for k in range(2):
                column = const(64, 4 * (2 * word + k))
                source = b.add(column, b.lshr(row, const(64, 1)))
                half = half_at(w, source, matrix, b.and_(row, const(64, 1)))
                made = b.or_(made, b.shl(half, const(32, 16 * k)))
            w.give(lane, word, made)

    w.each(one)


@form(f"stmatrix.sync.aligned.m8n8.{COUNT}[trans].{{space:shared|shared::cta}}.b16", "[a:space] {b:b32*count}", "stores 8 x 8 matrices of halves, a row at each lane's address", sync="warp", resolve=resolve_stmatrix)  # fmt: skip
def stmatrix(t: Any, m: Modifiers, address: Any, words: list[Any]) -> Any:
    t.keep(address)
    made = t.wait([ALL, *words, *[const(32, 0)] * (4 - len(words))], outputs=4)
    with t.b.if_then(provides(t, len(words))):
        t.store(t.kept(), "shared", "b32", [t.b.trunc(word, I32) for word in made])
    return []
