"""Matrices that a warp loads, stores and multiplies: fragments, and exact products."""

from fractions import Fraction

import numpy as np
import pytest

from qframe_plugins.ptx_host import KernelFaultError, Module
from qframe_plugins.ptx_host.forms import count_of
from qframe_plugins.ptx_host.syntax import BITS
from tests.ptx import exact, models
from tests.ptx.snippets import kernel, named
from tests.ptx.test_device import name_of, run


@pytest.mark.parametrize("form", named("ldmatrix", "stmatrix"), ids=name_of)
def test_matrices_of_halves_are_spread_over_lanes(form):
    for opcode, m in form.variants():
        count = int(m["count"][1:])
        names = ", ".join(f"%r{20 + i}" for i in range(count))
        x = np.random.default_rng(4).integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
        y = np.zeros((32, count), np.uint32)
        matrix = x.transpose(0, 2, 1) if m["trans"] else x
        fragments = np.zeros_like(y)
        for lane in range(32):
            for k in range(count):
                pair = matrix[k, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
                fragments[lane, k] = int(pair[0]) | int(pair[1]) << 16
        body = f"""mov.u32 %r0, %tid.x; mov.u32 %r1, s; and.b32 %r2, %r0, {8 * count - 1};
            shl.b32 %r2, %r2, 4; add.u32 %r3, %r1, %r2; cvt.u64.u32 %d0, %r2;
            add.u64 %d1, %x, %d0; setp.lt.u32 %p0, %r0, {8 * count};
            mul.wide.u32 %d2, %r0, {4 * count}; add.u64 %d2, %d2, %y;\n"""
        row = "{%r10, %r11, %r12, %r13}"
        if form.name == "ldmatrix":
            body += f"@%p0 ld.global.v4.u32 {row}, [%d1];\n@%p0 st.shared.v4.u32 [%r3], {row};\n"
            body += f"bar.sync 0;\n{opcode} {{{names}}}, [%r3];\n"
            body += "".join(f"st.global.u32 [%d2+{4 * i}], %r{20 + i};\n" for i in range(count))
            run(kernel(body, registers=f".shared .align 16 .b8 s[{128 * count}];"), x, y)
            assert y.tolist() == fragments.tolist(), opcode
        else:
            body += "".join(f"ld.global.u32 %r{20 + i}, [%d2+{4 * i}];\n" for i in range(count))
            body += f"{opcode} [%r3], {{{names}}};\nbar.sync 0;\n"
            body += f"@%p0 ld.shared.v4.u32 {row}, [%r3];\n@%p0 st.global.v4.u32 [%d1], {row};\n"
            out = np.zeros_like(x)
            run(kernel(body, registers=f".shared .align 16 .b8 s[{128 * count}];"), out, fragments)
            assert out.tolist() == x.tolist(), opcode


def packed(numbers, width):
    """Put numbers of `width` bits together, lowest first."""
    return sum((int(v) & ((1 << width) - 1)) << width * i for i, v in enumerate(numbers))


def coded(numbers, kind):
    """Return the bits of an array of numbers."""
    bits = [exact.signed(Fraction(number), kind=kind) for number in numbers.flat]
    return np.array(bits).reshape(numbers.shape)


@pytest.mark.parametrize("form", named("mma"), ids=name_of)
def test_products_of_matrices_are_exact(form):
    """The fragments of PTX's figures, put together here by their row and column alone."""
    widths = {"s8": 8, "u8": 8, "s4": 4, "u4": 4, "f16": 16, "bf16": 16, "tf32": 32}
    for number, (opcode, m) in enumerate(form.variants()):
        rng = np.random.default_rng(number)
        depth, width = int(m["shape"].rpartition("k")[2]), widths[m["A"]]
        per = 32 // width
        whole = m["D"] == "s32"
        encoded = "f32" if m["A"] == "tf32" else m["A"]
        if whole:
            a, b = (
                rng.integers(-(1 << width - 1), 1 << width - 1, shape)
                + (m[k][0] == "u") * (1 << width - 1)
                for k, shape in (("A", (16, depth)), ("B", (depth, 8)))
            )
            c = rng.integers(-(2**31), 2**31, (16, 8))
            c[:4] = np.array([2**31 - 1, -(2**31), 0, 1])[:, None]
            a_bits, b_bits = a, b
        else:
            a, b = (rng.integers(-30, 31, shape) / 8 for shape in ((16, depth), (depth, 8)))
            c = rng.integers(-99, 100, (16, 8)) / 64
            a_bits, b_bits = coded(a, encoded), coded(b, encoded)
            if m["A"] == "tf32":
                a_bits, b_bits = a_bits | 0x1FFF, b_bits | 0x1FFF  # bits that are cut
        registers = [count_of(slot, m) for slot in form.slots()]
        halves = 2 if BITS[m["D"]] == 16 else 1
        x = np.zeros((32, sum(registers[1:])), np.uint32)
        result = exact_product(a, b, c, m, whole)
        c_bits = c if whole else coded(c, m["D"])
        expected = np.zeros((32, registers[0]), np.uint32)
        for lane in range(32):
            g, t = lane // 4, lane % 4
            row = []
            for r in range(registers[1]):
                k = t * per + 4 * per * (r // 2)
                row.append(packed(a_bits[g + 8 * (r % 2), k : k + per], width))
            for r in range(registers[2]):
                k = t * per + 4 * per * r
                row.append(packed(b_bits[k : k + per, g], width))
            for source, target in ((c_bits, row), (result, expected[lane])):
                for r in range(registers[0]):
                    first = r * halves
                    cells = [
                        (g + 8 * (i // 2), 2 * t + i % 2) for i in range(first, first + halves)
                    ]
                    word = packed([source[cell] for cell in cells], 32 // halves)
                    if target is row:
                        row.append(word)
                    else:
                        target[r] = word
            x[lane] = row
        made = multiplied(opcode, registers, x)
        assert made.tolist() == expected.tolist(), opcode


def exact_product(a, b, c, m, whole):
    """Return the bits of a b + c, [16, 8]."""
    made = np.zeros((16, 8), object)
    for i, j in np.ndindex(16, 8):
        if whole:
            total = int(c[i, j]) + sum(int(p) * int(q) for p, q in zip(a[i], b[:, j], strict=True))
            made[i, j] = models.clip(total, "s32") if m["sat"] else models.u(total, 32)
        else:
            total = Fraction(c[i, j])
            total += sum(Fraction(p) * Fraction(q) for p, q in zip(a[i], b[:, j], strict=True))
            made[i, j] = exact.signed(total, kind=m["D"])
    return made


def multiplied(opcode, registers, x):
    body = f"mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, {4 * x.shape[1]}; add.u64 %d1, %x, %d0;\n"
    names = [f"%r{10 + i}" for i in range(x.shape[1])]
    body += "".join(f"ld.global.u32 {name}, [%d1+{4 * i}];\n" for i, name in enumerate(names))
    groups, at = [[f"%r{40 + i}" for i in range(registers[0])]], 0
    for count in registers[1:]:
        groups.append(names[at : at + count])
        at += count
    body += f"{opcode} {', '.join('{' + ', '.join(group) + '}' for group in groups)};\n"
    body += f"mul.wide.u32 %d0, %r0, {4 * registers[0]}; add.u64 %d1, %y, %d0;\n"
    body += "".join(f"st.global.u32 [%d1+{4 * i}], {name};\n" for i, name in enumerate(groups[0]))
    y = np.zeros((32, registers[0]), np.uint32)
    run(kernel(body), x, y, order="random", seed=1)
    return y


def test_a_matrix_operation_needs_its_whole_warp():
    four = "{%r1, %r2, %r3, %r4}"
    line = f"mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {four}, {{%r5, %r6}}, {{%r7}}, {four};"
    registers = "".join(f"mov.u32 %r{i}, 0;" for i in range(8))
    with pytest.raises(KernelFaultError, match="needs all 32 lanes") as raised:
        Module.from_ptx(kernel(registers + line, "x")).kernel().launch(1, 16, np.zeros(1))
    assert [one.kind for one in raised.value.findings] == ["bad-mask"]
