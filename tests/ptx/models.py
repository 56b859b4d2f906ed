"""What each opcode does, in Python's integers and Fractions: the reference of the table.

A model is named as the function that translates its form. It is given the modifiers and the bits
of the operands, and returns the bits of the results.
"""

from fractions import Fraction

from qframe_plugins.ptx_host.syntax import BITS
from tests.ptx import exact


def s(value, bits):
    """Return what bits are in two's complement."""
    return value - ((value >> (bits - 1)) << bits)


def u(value, bits):
    return value % (1 << bits)


def read(value, kind):
    return s(value, BITS[kind]) if kind[0] == "s" else value


def clip(value, kind):
    bits = BITS[kind]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    return u(min(max(value, low), high), bits)


def bit_list(value, count):
    return [value >> i & 1 for i in range(count)]


def from_bits(bits):
    return sum(bit << i for i, bit in enumerate(bits))


# Integers -------------------------------------------------------------------------------------


def add(m, a, b):
    return u(a + b, BITS[m["T"]])


def sub(m, a, b):
    return u(a - b, BITS[m["T"]])


def add_sat(m, a, b):
    return clip(s(a, 32) + s(b, 32), "s32")


def sub_sat(m, a, b):
    return clip(s(a, 32) - s(b, 32), "s32")


def mul(m, a, b):
    bits = BITS[m["T"]]
    whole = read(a, m["T"]) * read(b, m["T"])
    if m["part"] == "wide":
        return u(whole, 2 * bits)
    return u(whole >> (bits if m["part"] == "hi" else 0), bits)


def mad(m, a, b, c):
    return u(mul(m, a, b) + c, BITS[m["T"]] * (2 if m["part"] == "wide" else 1))


def mul24(m, a, b):
    a, b = (x & 0xFFFFFF for x in (a, b))
    if m["T"] == "s32":
        a, b = s(a, 24), s(b, 24)
    return u(a * b >> (16 if m["part"] == "hi" else 0), 32)


def mad24(m, a, b, c):
    return u(mul24(m, a, b) + c, 32)


def sad(m, a, b, c):
    return u(c + abs(read(a, m["T"]) - read(b, m["T"])), BITS[m["T"]])


def div(m, a, b):
    x, y = read(a, m["T"]), read(b, m["T"])
    if y == 0:
        return u(-1, BITS[m["T"]])
    return u(abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1), BITS[m["T"]])


def rem(m, a, b):
    x, y = read(a, m["T"]), read(b, m["T"])
    if y == 0:
        return a
    return u(abs(x) % abs(y) * (-1 if x < 0 else 1), BITS[m["T"]])


def absolute(m, a):
    return u(abs(read(a, m["T"])), BITS[m["T"]])


def neg(m, a):
    return u(-a, BITS[m["T"]])


def int_minmax(m, a, b):
    pick = min if "=min" in m else max
    return pick(a, b, key=lambda x: read(x, m["T"]))


def popc(m, a):
    return a.bit_count()


def clz(m, a):
    return BITS[m["T"]] - a.bit_length()


def bfind(m, a):
    bits = BITS[m["T"]]
    if m["T"][0] == "s" and a >> (bits - 1):
        a = u(~a, bits)
    if not a:
        return 0xFFFFFFFF
    return bits - a.bit_length() if m["shiftamt"] else a.bit_length() - 1


def brev(m, a):
    return from_bits(bit_list(a, BITS[m["T"]])[::-1])


def bfe(m, a, b, c):
    bits, start, length = BITS[m["T"]], b & 255, c & 255
    given = bit_list(a, bits)
    sign = given[min(start + length - 1, bits - 1)] if m["T"][0] == "s" and length else 0
    return from_bits(
        given[start + i] if i < length and start + i < bits else sign for i in range(bits)
    )


def bfi(m, a, b, c, d):
    bits, start, length = BITS[m["T"]], c & 255, d & 255
    made, given = bit_list(b, bits), bit_list(a, bits)
    for i in range(length):
        if i < bits and start + i < bits:
            made[start + i] = given[i]
    return from_bits(made)


def bmsk(m, a, b):
    a, b = (a % 32, b % 32) if m["mode"] == "wrap" else (min(a, 32), min(b, 32))
    return u(((1 << b) - 1) << a, 32)


def szext(m, a, b):
    b = b % 32 if m["mode"] == "wrap" else min(b, 32)
    if not b:
        return 0
    low = a % (1 << b)
    return u(s(low, b), 32) if m["T"] == "s32" else low


def parts(value, width, kind):
    count = 32 // width
    found = [value >> width * i & ((1 << width) - 1) for i in range(count)]
    return [s(x, width) for x in found] if kind[0] == "s" else found


def dp4a(m, a, b, c):
    return u(
        c + sum(x * y for x, y in zip(parts(a, 8, m["A"]), parts(b, 8, m["B"]), strict=True)), 32
    )


