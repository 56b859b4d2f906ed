"""Conversions. Source: PTX ISA 8.5, 9.7.9.21 (cvt)."""

from __future__ import annotations

from typing import Any

from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.ops_float import finished
from qframe_plugins.ptx_host.syntax import BITS
from qframe_plugins.ptx_host.values import (
    const,
    decode,
    encode,
    float_op,
    flush,
    from_int_odd,
    intrinsic,
    resize,
)

WHOLE = "u8|u16|u32|u64|s8|s16|s32|s64"
INTEGRAL = {"rni": "roundeven", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
"""Mode -> how LLVM rounds to an integral number."""


def _cut(t: Any, m: Modifiers, x: Any) -> Any:
    """Return an integer cut to the range of the target."""
    source, target = m["S"], m["D"]
    wide = resize(t.b, x, 128, source[0] == "s")
    bits = BITS[target]
    least, most = (
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if target[0] == "s" else (0, (1 << bits) - 1)
    )
    for name, bound in (("smax", least), ("smin", most)):
        wide = intrinsic(t.b, f"llvm.{name}.i128", wide.type, [wide, const(128, bound)])
    return resize(t.b, wide, bits)


@form(f"cvt[sat].{{D:{WHOLE}}}.{{S:{WHOLE}}}", ">d:D a:S", "a, cut to the low bits or extended by the sign of S; with .sat cut to the range of D")  # fmt: skip
def whole_to_whole(t: Any, m: Modifiers, x: Any) -> Any:
    if m["sat"]:
        return _cut(t, m, x)
    return resize(t.b, x, BITS[m["D"]], m["S"][0] == "s")


@form(f"cvt.{{rnd:rn|rz|rm|rp}}[sat].{{D:f16|f32}}.{{S:{WHOLE}}}", ">d:D a:S", "a, rounded")
@form(f"cvt.{{rnd:rn}}.{{D:f64|bf16}}.{{S:{WHOLE}}}", ">d:D a:S", "a, rounded")
def whole_to_float(t: Any, m: Modifiers, x: Any) -> Any:
    signed = m["S"][0] == "s"
    if m["D"] == "f64":
        kind = decode(t.b, const(64, 0), "f64").type
        return encode(t.b, (t.b.sitofp if signed else t.b.uitofp)(x, kind), "f64")
    made = encode(t.b, from_int_odd(t.b, x, signed), m["D"], m["rnd"])
    return finished(t, m, m["D"], made)


@form(f"cvt.{{rnd:rni|rzi|rmi|rpi}}[ftz][sat].{{D:{WHOLE}}}.{{S:f16|bf16|f32|f64}}", ">d:D a:S", "a, rounded to an integer and cut to the range of D; NaN becomes 0, or 2^(n-1) from f64 and to 64 bits", only=lambda m: not m["ftz"] or m["S"] == "f32")  # fmt: skip
def float_to_whole(t: Any, m: Modifiers, x: Any) -> Any:
    source, target = m["S"], m["D"]
    x = flush(t.b, x, source) if m["ftz"] else x
    value = float_op(t.b, INTEGRAL[m["rnd"]], decode(t.b, x, source, wide=True))
    kind = const(BITS[target], 0).type
    name = f"llvm.fpto{'s' if target[0] == 's' else 'u'}i.sat.i{BITS[target]}.f64"
    made = intrinsic(t.b, name, kind, [value])
    if source != "f64" and BITS[target] < 64:
        return made
    highest = const(BITS[target], 1 << (BITS[target] - 1))
    return t.b.select(t.b.fcmp_unordered("uno", value, value), highest, made)


def narrows(m: Modifiers) -> bool:
    """Return whether the target has fewer bits than the source."""
    return BITS[m["D"]] < BITS[m["S"]]


@form("cvt.{rnd:rn|rz|rm|rp}[ftz][sat].{D:f16|f32}.{S:f32|f64}", ">d:D a:S", "a, rounded", only=narrows)  # fmt: skip
@form("cvt.{rnd:rn|rz}[relu].{D:f16|bf16}.{S:f32}", ">d:D a:S", "a, rounded; with .relu 0 where it is negative")  # fmt: skip
@form("cvt.{rnd:rn|rz|rm|rp}.{D:bf16}.{S:f64}", ">d:D a:S", "a, rounded")
def narrow(t: Any, m: Modifiers, x: Any) -> Any:
    if m.get("ftz") and m["S"] == "f32":
        x = flush(t.b, x, "f32")
    made = encode(t.b, decode(t.b, x, m["S"], wide=True), m["D"], m["rnd"])
    return finished(t, {**m, "ftz": m.get("ftz", "") if m["D"] == "f32" else ""}, m["D"], made)


@form("cvt.{rnd:rn|rz}[relu].{D:f16x2|bf16x2}.{S:f32}", ">d:D a:S b:S", "a and b, rounded; b is the low half")  # fmt: skip
def narrow_pair(t: Any, m: Modifiers, high: Any, low: Any) -> Any:
    kind = m["D"][:-2]
    halves = [resize(t.b, narrow(t, {**m, "D": kind}, value), 32) for value in (low, high)]
    return t.b.or_(halves[0], t.b.shl(halves[1], const(32, 16)))


@form("cvt[ftz][sat].{D:f32}.{S:f16}", ">d:D a:S", "a, exactly")
@form("cvt.{D:f32}.{S:bf16}", ">d:D a:S", "a, exactly")
@form("cvt.{D:f64}.{S:f16|bf16}", ">d:D a:S", "a, exactly")
@form("cvt[ftz].{D:f64}.{S:f32}", ">d:D a:S", "a, exactly")
def widen(t: Any, m: Modifiers, x: Any) -> Any:
    if m.get("ftz") and m["S"] == "f32":
        x = flush(t.b, x, "f32")
    made = encode(t.b, decode(t.b, x, m["S"], wide=True), m["D"])
    return finished(t, {"sat": m.get("sat", "")}, m["D"], made)


@form("cvt[rnd:rni|rzi|rmi|rpi][ftz][sat].{D:f16|f32|f64}.{S:f16|f32|f64}", ">d:D a:S", "a, rounded to an integral number", only=lambda m: m["D"] == m["S"] and (not m["ftz"] or m["D"] == "f32"))  # fmt: skip
def same(t: Any, m: Modifiers, x: Any) -> Any:
    kind = m["D"]
    x = flush(t.b, x, kind) if m["ftz"] else x
    value = decode(t.b, x, kind, wide=True)
    if m["rnd"]:
        value = float_op(t.b, INTEGRAL[m["rnd"]], value)
    return finished(t, m, kind, encode(t.b, value, kind))
