"""mma.sync: products of small matrices by a warp. Source: PTX ISA 8.5, 9.7.14.5 (the fragments).

Integer products are exact and wrap, or end at the range of s32 with .satfinite. Of floats, the
products are exact, and the sum of c and the products in ascending k is kept in float64 and rounded
once. A GPU keeps fewer bits, in an order that is not documented: see docs/ptx.md.
"""

from __future__ import annotations

from typing import Any

from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.ops_warp import ALL
from qframe_plugins.ptx_host.syntax import BITS
from qframe_plugins.ptx_host.values import I32, const, decode, encode, int_op, resize

WIDTHS = {"s8": 8, "u8": 8, "s4": 4, "u4": 4, "f16": 16, "bf16": 16, "tf32": 32}


def shape(m: Modifiers) -> tuple[int, int, int, int]:
    """Return (k, numbers of a register, registers of a, registers of b)."""
    depth, per = int(m["shape"].rpartition("k")[2]), 32 // WIDTHS[m["A"]]
    return depth, per, depth // (2 * per), depth // (4 * per)


def element(w: Any, word: Any, at: Any, kind: str) -> Any:
    """Return number `at` of a register, as i64, or double."""
    b, bits = w.b, WIDTHS[kind]
    part = b.lshr(word, resize(b, b.mul(at, const(64, bits)), 32))
    if kind == "tf32":
        return decode(b, b.and_(part, const(32, ~0x1FFF)), "f32", wide=True)
    if kind in ("f16", "bf16"):
        return decode(b, resize(b, part, 16), kind)
    moved = b.shl(resize(b, part, 64), const(64, 64 - bits))
    return (b.ashr if kind[0] == "s" else b.lshr)(moved, const(64, 64 - bits))


