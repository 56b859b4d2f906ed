"""Numbers as LLVM values: integers of every width, and floats that are rounded as PTX says.

A register holds bits, an LLVM integer. Floats are decoded before an operation and encoded after
it. Additions, products and quotients of float16, bfloat16 and float32 in another mode than to
nearest are computed in float64 and rounded to odd, then to the format: for formats of at most 51
bits that is the correctly rounded result in every mode.

Source: Boldo and Melquiond, When double rounding is odd, 2005 (rounding to odd);
        Knuth, TAOCP 2, 4.2.2 (the error of a sum, TwoSum).
Error:  none. What NaN comes out is the canonical one of PTX, 0x7fffffff or 0x7fff; PTX leaves that
        of float64 open, and here it is 0x7ff8000000000000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from qframe_plugins.ptx_host.syntax import BITS

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
FLOATS = ("f16", "bf16", "f32", "f64")
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
WORDS = I64.as_pointer()


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: bits, stored significand bits, least normal exponent."""

    bits: int
    fraction: int
    least: int
    nan: int

    @property
    def infinity(self) -> int:
        """The bits of infinity."""
        return ((1 << (self.bits - 1 - self.fraction)) - 1) << self.fraction

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << (self.bits - 1)

    @property
    def one(self) -> int:
        """The bits of 1."""
        return (1 - self.least) << self.fraction


FORMATS = {
    "f16": Format(16, 10, -14, 0x7FFF),
    "bf16": Format(16, 7, -126, 0x7FFF),
    "f32": Format(32, 23, -126, 0x7FFFFFFF),
    "f64": Format(64, 52, -1022, 0x7FF8000000000000),
}


def const(bits: int, value: int) -> Any:
    """Return an integer constant, modulo 2^bits."""
    return ir.Constant(ir.IntType(bits), value % (1 << bits) if bits > 1 else value & 1)


def resize(b: Any, value: Any, bits: int, signed: bool = False) -> Any:
    """Return an integer cut or extended to `bits`."""
    have = value.type.width
    if have == bits:
        return value
    if have > bits:
        return b.trunc(value, ir.IntType(bits))
    return (b.sext if signed else b.zext)(value, ir.IntType(bits))


def intrinsic(b: Any, name: str, returns: Any, values: list[Any]) -> Any:
    """Call the LLVM intrinsic of this full name."""
    known = b.module.globals.get(name)
    if known is None:
        kind = ir.FunctionType(returns, [value.type for value in values])
        known = ir.Function(b.module, kind, name)
    return b.call(known, values)


def int_op(b: Any, name: str, *values: Any) -> Any:
    """Call llvm.NAME.iN on integers of one width."""
    kind = values[0].type
    return intrinsic(b, f"llvm.{name}.i{kind.width}", kind, list(values))


def float_op(b: Any, name: str, *values: Any) -> Any:
    """Call llvm.NAME.f32 or .f64."""
    kind = values[0].type
    return intrinsic(b, f"llvm.{name}.{'f32' if kind == FLOAT else 'f64'}", kind, list(values))


# Bits <-> floats ------------------------------------------------------------------------------


def decode(b: Any, bits: Any, kind: str, wide: bool = False) -> Any:
    """Return the number that bits of type `kind` stand for: float for f32, double otherwise.

    `wide` makes a double of float32, too. Nothing is rounded.
    """
    if kind == "f64":
        return b.bitcast(bits, DOUBLE)
    if kind == "f16":
        magnitude = b.zext(b.and_(bits, const(16, 0x7FFF)), I64)
        small = b.bitcast(b.shl(magnitude, const(64, 42)), DOUBLE)  # its exponent is 1008 too low
        finite = b.bitcast(b.fmul(small, ir.Constant(DOUBLE, 2.0**1008)), I64)
        other = b.or_(b.shl(magnitude, const(64, 42)), const(64, 0x7FF << 52))
        is_finite = b.icmp_unsigned("<", magnitude, const(64, 0x7C00))
        sign = b.shl(b.zext(b.and_(bits, const(16, 0x8000)), I64), const(64, 48))
        return b.bitcast(b.or_(b.select(is_finite, finite, other), sign), DOUBLE)
    if kind == "bf16":
        bits = b.shl(b.zext(bits, I32), const(32, 16))
    value = b.bitcast(bits, FLOAT)
    return b.fpext(value, DOUBLE) if wide or kind == "bf16" else value


