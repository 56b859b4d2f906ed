"""`check_kernel` and `crosscheck`: what is wrong is told by number, side, theorem and script."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe.contracts import Unsupported
from qframe.errors import MissingExtraError, PluginError, RecipeError, UnsupportedError
from qframe.host import Host
from qframe.kernels import OPS
from qframe_conformance import check_kernel, kernel_rounds, replay
from qframe_conformance.crosscheck import GROUP, crosscheck
from qframe_conformance.kernel_case import KernelCase, beside, sides
from qframe_conformance.kernel_scenarios import LARGEST_SIMULATED, scenarios
from qframe_plugins.kernels.torch_ops import qframe_kernels
from qframe_plugins.ptx_host import Fresh, PtxKernel
from tests.mutants.kernels_int8 import Int8
from tests.mutants.kernels_small import changed
from tests.ran import command

TORCH = {kernel.op: kernel for kernel in qframe_kernels()}
CODES = ["int4-asymmetric-group", "int8-symmetric-channel"]

DEQUANTIZE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry dequantize(.param .u64 codes, .param .u64 scale, .param .u64 zero,
                           .param .u64 group, .param .u64 out, .param .u32 rows,
                           .param .u32 columns, .param .u32 pitch)
{
    .reg .b32 %r<20>; .reg .b64 %a<20>; .reg .f32 %f<4>; .reg .pred %p<2>; .reg .b16 %h<3>;
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3;
    ld.param.u32 %r5, [columns]; ld.param.u32 %r6, [pitch];
    setp.ge.u32 %p1, %r4, %r5;
    @%p1 bra DONE;
    mov.u32 %r7, %ctaid.y;
    ld.param.u64 %a1, [group]; mul.wide.u32 %a2, %r4, 4; add.u64 %a1, %a1, %a2;
    ld.global.u32 %r8, [%a1];
    mad.lo.u32 %r9, %r7, %r6, %r8;
    mad.lo.u32 %r10, %r7, %r5, %r4;
    ld.param.u64 %a3, [codes]; mul.wide.u32 %a4, %r10, 2; add.u64 %a3, %a3, %a4;
    ld.global.s16 %r11, [%a3];
    ld.param.u64 %a5, [zero]; mul.wide.u32 %a6, %r9, 2; add.u64 %a5, %a5, %a6;
    ld.global.s16 %r12, [%a5];
    sub.s32 %r13, %r11, %r12;
    cvt.rn.f32.s32 %f1, %r13;
    ld.param.u64 %a7, [scale]; mul.wide.u32 %a8, %r9, 4; add.u64 %a7, %a7, %a8;
    ld.global.f32 %f2, [%a7];
    mul.rn.f32 %f3, %f1, %f2;
    ld.param.u64 %a9, [out]; mul.wide.u32 %a10, %r10, 4; add.u64 %a9, %a9, %a10;
    st.global.f32 [%a9], %f3;
DONE:
    ret;
}
"""


