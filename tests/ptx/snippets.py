"""PTX texts that tests write: one kernel that applies variants of a form to columns of numbers."""

import math
import random

import numpy as np

from qframe_plugins.ptx_host import Module
from qframe_plugins.ptx_host.forms import TABLE, count_of, type_of
from qframe_plugins.ptx_host.syntax import BITS

HEAD = ".version 8.5\n.target sm_90\n.address_size 64\n"
MOST = 40  # variants of a form that are tried
THREADS = 128


def kernel(body, params="x y", registers="", head=""):
    """Return a text with one kernel `k` of 64-bit parameters, which are in %x, %y, ..."""
    names = params.split()
    declared = ", ".join(f".param .u64 p_{name}" for name in names)
    loads = "".join(f"ld.param.u64 %{name}, [p_{name}];\n" for name in names)
    pointers = "".join(f".reg .b64 %{name};\n" for name in names)
    return (
        f"{HEAD}{head}\n.visible .entry k({declared})\n{{\n{pointers}"
        ".reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %d<64>; .reg .pred %p<16>;\n"
        ".reg .f32 %f<32>; .reg .f64 %e<16>;\n"
        f"{registers}\n{loads}{body}\nret;\n}}\n"
    )


def named(*names):
    """Return the forms that these functions translate."""
    return [form for form in TABLE if form.emit.__name__ in names]


def chosen(form, most=MOST, wanted=lambda m: True):
    """Return variants of a form: all, or so many that every modifier is among them."""
    choices = [[*part.choices, *([""] if part.optional else [])] for part in form.parts()]
    if math.prod(map(len, choices)) <= 4000:
        every = [(opcode, m) for opcode, m in form.variants() if wanted(m)]
        if len(every) <= most:
            return every
        random.Random(form.pattern).shuffle(every)
    else:
        rng = random.Random(form.pattern)
        drawn = [".".join(filter(None, map(rng.choice, choices))) for _ in range(20 * most)]
        every = [(opcode, form.modifiers(opcode)) for opcode in drawn]
        every = [(opcode, m) for opcode, m in every if m is not None and wanted(m)]
    seen, first, rest = set(), [], []
    for opcode, m in every:
        new = set(m.items()) - seen
        (first if new else rest).append((opcode, m))
        seen |= new
    return (first + rest)[: max(most, len(first))]


def words(kind, rng, count):
    """Return bits of a type: special ones, small ones, any."""
    bits = BITS[kind]
    if kind == "pred":
        return [rng.getrandbits(1) for _ in range(count)]
    top = 1 << (bits - 1)
    special = [0, 1, 2, 3, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2]
    if kind.startswith(("f", "bf")) and not kind.endswith("x2"):
        fraction = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}[kind]
        infinity = ((1 << (bits - 1 - fraction)) - 1) << fraction
        one = infinity >> 1 & infinity
        special = [0, 1, infinity, infinity - 1, infinity + 1, one, one + 1, one - 1, 1 << fraction]
        special += [(1 << fraction) - 1, one + (1 << fraction), one - (1 << fraction)]
        special += [word | top for word in special]
        near = [
            rng.randrange(one - (6 << fraction), one + (6 << fraction)) | rng.choice([0, top])
            for _ in range(count)
        ]
    else:
        near = [rng.randrange(-40, 70) % (2 * top) for _ in range(count)]
    made = []
    for index in range(count):
        pool = rng.random()
        pick = rng.choice(special) if pool < 0.3 else near[index] if pool < 0.65 else None
        made.append(rng.getrandbits(bits) if pick is None else pick)
    return made


class Columns:
    """One form's variants, with numbers for their operands, and what came out."""

    def __init__(self, form, most=MOST):
        self.form, self.variants = form, chosen(form, most)
        self.slots = form.slots()
        self.inputs, self.outputs, body = [], [], []
        self.declared, self.ends = "", []
        rng = random.Random(form.pattern + form.operands)
        self.immediate = rng.randrange(256)
        for opcode, m in self.variants:
            names = []
            for slot in self.slots:
                if slot.is_written:
                    names.append(self.target(slot, m))
                elif slot.kind == "number":
                    names.append(str(self.immediate))
                else:
                    names.append(self.source(slot, m, rng, body))
            body.append(f"{opcode} {', '.join(names)};")
            body.extend(self.ends)
            self.ends = []
        self.text = kernel("mov.u32 %r0, %tid.x;\n" + "\n".join(body), registers=self.declared)

    def place(self, pointer, column):
        """Return the lines that put the address of a thread's word of a column into %d0."""
        offset = column * THREADS * 8
        return (
            f"mul.wide.u32 %d0, %r0, 8;\nadd.u64 %d0, %d0, %{pointer};\nadd.u64 %d0, %d0, {offset};"
        )

    def fresh(self, kind):
        number = self.declared.count(".reg")
        name = f"%v{number}"
        declared = "pred" if kind == "pred" else f"b{BITS[kind]}"
        self.declared += f".reg .{declared} {name};\n"
        return name

    def source(self, slot, m, rng, body):
        kind, count = type_of(slot, m), count_of(slot, m)
        parts = []
        for _ in range(count or 1):
            column = len(self.inputs)
            self.inputs.append((kind, words(kind, rng, THREADS)))
            name = self.fresh(kind)
            body.append(self.place("x", column))
            if kind == "pred":
                body.append(f"ld.global.b16 %h0, [%d0];\nsetp.ne.u16 {name}, %h0, 0;")
            else:
                body.append(f"ld.global.b{BITS[kind]} {name}, [%d0];")
            parts.append(name)
        return "{" + ", ".join(parts) + "}" if count else parts[0]

    def target(self, slot, m):
        kinds = [(type_of(slot, m), count_of(slot, m))]
        if slot.second:
            kinds.append((slot.second, 0))
        groups = []
        for kind, count in kinds:
            parts = []
            for _ in range(count or 1):
                column = len(self.outputs)
                self.outputs.append(kind)
                name = self.fresh(kind)
                parts.append(name)
                stored = [self.place("y", column)]
                if kind == "pred":
                    stored.append(f"selp.u16 %h0, 1, 0, {name};\nst.global.b16 [%d0], %h0;")
                else:
                    stored.append(f"st.global.b{BITS[kind]} [%d0], {name};")
                self.ends = [*self.ends, *stored]
            groups.append("{" + ", ".join(parts) + "}" if count else parts[0])
        return "|".join(groups)

    def run(self, **options):
        """Return (opcode, modifiers, operands, results) of every thread and variant."""
        x = np.zeros((max(len(self.inputs), 1), THREADS), np.uint64)
        for column, (_, bits) in enumerate(self.inputs):
            x[column] = bits
        y = np.zeros((len(self.outputs), THREADS), np.uint64)
        Module.from_ptx(self.text).kernel().launch(1, THREADS, x, y, **options)
        ins = len(self.inputs) // len(self.variants)
        outs = len(self.outputs) // len(self.variants)
        x, y = x.tolist(), y.tolist()
        for index, (opcode, m) in enumerate(self.variants):
            columns = x[index * ins : (index + 1) * ins], y[index * outs : (index + 1) * outs]
            for thread in range(THREADS):
                yield opcode, m, [c[thread] for c in columns[0]], [c[thread] for c in columns[1]]
