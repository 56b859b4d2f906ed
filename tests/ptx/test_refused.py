"""What is refused, and how: texts, launches, and kernels that cannot go on."""

import numpy as np
import pytest
import torch

from qframe_plugins.ptx_host import (
    KernelFaultError,
    LaunchError,
    Module,
    PtxError,
    PtxUnsupportedError,
)
from tests.ptx.snippets import HEAD, kernel
from tests.ptx.test_device import INDEX, run


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("frobnicate.u32 %r1, %r2;", PtxUnsupportedError, "frobnicate.u32 is not supported"),
        ("add.u8 %r1, %r2, %r3;", PtxUnsupportedError, "add.u8 is not supported"),
        ("add.rn.sat.ftz.f32 %f1, %f2, %f3;", PtxUnsupportedError, "is not supported"),
        ("mul.wide.u64 %d1, %d2, %d3;", PtxUnsupportedError, "is not supported"),
        ("add.u32 %r1, %r2;", PtxError, "2 operands, expected 3"),
        ("add.u32 %r1, %d2, %r3;", PtxError, "is of type .b64, expected .u32"),
        ("add.u32 %p1, %r2, %r3;", PtxError, "is of type .pred"),
        ("add.u32 5, %r2, %r3;", PtxError, "has to be a register"),
        ("lop3.b32 %r1, %r2, %r3, %r4, %r5;", PtxError, "has to be a number"),
        ("ld.global.v2.u32 {%r1}, [%d1];", PtxError, "has 1 parts, expected 2"),
        ("mov.u32 %r1, %clock;", PtxError, "neither a register nor a variable"),
        ("mov.u32 %r1, missing;", PtxError, "'missing' is neither"),
        ("mov.f64 %e1, 0f3F800000;", PtxError, "a float of 32 bits, expected 64"),
        ("ld.param.u64 %d1, [p_x+4];", PtxError, "8 bytes at byte 4 of p_x, which has 8"),
        ("ld.param.u64 %d1, [p_z];", PtxError, "there is no parameter 'p_z'"),
        ("ld.param.u64 %d1, [%d2];", PtxUnsupportedError, "by its name, not by an address"),
        ("bra NOWHERE;", PtxError, "no label 'NOWHERE'"),
        ("call unknown, (%r1);", PtxUnsupportedError, "unknown has no body"),
        ("ld.global.u32 %r1, [%d1*4];", PtxUnsupportedError, "the operand '%d1*4'"),
        ("cp.async.cg.shared.global [%r1], [%d1], 8;", PtxUnsupportedError, ".cg copies 16"),
        (".tex .u64 t;", PtxUnsupportedError, "the declaration"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_the_line(line, error, says):
    text = kernel(f"\n\n{line}\n", "x")
    number = text[: text.index(line)].count("\n") + 1
    with pytest.raises(error, match=rf"line {number}\b") as raised:
        Module.from_ptx(text).kernel().launch(1, 1, np.zeros(1))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello", "has no ';' at its end"),
        (".version 8.0", "directive .target is missing"),
        (HEAD + ".visible .entry k() { ret; ", "a '}' is missing"),
        (HEAD + ".visible .entry k() { add.u32 %r1, %r2", "has no ';' at its end"),
    ],
)
def test_what_is_no_ptx_is_said_to_be_none(text, says):
    with pytest.raises(PtxError, match=says):
        Module.from_ptx(text)


def test_a_function_that_calls_itself_is_refused():
    head = ".func f() { call f; ret; }"
    with pytest.raises(PtxUnsupportedError, match="f calls itself"):
        Module.from_ptx(kernel("call f;", "x", head=head)).kernel()


ADD = kernel(INDEX.format(4) + "ld.global.u32 %r1, [%d1]; st.global.u32 [%d1], %r1;", "x")
X = np.arange(64, dtype=np.uint32)


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        (lambda k: k.launch(1, 32), "0 arguments, expected 1: p_x: .u64"),
        (lambda k: k.launch(1, 2000, X), "2000 threads in a block"),
        (lambda k: k.launch(0, 32, X), "expected one to three positive numbers"),
        (lambda k: k.launch(1, (1, 1, 1, 1), X), "expected one to three positive numbers"),
        (lambda k: k.launch(1, 32, X[::2]), "C-contiguous"),
        (lambda k: k.launch(1, 32, "x"), "got str"),
        (lambda k: k.launch(1, 32, 2.5), "got float"),
        (lambda k: k.launch(1, 32, 1 << 64), "does not fit into 64 bits"),
        (lambda k: k.launch(1, 32, np.float32(1)), "float32 has 4 bytes"),
        (lambda k: k.launch(1, 32, b"abc"), "3 bytes, expected 8"),
        (
            lambda k: k.launch(1, 32, X, order="sideways"),
            "expected one of forward, reverse, random",
        ),
        (lambda k: k.launch(1, 32, X, fuel=-1), "not negative"),
        (lambda k: k.module.kernel("other"), "no kernel 'other'; there are k"),
        (lambda k: k.module.variable("v"), "no variable 'v'"),
    ],
)
def test_launches_that_cannot_be_are_refused(launch, says):
    with pytest.raises(LaunchError, match=says):
        launch(Module.from_ptx(ADD).kernel())


def test_a_process_that_flushes_subnormal_numbers_is_told():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(LaunchError, match="flushes subnormal numbers"):
            Module.from_ptx(ADD).kernel().launch(1, 32, X)
    finally:
        torch.set_flush_denormal(False)


def test_arrays_that_overlap_are_refused_and_the_same_one_is_shared():
    two = kernel(
        "ld.global.u32 %r1, [%x]; add.u32 %r1, %r1, 1; st.global.u32 [%y], %r1;"
        "ld.global.u32 %r1, [%x]; add.u32 %r1, %r1, 1; st.global.u32 [%y], %r1;"
    )
    x = np.zeros(8, np.uint32)
    with pytest.raises(LaunchError, match="overlaps p_x"):
        Module.from_ptx(two).kernel().launch(1, 1, x[:6], x[2:])
    run(two, x, x, block=1)
    assert x[0] == 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("trap;", "a trap"),
        ("L: bra L;", "more jumps back than `fuel` allows"),
        ("mov.u32 %r1, 0;" + "cp.async.ca.shared.global [s], [%x], 4;" * 65, "more than 64 copies"),
    ],
)
def test_what_cannot_go_on_ends_with_an_error(body, says):
    text = kernel(body, "x", ".shared .align 4 .b8 s[4];")
    with pytest.raises(KernelFaultError, match=says):
        Module.from_ptx(text).kernel().launch(1, 1, np.zeros(1), fuel=1000)
