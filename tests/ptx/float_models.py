"""What opcodes of floats do, in Fractions and Decimals; see `models`."""

from decimal import Context, Decimal
from fractions import Fraction
from math import floor

from qframe_plugins.ptx_host.syntax import BITS
from tests.ptx import exact
from tests.ptx.models import clip, order, read, u

# Floats ---------------------------------------------------------------------------------------


def lanes(m, apply, *values):
    """Apply a model of one number to both halves of pairs."""
    kind = m["T"]
    if not kind.endswith("x2"):
        return apply(kind, *values)
    halves = [apply(kind[:-2], *(v >> k & 0xFFFF for v in values)) for k in (0, 16)]
    return halves[0] | halves[1] << 16


def read_floats(m, kind, values):
    values = [exact.flushed(v, kind) if m.get("ftz") else v for v in values]
    return [exact.number(v, kind) for v in values]


def binary(m, a, b):
    def apply(kind, a, b):
        x, y = read_floats(m, kind, (a, b))
        mode = m.get("rnd") or "rn"
        if "=mul" in m:
            made = exact.multiply(x, y)
        else:
            made = exact.add(x, (y[0] != ("=sub" in m), y[1]), mode)
        return exact.finish(exact.encode(*made, kind, mode), kind, m)

    return lanes(m, apply, a, b)


def fma(m, a, b, c):
    def apply(kind, a, b, c):
        x, y, z = read_floats(m, kind, (a, b, c))
        made = exact.add(exact.multiply(x, y), z, m["rnd"])
        return exact.finish(exact.encode(*made, kind, m["rnd"]), kind, m)

    return lanes(m, apply, a, b, c)


def divide(m, a, b):
    kind = m["T"]
    made = exact.divide(*read_floats(m, kind, (a, b)))
    return exact.finish(exact.encode(*made, kind, m.get("rnd") or "rn"), kind, m)


def rcp(m, a):
    return divide(m, exact.encode(False, Fraction(1), m["T"]), a)


def gross(m, a):
    """Of both words the high one counts, before and after."""
    high = -1 << 32
    a = exact.flushed(a & high, "f64")
    made = exact.root(a, "f64", "rn") if "=rsqrt" in m else a
    one = exact.number(exact.encode(False, Fraction(1), "f64"), "f64")
    made = exact.encode(*exact.divide(one, exact.number(made, "f64")), "f64")
    return exact.flushed(made & high, "f64")


def sqrt(m, a):
    kind = m["T"]
    a = exact.flushed(a, kind) if m.get("ftz") else a
    return exact.finish(exact.root(a, kind, m.get("rnd") or "rn"), kind, m)


def sign(m, a):
    def apply(kind, a):
        if exact.is_nan(a, kind):
            return exact.nan(kind)
        top = exact.sign_bit(kind)
        return exact.finish(a ^ top if "=neg" in m else a & (top - 1), kind, m)

    return lanes(m, apply, a)


def float_minmax(m, a, b):
    def apply(kind, a, b):
        a, b = (exact.flushed(v, kind) if m.get("ftz") else v for v in (a, b))
        nans = [exact.is_nan(v, kind) for v in (a, b)]
        if all(nans) or (any(nans) and m.get("nan")):
            return exact.nan(kind)
        if any(nans):
            return b if nans[0] else a
        pick = min if "=min" in m else max
        return pick(a, b, key=lambda v: (order(v, kind), not v & exact.sign_bit(kind)))

    return lanes(m, apply, a, b)


def copysign(m, a, b):
    top = exact.sign_bit(m["T"])
    return a & top | b & (top - 1)


# Conversions ----------------------------------------------------------------------------------


def whole_to_whole(m, a):
    value = read(a, m["S"])
    return clip(value, m["D"]) if m["sat"] else u(value, BITS[m["D"]])


def whole_to_float(m, a):
    value = read(a, m["S"])
    made = exact.encode(value < 0, Fraction(abs(value)), m["D"], m["rnd"])
    return exact.finish(made, m["D"], m)


def integral(x, mode):
    low = floor(x)
    if mode == "rni":
        return round(x)
    return {"rzi": low if x >= 0 else -floor(-x), "rmi": low, "rpi": -floor(-x)}[mode]


def float_to_whole(m, a):
    kind, target = m["S"], m["D"]
    a = exact.flushed(a, kind) if m["ftz"] else a
    negative, magnitude = exact.number(a, kind)
    if magnitude == exact.NAN:
        wide = kind == "f64" or BITS[target] == 64
        return 1 << (BITS[target] - 1) if wide else 0
    if magnitude == exact.INF:
        return clip(-(1 << 70) if negative else 1 << 70, target)
    return clip(integral(-magnitude if negative else magnitude, m["rnd"]), target)


