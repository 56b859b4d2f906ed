"""Random typed expressions, written as PTX and computed by NumPy at once, node by node."""

import numpy as np
from ml_dtypes import bfloat16

DTYPES = {
    **{f"{sign}{bits}": np.dtype(f"{'i' if sign == 's' else 'u'}{bits // 8}")
       for sign in "su" for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16), "bf16": np.dtype(bfloat16),
    "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
}  # fmt: skip
WHOLE = [kind for kind in DTYPES if kind[0] in "su"]
FLOATS = ["f16", "bf16", "f32", "f64"]
WORKED = [kind for kind in DTYPES if kind not in ("s8", "u8")]  # that PTX has arithmetic for


def bits_of(kind):
    return 8 * DTYPES[kind].itemsize


def inputs(kind, rng, count):
    """Return numbers of a type: any bits, small ones, the ends, subnormal ones, NaN, infinities."""
    size = DTYPES[kind].itemsize
    raw = rng.integers(0, 256, (count, size), np.uint8).view(f"u{size}")[:, 0]
    if kind in WHOLE:
        made = raw.view(DTYPES[kind])
        small = rng.integers(-20 if kind[0] == "s" else 0, 21, count).astype(DTYPES[kind])
        made = np.where(rng.random(count) < 0.5, made, small)
        info = np.iinfo(DTYPES[kind])
        made[:5] = [info.min, info.max, 0, 1, info.max - 1]
        return made
    made = raw.view(DTYPES[kind])
    plain = (rng.standard_normal(count) * 10.0 ** rng.integers(-3, 4, count)).astype(DTYPES[kind])
    made = np.where(rng.random(count) < 0.5, made, plain)
    made[:4] = [0.0, -0.0, np.inf, -np.inf]
    made[4:12] = np.arange(1, 9, dtype=f"u{size}").view(DTYPES[kind]) * DTYPES[kind].type(-1)
    return np.where(np.isnan(made), DTYPES[kind].type(np.nan), made)


