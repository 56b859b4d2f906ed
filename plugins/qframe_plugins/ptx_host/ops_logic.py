"""Bits, comparisons and moves. Source: PTX ISA 8.5, 9.7.6 to 9.7.9."""

from __future__ import annotations

from typing import Any

from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.syntax import BITS
from qframe_plugins.ptx_host.values import (
    FLOATS,
    FORMATS,
    I8,
    const,
    decode,
    flush,
    intrinsic,
    resize,
)

ANY = "{T:b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64}"


@form("and.{T:pred|b16|b32|b64}", ">d:T a:T b:T", "a and b")
@form("or.{T:pred|b16|b32|b64}", ">d:T a:T b:T", "a or b")
@form("xor.{T:pred|b16|b32|b64}", ">d:T a:T b:T", "a xor b")
def bitwise(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return (t.b.and_ if "=and" in m else t.b.or_ if "=or" in m else t.b.xor)(x, y)


@form("not.{T:pred|b16|b32|b64}", ">d:T a:T", "the bits of a, inverted")
def invert(t: Any, m: Modifiers, x: Any) -> Any:
    return t.b.not_(x)


@form("cnot.{T:b16|b32|b64}", ">d:T a:T", "1 for a = 0, else 0")
def cnot(t: Any, m: Modifiers, x: Any) -> Any:
    return resize(t.b, t.b.icmp_unsigned("==", x, const(BITS[m["T"]], 0)), BITS[m["T"]])


@form("shl.{T:b16|b32|b64}", ">d:T a:T b:u32", "a shifted left; 0 from n bits on")
@form("shr.{T:b16|b32|b64|u16|u32|u64|s16|s32|s64}", ">d:T a:T b:u32", "a shifted right, filled with zeros or the sign, from n bits on wholly")  # fmt: skip
def shift(t: Any, m: Modifiers, x: Any, amount: Any) -> Any:
    b, bits = t.b, BITS[m["T"]]
    beyond = b.icmp_unsigned(">=", amount, const(32, bits))
    amount = b.select(beyond, const(32, bits - 1), amount)
    if m["T"][0] == "s":
        return b.ashr(x, resize(b, amount, bits))
    moved = (b.shl if "=shl" in m else b.lshr)(x, resize(b, amount, bits))
    return b.select(beyond, const(bits, 0), moved)


@form("shf.{way:l|r}.{mode:wrap|clamp}.b32", ">d:b32 a:b32 b:b32 c:u32", "32 bits of the pair (b, a), shifted by c: modulo 32, or at most 32")  # fmt: skip
def funnel(t: Any, m: Modifiers, low: Any, high: Any, amount: Any) -> Any:
    b = t.b
    if m["mode"] == "wrap":
        amount = b.and_(amount, const(32, 31))
    else:
        beyond = b.icmp_unsigned(">", amount, const(32, 32))
        amount = b.select(beyond, const(32, 32), amount)
    amount = resize(b, amount, 64)
    pair = b.or_(resize(b, low, 64), b.shl(resize(b, high, 64), const(64, 32)))
    if m["way"] == "l":
        return resize(b, b.lshr(b.shl(pair, amount), const(64, 32)), 32)
    return resize(b, b.lshr(pair, amount), 32)


@form("lop3.b32", ">d:b32 a:b32 b:b32 c:b32 table#", "bit 4a + 2b + c of the table, for every bit")
def lop3(t: Any, m: Modifiers, x: Any, y: Any, z: Any, table: int) -> Any:
    b = t.b
    made = const(32, 0)
    for index in range(8):
        if table >> index & 1:
            terms = [v if index & bit else b.not_(v) for v, bit in ((x, 4), (y, 2), (z, 1))]
            made = b.or_(made, b.and_(b.and_(terms[0], terms[1]), terms[2]))
    return made


PERMUTED = {
    "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
    "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
    "rc8": [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)],
    "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
    "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
    "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
}
"""Mode of prmt -> for c & 3, the byte of (b, a) that each byte of d comes from, lowest first."""


