"""Floating point as PTX has it, in Fractions: the models that opcodes are compared with."""

from fractions import Fraction
from math import isqrt

FORMATS = {  # bits, stored significand bits, least normal exponent, canonical NaN
    "f16": (16, 10, -14, 0x7FFF),
    "bf16": (16, 7, -126, 0x7FFF),
    "f32": (32, 23, -126, 0x7FFFFFFF),
    "f64": (64, 52, -1022, 0x7FF8000000000000),
}
NAN, INF = "nan", "inf"


def sign_bit(kind):
    return 1 << (FORMATS[kind][0] - 1)


def infinity(kind):
    bits, fraction, _, _ = FORMATS[kind]
    return ((1 << (bits - 1 - fraction)) - 1) << fraction


def nan(kind):
    return FORMATS[kind][3]


def number(bits, kind):
    """Return (negative, magnitude): a Fraction, INF or NAN."""
    _, fraction, least, _ = FORMATS[kind]
    negative, magnitude = bool(bits & sign_bit(kind)), bits & (sign_bit(kind) - 1)
    if magnitude >= infinity(kind):
        return negative, INF if magnitude == infinity(kind) else NAN
    exponent, rest = magnitude >> fraction, magnitude & ((1 << fraction) - 1)
    if exponent:
        rest, exponent = rest | 1 << fraction, exponent - 1
    return negative, Fraction(rest) * Fraction(2) ** (least + exponent - fraction)


def is_nan(bits, kind):
    return number(bits, kind)[1] == NAN


def flushed(bits, kind):
    negative, magnitude = number(bits, kind)
    small = magnitude not in (INF, NAN) and magnitude < Fraction(2) ** FORMATS[kind][2]
    return negative * sign_bit(kind) if small else bits


def encode(negative, magnitude, kind, mode="rn"):
    """Return the bits of a number, rounded."""
    _, fraction, least, canonical = FORMATS[kind]
    sign = negative * sign_bit(kind)
    if magnitude == NAN:
        return canonical
    if magnitude == INF:
        return sign | infinity(kind)
    if magnitude == 0:
        return sign
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > magnitude
    exponent = max(exponent, least)
    scaled = magnitude / Fraction(2) ** (exponent - fraction)
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2),
        "rz": False,
        "rm": rest and negative,
        "rp": rest and not negative,
    }[mode or "rn"]
    made = ((exponent - least) << fraction) + whole + bool(up)
    if made >= infinity(kind):
        outward = {"rn": True, "rz": False, "rm": negative, "rp": not negative}[mode or "rn"]
        made = infinity(kind) - (not outward)
    return sign | made


def signed(value, mode="rn", kind="f32", zero_negative=False):
    """Return the bits of a signed Fraction."""
    return encode(value < 0 or (value == 0 and zero_negative), abs(value), kind, mode)


def fraction(bits, kind):
    negative, magnitude = number(bits, kind)
    return -magnitude if negative else magnitude


def multiply(x, y):
    """Return the product of two (negative, magnitude)."""
    negative = x[0] != y[0]
    if NAN in (x[1], y[1]) or (INF in (x[1], y[1]) and 0 in (x[1], y[1])):
        return negative, NAN
    return negative, INF if INF in (x[1], y[1]) else x[1] * y[1]


def add(x, y, mode="rn"):
    """Return the sum of two (negative, magnitude)."""
    if NAN in (x[1], y[1]) or (x[1] == INF and y[1] == INF and x[0] != y[0]):
        return False, NAN
    if INF in (x[1], y[1]):
        return (x if x[1] == INF else y)[0], INF
    total = (-x[1] if x[0] else x[1]) + (-y[1] if y[0] else y[1])
    if total == 0:  # both zeros, or x - x
        return (x[0] if x[0] == y[0] else mode == "rm"), Fraction(0)
    return total < 0, abs(total)


def divide(x, y):
    negative = x[0] != y[0]
    if NAN in (x[1], y[1]) or (x[1] == y[1] and x[1] in (0, INF)):
        return negative, NAN
    if x[1] == INF or y[1] == 0:
        return negative, INF
    return negative, Fraction(0) if y[1] == INF else x[1] / y[1]


def root(bits, kind, mode):
    """Return the bits of the square root, from 1200 bits of it and whether there are more."""
    negative, magnitude = number(bits, kind)
    if magnitude in (0, NAN) or negative:
        return encode(negative, magnitude if magnitude == 0 else NAN, kind)
    if magnitude == INF:
        return infinity(kind)
    shift = 1200
    scaled = magnitude * (1 << (2 * shift))
    whole = isqrt(scaled.numerator // scaled.denominator)
    exact = Fraction(whole * whole) == scaled
    sticky = Fraction(whole) if exact else Fraction(2 * whole + 1, 2)
    return encode(False, sticky / (1 << shift), kind, mode)


def finish(bits, kind, m):
    """Return bits after .ftz, .sat and .relu."""
    bits = flushed(bits, kind) if m.get("ftz") else bits
    if m.get("sat"):
        if is_nan(bits, kind) or bits & sign_bit(kind):
            return 0
        one = encode(False, Fraction(1), kind)
        return min(bits, one)
    if m.get("relu") and bits & sign_bit(kind):
        return 0
    return bits
