"""Memory, functions and what is refused: instructions that need more than one to be seen."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe_plugins.ptx_host import (
    Module,
)
from qframe_plugins.ptx_host.forms import TABLE
from qframe_plugins.ptx_host.syntax import BITS
from tests.ptx import float_models, models
from tests.ptx.snippets import chosen, kernel

ORDERS = ("forward", "reverse", "random")
INDEX = "mov.u32 %r0, %tid.x;\nmul.wide.u32 %d0, %r0, {0};\nadd.u64 %d1, %x, %d0;\n"


@functools.lru_cache(maxsize=256)
def translated(text):
    return Module.from_ptx(text).kernel()


def run(text, *arrays, block=32, grid=1, **options):
    """Launch a text's kernel; nothing may be found."""
    found = translated(text).launch(grid, block, *arrays, **options)
    assert list(map(str, found.findings)) == []
    return found


def forms(group):
    return [form for form in TABLE if form.group == group]


def name_of(form):
    return f"{form.pattern} {form.operands}".replace(" ", "_")


# Integers of several words --------------------------------------------------------------------

WIDE = {
    "add": "add.cc.u32 %r1, {a0}, {b0};\naddc.cc.u32 %r2, {a1}, {b1};\naddc.u32 %r3, {a2}, {b2};",
    "sub": "sub.cc.s32 %r1, {a0}, {b0};\nsubc.cc.s32 %r2, {a1}, {b1};\nsubc.s32 %r3, {a2}, {b2};",
    "mad": "mad.lo.cc.u32 %r1, {a0}, {b0}, {a1};\nmadc.hi.cc.u32 %r2, {a0}, {b0}, {a2};\n"
    "madc.lo.u32 %r3, {a0}, 0, {b1};",
}
WORD = st.one_of(st.sampled_from([0, 1, 2**32 - 1, 2**31]), st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("name", WIDE)
@given(st.lists(WORD, min_size=6, max_size=6))
def test_carries_make_long_integers(name, words):
    registers = {f"{who}{i}": f"%r{10 + 4 * k + i}" for k, who in enumerate("ab") for i in range(3)}
    loads = "".join(
        f"ld.global.u32 {registers[f'{who}{i}']}, [%x+{4 * (3 * k + i)}];\n"
        for k, who in enumerate("ab")
        for i in range(3)
    )
    stores = "".join(f"st.global.u32 [%y+{4 * i}], %r{i + 1};\n" for i in range(3))
    text = kernel(loads + WIDE[name].format(**registers) + "\n" + stores)
    y = np.zeros(3, np.uint32)
    run(text, np.array(words, np.uint32), y, block=1, check=False)
    a, b = (sum(word << 32 * i for i, word in enumerate(part)) for part in (words[:3], words[3:]))
    if name == "mad":
        expected = words[0] * words[3] + (words[1] | words[2] << 32) + (words[4] << 64)
    else:
        expected = a + b if name == "add" else a - b
    assert sum(int(word) << 32 * i for i, word in enumerate(y)) == expected % (1 << 96)


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [f for f in TABLE if f.emit.__name__ == "load"], ids=name_of)
def test_loads_and_stores_move_bytes(form):
    """Every type and number of parts, in each space, extended by the type."""

    def wanted(m):
        most = 16 if m["space"] in ("shared", "shared::cta", "local") else 32
        fits = BITS[m["T"]] * int(m.get("vec", "")[1:] or 1) <= 8 * most
        return fits and m["space"] != "param"

    for opcode, m in chosen(form, wanted=wanted):
        kind, count = m["T"], int(m["vec"][1:] or 1)
        size = BITS[kind] // 8
        space = m["space"] or "global"
        parts = ", ".join(f"%w{i}" for i in range(count))
        vector = f"{{{parts}}}" if count > 1 else parts
        plain = f"v{count}.b{8 * size}" if count > 1 else f"b{8 * size}"
        place, into, head = "%d1", "", ""
        if space.startswith(("shared", "local")):
            space = space.partition("::")[0]
            head = f".{space} .align 32 .b8 buffer[1024];"
            into = f"mov.u64 %d3, buffer;\nmul.wide.u32 %d4, %r0, {size * count};\n"
            into += "add.u64 %d3, %d3, %d4;\n"
            into += f"ld.global.{plain} {vector}, [%d1];\nst.{space}.{plain} [%d3], {vector};\n"
            place = "%d3"
        body = INDEX.format(size * count) + into + f"{opcode} {vector}, [{place}];\n"
        for index in range(count):
            body += f"mul.wide.u32 %d5, %r0, {8 * count};\nadd.u64 %d5, %d5, %y;\n"
            body += f"st.global.b64 [%d5+{8 * index}], %w{index};\n"
        text = kernel(body, registers=head + "".join(f".reg .b64 %w{i};" for i in range(count)))
        raw = np.random.default_rng(1).integers(0, 256, (32, count, size), np.uint8)
        y = np.zeros((32, count), np.uint64)
        run(text, raw, y)
        expected = [
            [
                models.u(models.read(int.from_bytes(word.tobytes(), "little"), kind), 64)
                for word in row
            ]
            for row in raw
        ]
        assert y.tolist() == expected, opcode


