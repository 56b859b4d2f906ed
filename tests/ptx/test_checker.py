"""The checker finds every seeded bug, names it and its line, and finds nothing in the twins."""

import numpy as np
import pytest

from qframe_plugins.ptx_host import KINDS, KernelFaultError, LaunchError, Module
from qframe_plugins.ptx_host import launch as launching
from tests.ptx import seeded_mistakes, seeded_races
from tests.ptx.seeds import Seed
from tests.ptx.snippets import kernel
from tests.ptx.test_device import translated
from tests.ptx.twins import TWINS

BUGS = seeded_races.BUGS + seeded_mistakes.BUGS

ORDERS = ("forward", "reverse", "random")


def findings(seed, order):
    try:
        return launched(seed, order, seed.given()).findings
    except KernelFaultError as error:
        return error.findings


def launched(seed, order, given):
    options = {"order": order, **seed.options}
    return translated(seed.text()).launch(seed.grid, seed.block, *given, **options)


def name_of(seed):
    return seed.name.replace(" ", "_")


@pytest.mark.parametrize("seed", BUGS, ids=name_of)
def test_a_bug_is_found_and_named_with_its_line(seed):
    found = findings(seed, "forward")
    named = {(one.kind, one.place.partition("(")[2].rstrip(")")) for one in found}
    assert (seed.finding, seed.line()) in named, "\n".join(map(str, found))
    [one] = [o for o in found if o.kind == seed.finding and seed.line() in o.place]
    line = int(one.place.split()[1])
    assert one.instruction.split()[-1] in seed.text().splitlines()[line - 1]
    assert one.kernel == "k"
    assert one.count > 0


@pytest.mark.parametrize("seed", BUGS, ids=name_of)
def test_a_bug_is_found_in_every_order_of_threads(seed):
    """Perhaps at the other of two accesses that race; but it is found."""
    for order in ORDERS:
        kinds = {one.kind for one in findings(seed, order)}
        same = {seed.finding}
        if seed.finding.startswith("race"):
            same = {"race-with-write", "race-with-read"}
        if seed.finding == "missing-wait":
            same.add("uninitialized")
        assert kinds & same, (order, kinds)


@pytest.mark.parametrize("seed", TWINS, ids=name_of)
def test_nothing_is_found_in_a_twin(seed):
    results = []
    for order in ORDERS:
        given = seed.given()
        found = launched(seed, order, given).findings
        assert list(map(str, found)) == []
        y = getattr(given[1], "array", given[1])
        results.append(y.tolist())
    assert results[0] == results[1] == results[2]


def test_there_are_enough_of_both_and_every_kind_has_a_bug():
    assert len(BUGS) >= 40
    assert len(TWINS) >= 15
    assert len({seed.name for seed in BUGS + TWINS}) == len(BUGS) + len(TWINS)
    assert {seed.finding for seed in BUGS} == set(KINDS)


def test_a_finding_says_everything():
    [seed] = [one for one in BUGS if one.name == "a block reads what another one writes"]
    [one] = [one for one in findings(seed, "forward") if one.kind == seed.finding]
    text = str(one)
    assert text.startswith(f"race-with-write: k, line {one.place.split()[1]} ({seed.line()}): ")
    assert "'ld.global.u32 %r6, [%d3]'; 4 bytes at byte 0 of 512 of p_y" in text
    assert "with block 0, thread 0, at line" in text
    assert "first in block 1, thread 0; 256 times" in text


def test_what_is_refused_is_not_done():
    """An access outside hits nothing: what is beside an array stays, and what is read is zero."""
    body = "st.global.u32 [%x+16], %r0; ld.global.u32 %r1, [%x-4]; st.global.u32 [%x], %r1;"
    x = np.full(4, 9, np.uint32)
    found = Module.from_ptx(kernel("mov.u32 %r0, 5;" + body, "x")).kernel().launch(1, 1, x).findings
    assert [one.kind for one in found] == ["out-of-bounds"] * 2
    assert x[1:].tolist() == [9, 9, 9]


def test_an_array_that_is_read_only_is_never_written():
    seed = Seed("", "", "st.global.u32 [%d1], %r2;\nst.global.u32 [%d1], %r9;")
    x, y = np.full(64, 3, np.uint32), np.zeros(64, np.uint32)
    x.flags.writeable = False
    with pytest.raises(KernelFaultError, match="p_x: the kernel has written to an array that is"):
        Module.from_ptx(seed.text()).kernel().launch(1, 64, x, y, check=False)
    assert x.tolist() == [3] * 64


def test_too_much_memory_to_check_is_refused(monkeypatch):
    monkeypatch.setattr(launching, "CELLS_MOST", 1 << 20)
    with pytest.raises(LaunchError, match="the checker would need 3 MiB for its cells"):
        Module.from_ptx(kernel("", "x")).kernel().launch(1, 1, np.zeros(1 << 14, np.uint16))