@form("prmt.b32[mode:f4e|b4e|rc8|ecl|ecr|rc16]", ">d:b32 a:b32 b:b32 c:b32", "four of the eight bytes of a and b; with bit 3 of a selector, their signs")  # fmt: skip
def prmt(t: Any, m: Modifiers, x: Any, y: Any, chosen: Any) -> Any:
    b = t.b
    pair = b.or_(resize(b, x, 64), b.shl(resize(b, y, 64), const(64, 32)))
    if m["mode"]:
        words = [sum(p << 4 * k for k, p in enumerate(row)) for row in PERMUTED[m["mode"]]]
        which = b.and_(chosen, const(32, 3))
        chosen = const(32, words[3])
        for index in range(3):
            same = b.icmp_unsigned("==", which, const(32, index))
            chosen = b.select(same, const(32, words[index]), chosen)
    made = const(32, 0)
    for index in range(4):
        selector = b.and_(b.lshr(chosen, const(32, 4 * index)), const(32, 15))
        place = b.shl(b.and_(selector, const(32, 7)), const(32, 3))
        byte = b.trunc(b.lshr(pair, resize(b, place, 64)), I8)
        signs = b.icmp_unsigned(">=", selector, const(32, 8))
        byte = b.select(signs, b.ashr(byte, const(8, 7)), byte)
        made = b.or_(made, b.shl(resize(b, byte, 32), const(32, 8 * index)))
    return made


# Comparisons ----------------------------------------------------------------------------------

