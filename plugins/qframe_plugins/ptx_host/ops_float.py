"""Floating-point arithmetic. Source: PTX ISA 8.5, 9.7.3 to 9.7.5.

Everything that PTX says is rounded correctly is. What it calls approximate (`.approx`, `.full`,
`ex2`, `lg2`, `sin`, `cos`, `tanh`) is the float64 result of the C library rounded to the format:
better than any GPU's, within every bound that PTX states, but not a GPU's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qframe_plugins.ptx_host.forms import Modifiers, form
from qframe_plugins.ptx_host.syntax import BITS
from qframe_plugins.ptx_host.values import (
    DOUBLE,
    FORMATS,
    add_odd,
    canonical,
    const,
    decode,
    divide_odd,
    encode,
    float_op,
    flush,
    is_nan,
    resize,
    saturate,
    sqrt_odd,
)

ROUND = "[rnd:rn|rz|rm|rp]"


def per_lane(t: Any, kind: str, apply: Callable[..., Any], *values: Any) -> Any:
    """Apply a function of one type's bits, to both halves where the type is a pair."""
    if not kind.endswith("x2"):
        return apply(kind, *values)
    made = const(32, 0)
    for shift in (0, 16):
        halves = [resize(t.b, t.b.lshr(value, const(32, shift)), 16) for value in values]
        half = resize(t.b, apply(kind[:-2], *halves), 32)
        made = t.b.or_(made, t.b.shl(half, const(32, shift)))
    return made


def finished(t: Any, m: Modifiers, kind: str, bits: Any) -> Any:
    """Return a result with what .ftz, .sat and .relu do to it."""
    if m.get("ftz"):
        bits = flush(t.b, bits, kind)
    if m.get("sat"):
        bits = saturate(t.b, bits, kind)
    if m.get("relu"):
        negative = t.b.icmp_unsigned(">=", bits, const(BITS[kind], FORMATS[kind].sign))
        bits = t.b.select(negative, const(BITS[kind], 0), bits)
    return bits


def numbers(t: Any, m: Modifiers, kind: str, values: tuple[Any, ...], wide: bool) -> list[Any]:
    """Return operands as floats, flushed where asked."""
    if m.get("ftz"):
        values = tuple(flush(t.b, value, kind) for value in values)
    return [decode(t.b, value, kind, wide) for value in values]


def is_native(m: Modifiers, kind: str) -> bool:
    """Return whether the host's own instruction rounds as asked."""
    return kind in ("f32", "f64") and m.get("rnd", "") in ("", "rn")


def arithmetic(t: Any, m: Modifiers, name: str, *values: Any) -> Any:
    """Return the sum, difference, product or fused sum of operands, in the instruction's type."""

    def apply(kind: str, *values: Any) -> Any:
        x = numbers(t, m, kind, values, not is_native(m, kind))
        if is_native(m, kind):
            made = float_op(t.b, "fma", *x) if name == "fma" else getattr(t.b, f"f{name}")(*x)
        elif name == "mul":
            made = t.b.fmul(x[0], x[1])  # exact
        elif name == "fma":
            made = add_odd(t.b, t.b.fmul(x[0], x[1]), x[2])
        else:
            made = add_odd(t.b, x[0], t.b.fneg(x[1]) if name == "sub" else x[1])
        mode = m.get("rnd") or "rn"
        if name != "mul" and mode == "rm":
            made = zero_of_a_sum(t, name, x, made)
        bits = encode(t.b, made, kind, mode)
        return finished(t, m, kind, bits)

    return per_lane(t, m["T"], apply, *values)