def resolve_mma(w: Any, m: Modifiers) -> None:
    """Brought: mask, registers of a, b and c. Given: registers of d."""
    b = w.b
    depth, per, many_a, many_b = shape(m)
    block = 4 * per
    whole = m["D"] == "s32"
    w.needs_all()

    def place(k: Any) -> tuple[Any, Any, Any]:
        """Return (lane of four, block of k, number of the register) of index k."""
        inside = b.urem(k, const(64, block))
        return (
            b.udiv(inside, const(64, per)), b.udiv(k, const(64, block)),
            b.urem(inside, const(64, per)),
        )  # fmt: skip

    def number(row: Any, column: Any, start: Any) -> Any:
        """Return start + the row of a times the column of b."""
        total = w.cell(start)
        b.store(start, total)

        def step(k: Any) -> None:
            four, blocks, at = place(k)
            lane = b.add(b.mul(b.and_(row, const(64, 7)), const(64, 4)), four)
            register = b.add(b.lshr(row, const(64, 3)), b.mul(blocks, const(64, 2)))
            x = element(w, w.brought(lane, b.add(register, const(64, 1))), at, m["A"])
            lane = b.add(b.mul(column, const(64, 4)), four)
            y = element(w, w.brought(lane, b.add(blocks, const(64, 1 + many_a))), at, m["B"])
            if whole:
                b.store(b.add(b.load(total), b.mul(x, y)), total)
            else:
                b.store(b.fadd(b.load(total), b.fmul(x, y)), total)

        w.loop(depth, step)
        return b.load(total)

    def one(lane: Any) -> None:
        row, four = b.lshr(lane, const(64, 2)), b.and_(lane, const(64, 3))
        kind = m["D"]
        halves = 1 if BITS[kind] == 32 else 2
        for register in range(4 // halves):
            made = const(32, 0)
            old = w.brought(lane, 1 + many_a + many_b + register)
            for half in range(halves):
                index = register * halves + half
                r = b.add(row, const(64, 8 * (index >> 1)))
                c = b.add(b.mul(four, const(64, 2)), const(64, index & 1))
                bits = resize(b, b.lshr(old, const(32, 16 * half)), BITS[kind])
                if whole:
                    total = number(r, c, resize(b, bits, 64, signed=True))
                    if m["sat"]:
                        total = int_op(b, "smin", total, const(64, (1 << 31) - 1))
                        total = int_op(b, "smax", total, const(64, -(1 << 31)))
                    result = resize(b, total, 32)
                else:
                    total = number(r, c, decode(b, bits, kind, wide=True))
                    result = resize(b, encode(b, total, kind), 32)
                made = b.or_(made, b.shl(result, const(32, 16 * half)))
            w.give(lane, register, made)

    w.each(one)


INTS = "row.col[sat:satfinite].{D:s32}"


@form(f"mma.sync.aligned.{{shape:m16n8k16}}.{INTS}.{{A:s8|u8}}.{{B:s8|u8}}.s32", ">{d:b32*4} {a:b32*2} {b:b32*1} {c:b32*4}", "d = a b + c", sync="warp", resolve=resolve_mma)  # fmt: skip
@form(f"mma.sync.aligned.{{shape:m16n8k32}}.{INTS}.{{A:s8|u8}}.{{B:s8|u8}}.s32", ">{d:b32*4} {a:b32*4} {b:b32*2} {c:b32*4}", "d = a b + c", sync="warp", resolve=resolve_mma)  # fmt: skip
@form(f"mma.sync.aligned.{{shape:m16n8k32}}.{INTS}.{{A:s4|u4}}.{{B:s4|u4}}.s32", ">{d:b32*4} {a:b32*2} {b:b32*1} {c:b32*4}", "d = a b + c", sync="warp", resolve=resolve_mma)  # fmt: skip
@form(f"mma.sync.aligned.{{shape:m16n8k64}}.{INTS}.{{A:s4|u4}}.{{B:s4|u4}}.s32", ">{d:b32*4} {a:b32*4} {b:b32*2} {c:b32*4}", "d = a b + c", sync="warp", resolve=resolve_mma)  # fmt: skip
@form("mma.sync.aligned.{shape:m16n8k8}.row.col.{D:f32}.{A:f16|bf16}.{B:f16|bf16}.f32", ">{d:b32*4} {a:b32*2} {b:b32*1} {c:b32*4}", "d = a b + c", sync="warp", resolve=resolve_mma, only=lambda m: m["A"] == m["B"])  # fmt: skip
@form("mma.sync.aligned.{shape:m16n8k16}.row.col.{D:f32}.{A:f16|bf16}.{B:f16|bf16}.f32", ">{d:b32*4} {a:b32*4} {b:b32*2} {c:b32*4}", "d = a b + c", sync="warp", resolve=resolve_mma, only=lambda m: m["A"] == m["B"])  # fmt: skip
@form("mma.sync.aligned.{shape:m16n8k8}.row.col.{D:f16}.{A:f16}.{B:f16}.f16", ">{d:b32*2} {a:b32*2} {b:b32*1} {c:b32*2}", "d = a b + c", sync="warp", resolve=resolve_mma)  # fmt: skip
@form("mma.sync.aligned.{shape:m16n8k16}.row.col.{D:f16}.{A:f16}.{B:f16}.f16", ">{d:b32*2} {a:b32*4} {b:b32*2} {c:b32*2}", "d = a b + c", sync="warp", resolve=resolve_mma)  # fmt: skip
@form("mma.sync.aligned.{shape:m16n8k4}.row.col.{D:f32}.{A:tf32}.{B:tf32}.f32", ">{d:b32*4} {a:b32*2} {b:b32*1} {c:b32*4}", "d = a b + c; of tf32, the low 13 bits are cut", sync="warp", resolve=resolve_mma)  # fmt: skip
@form("mma.sync.aligned.{shape:m16n8k8}.row.col.{D:f32}.{A:tf32}.{B:tf32}.f32", ">{d:b32*4} {a:b32*4} {b:b32*2} {c:b32*4}", "d = a b + c; of tf32, the low 13 bits are cut", sync="warp", resolve=resolve_mma)  # fmt: skip
def mma(t: Any, m: Modifiers, a: list[Any], b: list[Any], c: list[Any]) -> Any:
    count = 2 if m["D"] == "f16" else 4
    return [t.b.trunc(made, I32) for made in t.wait([ALL, *a, *b, *c], outputs=count)]