def canonical(b: Any, bits: Any, kind: str) -> Any:
    """Return bits with every NaN replaced by the canonical one."""
    return b.select(is_nan(b, bits, kind), const(BITS[kind], FORMATS[kind].nan), bits)


def is_nan(b: Any, bits: Any, kind: str) -> Any:
    """Return whether bits are a NaN."""
    form = FORMATS[kind]
    magnitude = b.and_(bits, const(form.bits, form.sign - 1))
    return b.icmp_unsigned(">", magnitude, const(form.bits, form.infinity))


def encode(b: Any, value: Any, kind: str, mode: str = "rn") -> Any:
    """Return the bits of a float or double as type `kind`, rounded by `mode`."""
    if value.type == FLOAT and kind == "f32":
        return canonical(b, b.bitcast(value, I32), kind)
    if value.type == FLOAT:
        value = b.fpext(value, DOUBLE)
    if kind == "f64":
        return canonical(b, b.bitcast(value, I64), kind)
    if kind == "f32" and mode == "rn":
        return canonical(b, b.bitcast(b.fptrunc(value, FLOAT), I32), kind)
    return b.call(rounder(b.module, kind, mode), [b.bitcast(value, I64)])


def flush(b: Any, bits: Any, kind: str) -> Any:
    """Return bits with subnormal numbers replaced by zeros of their sign."""
    form = FORMATS[kind]
    exponent = b.and_(bits, const(form.bits, form.infinity))
    is_small = b.icmp_unsigned("==", exponent, const(form.bits, 0))
    return b.select(is_small, b.and_(bits, const(form.bits, form.sign)), bits)


def saturate(b: Any, bits: Any, kind: str) -> Any:
    """Return bits of a number cut to 0 .. 1; NaN becomes +0."""
    form = FORMATS[kind]
    negative = b.icmp_unsigned(">=", bits, const(form.bits, form.sign))
    zero = b.or_(negative, is_nan(b, bits, kind))
    above = b.icmp_unsigned(">", bits, const(form.bits, form.one))
    cut = b.select(above, const(form.bits, form.one), bits)
    return b.select(zero, const(form.bits, 0), cut)