class Expressions:
    """Several expressions over the same inputs: the lines, and for each (type, register, value)."""

    def __init__(self, seed, count, threads, depth=4):
        self.rng = np.random.default_rng(seed)
        self.lines, self.registers, self.leaves = [], {}, {}
        with np.errstate(all="ignore"):
            self.given = {kind: inputs(kind, self.rng, threads) for kind in DTYPES}
            kinds = self.rng.choice(WORKED, count)
            self.results = [(kind, *self.node(kind, depth)) for kind in kinds]

    def pick(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def register(self, kind):
        """Return a new register; 8 bits live in 16."""
        name = f"%n{len(self.registers)}"
        self.registers[name] = "pred" if kind == "pred" else f"b{max(16, bits_of(kind))}"
        return name

    def emit(self, opcode, kind, *operands):
        name = self.register(kind)
        self.lines.append(f"{opcode} {name}, {', '.join(map(str, operands))};")
        return name

    def node(self, kind, depth):
        """Return (register, value) of a random expression of a type."""
        if depth == 0 or self.rng.random() < 0.1:
            return self.leaves.setdefault(kind, self.register(kind)), self.given[kind]
        if kind in ("s8", "u8") or self.rng.random() < 0.25:
            return self.converted(kind, depth)
        if self.rng.random() < 0.15:
            return self.chosen(kind, depth)
        return (self.whole if kind in WHOLE else self.floating)(kind, depth)

    def chosen(self, kind, depth):
        other = self.pick(*WORKED)
        (a, x), (b, y) = self.node(other, depth - 1), self.node(other, depth - 1)
        (c, u), (d, v) = self.node(kind, depth - 1), self.node(kind, depth - 1)
        name, compare = self.pick(
            ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less),
            ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal),
        )  # fmt: skip
        fine = compare(x, y)
        if other in FLOATS and name == "ne":
            fine &= ~(np.isnan(x) | np.isnan(y))
        test = self.emit(f"setp.{name}.{other}", "pred", a, b)
        made = self.emit(f"selp.b{bits_of(kind)}", kind, c, d, test)
        return made, np.where(fine, u, v)

    def converted(self, kind, depth):
        source = self.pick(*DTYPES)
        if kind in FLOATS and source in WHOLE and kind in ("f16", "bf16"):
            source = self.pick("f32", "f64")  # NumPy rounds twice from long integers
        a, x = self.node(source, depth - 1)
        if source == kind:
            return a, x
        if kind in WHOLE and source in WHOLE:
            return self.emit(f"cvt.{kind}.{source}", kind, a), x.astype(DTYPES[kind])
        if kind in WHOLE:
            return self.emit(f"cvt.rzi.{kind}.{source}", kind, a), truncated(x, kind, source)
        if source in WHOLE:
            return self.emit(f"cvt.rn.{kind}.{source}", kind, a), x.astype(DTYPES[kind])
        if {kind, source} == {"f16", "bf16"}:
            a = self.emit(f"cvt.f32.{source}", "f32", a)
            return self.emit(f"cvt.rn.{kind}.f32", kind, a), x.astype("f4").astype(DTYPES[kind])
        if bits_of(source) == 64 and kind in ("f16", "bf16"):  # NumPy goes by float32, as here
            a = self.emit("cvt.rn.f32.f64", "f32", a)
            return self.emit(f"cvt.rn.{kind}.f32", kind, a), x.astype("f4").astype(DTYPES[kind])
        mode = "rn." if bits_of(kind) < bits_of(source) else ""
        return self.emit(f"cvt.{mode}{kind}.{source}", kind, a), x.astype(DTYPES[kind])

    def whole(self, kind, depth):
        bits, signed, any_bits = bits_of(kind), kind[0] == "s", f"b{bits_of(kind)}"
        a, x = self.node(kind, depth - 1)
        names = [
            "add",
            "sub",
            "mul",
            "and",
            "or",
            "xor",
            "not",
            "shl",
            "shr",
            "min",
            "max",
            "div",
            "rem",
            "mad",
        ]
        name = self.pick(*names, *(["neg", "abs"] if signed else []))
        if name == "not":
            return self.emit(f"not.{any_bits}", kind, a), ~x
        if name in ("neg", "abs"):
            return self.emit(f"{name}.{kind}", kind, a), -x if name == "neg" else np.abs(x)
        if name in ("shl", "shr"):
            amount = int(self.rng.integers(0, bits + 4))
            made = self.emit(f"{name}.{any_bits if name == 'shl' else kind}", kind, a, amount)
            if amount < bits:
                return made, x << amount if name == "shl" else x >> amount
            return made, x >> (bits - 1) if signed and name == "shr" else x * 0
        b, y = self.node(kind, depth - 1)
        if name in ("and", "or", "xor"):
            apply = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
            return self.emit(f"{name}.{any_bits}", kind, a, b), apply(x, y)
        if name == "mad":
            c, z = self.node(kind, depth - 1)
            return self.emit(f"mad.lo.{kind}", kind, a, b, c), x * y + z
        made = self.emit(f"{'mul.lo' if name == 'mul' else name}.{kind}", kind, a, b)
        if name in ("div", "rem"):
            return made, quotient(x, y)[name == "rem"]
        apply = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum,
                 "max": np.maximum}[name]  # fmt: skip
        return made, apply(x, y)

    def floating(self, kind, depth):
        a, x = self.node(kind, depth - 1)
        wide = kind in ("f32", "f64")
        name = self.pick("add", "sub", "mul", "neg", "abs", "min", "max",
                         *(["div", "sqrt"] if wide else []))  # fmt: skip
        if name in ("neg", "abs"):
            made = -x if name == "neg" else np.abs(x)
            return self.emit(f"{name}.{kind}", kind, a), made
        if name == "sqrt":
            return self.emit(f"sqrt.rn.{kind}", kind, a), np.sqrt(x)
        b, y = self.node(kind, depth - 1)
        if name in ("min", "max"):
            return self.emit(f"{name}.{kind}", kind, a, b), extreme(x, y, name == "min")
        apply = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
        return self.emit(f"{name}.rn.{kind}", kind, a, b), apply(x, y)


def quotient(x, y):
    """Return x / y toward zero and its rest; all bits and x for y = 0."""
    zero = y == 0
    lowest = (y == -1) & (x == np.iinfo(x.dtype).min) if x.dtype.kind == "i" else zero & False
    safe = np.where(zero | lowest, 1, y).astype(x.dtype)
    down, rest = np.divmod(x, safe)
    fix = (rest != 0) & ((x < 0) != (safe < 0))
    down, rest = down + fix.astype(x.dtype), rest - fix.astype(x.dtype) * safe
    ones = np.array(-1, np.int64).astype(x.dtype)
    return np.where(zero, ones, down), np.where(zero, x, rest)


def truncated(x, kind, source):
    """Return floats cut to integers as PTX does it: at the ends of the range, and NaN apart."""
    info, wide = np.iinfo(DTYPES[kind]), np.trunc(x.astype(np.float64))
    above, below = wide >= float(info.max) + (bits_of(kind) < 64), wide <= float(info.min)
    inside = np.where(above | below | np.isnan(wide), 0, wide)
    made = np.where(above, info.max, np.where(below, info.min, inside.astype(DTYPES[kind])))
    highest = 1 << (bits_of(kind) - 1) if source == "f64" or bits_of(kind) == 64 else 0
    odd = np.array(highest, np.uint64).astype(f"u{bits_of(kind) // 8}").view(DTYPES[kind])
    return np.where(np.isnan(wide), odd, made.astype(DTYPES[kind]))


def extreme(x, y, least):
    """Return the lesser or greater number, -0 before +0, and a number rather than NaN."""
    first = (x < y) if least else (x > y)
    first |= (x == y) & (np.signbit(x) == least)
    made = np.where(first, x, y)
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, made))
