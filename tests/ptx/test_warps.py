"""What threads do together: warps, barriers and matrices, in every order of threads."""

import numpy as np
import pytest

from qframe_plugins.ptx_host import Module
from qframe_plugins.ptx_host.syntax import BITS
from tests.ptx import models
from tests.ptx.snippets import kernel, named
from tests.ptx.test_device import INDEX, ORDERS, name_of, run

EVERY = 0xFFFFFFFF
VOTES = ("vote", "ballot", "match_any", "match_all", "redux", "elect")
MASKS = (EVERY, 0x0000FFFF, 0xF0F0A5C3)


def lanes_of(mask):
    return [lane for lane in range(32) if mask >> lane & 1]


def per_lane(opcode_line, arrays, mask, wide=4, results=1, registers="", order="forward"):
    """Run one instruction in the lanes of a mask; return [lane, result], -1 for the others.

    The line reads %r10, %r11, ... (from the arrays), %d10 (64 bits), %p5 and the mask in %r9; it
    writes %r20, ...
    """
    body = INDEX.format(wide)
    body += f"mov.u32 %r9, {mask};\nshr.u32 %r8, %r9, %r0;\nand.b32 %r8, %r8, 1;\n"
    body += "setp.eq.u32 %p9, %r8, 1;\n"
    for index in range(len(arrays)):
        body += f"ld.global.b{8 * wide} %{'r' if wide == 4 else 'd'}{10 + index}, [%d1];\n"
        body += f"add.u64 %d1, %d1, {32 * wide};\n"
    body += "" if wide == 8 else "setp.ne.u32 %p5, %r10, 0;\n"
    body += f"@!%p9 bra DONE;\n{opcode_line}\nmul.wide.u32 %d2, %r0, 16;\nadd.u64 %d2, %d2, %y;\n"
    body += "".join(f"st.global.u32 [%d2+{4 * i}], %r{20 + i};\n" for i in range(results))
    body += "DONE:"
    x = np.concatenate(arrays) if arrays else np.zeros(1, np.uint32)
    y = np.full((32, 4), 0xAAAAAAAA, np.uint32)
    run(kernel(body, registers=registers), x, y, order=order, seed=5)
    return y[:, :results].tolist()