def narrow(m, a):
    flush = m.get("ftz")
    a = exact.flushed(a, "f32") if flush and m["S"] == "f32" else a
    made = exact.encode(*exact.number(a, m["S"]), m["D"], m["rnd"])
    return exact.finish(made, m["D"], {**m, "ftz": flush and m["D"] == "f32"})


def narrow_pair(m, a, b):
    high, low = (narrow({**m, "D": m["D"][:-2]}, v) for v in (a, b))
    return high << 16 | low


def widen(m, a):
    a = exact.flushed(a, "f32") if m.get("ftz") and m["S"] == "f32" else a
    return exact.finish(
        exact.encode(*exact.number(a, m["S"]), m["D"]), m["D"], {"sat": m.get("sat")}
    )


def same(m, a):
    kind = m["D"]
    a = exact.flushed(a, kind) if m["ftz"] else a
    negative, magnitude = exact.number(a, kind)
    if m["rnd"] and magnitude not in (exact.NAN, exact.INF):
        magnitude = Fraction(abs(integral(-magnitude if negative else magnitude, m["rnd"])))
    return exact.finish(exact.encode(negative, magnitude, kind), kind, m)


# Functions that PTX calls approximate: the two numbers of the format around the exact result. ----

CONTEXT = Context(prec=60)


def decimal(x):
    return CONTEXT.divide(Decimal(x.numerator), Decimal(x.denominator))


def sine(x, shift):
    """Return sin (shift 1) or cos (shift 0) of a Decimal by its series."""
    total, term, k = Decimal(0), (x if shift else Decimal(1)), shift
    while abs(term) > Decimal(10) ** -58 or k < 4:
        total = CONTEXT.add(total, term)
        k += 2
        term = CONTEXT.divide(CONTEXT.multiply(CONTEXT.multiply(-term, x), x), Decimal(k * (k - 1)))
    return total


def curve(name, x):
    """Return a function of a Fraction as a Decimal of 50 digits, or None if it is not tried."""
    if name in ("sin", "cos"):
        return sine(decimal(x), int(name == "sin")) if abs(x) < 30 else None
    if name == "ex2":
        return CONTEXT.power(2, decimal(x)) if abs(x) < 1200 else None
    if name == "lg2":
        return CONTEXT.divide(CONTEXT.ln(decimal(x)), CONTEXT.ln(2)) if x > 0 else None
    if name == "tanh":
        if abs(x) > 60 or abs(x) < Fraction(1, 10**15):
            return None
        e = CONTEXT.exp(decimal(2 * x))
        return CONTEXT.divide(CONTEXT.subtract(e, 1), CONTEXT.add(e, 1))
    return CONTEXT.divide(1, CONTEXT.sqrt(decimal(x))) if x > 0 else None


LIMITS = {  # name -> (of -inf, of -0, of +0, of +inf), as numbers, NaN where there is none
    "ex2": ("0", "1", "1", "inf"), "lg2": ("nan", "-inf", "-inf", "inf"),
    "sin": ("nan", "-0", "0", "nan"), "cos": ("nan", "1", "1", "nan"),
    "tanh": ("-1", "-0", "0", "1"), "rsqrt": ("nan", "-inf", "inf", "0"),
}  # fmt: skip


def limit(text, kind):
    if text == "nan":
        return exact.nan(kind)
    magnitude = text.lstrip("-")
    negative = text.startswith("-")
    return exact.encode(
        negative, exact.INF if magnitude == "inf" else Fraction(int(magnitude)), kind
    )


def approximate(name, m, a):
    """Return the results that are allowed, a set; None for any."""
    kind = m["T"]
    a = exact.flushed(a, kind) if m.get("ftz") else a
    negative, magnitude = exact.number(a, kind)
    if magnitude == exact.NAN:
        return {exact.nan(kind)}
    if magnitude in (0, exact.INF):
        place = (0 if negative else 3) if magnitude == exact.INF else (1 if negative else 2)
        return {limit(LIMITS[name][place], kind)}
    x = -magnitude if negative else magnitude
    if x < 0 and name in ("lg2", "rsqrt"):
        return {exact.nan(kind)}
    value = curve(name, x)
    if value is None:
        return None
    value = Fraction(value)
    allowed = {exact.encode(value < 0, abs(value), kind, mode) for mode in ("rm", "rp")}
    return {exact.finish(bits, kind, m) for bits in allowed}