@pytest.mark.parametrize("form", [f for f in TABLE if f.emit.__name__ == "store"], ids=name_of)
def test_stores_write_what_they_say_and_no_more(form):
    def wanted(m):
        fits = BITS[m["T"]] * int(m["vec"][1:] or 1) <= 256
        return fits and m["space"] in ("", "global")

    for opcode, m in chosen(form, wanted=wanted):
        kind, count = m["T"], int(m["vec"][1:] or 1)
        size = BITS[kind] // 8
        parts = ", ".join(f"%w{i}" for i in range(count))
        vector = f"{{{parts}}}" if count > 1 else parts
        loads = "".join(f"ld.global.b64 %w{i}, [%y+{8 * i}];\n" for i in range(count))
        registers = "".join(f".reg .b64 %w{i};" for i in range(count))
        x = np.full(96, 0x55, np.uint8)
        y = np.random.default_rng(2).integers(0, 2**63, count).astype(np.uint64)
        run(kernel(f"{loads}{opcode} [%x+32], {vector};", registers=registers), x, y, block=1)
        written = b"".join(int(word).to_bytes(8, "little")[:size] for word in y)
        expected = b"\x55" * 32 + written + b"\x55" * (64 - len(written))
        assert x.tobytes() == expected, opcode


def folded(m, old, x):
    """Return what an atomic leaves, in bits."""
    kind, op = m["T"], m["op"]
    if kind.startswith(("f", "bf")):
        ftz = "ftz" if kind == "f32" and m["space"] in ("", "global") else ""
        return float_models.binary({"T": kind, "=add": "", "ftz": ftz}, old, x)
    if op == "inc":
        return 0 if old >= x else old + 1
    if op == "dec":
        return x if old == 0 or old > x else old - 1
    if op in ("min", "max"):
        return models.int_minmax({"T": kind, f"={op}": ""}, old, x)
    bits = BITS[kind]
    return {"add": models.u(old + x, bits), "and": old & x, "or": old | x, "xor": old ^ x,
            "exch": x}[op]  # fmt: skip


