"""Kernels are timed on operands that are those of their operation, all backends on the same."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qframe.kernel_speed as speed
from qframe.dispatch import Dispatch
from qframe.errors import RecipeError, UnsupportedError
from qframe.host import Host
from qframe.kernel_judges import judge
from qframe.kernel_speed import FULL, Sizes, Timed, measure
from qframe.kernels import ARITHMETICS, OPS
from tests.ran import command

SMALL = Sizes(rows=24, columns=40, tokens=3, group_size=16, context=70, heads=2, head_dim=8)
KERNELS = [Host.discover().get("kernel", name) for name in Host.discover().names("kernel")]

REFUSES = """
from qframe import Unsupported, hookimpl


class Never:
    op = "hadamard"
    backend = "never"
    priority = 99

    def supports(self, call):
        return Unsupported(f"not for {call.shape}")

    def __call__(self, x, signs, block):
        raise RuntimeError("called")


@hookimpl
def qframe_kernels():
    return [Never()]
"""


@pytest.fixture
def run(capsys):
    return lambda *arguments: command(capsys, "bench-kernels", *arguments)


@pytest.fixture(autouse=True)
def little_to_read(monkeypatch):
    monkeypatch.setattr(speed, "COLD", 1 << 12)


@given(
    st.sampled_from(list(OPS)),
    st.integers(1, 30),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(2, 8),
    st.sampled_from([1, 7, 16, 128]),
    st.integers(1, 150),
)
def test_operands_are_those_of_the_operation(op, rows, columns, tokens, bits, group, context):
    """A kernel that is right gives the right answer for them."""
    size = Sizes(
        rows=rows,
        columns=columns,
        tokens=tokens,
        num_bits=bits,
        group_size=group,
        context=context,
        heads=2,
        head_dim=8,
    )
    work = speed._WORKS[op](size, np.random.default_rng(0))
    assert len(work.call.shape) == len(OPS[op].call)
    kernel = Dispatch(KERNELS).choose(work.call)
    given = copy.deepcopy((*work.given, *work.constants))
    laid = kernel.prepare(*work.constants) if hasattr(kernel, "prepare") else None
    answer = kernel(*work.given, *([laid] if laid is not None else work.constants))
    if answer is None:
        answer = work.given[0]
    names = [operand.name for operand in OPS[op].operands]
    operands = {
        name: each.numpy() if isinstance(each, torch.Tensor) else each
        for name, each in zip(names, given, strict=True)
    }
    for operand in OPS[op].operands:
        if operand.is_tensor:
            assert str(operands[operand.name].dtype) == operand.dtype
    parts = answer if isinstance(answer, tuple) else (answer,)
    judged = judge(op, operands, tuple(each.numpy() for each in parts), ARITHMETICS["float32"])
    assert {theorem for theorem, each in judged.items() if not each.ratio <= 1} == set()


def test_bytes_are_those_that_are_stored():
    """Of 4 bits: half a byte for each weight, four for each scale."""
    size = Sizes(rows=64, columns=256, num_bits=4, group_size=128)
    for op in ("linear_weight_only", "linear_int8_groups"):
        work = speed._WORKS[op](size, np.random.default_rng(0))
        assert work.nbytes == 64 * 256 // 2 + 4 * 64 * 2
    work = speed._WORKS["linear_int8"](size, np.random.default_rng(0))
    assert work.nbytes == 64 * 256 + 4 * 64
    wide = Sizes(heads=2, head_dim=64, context=128, num_bits=4)
    work = speed._WORKS["attention_kv"](wide, np.random.default_rng(0))
    codes = 2 * 2 * 64 * 128 // 2  # keys and values
    assert work.nbytes == codes + 8 * 2 * (2 * 64 + 128)  # scale and offset


def test_all_backends_take_turns_and_the_first_is_that_of_auto():
    seen = {each.call.op: each for each in measure(KERNELS, None, [SMALL], rounds=2)}
    assert list(seen) == list(OPS)
    for timed in seen.values():
        auto = Dispatch(KERNELS).choose(timed.call).backend
        backends = {each.backend for each in KERNELS if each.op == timed.call.op}
        assert set(timed.shares) | set(timed.refused) == backends
        assert set(timed.times) - set(timed.shares) <= {FULL}
        assert all(len(each) == 2 and min(each) >= 0 for each in timed.times.values())
        assert timed.shares[auto] > 0
    assert FULL in seen["linear_int8"].times
    assert FULL in seen["attention_kv"].times
    assert FULL not in seen["hadamard"].times


class Listed:
    """A kernel that lists the weights that it is called with."""

    op, backend, called = "linear_weight_only", "listed", None

    def __init__(self):
        self.called = []

    def supports(self, call):
        return None

    def prepare(self, codes, *others):
        return codes

    def __call__(self, x, codes):
        self.called.append(codes)


def test_a_kernel_runs_on_another_weight_just_before_it_is_timed():
    """So its code is warm, and the weight is not."""
    kernel = Listed()
    list(measure([kernel], [kernel.op], [SMALL], rounds=2))
    first, *others = kernel.called
    assert [each is first for each in others] == [False, True] * 2
    assert not any(torch.equal(each, first) for each in others[::2])


def test_ratios_are_speeds():
    timed = Timed(call=None, times={"a": [1, 4], "b": [2, 8]}, shares={}, refused={})
    assert timed.over("a", "b") == 2
    assert timed.over("b", "a") == 0.5


def test_sizes_that_an_operation_does_not_depend_on_are_timed_once():
    sizes = [SMALL, Sizes(**{**{n: getattr(SMALL, n) for n in SMALL.__slots__}, "tokens": 9})]
    found = [each.call.op for each in measure(KERNELS, ["attention_kv", "hadamard"], sizes)]
    assert found == ["attention_kv", "hadamard", "hadamard"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"num_bits": 9}, r"num_bits must lie in 2\.\.8"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        Sizes(**change)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UnsupportedError, match="no operation 'matmul'"):
        list(measure(KERNELS, ["matmul"], [SMALL]))
    with pytest.raises(RecipeError, match="rounds must be at least 1"):
        list(measure(KERNELS, None, [SMALL], rounds=0))


# The command ------------------------------------------------------------------------------------

FEW = ("--shape", "24x40", "--context", "64", "--tokens", "2", "--rounds", "1")


def test_the_command_shows_every_backend(run):
    made = run("linear_int8", "hadamard", *FEW)
    assert made.code == 0, made.err
    for word in ("linear_int8", "hadamard", "numba", "torch", "2 tokens, 40 columns, 24 rows"):
        assert word in made.out
    record = run("linear_int8", *FEW, "--json").json()
    assert record["rounds"] == 1
    (found,) = record["found"]
    assert found["shape"] == {"tokens": 2, "columns": 40, "rows": 24}
    assert set(found["times"]) == {"numba", "torch", FULL}


def test_the_command_takes_kernels_of_a_file_and_says_why_one_does_not_serve(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(REFUSES)
    made = run("hadamard", *FEW, "--plugin", file)
    assert "never: not for (2, 40, 8)" in " ".join(made.out.split())
    assert run("hadamard", *FEW, "--plugin", file, "--json").json()["found"][0]["refused"]


def test_a_shape_that_is_none_is_refused(run):
    assert "expected ROWSxCOLUMNS" in run("--shape", "4096").err
    assert run("--shape", "0x8").code != 0