COMPARED = {
    **{name: (name, "ordered") for name in ("eq", "ne", "lt", "le", "gt", "ge", "num")},
    **{f"{name}u": (name, "unordered") for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "nan": ("nan", "unordered"),
}
SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
         "num": "ord", "nan": "uno", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip


def compare(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    """Return x m["cmp"] y."""
    kind, name = m["T"], m["cmp"]
    if kind in FLOATS:
        if m.get("ftz"):
            x, y = (flush(t.b, v, kind) for v in (x, y))
        x, y = (decode(t.b, v, kind) for v in (x, y))
        name, order = COMPARED[name]
        return getattr(t.b, f"fcmp_{order}")(SIGNS[name], x, y)
    signed = kind[0] == "s" and name not in ("lo", "ls", "hi", "hs")
    return (t.b.icmp_signed if signed else t.b.icmp_unsigned)(SIGNS[name], x, y)


def comparable(m: Modifiers) -> bool:
    """Return whether the comparison exists for the type."""
    kind, name = m["T"], m["cmp"]
    if kind in FLOATS:
        return name in COMPARED and (not m.get("ftz") or kind in ("f32", "f16"))
    if m.get("ftz") or name not in SIGNS or name in ("num", "nan"):
        return False
    if kind[0] == "b":
        return name in ("eq", "ne")
    return not (kind[0] == "s" and name in ("lo", "ls", "hi", "hs"))


CMP = "{cmp:eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan}"
COMPARABLE = ANY[:-1] + "|f16|bf16}"


@form(f"setp.{CMP}[ftz].{COMPARABLE}", ">p:pred|pred a:T b:T", "p = a cmp b, q = its opposite", only=comparable)  # fmt: skip
def setp(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    made = compare(t, m, x, y)
    return made, t.b.not_(made)


@form(f"setp.{CMP}.{{bool:and|or|xor}}[ftz].{COMPARABLE}", ">p:pred|pred a:T b:T c:pred", "p = (a cmp b) bool c, q = (not a cmp b) bool c", only=comparable)  # fmt: skip
def setp_bool(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    made = compare(t, m, x, y)
    combine = {"and": t.b.and_, "or": t.b.or_, "xor": t.b.xor}[m["bool"]]
    return combine(made, z), combine(t.b.not_(made), z)


@form(f"set.{CMP}[ftz].{{D:u32|s32|f32}}.{ANY}", ">d:D a:T b:T", "all bits, or 1.0, where a cmp b; else 0", only=comparable)  # fmt: skip
def set_(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    yes = const(32, 0x3F800000 if m["D"] == "f32" else -1)
    return t.b.select(compare(t, m, x, y), yes, const(32, 0))


SHORT = {"f16x2": "f16", "bf16x2": "bf16"}


def halves(t: Any, m: Modifiers, x: Any, y: Any) -> list[Any]:
    """Return x cmp y of the halves of pairs, low one first; of no pair, of both."""
    kind = SHORT.get(m["T"], m["T"])
    shifts = (0, 16) if m["T"] in SHORT else (0,)
    parts = [
        [resize(t.b, t.b.lshr(v, const(v.type.width, shift)), BITS[kind]) for v in (x, y)]
        for shift in shifts
    ]
    return [compare(t, {**m, "T": kind}, *part) for part in parts]


def comparable_halves(m: Modifiers) -> bool:
    """Return whether the comparison exists for short floats."""
    return comparable({**m, "T": SHORT.get(m["T"], m["T"])}) and m.get("D", m["T"]) == m["T"]


@form(f"setp.{CMP}[ftz].{{T:f16x2|bf16x2}}", ">p:pred|pred a:T b:T", "p = a cmp b of the low halves, q = of the high ones", only=comparable_halves)  # fmt: skip
def setp_halves(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return halves(t, m, x, y)


@form(f"set.{CMP}[ftz].{{D:u32|s32}}.{{T:f16|bf16}}", ">d:D a:T b:T", "all bits where a cmp b; else 0", only=comparable)  # fmt: skip
def set_short(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return t.b.select(compare(t, m, x, y), const(32, -1), const(32, 0))


@form(f"set.{CMP}[ftz].{{D:f16|f16x2|bf16|bf16x2}}.{{T:f16|f16x2|bf16|bf16x2}}", ">d:D a:T b:T", "1.0 where a cmp b, else 0; for both halves of pairs", only=comparable_halves)  # fmt: skip
def set_halves(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    bits, made = BITS[m["T"]], const(BITS[m["T"]], 0)
    one = FORMATS[SHORT.get(m["T"], m["T"])].one
    for index, fine in enumerate(halves(t, m, x, y)):
        word = t.b.select(fine, const(bits, one << 16 * index), const(bits, 0))
        made = t.b.or_(made, word)
    return made


@form(f"selp.{ANY}", ">d:T a:T b:T c:pred", "c ? a : b")
def selp(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    return t.b.select(z, x, y)


@form(f"slct[ftz].{ANY}.{{C:s32|f32}}", ">d:T a:T b:T c:C", "c >= 0 ? a : b", only=lambda m: not m["ftz"] or m["C"] == "f32")  # fmt: skip
def slct(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    if m["C"] == "s32":
        return t.b.select(t.b.icmp_signed(">=", z, const(32, 0)), x, y)
    z = flush(t.b, z, "f32") if m["ftz"] else z
    zero = decode(t.b, const(32, 0), "f32")
    return t.b.select(t.b.fcmp_ordered(">=", decode(t.b, z, "f32"), zero), x, y)


CLASSES = {"infinite": 516, "finite": 504, "number": 1020, "notanumber": 3,
           "normal": 264, "subnormal": 144}  # fmt: skip


@form("testp.{class:infinite|finite|number|notanumber|normal|subnormal}.{T:f32|f64}", ">p:pred a:T", "whether a is of that class; zeros are normal")  # fmt: skip
def testp(t: Any, m: Modifiers, x: Any) -> Any:
    classes = CLASSES[m["class"]] | (96 if m["class"] == "normal" else 0)
    value = decode(t.b, x, m["T"])
    name = f"llvm.is.fpclass.{m['T']}"
    return intrinsic(t.b, name, const(1, 0).type, [value, const(32, classes)])


# Moves ----------------------------------------------------------------------------------------

MOVED = "{T:pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f16|bf16|f16x2|bf16x2|f32|f64}"


@form(f"mov.{MOVED}", ">d:T a:T", "a")
def mov(t: Any, m: Modifiers, x: Any) -> Any:
    return x


@form("mov.{T:b16}", ">{d:b8*2} a:T", "the parts of a, lowest first")
@form("mov.{T:b32}", ">{d:b16*2} a:T", "the parts of a, lowest first")
@form("mov.{T:b32}", ">{d:b8*4} a:T", "the parts of a, lowest first")
@form("mov.{T:b64}", ">{d:b32*2} a:T", "the parts of a, lowest first")
@form("mov.{T:b64}", ">{d:b16*4} a:T", "the parts of a, lowest first")
def unpack(t: Any, m: Modifiers, x: Any) -> Any:
    slot = t.current.form.slots()[0]
    count, bits = int(slot.count), BITS[m["T"]]
    width = bits // count
    return [resize(t.b, t.b.lshr(x, const(bits, width * k)), width) for k in range(count)]


@form("mov.{T:b16}", ">d:T {a:b8*2}", "the parts put together, lowest first")
@form("mov.{T:b32}", ">d:T {a:b16*2}", "the parts put together, lowest first")
@form("mov.{T:b32}", ">d:T {a:b8*4}", "the parts put together, lowest first")
@form("mov.{T:b64}", ">d:T {a:b32*2}", "the parts put together, lowest first")
@form("mov.{T:b64}", ">d:T {a:b16*4}", "the parts put together, lowest first")
def pack(t: Any, m: Modifiers, parts: list[Any]) -> Any:
    bits = BITS[m["T"]]
    width, made = bits // len(parts), const(bits, 0)
    for index, part in enumerate(parts):
        made = t.b.or_(made, t.b.shl(resize(t.b, part, bits), const(bits, width * index)))
    return made


@form("cvta[to].{space:global|shared|local|const|param}.{T:u64}", ">d:T a:T", "a generic address from one of a space, or the other way")  # fmt: skip
def cvta(t: Any, m: Modifiers, x: Any) -> Any:
    return (t.b.sub if m["to"] else t.b.add)(x, t.base(m["space"]))