def launch(device, codes, scale, zero, group):
    rows, columns = codes.shape
    out = np.zeros((rows, columns), np.float32)
    pitch = scale.shape[1] if len(scale) > 1 else 0
    if out.size:
        grid = (-(-columns // 32), rows)
        given_ = (codes, scale, zero, group, Fresh(out), rows, columns, pitch)
        device.launch("dequantize", grid, 32, *given_)
    return out


def ptx_kernel(*changes, run=launch):
    text = DEQUANTIZE
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return PtxKernel("dequantize", text, run)


# PTX ------------------------------------------------------------------------------------------


def test_ptx_that_is_right_passes_in_all_orders():
    report = check_kernel(ptx_kernel(), scenarios=CODES)
    assert report.ok, str(report)
    held = {record.check for record in report.records if record.status == "held"}
    assert {"answers", "variants_agree", "integers_exactly", "values_of_codes"} <= held
    assert report.plugin == "dequantize/ptx_host sm_80"


WRONG = {
    "no test of the bound": ([("@%p1 bra DONE;", "")], "answers", "out-of-bounds"),
    "a wrong pitch": ([("%r9, %r7, %r6, %r8", "%r9, %r7, %r5, %r8")], "answers", "out-of-bounds"),
    "the last column is left out": ([("setp.ge.u32 %p1, %r4, %r5;",
        "sub.u32 %r5, %r5, 1; setp.ge.u32 %p1, %r4, %r5; add.u32 %r5, %r5, 1;")],
        "values_of_codes", "float64"),
    "codes are read as unsigned": ([("ld.global.s16 %r11", "ld.global.u16 %h1"),
        ("sub.s32 %r13, %r11, %r12;", "cvt.u32.u16 %r11, %h1; sub.s32 %r13, %r11, %r12;")],
        "values_of_codes", "furthest from float64: ptx_host sm_80"),
    "the product is cut": ([("mul.rn.f32 %f3", "mul.rz.f32 %f3")],
        "values_of_codes", "furthest from float64: ptx_host sm_80"),
    "every thread stores to the first number": ([("[%a9], %f3;\nDONE", "[%a11], %f3;\nDONE"),
        ("add.u64 %a9, %a9, %a10;", "add.u64 %a9, %a9, %a10; ld.param.u64 %a11, [out];")],
        "answers", "race-with-write"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_ptx_that_is_wrong_is_told_where_and_by_whom(name):
    changes, check, said = WRONG[name]
    report = check_kernel(ptx_kernel(*changes), scenarios=CODES)
    first = next(record for record in report.failures if record.check == check)
    assert said in first.message, first.message
    assert first.counterexample.arrays["codes"].size <= 9 * 33  # it has been made small
    assert "replay" in first.counterexample.snippet


def test_a_scale_that_is_no_power_of_two_is_what_a_cut_product_needs():
    """On integers nothing is rounded: the check for integers has nothing against it."""
    changes = WRONG["the product is cut"][0]
    kernel = ptx_kernel(*changes)
    assert check_kernel(kernel, only=["integers_exactly"], scenarios=CODES).ok


def test_a_launch_that_returns_something_else_is_told():
    report = check_kernel(
        ptx_kernel(run=lambda *given_: np.float64(0)), only=["answers"], scenarios=CODES
    )
    assert "expected a tensor" in report.failures[0].message


def test_operands_are_the_launch_functions_own():
    """What it writes into them does not reach the caller."""
    kernel, codes = ptx_kernel(), torch.zeros(2, 3, dtype=torch.int16)

    def scribbling(device, *operands):
        made = launch(device, *operands)
        operands[0][:] = 7
        return made

    scale, zero = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int16)
    group = torch.zeros(3, dtype=torch.int32)
    PtxKernel("dequantize", kernel.ptx, scribbling)(codes, scale, zero, group)
    assert codes.tolist() == [[0] * 3] * 2


def test_calls_that_are_not_served_are_not_made():
    asked = []

    def serves(call):
        asked.append(call.shape)
        return None if call.shape[1] == 33 else "only 33 columns"

    kernel = PtxKernel("dequantize", DEQUANTIZE, launch, serves=serves)
    for scenario in scenarios(kernel):
        assert scenario.subject.shape[1] == 33
    assert len({shape[1] for shape in asked}) > 1


# Functions ------------------------------------------------------------------------------------


def test_a_function_is_a_kernel_of_the_operation_it_is_said_to_compute():
    def exact(x_codes, x_scale, w_codes, w_scale):
        return ((x_codes.double() @ w_codes.double().T).float() * x_scale[:, None]) * w_scale

    assert check_kernel(exact, "linear_int8").ok
    report = check_kernel(lambda *given_: exact(*given_) * 1.0001, "linear_int8", shrink=False)
    assert {"eight_bit_decode", "integers_exactly"} <= {r.check for r in report.failures}


@pytest.mark.parametrize(
    ("given_", "error", "said"),
    [
        ((3, None), PluginError, "3 is no kernel"),
        ((print, None), PluginError, "the operation that it computes"),
        ((print, "linear_int9"), UnsupportedError, "there is no operation 'linear_int9'"),
        ((TORCH["hadamard"], "dequantize"), PluginError, "computes 'hadamard', not 'dequantize'"),
    ],
)
def test_what_is_no_kernel(given_, error, said):
    with pytest.raises(error, match=said):
        check_kernel(*given_)


@given(st.integers(0, 2**32), st.integers(0, 8), st.sampled_from(["numba", "torch", None]))
def test_the_side_that_is_further_from_float64_is_named(seed, place, wrong):
    """Of a kernel and a peer, one of them spoilt in one number."""
    rng = np.random.default_rng(seed)
    operands = {
        "x_codes": rng.integers(-127, 128, (3, 5)).astype(np.int8),
        "x_scale": np.ones(3, np.float32),
        "w_codes": rng.integers(-127, 128, (3, 5)).astype(np.int8),
        "w_scale": np.ones(3, np.float32),
    }

    def kernel(backend):
        def result(self, y):
            y = y.copy()
            y.flat[place] += backend == wrong
            return y

        return changed(Int8, backend=backend, result=result)()

    case = KernelCase(kernel("numba"), operands, seed)
    exact = case.op.oracle(*operands.values())
    mask = np.zeros((3, 3), bool)
    mask.flat[place] = True
    with beside([kernel("torch"), kernel("numba"), TORCH["hadamard"]]):
        said = sides(case, 0, exact, mask)
    row, column = divmod(place, 3)
    assert f"first of 1 wrong numbers at [{row}, {column}]" in said
    assert f"float64 {exact[row, column]:.9g}" in said
    assert said.count("numba ") == 1
    if wrong:
        assert said.endswith(f"furthest from float64: {wrong}")


def test_a_failure_is_shown_again_by_its_script(tmp_path):
    """The script of a counterexample prints what the report says."""
    report = check_kernel(TORCH["hadamard"], only=["answers"])
    assert report.code.startswith("from qframe_plugins.kernels.torch_ops import")
    kernel = changed(Int8, result=lambda self, y: y[:, ::-1])()
    report = check_kernel(kernel, only=["eight_bit_decode"])
    [failure] = {record.check: record for record in report.failures}.values()
    operands = dict(failure.counterexample.arrays)
    assert "eight_bit_decode" in replay("eight_bit_decode", KernelCase(kernel, operands))


# The table ------------------------------------------------------------------------------------


class Host2:
    """A host of some kernels."""

    def __init__(self, *kernels):
        self.kernels = {f"{each.op}/{each.backend}": each for each in kernels}

    def names(self, kind):
        return list(self.kernels) if kind == "kernel" else []

    def get(self, kind, name):
        return self.kernels[name]


def wrong_by_a_bit(self, y):
    return np.nextafter(y, np.float32(np.inf))


def test_each_target_is_a_row_and_a_wrong_one_is_named():
    right, wrong = changed(Int8)(), changed(Int8, result=wrong_by_a_bit)()
    many = changed(Int8, backend="many", targets={"sm_1": right, "sm_2": wrong})()
    found = crosscheck(Host2(right, many), backends=["small", "many"])
    rows = {row.label: row for row in found.rows}
    assert list(rows) == ["small", "many sm_1", "many sm_2"]
    assert {label: row.report.ok for label, row in rows.items()} == {
        "small": True,
        "many sm_1": True,
        "many sm_2": False,
    }
    assert not found.ok
    only = crosscheck(Host2(right, many), backends=["many"], targets=["sm_1"])
    assert [row.label for row in only.rows] == ["many sm_1"]
    assert only.ok


def test_what_cannot_run_is_listed_and_is_neither_failure_nor_success():
    absent = changed(Int8, supports=lambda self, call: Unsupported("no such machine"))()
    found = crosscheck(Host2(absent), backends=["small"])
    [row] = found.rows
    assert (row.report, row.why) == (None, "no such machine")
    assert not found.ok


@pytest.mark.parametrize(
    ("key", "name", "near"),
    [("ops", "linear_int9", "linear_int8"), ("backends", "smal", "small"), ("targets", "sm_9", "")],
)
def test_names_that_nobody_has(key, name, near):
    with pytest.raises(RecipeError, match=f"'{name}'.*{near}"):
        crosscheck(Host2(changed(Int8)()), **{key: [name]})


def test_other_packages_add_verdicts(monkeypatch):
    verdict = SimpleNamespace(holds=False)

    def absent(targets):
        raise MissingExtraError("this", "that", "it")

    points = [
        SimpleNamespace(name="costs", load=lambda: lambda targets: [verdict]),
        SimpleNamespace(name="others", load=lambda: absent),
    ]
    known = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **wanted: points if wanted == {"group": GROUP} else known(**wanted),
    )
    found = crosscheck(Host2(changed(Int8)()))
    assert found.rows[0].report.ok
    assert found.broken == [verdict]
    assert not found.ok
    assert '"qframe[that]"' in found.absent["others"]


def test_kernels_that_simulate_are_tried_on_small_calls():
    sizes = {"by_name_only": True, "backend": "simulated"}
    for base in TORCH.values():
        kernel = type("Simulated", (type(base),), sizes)
        made = kernel(base.function) if type(base).__name__ == "TorchKernel" else kernel()
        found = scenarios(made)
        beyond = {name for name, *_ in kernel_rounds.of(base.op)}  # what a block takes at once
        plain = {each.id for each in found}
        plain -= {f"{name}{dtype}" for name in beyond for dtype in ("", ", bfloat16", ", float16")}
        assert plain <= {each.id for each in scenarios(base)}
        for scenario in found:
            shape = scenario.subject.shape
            shape = shape[:2] if scenario.subject.op == "hadamard" else shape
            assert np.prod(shape) <= LARGEST_SIMULATED


def test_the_command_prints_a_table_and_its_exit_code_tells(capsys, tmp_path):
    done = command(capsys, "crosscheck", "--op", "hadamard", "--backend", "torch", "--json")
    assert done.code == 0
    found = done.json()
    assert found["ok"]
    assert [(each["op"], each["backend"]) for each in found["kernels"]] == [("hadamard", "torch")]
    plugin = tmp_path / "wrong.py"
    plugin.write_text(
        "from qframe import hookimpl\n"
        "from qframe_plugins.kernels import torch_ops\n\n\n"
        "@hookimpl\n"
        "def qframe_kernels():\n"
        "    [kernel] = [each for each in torch_ops.qframe_kernels() if each.op == 'hadamard']\n"
        "    function, kernel.backend = kernel.function, 'mine'\n"
        "    kernel.function = lambda x, signs, block: 2 * function(x, signs, block)\n"
        "    return [kernel]\n",
        encoding="utf-8",
    )
    words = ["crosscheck", "--op", "hadamard", "--backend", "mine", "--plugin", plugin]
    done = command(capsys, *words, "--save", tmp_path / "failures")
    assert done.code == 4
    assert "kernels: 0 of 1 hold" in done.out
    assert "furthest from float64: mine" in " ".join(done.out.split())
    assert list((tmp_path / "failures").rglob("*.py"))


def test_every_operation_is_in_the_table_of_the_host():
    host = Host.discover()
    kernels = [host.get("kernel", name) for name in host.names("kernel")]
    for backend in ("numba", "torch"):
        assert {each.op for each in kernels if each.backend == backend} == set(OPS)


def test_importing_the_command_is_light():
    code = "import sys, qframe_conformance.crosscheck_command; print({'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
