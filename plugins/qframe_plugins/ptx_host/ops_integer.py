"""Integer arithmetic. Source: PTX ISA 8.5, 9.7.1 and 9.7.2 (extended precision)."""

from __future__ import annotations

from typing import Any

from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.syntax import BITS
from qframe_plugins.ptx_host.values import I1, I8, I16, const, int_op, intrinsic, resize

WHOLE = "{T:u16|u32|u64|s16|s32|s64}"


def is_signed(kind: str) -> bool:
    """Return whether a type is a signed integer's."""
    return kind.startswith("s")


@form(f"add.{WHOLE}", ">d:T a:T b:T", "a + b, modulo 2^n")
def add(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return t.b.add(x, y)


@form(f"sub.{WHOLE}", ">d:T a:T b:T", "a - b, modulo 2^n")
def sub(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return t.b.sub(x, y)


@form("add.sat.{T:s32}", ">d:T a:T b:T", "a + b, cut to the range of s32")
def add_sat(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return int_op(t.b, "sadd.sat", x, y)


@form("sub.sat.{T:s32}", ">d:T a:T b:T", "a - b, cut to the range of s32")
def sub_sat(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return int_op(t.b, "ssub.sat", x, y)


def product(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    """Return the part of x y that m["part"] names."""
    kind, part, bits = m["T"], m["part"], BITS[m["T"]]
    if part == "lo":
        return t.b.mul(x, y)
    wide = t.b.mul(*(resize(t.b, v, 2 * bits, is_signed(kind)) for v in (x, y)))
    return wide if part == "wide" else resize(t.b, t.b.lshr(wide, const(2 * bits, bits)), bits)


@form(f"mul.{{part:lo|hi}}.{WHOLE}", ">d:T a:T b:T", "the low or high half of a b")
@form("mul.{part:wide}.{T:u16|u32|s16|s32}", ">d:2T a:T b:T", "a b, whole")
def mul(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return product(t, m, x, y)


@form(f"mad.{{part:lo|hi}}.{WHOLE}", ">d:T a:T b:T c:T", "a half of a b, plus c, modulo 2^n")
@form("mad.{part:wide}.{T:u16|u32|s16|s32}", ">d:2T a:T b:T c:2T", "a b + c, modulo 2^2n")
def mad(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    return t.b.add(product(t, m, x, y), z)


def product24(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    """Return the low 32 of 48 bits, or the high 32, of the product of the low 24 bits."""
    wide = []
    for value in (x, y):
        cut = t.b.shl(resize(t.b, value, 64), const(64, 40))
        shift = t.b.ashr if is_signed(m["T"]) else t.b.lshr
        wide.append(shift(cut, const(64, 40)))
    whole = t.b.mul(*wide)
    return resize(t.b, t.b.lshr(whole, const(64, 0 if m["part"] == "lo" else 16)), 32)


@form("mul24.{part:lo|hi}.{T:u32|s32}", ">d:T a:T b:T", "32 of the 48 bits of a 24-bit product")
def mul24(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    return product24(t, m, x, y)


@form("mad24.{part:lo|hi}.{T:u32|s32}", ">d:T a:T b:T c:T", "the same, plus c")
def mad24(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    return t.b.add(product24(t, m, x, y), z)


@form(f"sad.{WHOLE}", ">d:T a:T b:T c:T", "c + |a - b|")
def sad(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    less = (t.b.icmp_signed if is_signed(m["T"]) else t.b.icmp_unsigned)("<", x, y)
    return t.b.add(z, t.b.select(less, t.b.sub(y, x), t.b.sub(x, y)))


def safe(t: Any, kind: str, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """Return (divisor that never traps, y == 0, least / -1)."""
    bits = BITS[kind]
    zero = t.b.icmp_unsigned("==", y, const(bits, 0))
    over = const(1, 0)
    if is_signed(kind):
        least = t.b.icmp_unsigned("==", x, const(bits, 1 << (bits - 1)))
        over = t.b.and_(least, t.b.icmp_unsigned("==", y, const(bits, -1)))
    return t.b.select(t.b.or_(zero, over), const(bits, 1), y), zero, over


@form(f"div.{WHOLE}", ">d:T a:T b:T", "a / b toward zero; all bits set for b = 0")
def div(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    divisor, zero, _ = safe(t, m["T"], x, y)
    made = (t.b.sdiv if is_signed(m["T"]) else t.b.udiv)(x, divisor)
    return t.b.select(zero, const(BITS[m["T"]], -1), made)


@form(f"rem.{WHOLE}", ">d:T a:T b:T", "the rest of a / b, with the sign of a; a for b = 0")
def rem(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    divisor, zero, _ = safe(t, m["T"], x, y)
    made = (t.b.srem if is_signed(m["T"]) else t.b.urem)(x, divisor)
    return t.b.select(zero, x, made)


@form("abs.{T:s16|s32|s64}", ">d:T a:T", "|a|; the least number stays")
def absolute(t: Any, m: Modifiers, x: Any) -> Any:
    return intrinsic(t.b, f"llvm.abs.i{BITS[m['T']]}", x.type, [x, const(1, 0)])


@form("neg.{T:s16|s32|s64}", ">d:T a:T", "-a, modulo 2^n")
def neg(t: Any, m: Modifiers, x: Any) -> Any:
    return t.b.neg(x)


@form(f"min.{WHOLE}", ">d:T a:T b:T", "the lesser")
@form(f"max.{WHOLE}", ">d:T a:T b:T", "the greater")
def minmax(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    name = "min" if "=min" in m else "max"
    return int_op(t.b, ("s" if is_signed(m["T"]) else "u") + name, x, y)


@form("popc.{T:b32|b64}", ">d:u32 a:T", "how many bits are set")
def popc(t: Any, m: Modifiers, x: Any) -> Any:
    return resize(t.b, int_op(t.b, "ctpop", x), 32)


@form("clz.{T:b32|b64}", ">d:u32 a:T", "how many zeros lead")
def clz(t: Any, m: Modifiers, x: Any) -> Any:
    return resize(t.b, intrinsic(t.b, f"llvm.ctlz.i{BITS[m['T']]}", x.type, [x, const(1, 0)]), 32)


@form("bfind[shiftamt].{T:u32|u64|s32|s64}", ">d:u32 a:T", "where the highest bit is that is not the sign; 2^32 - 1 for none")  # fmt: skip
def bfind(t: Any, m: Modifiers, x: Any) -> Any:
    bits = BITS[m["T"]]
    if is_signed(m["T"]):
        x = t.b.xor(x, t.b.ashr(x, const(bits, bits - 1)))
    zeros = resize(t.b, intrinsic(t.b, f"llvm.ctlz.i{bits}", x.type, [x, const(1, 0)]), 32)
    place = zeros if m["shiftamt"] else t.b.sub(const(32, bits - 1), zeros)
    return t.b.select(t.b.icmp_unsigned("==", x, const(bits, 0)), const(32, -1), place)


@form("brev.{T:b32|b64}", ">d:T a:T", "the bits backwards")
def brev(t: Any, m: Modifiers, x: Any) -> Any:
    return int_op(t.b, "bitreverse", x)


@form("bfe.{T:u32|u64|s32|s64}", ">d:T a:T b:u32 c:u32", "c bits of a from bit b on, extended by zeros or the field's sign")  # fmt: skip
def bfe(t: Any, m: Modifiers, x: Any, start: Any, length: Any) -> Any:
    b, bits = t.b, BITS[m["T"]]
    start, length = (b.and_(v, const(32, 255)) for v in (start, length))
    last = int_op(b, "umin", b.sub(b.add(start, length), const(32, 1)), const(32, bits - 1))
    start, length = (int_op(b, "umin", v, const(32, bits)) for v in (start, length))
    wide = resize(b, x, 128, is_signed(m["T"]))
    moved = b.lshr(wide, resize(b, start, 128))
    keep = b.sub(b.shl(const(128, 1), resize(b, length, 128)), const(128, 1))
    kept = resize(b, b.and_(moved, keep), bits)
    if not is_signed(m["T"]):
        return kept
    sign = b.trunc(b.lshr(x, resize(b, last, bits)), I1)
    filled = b.shl(const(128, -1), resize(b, length, 128))
    kept = b.select(sign, b.or_(kept, resize(b, filled, bits)), kept)
    return b.select(b.icmp_unsigned("==", length, const(32, 0)), const(bits, 0), kept)


@form("bfi.{T:b32|b64}", ">f:T a:T b:T c:u32 d:u32", "b with d bits of a from bit c on")
def bfi(t: Any, m: Modifiers, x: Any, y: Any, start: Any, length: Any) -> Any:
    b, bits = t.b, BITS[m["T"]]
    start, length = (
        resize(b, int_op(b, "umin", b.and_(v, const(32, 255)), const(32, bits)), 128)
        for v in (start, length)
    )
    field = b.shl(b.sub(b.shl(const(128, 1), length), const(128, 1)), start)
    field = resize(b, field, bits)
    moved = resize(b, b.shl(resize(b, x, 128), start), bits)
    return b.or_(b.and_(moved, field), b.and_(y, b.not_(field)))


@form("bmsk.{mode:clamp|wrap}.b32", ">d:b32 a:b32 b:b32", "b set bits from bit a on")
def bmsk(t: Any, m: Modifiers, start: Any, length: Any) -> Any:
    b = t.b
    if m["mode"] == "wrap":
        start, length = (b.and_(v, const(32, 31)) for v in (start, length))
    else:
        start, length = (int_op(b, "umin", v, const(32, 32)) for v in (start, length))
    start, length = (resize(b, v, 64) for v in (start, length))
    ones = b.sub(b.shl(const(64, 1), length), const(64, 1))
    return resize(b, b.shl(ones, start), 32)


@form("szext.{mode:clamp|wrap}.{T:u32|s32}", ">d:T a:T b:u32", "the low b bits of a, extended")
def szext(t: Any, m: Modifiers, x: Any, length: Any) -> Any:
    b = t.b
    if m["mode"] == "wrap":
        length = b.and_(length, const(32, 31))
    else:
        length = int_op(b, "umin", length, const(32, 32))
    shift = b.sub(const(64, 64), resize(b, length, 64))
    none = b.icmp_unsigned("==", length, const(32, 0))
    moved = b.shl(resize(b, x, 64), b.and_(shift, const(64, 63)))
    made = (b.ashr if is_signed(m["T"]) else b.lshr)(moved, b.and_(shift, const(64, 63)))
    return b.select(none, const(32, 0), resize(b, made, 32))


def lane(t: Any, word: Any, index: int, kind: Any, signed: bool) -> Any:
    """Return one byte or half of a word, as 32 bits."""
    part = t.b.trunc(t.b.lshr(word, const(32, index * kind.width)), kind)
    return resize(t.b, part, 32, signed)


@form("dp4a.{A:u32|s32}.{B:u32|s32}", ">d:b32 a:b32 b:b32 c:b32", "c + the four products of bytes")
def dp4a(t: Any, m: Modifiers, x: Any, y: Any, total: Any) -> Any:
    for index in range(4):
        one, other = (lane(t, v, index, I8, is_signed(m[k])) for v, k in ((x, "A"), (y, "B")))
        total = t.b.add(total, t.b.mul(one, other))
    return total


@form("dp2a.{half:lo|hi}.{A:u32|s32}.{B:u32|s32}", ">d:b32 a:b32 b:b32 c:b32", "c + two products: the halves of a, and bytes of b")  # fmt: skip
def dp2a(t: Any, m: Modifiers, x: Any, y: Any, total: Any) -> Any:
    for index in range(2):
        one = lane(t, x, index, I16, is_signed(m["A"]))
        other = lane(t, y, index + 2 * (m["half"] == "hi"), I8, is_signed(m["B"]))
        total = t.b.add(total, t.b.mul(one, other))
    return total


# Extended precision: the carry is a register of its own. ----------------------------------------

CARRIED = "{T:u32|s32|u64|s64}"


def carry(t: Any, m: Modifiers, total: Any) -> Any:
    """Keep the carry of a sum of one bit more than its type, where asked; return the sum."""
    bits = BITS[m["T"]]
    if m["cc"]:
        t.set_carry(t.b.trunc(t.b.lshr(total, const(bits + 1, bits)), I1))
    return resize(t.b, total, bits)


@form(f"add.{{cc:cc}}.{CARRIED}", ">d:T a:T b:T", "a + b, and the carry")
@form(f"addc[cc].{CARRIED}", ">d:T a:T b:T", "a + b + carry, and the carry")
@form(f"sub.{{cc:cc}}.{CARRIED}", ">d:T a:T b:T", "a - b, and the borrow")
@form(f"subc[cc].{CARRIED}", ">d:T a:T b:T", "a - b - borrow, and the borrow")
def add_carry(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    bits = BITS[m["T"]] + 1
    minus = "=sub" in m or "=subc" in m
    x, y = (resize(t.b, v, bits) for v in (x, y))
    total = (t.b.sub if minus else t.b.add)(x, y)
    if "=addc" in m or "=subc" in m:
        total = (t.b.sub if minus else t.b.add)(total, resize(t.b, t.carry(), bits))
    return carry(t, m, total)


@form(f"mad.{{part:lo|hi}}.{{cc:cc}}.{CARRIED}", ">d:T a:T b:T c:T", "a half of a b, plus c, and the carry")  # fmt: skip
@form(f"madc.{{part:lo|hi}}[cc].{CARRIED}", ">d:T a:T b:T c:T", "the same, plus the carry")
def mad_carry(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    bits = BITS[m["T"]] + 1
    total = t.b.add(resize(t.b, product(t, m, x, y), bits), resize(t.b, z, bits))
    if "=madc" in m:
        total = t.b.add(total, resize(t.b, t.carry(), bits))
    return carry(t, m, total)
