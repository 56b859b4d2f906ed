"""Mutants of PTX: each is the same text but for one instruction; a good test notices nearly all."""

import numpy as np
import pytest

from qframe import Scheme
from qframe.errors import QframeError
from qframe_conformance import kernel_draws
from qframe_plugins.ptx_host import Fresh, Module
from qframe_plugins.ptx_host.mutants import mutants
from tests.test_check_kernel import DEQUANTIZE

FUEL = 10**4


def every(text=DEQUANTIZE):
    source = Module.from_ptx(text).source
    return source, list(mutants(source, "dequantize"))


def test_one_instruction_is_changed_and_the_rest_is_as_it_was():
    source, made = every()
    before = source.functions["dequantize"].body
    assert len({mutant.line for mutant in made}) > 10
    for mutant in made:
        after = mutant.source.functions["dequantize"].body
        if len(after) == len(before) - 1:
            assert mutant.change == "left out"
            continue
        [place] = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert before[place].place.line == mutant.line
        assert before[place].text == mutant.text
    keys = [
        tuple(str(each) for each in mutant.source.functions["dequantize"].body) for mutant in made
    ]
    assert len(set(keys)) == len(keys)
    assert source.functions["dequantize"].body == before


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("setp.ge.u32 %p1, %r4, %r5", "ge -> gt"),
        ("@%p1 bra DONE", "condition negated"),
        ("st.global.f32 [%a9], %f3", "left out"),
        ("st.global.f32 [%a9], %f3", "[+4]"),
        ("sub.s32 %r13, %r11, %r12", "sub -> add"),
        ("sub.s32 %r13, %r11, %r12", "operands 1 and 2 swapped"),
        ("mul.rn.f32 %f3, %f1, %f2", "rn -> rz"),
        ("ld.global.s16 %r11, [%a3]", "s16 -> u16"),
        ("mul.wide.u32 %a8, %r9, 4", "4 -> 5"),
        ("mul.wide.u32 %a8, %r9, 4", "4 -> 3"),
    ],
)
def test_what_people_get_wrong_is_among_them(text, change):
    _, made = every()
    assert (text, change) in {(mutant.text, mutant.change) for mutant in made}


def outcome(module, operands):
    """Return the bits of every call, or what went wrong."""
    found, kernel = [], module.kernel()
    for codes, scale, zero, group in operands:
        rows, columns = codes.shape
        out = np.zeros((rows, columns), np.float32)
        pitch = scale.shape[1] if len(scale) > 1 else 0
        try:
            run = kernel.launch(
                (-(-columns // 32), rows), 32, codes, scale, zero, group, Fresh(out),
                rows, columns, pitch, fuel=FUEL,
            )  # fmt: skip
        except QframeError as error:
            return type(error).__name__
        if run.findings:
            return run.findings[0].kind
        found.append(out.tobytes())
    return found


KNOWN = {
    # A difference of two numbers of 16 bits is a float32 number: it is not rounded.
    ("cvt.rn.f32.s32 %f1, %r13", "rn -> rz"),
}


def test_nearly_all_are_noticed_on_small_odd_shapes():
    """By bits and findings; those that are not are listed, and are no mistakes."""
    rng = np.random.default_rng(0)
    calls = []
    for rows, columns, size in ((3, 7, 3), (5, 65, 32), (2, 33, 7)):
        for symmetric in (True, False):
            scheme = Scheme(num_bits=4, symmetric=symmetric, group_size=size)
            made = kernel_draws.weight(rng, scheme, rows, columns)
            names = ("codes", "scale", "zero_point", "group_index")
            calls.append([made[name] for name in names])
    source, made = every()
    right = outcome(Module(source), calls)
    survivors = {
        (each.text, each.change) for each in made if outcome(each.module(), calls) == right
    }
    assert survivors == KNOWN