def dp2a(m, a, b, c):
    low = 0 if m["half"] == "lo" else 2
    pairs = zip(parts(a, 16, m["A"]), parts(b, 8, m["B"])[low : low + 2], strict=True)
    return u(c + sum(x * y for x, y in pairs), 32)


# Bits and moves -------------------------------------------------------------------------------


def bitwise(m, a, b):
    return a & b if "=and" in m else a | b if "=or" in m else a ^ b


def invert(m, a):
    return u(~a, BITS[m["T"]])


def cnot(m, a):
    return int(a == 0)


def shift(m, a, b):
    bits = BITS[m["T"]]
    if "=shl" in m:
        return u(a << min(b, bits), bits)
    return u(read(a, m["T"]) >> min(b, bits), bits)


def funnel(m, a, b, c):
    c = c % 32 if m["mode"] == "wrap" else min(c, 32)
    pair = b << 32 | a
    return u(pair << c >> 32, 32) if m["way"] == "l" else u(pair >> c, 32)


def lop3(m, a, b, c, table):
    return from_bits(
        table >> (4 * x + 2 * y + z) & 1
        for x, y, z in zip(*(bit_list(v, 32) for v in (a, b, c)), strict=True)
    )


def prmt(m, a, b, c):
    given = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    low, mode = c & 3, m["mode"]
    if not mode:
        made = []
        for i in range(4):
            selector = c >> 4 * i & 15
            byte = given[selector & 7]
            made.append(byte if selector < 8 else 255 * (byte >> 7))
    else:
        chosen = {
            "f4e": [low + i for i in range(4)],
            "b4e": [(low - i) % 8 for i in range(4)],
            "rc8": [low] * 4,
            "ecl": [max(i, low) for i in range(4)],
            "ecr": [min(i, low) for i in range(4)],
            "rc16": [2 * (low & 1) + i % 2 for i in range(4)],
        }[mode]
        made = [given[i] for i in chosen]
    return sum(byte << 8 * i for i, byte in enumerate(made))


def compare(m, a, b):
    name, kind = m["cmp"], m["T"]
    if kind in exact.FORMATS:
        if m.get("ftz"):
            a, b = exact.flushed(a, kind), exact.flushed(b, kind)
        unordered = exact.is_nan(a, kind) or exact.is_nan(b, kind)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if unordered:
            return name.endswith("u")
        name = name.removesuffix("u")
        a, b = (order(x, kind) for x in (a, b))
    elif name not in ("lo", "ls", "hi", "hs"):
        a, b = read(a, kind), read(b, kind)
    return {
        "eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b,
        "lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b,
    }[name]  # fmt: skip


def order(bits, kind):
    """Return a number that is ordered as floats are; both zeros are equal."""
    magnitude = bits & (exact.sign_bit(kind) - 1)
    return -magnitude if bits & exact.sign_bit(kind) else magnitude


def setp(m, a, b):
    made = compare(m, a, b)
    return int(made), int(not made)


def setp_bool(m, a, b, c):
    made = int(compare(m, a, b))
    apply = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[m["bool"]]
    return apply(made, c), apply(1 - made, c)


def set_(m, a, b):
    return (0x3F800000 if m["D"] == "f32" else 0xFFFFFFFF) * compare(m, a, b)


def half_compares(m, a, b):
    kind = m["T"].removesuffix("x2")
    shifts = (0, 16) if m["T"].endswith("x2") else (0,)
    return [compare({**m, "T": kind}, a >> k & 0xFFFF, b >> k & 0xFFFF) for k in shifts]


def setp_halves(m, a, b):
    return tuple(map(int, half_compares(m, a, b)))


def set_short(m, a, b):
    return 0xFFFFFFFF * compare(m, a, b)


def set_halves(m, a, b):
    one = exact.encode(False, Fraction(1), m["T"].removesuffix("x2"))
    return sum(one * fine << 16 * k for k, fine in enumerate(half_compares(m, a, b)))


def selp(m, a, b, c):
    return a if c else b


def slct(m, a, b, c):
    if m["C"] == "s32":
        return a if s(c, 32) >= 0 else b
    c = exact.flushed(c, "f32") if m["ftz"] else c
    return a if not exact.is_nan(c, "f32") and order(c, "f32") >= 0 else b


def testp(m, a):
    kind = m["T"]
    _, magnitude = exact.number(a, kind)
    number = magnitude not in (exact.NAN, exact.INF)
    small = number and 0 < magnitude < Fraction(2) ** exact.FORMATS[kind][2]
    return int({
        "infinite": magnitude == exact.INF, "finite": number, "number": magnitude != exact.NAN,
        "notanumber": magnitude == exact.NAN, "normal": number and not small, "subnormal": small,
    }[m["class"]])  # fmt: skip


def mov(m, a):
    return a


def unpack(m, a, count):
    width = BITS[m["T"]] // count
    return tuple(a >> width * i & ((1 << width) - 1) for i in range(count))


def pack(m, *given):
    width = BITS[m["T"]] // len(given)
    return sum(part << width * i for i, part in enumerate(given))