def rounder(module: Any, kind: str, mode: str) -> Any:
    """Return the function that rounds the bits of a float64 to a narrower format."""
    name = f"round.{kind}.{mode}"
    if name in module.globals:
        return module.globals[name]
    form = FORMATS[kind]
    function = ir.Function(module, ir.FunctionType(ir.IntType(form.bits), [I64]), name)
    function.linkage = "internal"
    b = ir.IRBuilder(function.append_basic_block())
    [bits] = function.args
    zero, one = const(64, 0), const(64, 1)
    negative = b.icmp_signed("<", bits, zero)
    magnitude = b.and_(bits, const(64, (1 << 63) - 1))
    field = b.lshr(magnitude, const(64, 52))
    fraction = b.and_(magnitude, const(64, (1 << 52) - 1))
    hidden = b.select(b.icmp_unsigned("==", field, zero), zero, const(64, 1 << 52))
    significand = b.or_(fraction, hidden)
    over = b.sub(field, const(64, 1023 + form.least))  # exponent, from the least normal one on
    below = int_op(b, "smax", b.sub(zero, over), zero)
    shift = int_op(b, "umin", b.add(below, const(64, 52 - form.fraction)), const(64, 63))
    kept = b.lshr(significand, shift)
    rest = b.and_(significand, b.sub(b.shl(one, shift), one))
    half = b.lshr(b.shl(one, shift), one)
    is_tie, is_more = b.icmp_unsigned("==", rest, half), b.icmp_unsigned(">", rest, half)
    is_odd = b.trunc(kept, I1)
    inexact = b.icmp_unsigned("!=", rest, zero)
    up = {
        "rn": b.or_(is_more, b.and_(is_tie, is_odd)),
        "rna": b.or_(is_more, is_tie),
        "rz": const(1, 0),
        "rm": b.and_(inexact, negative),
        "rp": b.and_(inexact, b.not_(negative)),
    }[mode]
    to_infinity = {
        "rn": const(1, 1), "rna": const(1, 1), "rz": const(1, 0),
        "rm": negative, "rp": b.not_(negative),
    }[mode]  # fmt: skip
    kept = b.add(kept, b.zext(up, I64))
    base = b.shl(int_op(b, "smax", over, zero), const(64, form.fraction))
    made = b.add(base, kept)
    infinite = const(64, form.infinity)
    limit = b.select(to_infinity, infinite, const(64, form.infinity - 1))
    made = b.select(b.icmp_unsigned(">=", made, infinite), limit, made)
    special = const(64, 0x7FF << 52)
    made = b.select(b.icmp_unsigned("==", magnitude, special), infinite, made)
    made = b.or_(made, b.select(negative, const(64, form.sign), zero))
    made = b.select(b.icmp_unsigned(">", magnitude, special), const(64, form.nan), made)
    b.ret(resize(b, made, form.bits))
    return function


# Operations whose result is rounded to odd ----------------------------------------------------


def _odd(b: Any, value: Any, error: Any) -> Any:
    """Return `value`, a double, or its odd neighbour where value + error lies between both."""
    zero = ir.Constant(DOUBLE, 0.0)
    bits = b.bitcast(value, I64)
    inexact = b.fcmp_ordered("!=", error, zero)
    outward = b.icmp_unsigned(
        "==",
        b.icmp_signed("<", bits, const(64, 0)),
        b.icmp_signed("<", b.bitcast(error, I64), const(64, 0)),
    )
    step = b.select(outward, const(64, 1), const(64, -1))
    moves = b.and_(inexact, b.not_(b.trunc(bits, I1)))
    finite = b.fcmp_ordered("!=", float_op(b, "fabs", value), ir.Constant(DOUBLE, float("inf")))
    return b.bitcast(b.select(b.and_(moves, finite), b.add(bits, step), bits), DOUBLE)


def add_odd(b: Any, x: Any, y: Any) -> Any:
    """Return x + y, rounded to odd; for numbers whose sum does not overflow."""
    total = b.fadd(x, y)
    seen = b.fsub(total, x)
    error = b.fadd(b.fsub(x, b.fsub(total, seen)), b.fsub(y, seen))
    return _odd(b, total, error)


def divide_odd(b: Any, x: Any, y: Any) -> Any:
    """Return x / y, rounded to odd; for numbers of float32's range."""
    quotient = b.fdiv(x, y)
    rest = float_op(b, "fma", b.fneg(quotient), y, x)
    return _odd(b, quotient, b.fdiv(rest, y))


def sqrt_odd(b: Any, x: Any) -> Any:
    """Return the root of x, rounded to odd; for numbers of float32's range."""
    root = float_op(b, "sqrt", x)
    return _odd(b, root, float_op(b, "fma", b.fneg(root), root, x))


def from_int_odd(b: Any, value: Any, signed: bool) -> Any:
    """Return an integer of at most 64 bits as a double, rounded to odd."""
    if value.type.width <= 32:
        return (b.sitofp if signed else b.uitofp)(value, DOUBLE)
    high = b.and_(value, const(64, ~0x7FF))
    low = b.and_(value, const(64, 0x7FF))
    convert = b.sitofp if signed else b.uitofp  # `high` has 53 bits, so both are exact
    return add_odd(b, convert(high, DOUBLE), b.uitofp(low, DOUBLE))