@pytest.mark.parametrize("form", [f for f in TABLE if f.emit.__name__ == "atomic"], ids=name_of)
def test_atomics_take_turns(form):
    """32 threads update one cell: what each got and what is left follow the order of threads."""
    rng = np.random.default_rng(3)
    for opcode, m in chosen(form):
        kind, shared = m["T"], m["space"].startswith("shared")
        bits = BITS[kind]
        x = rng.integers(0, 1 << 63, 33).astype(np.uint64) * np.uint64(2) + np.uint64(1)
        x = (x >> np.uint64(64 - bits)).astype(f"u{bits // 8}")
        x[5:9] = [1, 2, 3, (1 << bits - 1) | 5]  # subnormal floats
        y, cell = np.zeros(32, x.dtype), x[32:].copy()
        registers = f".reg .b{bits} %v, %w;" + ".shared .align 8 .b64 s;" * shared
        body = INDEX.format(bits // 8) + f"ld.global.b{bits} %v, [%d1];\nadd.u64 %d2, %y, %d0;\n"
        place = "[s]" if shared else "[%z]"
        if shared:
            body += f"setp.eq.u32 %p0, %r0, 0;\n@%p0 ld.global.b{bits} %w, [%z];\n"
            body += f"@%p0 st.shared.b{bits} [s], %w;\nbar.sync 0;\n"
        got = form.name == "atom"
        body += (
            f"{opcode} %w, {place}, %v;\n"
            if got
            else f"{opcode} {place}, %v;\nmov.b{bits} %w, 0;\n"
        )
        body += f"st.global.b{bits} [%d2], %w;\n"
        if shared:
            body += (
                f"bar.sync 0;\n@%p0 ld.shared.b{bits} %w, [s];\n@%p0 st.global.b{bits} [%z], %w;"
            )
        run(kernel(body, "x y z", registers), x, y, cell)
        old, seen = int(x[32]), []
        for value in x[:32].tolist():
            seen.append(old)
            old = folded(m, old, value)
        assert int(cell[0]) == old, opcode
        assert y.tolist() == (seen if got else [0] * 32), opcode


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap_swaps_once(bits):
    body = INDEX.format(bits // 8) + f"cvt.u{bits}.u32 %v, %r0;\nmov.b{bits} %u, 7;\n"
    body += f"atom.global.cas.b{bits} %w, [%y], %u, %v;\nst.global.b{bits} [%d1], %w;"
    registers = f".reg .b{bits} %u, %v, %w;"
    x, y = np.zeros(32, f"u{bits // 8}"), np.full(1, 7, f"u{bits // 8}")
    run(kernel(body, registers=registers), x, y, order="reverse")
    assert y[0] == 31
    assert x.tolist() == [31] * 31 + [7]


def test_generic_addresses_lead_to_every_space():
    body = """
        mov.u32 %r0, %tid.x;
        mov.u64 %d1, s; cvta.shared.u64 %d2, %d1;
        mov.u64 %d3, l; cvta.local.u64 %d4, %d3;
        mov.u64 %d5, g; cvta.global.u64 %d6, %d5;
        mul.wide.u32 %d7, %r0, 4;
        add.u64 %d8, %d2, %d7; st.u32 [%d8], %r0;
        add.u32 %r1, %r0, 100; st.u32 [%d4], %r1;
        ld.shared.u32 %r2, [%d1+0];
        cvta.to.shared.u64 %d9, %d8; ld.shared.u32 %r2, [%d9];
        cvta.to.local.u64 %d10, %d4; ld.local.u32 %r3, [%d10];
        ld.u32 %r4, [%d6+4];
        add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4;
        add.u64 %d11, %x, %d7; st.u32 [%d11], %r2;"""
    registers = ".shared .align 4 .b8 s[128]; .local .align 4 .b8 l[4];"
    head = ".global .align 4 .u32 g[2] = {5, 1000};"
    x = np.zeros(32, np.uint32)
    text = kernel(body.replace("ld.shared.u32 %r2, [%d1+0];", ""), "x", registers, head)
    run(text, x)
    assert x.tolist() == [2 * i + 1100 for i in range(32)]


def test_addresses_of_32_bits_wrap():
    """Compilers take an index off a base, and add the size again in the offset."""
    body = (
        INDEX.format(4)
        + """mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2;
        st.shared.u32 [%r3], %r0; bar.sync 0;
        sub.u32 %r4, %r1, %r2; ld.shared.u32 %r5, [%r4+124]; st.global.u32 [%d1], %r5;"""
    )
    x = np.zeros(32, np.uint32)
    run(kernel(body, "x", ".shared .align 4 .b8 s[128];"), x)
    assert x.tolist() == list(range(32))[::-1]


def test_files_may_be_named_at_the_end():
    text = kernel(".loc 3 17 0\nst.global.u32 [%x+4], %r0;", "x") + '.file 3 "/far/away.cu"\n'
    [found] = Module.from_ptx(text).kernel().launch(1, 1, np.zeros(1, np.uint32)).findings
    assert found.place.endswith("(away.cu:17)")


def test_variables_of_a_module_outlive_a_launch():
    head = ".global .align 8 .u64 g = 40;"
    module = Module.from_ptx(kernel("atom.global.add.u64 %d0, [g], 1;", "x", head=head))
    for _ in range(2):
        assert module.kernel().launch(1, 1, np.zeros(1)).findings == ()
    assert module.variable("g").view(np.uint64).tolist() == [42]


def test_dynamic_shared_memory_lies_after_the_static():
    head = ".extern .shared .align 16 .b8 dyn[];"
    body = """mov.u32 %r0, dyn; mov.u32 %r1, s; mov.u32 %r2, %dynamic_smem_size;
        mov.u32 %r3, %total_smem_size;
        st.global.v4.u32 [%x], {%r0, %r1, %r2, %r3}; st.shared.u32 [dyn+60], %r0;"""
    x = np.zeros(4, np.uint32)
    text = kernel(body, "x", ".shared .align 4 .b8 s[20];", head)
    run(text, x, block=1, shared_bytes=64)
    assert x.tolist() == [32, 0, 64, 96]


def test_special_registers_say_where_a_thread_is():
    names = [f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    names += ["laneid", "warpid", "nwarpid"]
    names += [f"lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")]
    body = """mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x;
        mad.lo.u32 %r1, %r1, %r2, %r3; mov.u32 %r2, 40; mul.lo.u32 %r1, %r1, %r2;
        mov.u32 %r4, %tid.y; mad.lo.u32 %r1, %r4, 20, %r1; mov.u32 %r5, %tid.x;
        add.u32 %r1, %r1, %r5; mul.wide.u32 %d0, %r1, 80; add.u64 %d0, %x, %d0;"""
    for index, name in enumerate(names):
        body += f"mov.u32 %r6, %{name}; st.global.u32 [%d0+{4 * index}], %r6;\n"
    x = np.zeros((3, 2, 2, 20, 20), np.uint32)
    run(kernel(body, "x"), x, grid=(2, 3), block=(20, 2))
    for by, bx, ty, tx in np.ndindex(3, 2, 2, 20):
        lane = (ty * 20 + tx) % 32
        masks = [1 << lane, (1 << lane) - 1, (2 << lane) - 1]
        masks += [0xFFFFFFFF ^ masks[2], 0xFFFFFFFF ^ masks[1]]
        where = [tx, ty, 0, 20, 2, 1, bx, by, 0, 2, 3, 1, lane, (ty * 20 + tx) // 32, 2]
        assert x[by, bx, ty, tx].tolist() == where + masks


# Copies that are waited for -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "arrived"),
    [
        ("cp.async.wait_all;", 3),
        ("cp.async.wait_group 0;", 2),
        ("cp.async.wait_group 1;", 1),
        ("", 0),
    ],
)
def test_a_copy_arrives_at_its_wait_and_not_before(wait, arrived):
    """Three copies, the third in no group yet."""
    body = "mov.u32 %r9, 0;\n" + "".join(f"st.shared.u32 [s+{4 * i}], %r9;\n" for i in range(12))
    for index in range(3):
        size = (4, 8, 16)[index]
        body += f"cp.async.ca.shared.global [s+{16 * index}], [%x+{16 * index}], {size};\n"
        body += "cp.async.commit_group;\n" if index < 2 else ""
    body += wait + "".join(
        f"ld.shared.u32 %r{i}, [s+{16 * i}]; st.global.u32 [%y+{4 * i}], %r{i};\n" for i in range(3)
    )
    x, y = np.arange(1, 13, dtype=np.uint32), np.zeros(3, np.uint32)
    text = kernel(body, registers=".shared .align 16 .b8 s[48];")
    Module.from_ptx(text).kernel().launch(1, 1, x, y, check=False)
    assert y.tolist() == [v if i < arrived else 0 for i, v in enumerate([1, 5, 9])]


@pytest.mark.parametrize("given", [0, 3, 16, 99])
def test_a_copy_fills_what_its_source_lacks_with_zeros(given):
    body = f"""mov.u32 %r0, {given}; cp.async.cg.shared.global [s], [%x], 16, %r0;
        cp.async.wait_all; ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [s];
        st.global.v4.u32 [%y], {{%r1, %r2, %r3, %r4}};"""
    x, y = np.arange(1, 17, dtype=np.uint8), np.zeros(16, np.uint8)
    run(kernel(body, registers=".shared .align 16 .b8 s[16];"), x, y, block=1)
    assert y.tolist() == [v if i < given else 0 for i, v in enumerate(x)]


# Functions ------------------------------------------------------------------------------------

SQUARES = """
.func (.param .b32 out) squared(.param .b32 a, .param .align 4 .b8 pair[8])
{
    .reg .b32 %r<6>; .reg .pred %p;
    ld.param.u32 %r1, [a];
    ld.param.u32 %r2, [pair+4];
    setp.gt.u32 %p, %r1, 9;
    @%p bra BIG;
    mad.lo.u32 %r3, %r1, %r1, %r2;
    st.param.b32 [out], %r3;
    ret;
BIG:
    bar.sync 0;
    st.param.b32 [out], %r2;
    ret;
}
.func (.reg .b32 %back) twice(.reg .b32 %given) { add.u32 %back, %given, %given; ret; }
"""


def test_functions_are_called():
    body = (
        INDEX.format(4)
        + """
        {   .param .b32 p0; st.param.b32 [p0], %r0;
            .param .align 4 .b8 p1[8]; mov.u32 %r1, 1000; st.param.b32 [p1+4], %r1;
            .param .b32 back;
            call.uni (back), squared, (p0, p1);
            ld.param.b32 %r2, [back]; }
        {   .reg .b32 %r0; mov.u32 %r0, 1; add.u32 %r2, %r2, %r0; }
        call (%r3), twice, (%r2);
        st.global.u32 [%d1], %r3;"""
    )
    x = np.zeros(12, np.uint32)
    for order in ORDERS:
        found = (
            Module.from_ptx(kernel(body, "x", head=SQUARES)).kernel().launch(1, 12, x, order=order)
        )
        assert x.tolist() == [2 * (1001 + (i * i if i < 10 else 0)) for i in range(12)]
        assert [one.kind for one in found.findings] == ["divergent-barrier"]
