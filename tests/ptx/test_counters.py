"""Counters of kernels whose numbers are known by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe_plugins.ptx_host import LaunchError, Module
from qframe_plugins.ptx_host import counters as counting
from tests.ptx.snippets import kernel
from tests.ptx.test_device import INDEX, run, translated


def counted(body, *arrays, registers="", params="x", **options):
    return run(kernel(body, params, registers), *arrays, count=True, **options).counters


def strided(stride, offset=0):
    return f"""mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, {4 * stride};
        add.u64 %d1, %x, %d0; ld.global.u32 %r1, [%d1+{4 * offset}];"""


@given(st.integers(1, 12), st.integers(0, 20))
def test_sectors_are_those_that_the_addresses_touch(stride, offset):
    x = np.zeros(32 * 12 + 32, np.uint32)
    [access] = counted(strided(stride, offset), x).accesses
    assert (access.requests, access.bytes, access.least) == (1, 128, 4)
    assert access.units == len({(offset + stride * lane) * 4 // 32 for lane in range(32)})


@given(st.integers(1, 33))
def test_turns_of_banks_are_the_words_of_the_fullest(pad):
    body = f"""mov.u32 %r0, %tid.x; mov.u32 %r1, s; mad.lo.u32 %r1, %r0, {4 * pad}, %r1;
        st.shared.u32 [%r1], %r0;"""
    registers = ".shared .align 16 .b8 s[4352];"
    [access] = counted(body, np.zeros(1), registers=registers).accesses
    banks = [(lane * pad) % 32 for lane in range(32)]
    assert access.units == max(banks.count(bank) for bank in banks)
    assert (access.space, access.requests, access.least) == ("shared", 1, 1)


def test_lanes_that_read_one_word_take_one_turn():
    body = "mov.u32 %r1, s; st.shared.u32 [%r1], 7;".replace(" 7;", " %r1;")
    body = f"mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0; @%p1 {body.split('; ')[1]}"
    body = body.replace("[%r1], %r1", "[s], %r0") + " bar.sync 0; ld.shared.u32 %r2, [s];"
    registers = ".shared .align 16 .b8 s[16];"
    made = counted(body, np.zeros(1), registers=registers).accesses
    assert [(one.requests, one.units, one.bytes) for one in made] == [(1, 1, 4), (1, 1, 128)]


def test_every_execution_of_a_loop_is_a_request():
    body = """mov.u32 %r0, %tid.x; mov.u32 %r2, 0;
        AGAIN: ld.global.u32 %r1, [%x]; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 5;
        @%p1 bra AGAIN;"""
    made = counted(body, np.zeros(1, np.uint32), block=96, grid=2)
    [access] = made.accesses
    assert (access.requests, access.units) == (2 * 3 * 5, 2 * 3 * 5)
    assert made.instructions["add.u32"] == 2 * 96 * 5
    assert made.instructions["bra"] == 2 * 96 * 4
    assert made.bytes_read == {"p_x": 2 * 96 * 5 * 4}


def test_bytes_are_counted_by_argument():
    body = (
        INDEX.format(4)
        + """add.u64 %d2, %y, %d0; ld.global.u32 %r1, [%d1];
        st.global.u32 [%d2], %r1; red.global.add.u32 [%y], %r1;
        atom.global.add.u32 %r2, [%y], %r1;"""
    )
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    made = translated(kernel(body)).launch(1, 32, x, y, count=True, check=False).counters
    assert made.bytes_read == {"p_x": 128, "p_y": 128}
    assert made.bytes_written == {"p_y": 384}


def test_counting_changes_nothing():
    body = strided(3) + "add.u32 %r1, %r1, 1; st.global.u32 [%d1], %r1;"
    x, other = np.arange(128, dtype=np.uint32), np.arange(128, dtype=np.uint32)
    counted(body, x)
    run(kernel(body, "x"), other)
    assert x.tolist() == other.tolist()


def test_more_accesses_than_are_kept_are_refused(monkeypatch):
    monkeypatch.setattr(counting, "ENTRIES", 16)
    with pytest.raises(LaunchError, match="a block makes 32 accesses, counters keep 16"):
        Module.from_ptx(kernel(strided(1), "x")).kernel().launch(
            1, 32, np.zeros(32, np.uint32), count=True
        )