def words(seed, top=1 << 32):
    return np.random.default_rng(seed).integers(0, top, 32).astype(np.uint32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_read_other_lanes(mode, order):
    """Segments of every width, distances of every size, as the pseudocode of PTX has it."""
    values, distances = words(1), words(2, 64)
    for width in (1, 2, 8, 32):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        line = f"shfl.sync.{mode}.b32 %r20|%p1, %r10, %r11, {clamp}, %r9;\n"
        line += "selp.u32 %r21, 1, 0, %p1;"
        made = per_lane(line, [values, distances], EVERY, results=2, order=order)
        for lane in range(32):
            distance, segment = int(distances[lane]) & 31, clamp >> 8
            most = lane & segment | (clamp & 31) & ~segment
            source = {
                "up": lane - distance,
                "down": lane + distance,
                "bfly": lane ^ distance,
                "idx": lane & segment | distance & ~segment,
            }[mode]  # fmt: skip
            fine = source >= most if mode == "up" else source <= most
            assert made[lane] == [values[source if fine else lane], int(fine)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", named(*VOTES), ids=name_of)
def test_lanes_vote_match_and_reduce(form, mask):
    lanes = lanes_of(mask)
    for order, (opcode, m) in zip(ORDERS * 9, [*form.variants()] * 3, strict=False):
        kind = m.get("T", "u32")
        wide = BITS[kind] // 8
        for top in (1, 2, 3, 1 << 8 * wide - 1):
            x = np.random.default_rng(top % 97).integers(0, top, 32).astype(f"u{wide}")
            x[3] = x[3] * 2 + (top > 1000)
            source = "%r10" if wide == 4 else "%d10"
            line = {
                "vote": f"{opcode} %p1, %p5, %r9; selp.u32 %r20, 1, 0, %p1;",
                "ballot": f"{opcode} %r20, %p5, %r9;",
                "match_all": f"{opcode} %r20|%p1, {source}, %r9; selp.u32 %r21, 1, 0, %p1;",
                "elect": f"{opcode} %r20|%p1, %r9; selp.u32 %r21, 1, 0, %p1;",
            }.get(form.emit.__name__, f"{opcode} %r20, {source}, %r9;")
            results = 2 if "%r21" in line else 1
            made = per_lane(line, [x], mask, wide, results, order=order)
            given = {lane: int(x[lane]) for lane in lanes}
            for lane in lanes:
                assert made[lane] == together(form.emit.__name__, m, given, lane, mask), opcode
            assert all(made[lane][0] == 0xAAAAAAAA for lane in range(32) if lane not in lanes)


def together(name, m, given, lane, mask):
    """Return what a lane gets."""
    true = [bool(value) for value in given.values()]
    if name == "vote":
        whole, none = all(true), not any(true)
        return [int({"all": whole, "any": not none, "uni": whole or none}[m["op"]])]
    if name == "ballot":
        return [sum(1 << one for one, value in given.items() if value)]
    if name == "match_any":
        return [sum(1 << one for one, value in given.items() if value == given[lane])]
    if name == "match_all":
        same = len(set(given.values())) == 1
        return [mask if same else 0, int(same)]
    if name == "elect":
        return [min(given), int(lane == min(given))]
    values = [models.read(value, m["T"]) for value in given.values()]
    if m["op"] in ("add", "min", "max"):
        return [models.u({"add": sum, "min": min, "max": max}[m["op"]](values), 32)]
    made = values[0]
    for value in values[1:]:
        made = {"and": made & value, "or": made | value, "xor": made ^ value}[m["op"]]
    return [made]


@pytest.mark.parametrize("order", ORDERS)
def test_active_lanes_are_those_that_come_together(order):
    line = "activemask.b32 %r20;"
    made = per_lane(line, [], 0x00FF0F01, order=order)
    assert {made[lane][0] for lane in lanes_of(0x00FF0F01)} == {0x00FF0F01}


@pytest.mark.parametrize("order", ORDERS)
def test_a_warp_exchanges_through_shared_memory(order):
    """bar.warp.sync orders memory for its lanes; the checker sees that."""
    body = (
        INDEX.format(4)
        + """
        mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0;
        bar.warp.sync -1;
        xor.b32 %r4, %r2, 124; add.u32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4];
        st.global.u32 [%d1], %r5;"""
    )
    x = np.zeros(32, np.uint32)
    run(kernel(body, "x", ".shared .align 4 .b8 s[128];"), x, order=order)
    assert x.tolist() == list(range(32))[::-1]


# Barriers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", named("barrier", "reduce_all", "reduce_some"), ids=name_of)
def test_barriers_order_memory_and_count(form, order):
    for opcode, m in form.variants():
        op = m.get("op", "")
        count = " 0, 96" if form.emit.__name__ == "reduce_some" else " 0"
        for true in (0, 1, 95, 96):
            target = {"": "", "popc": " %r7,"}.get(op, " %p1,")
            predicate = ", %p2" if op else ""
            body = (
                INDEX.format(4)
                + f"""
                mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2;
                st.shared.u32 [%r3], %r0; setp.lt.u32 %p2, %r0, {true}; mov.u32 %r7, 0;
                {opcode}{target}{count}{predicate};
                sub.u32 %r4, 380, %r2; add.u32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4];
                {"selp.u32 %r7, 1, 0, %p1;" if op in ("and", "or") else ""}
                st.global.u32 [%d1], %r5; st.global.u32 [%d1+384], %r7;"""
            )
            x = np.zeros((2, 96), np.uint32)
            run(kernel(body, "x", ".shared .align 4 .b8 s[384];"), x, block=96, order=order)
            expected = {"": 0, "popc": true, "and": true == 96, "or": true > 0}[op]
            assert x[0].tolist() == list(range(96))[::-1]
            assert set(x[1].tolist()) == {int(expected)}, opcode


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", named("arrive"), ids=name_of)
def test_a_producer_arrives_and_a_consumer_waits(form, order):
    for opcode, _ in form.variants():
        body = (
            INDEX.format(4)
            + f"""
            mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2;
            setp.ge.u32 %p1, %r0, 32; @%p1 bra CONSUME;
            st.shared.u32 [%r3], %r0; {opcode} 3, 64; bra DONE;
            CONSUME: bar.sync 3, 64;
            sub.u32 %r4, %r3, 128; ld.shared.u32 %r5, [%r4]; st.global.u32 [%d1], %r5;
            DONE:"""
        )
        x = np.zeros(64, np.uint32)
        run(kernel(body, "x", ".shared .align 4 .b8 s[256];"), x, block=64, order=order)
        assert x.tolist() == [0] * 32 + list(range(32))


def test_what_is_written_after_arriving_is_not_ordered():
    body = """mov.u32 %r0, %tid.x; setp.ge.u32 %p1, %r0, 32; @%p1 bra CONSUME;
        bar.arrive 3, 64; st.shared.u32 [s], %r0; bra DONE;
        CONSUME: bar.sync 3, 64; ld.shared.u32 %r5, [s]; st.global.u32 [%x], %r5;
        DONE:"""
    text = kernel(body, "x", ".shared .align 4 .b8 s[4];")
    found = Module.from_ptx(text).kernel().launch(1, 64, np.zeros(1, np.uint32))
    assert "race-with-write" in {
        one.kind for one in found.findings if "ld.shared" in one.instruction
    }