def zero_of_a_sum(t: Any, name: str, x: list[Any], total: Any) -> Any:
    """Return the sum, where 0 is -0 unless both terms are +0: x - x, rounded down."""
    b, word, zero = t.b, ir.IntType(64), ir.Constant(DOUBLE, 0.0)
    first = b.fmul(x[0], x[1]) if name == "fma" else x[0]
    second = b.fneg(x[1]) if name == "sub" else x[-1]
    both = b.or_(b.bitcast(first, word), b.bitcast(second, word))
    is_negative = b.and_(
        b.icmp_unsigned("!=", both, const(64, 0)), b.fcmp_ordered("==", total, zero)
    )
    return b.select(is_negative, ir.Constant(DOUBLE, -0.0), total)


@form(f"add{ROUND}[ftz][sat].{{T:f32}}", ">d:T a:T b:T", "a + b")
@form("add[rnd:rn].{T:f64}", ">d:T a:T b:T", "a + b")
@form("add[rnd:rn][ftz][sat].{T:f16|f16x2}", ">d:T a:T b:T", "a + b")
@form("add[rnd:rn].{T:bf16|bf16x2}", ">d:T a:T b:T", "a + b")
@form(f"sub{ROUND}[ftz][sat].{{T:f32}}", ">d:T a:T b:T", "a - b")
@form("sub[rnd:rn].{T:f64}", ">d:T a:T b:T", "a - b")
@form("sub[rnd:rn][ftz][sat].{T:f16|f16x2}", ">d:T a:T b:T", "a - b")
@form("sub[rnd:rn].{T:bf16|bf16x2}", ">d:T a:T b:T", "a - b")
@form(f"mul{ROUND}[ftz][sat].{{T:f32}}", ">d:T a:T b:T", "a b")
@form("mul[rnd:rn].{T:f64}", ">d:T a:T b:T", "a b")
@form("mul[rnd:rn][ftz][sat].{T:f16|f16x2}", ">d:T a:T b:T", "a b")
@form("mul[rnd:rn].{T:bf16|bf16x2}", ">d:T a:T b:T", "a b")
def binary(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    name = next(name for name in ("add", "sub", "mul") if f"={name}" in m)
    return arithmetic(t, m, name, x, y)


@form("fma.{rnd:rn|rz|rm|rp}[ftz][sat].{T:f32}", ">d:T a:T b:T c:T", "a b + c, rounded once")
@form("fma.{rnd:rn}.{T:f64}", ">d:T a:T b:T c:T", "a b + c, rounded once")
@form("fma.{rnd:rn}[ftz][sat].{T:f16|f16x2}", ">d:T a:T b:T c:T", "a b + c, rounded once")
@form("fma.{rnd:rn}[ftz].{relu:relu}.{T:f16|f16x2}", ">d:T a:T b:T c:T", "the same, and 0 where it is negative")  # fmt: skip
@form("fma.{rnd:rn}[relu].{T:bf16|bf16x2}", ">d:T a:T b:T c:T", "a b + c, rounded once")
@form("mad.{rnd:rn|rz|rm|rp}[ftz][sat].{T:f32}", ">d:T a:T b:T c:T", "a b + c, rounded once")
@form("mad.{rnd:rn}.{T:f64}", ">d:T a:T b:T c:T", "a b + c, rounded once")
def fma(t: Any, m: Modifiers, x: Any, y: Any, z: Any) -> Any:
    return arithmetic(t, m, "fma", x, y, z)


@form("div.{rnd:rn|rz|rm|rp}[ftz].{T:f32}", ">d:T a:T b:T", "a / b")
@form("div.{rnd:rn}.{T:f64}", ">d:T a:T b:T", "a / b")
@form("div.{how:approx|full}[ftz].{T:f32}", ">d:T a:T b:T", "a / b, here rounded correctly")
def divide(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    kind = m["T"]
    native = is_native(m, kind)
    one, other = numbers(t, m, kind, (x, y), not native)
    made = t.b.fdiv(one, other) if native else divide_odd(t.b, one, other)
    return finished(t, m, kind, encode(t.b, made, kind, m.get("rnd") or "rn"))


@form("rcp.{rnd:rn|rz|rm|rp}[ftz].{T:f32}", ">d:T a:T", "1 / a")
@form("rcp.{rnd:rn}.{T:f64}", ">d:T a:T", "1 / a")
@form("rcp.{how:approx}[ftz].{T:f32}", ">d:T a:T", "1 / a, here rounded correctly")
def rcp(t: Any, m: Modifiers, x: Any) -> Any:
    return divide(t, m, const(BITS[m["T"]], FORMATS[m["T"]].one), x)


@form(
    "rcp.{how:approx}.{ftz:ftz}.{T:f64}",
    ">d:T a:T",
    "1 / a from the high word of a, of which the high word is kept",
)
@form(
    "rsqrt.{how:approx}.{ftz:ftz}.{T:f64}",
    ">d:T a:T",
    "1 / the root of a from the high word of a, of which the high word is kept",
)
def gross(t: Any, m: Modifiers, x: Any) -> Any:
    high = const(64, ~0xFFFFFFFF)
    [number] = numbers(t, m, "f64", (t.b.and_(x, high),), True)
    if "=rsqrt" in m:
        number = float_op(t.b, "sqrt", number)
    made = encode(t.b, t.b.fdiv(ir.Constant(DOUBLE, 1.0), number), "f64")
    return finished(t, m, "f64", t.b.and_(made, high))


@form("sqrt.{rnd:rn|rz|rm|rp}[ftz].{T:f32}", ">d:T a:T", "the root of a")
@form("sqrt.{rnd:rn}.{T:f64}", ">d:T a:T", "the root of a")
@form("sqrt.{how:approx}[ftz].{T:f32}", ">d:T a:T", "the root of a, here rounded correctly")
def sqrt(t: Any, m: Modifiers, x: Any) -> Any:
    kind = m["T"]
    native = is_native(m, kind)
    [value] = numbers(t, m, kind, (x,), not native)
    made = float_op(t.b, "sqrt", value) if native else sqrt_odd(t.b, value)
    return finished(t, m, kind, encode(t.b, made, kind, m.get("rnd") or "rn"))


def library(t: Any, name: str, value: Any) -> Any:
    """Call a function of the C library, double to double; `machine code` knows its address."""
    known = t.module.globals.get(name)
    if known is None:
        known = ir.Function(t.module, ir.FunctionType(DOUBLE, [DOUBLE]), name)
    return t.b.call(known, [value])


LIBRARY = {"ex2": "exp2", "lg2": "log2", "sin": "sin", "cos": "cos", "tanh": "tanh"}
"""Instruction -> the function of the C library that it is here."""


@form("ex2.approx[ftz].{T:f32}", ">d:T a:T", "2^a")
@form("ex2.approx.{T:f16|f16x2}", ">d:T a:T", "2^a")
@form("ex2.approx.{ftz:ftz}.{T:bf16|bf16x2}", ">d:T a:T", "2^a")
@form("lg2.approx[ftz].{T:f32}", ">d:T a:T", "the logarithm of a to base 2")
@form("sin.approx[ftz].{T:f32}", ">d:T a:T", "the sine of a")
@form("cos.approx[ftz].{T:f32}", ">d:T a:T", "the cosine of a")
@form("tanh.approx.{T:f32|f16|f16x2|bf16|bf16x2}", ">d:T a:T", "the hyperbolic tangent of a")
def transcendental(t: Any, m: Modifiers, x: Any) -> Any:
    function = next(function for name, function in LIBRARY.items() if f"={name}" in m)

    def apply(kind: str, value: Any) -> Any:
        [number] = numbers(t, m, kind, (value,), True)
        return finished(t, m, kind, encode(t.b, library(t, function, number), kind))

    return per_lane(t, m["T"], apply, x)


@form("rsqrt.approx[ftz].{T:f32}", ">d:T a:T", "1 / the root of a")
@form("rsqrt.approx.{T:f64}", ">d:T a:T", "1 / the root of a")
def rsqrt(t: Any, m: Modifiers, x: Any) -> Any:
    [number] = numbers(t, m, m["T"], (x,), True)
    made = t.b.fdiv(ir.Constant(DOUBLE, 1.0), float_op(t.b, "sqrt", number))
    return finished(t, m, m["T"], encode(t.b, made, m["T"]))


@form("abs[ftz].{T:f32|f16|f16x2}", ">d:T a:T", "|a|")
@form("abs.{T:f64|bf16|bf16x2}", ">d:T a:T", "|a|")
@form("neg[ftz].{T:f32|f16|f16x2}", ">d:T a:T", "-a")
@form("neg.{T:f64|bf16|bf16x2}", ">d:T a:T", "-a")
def sign(t: Any, m: Modifiers, x: Any) -> Any:
    def apply(kind: str, value: Any) -> Any:
        mask = FORMATS[kind].sign
        if "=neg" in m:
            made = t.b.xor(value, const(BITS[kind], mask))
        else:
            made = t.b.and_(value, const(BITS[kind], mask - 1))
        return finished(t, m, kind, canonical(t.b, made, kind))

    return per_lane(t, m["T"], apply, x)


def ordered(t: Any, bits: Any, kind: str) -> Any:
    """Return integers that are ordered, signed, as the numbers are, with -0 before +0."""
    negative = t.b.ashr(bits, const(BITS[kind], BITS[kind] - 1))
    return t.b.xor(bits, t.b.and_(negative, const(BITS[kind], FORMATS[kind].sign - 1)))


@form("min[ftz][nan:NaN].{T:f32}", ">d:T a:T b:T", "the lesser; a number rather than NaN, or NaN with .NaN")  # fmt: skip
@form("min.{T:f64}", ">d:T a:T b:T", "the lesser; a number rather than NaN")
@form("min[ftz][nan:NaN].{T:f16|f16x2}", ">d:T a:T b:T", "the lesser; a number rather than NaN, or NaN with .NaN")  # fmt: skip
@form("min[nan:NaN].{T:bf16|bf16x2}", ">d:T a:T b:T", "the lesser; a number rather than NaN, or NaN with .NaN")  # fmt: skip
@form("max[ftz][nan:NaN].{T:f32}", ">d:T a:T b:T", "the greater; a number rather than NaN, or NaN with .NaN")  # fmt: skip
@form("max.{T:f64}", ">d:T a:T b:T", "the greater; a number rather than NaN")
@form("max[ftz][nan:NaN].{T:f16|f16x2}", ">d:T a:T b:T", "the greater; a number rather than NaN, or NaN with .NaN")  # fmt: skip
@form("max[nan:NaN].{T:bf16|bf16x2}", ">d:T a:T b:T", "the greater; a number rather than NaN, or NaN with .NaN")  # fmt: skip
def minmax(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    def apply(kind: str, x: Any, y: Any) -> Any:
        b, nan = t.b, const(BITS[kind], FORMATS[kind].nan)
        if m.get("ftz"):
            x, y = (flush(b, value, kind) for value in (x, y))
        first = b.icmp_signed("<" if "=min" in m else ">", ordered(t, x, kind), ordered(t, y, kind))
        made = b.select(first, x, y)
        if m.get("nan"):
            return b.select(b.or_(is_nan(b, x, kind), is_nan(b, y, kind)), nan, made)
        made = b.select(is_nan(b, x, kind), y, b.select(is_nan(b, y, kind), x, made))
        return canonical(b, made, kind)

    return per_lane(t, m["T"], apply, x, y)


@form("copysign.{T:f32|f64}", ">d:T a:T b:T", "b with the sign of a")
def copysign(t: Any, m: Modifiers, x: Any, y: Any) -> Any:
    kind = m["T"]
    mask = FORMATS[kind].sign
    return t.b.or_(t.b.and_(x, const(BITS[kind], mask)), t.b.and_(y, const(BITS[kind], mask - 1)))
