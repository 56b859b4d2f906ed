"""What kernels ask of memory, counted: bytes, sectors of 32 bytes, turns of the banks."""

import re

import numpy as np
import pytest

from qframe import KVScheme, Scheme, kernels
from qframe_conformance import (
    kernel_draws,
    kernel_draws_int8,
    kernel_draws_other,
)
from qframe_plugins.kernels.cuda.compile import ARCHS, compile_ptx
from qframe_plugins.kernels.cuda.device import PtxHost
from tests.cuda.extra import answer, need_extra, on

need_extra()

SECTORS, WAYS = 2, 1
"""What is allowed of the ideal, as docs/kernels.md says: sectors, and turns of the banks."""

W4, KV4 = Scheme(num_bits=4, group_size=128), KVScheme(num_bits=4, axis="channel", group_size=64)


def counted(op, operands, arch="sm_90"):
    """Return the kernels that a call launches, and their counters."""
    device = PtxHost(arch, check=False, count=True, runs=[])
    answer(on(device, op), operands)
    return [(name, run.counters) for name, run in device.runs]


def weight_only(tokens, rows, columns, scheme=W4):
    rng = np.random.default_rng(0)
    made = kernel_draws.weight(rng, scheme, rows, columns)
    return {"x": rng.normal(size=(tokens, columns)).astype(np.float32), **made}


def operands_of(op):
    """Return calls with operands of ordinary sizes, which are whole numbers of sectors."""
    rng = np.random.default_rng(0)
    if op == "dequantize":
        return [kernel_draws.weight(rng, W4, 4, 256)]
    if op == "linear_weight_only":
        return [weight_only(tokens, 64, 256) for tokens in (1, 4, 32)]
    if op == "linear_int8":
        return [kernel_draws_int8.codes(rng, tokens, 256, 64) for tokens in (4, 32)]
    if op == "linear_int8_groups":
        return [kernel_draws_int8.groups(rng, tokens, 256, 64, W4) for tokens in (4, 32)]
    if op == "linear_int8_outliers":
        return [kernel_draws_int8.outliers(rng, 128, 64, 1.0)]
    if op == "quantize_activations":
        return [kernel_draws_int8.activations(rng, 256)]
    if op == "hadamard":
        return [kernel_draws_other.hadamard(rng, 1024, 256)]
    if op == "rms_norm":
        return [kernel_draws_other.norm(rng, 256)]
    if op == "attention_rotary":
        return [kernel_draws_other.newest(rng, (4, 2), 128, 64, 0.125)]
    if op == "hessian_update":
        return [kernel_draws_other.moments(rng, 64, 128, whole=False)]
    pairs = ((KV4, KVScheme(num_bits=4)), (KVScheme(num_bits=4), KV4))
    return [kernel_draws_other.attention(rng, (2, 1), 128, 64, *pair) for pair in pairs]


@pytest.mark.parametrize("op", kernels.OPS)
def test_lanes_of_a_warp_ask_for_what_lies_side_by_side(op):
    for operands in operands_of(op):
        for name, counters in counted(op, operands):
            assert counters.accesses
            for access in counters.accesses:
                allowed = SECTORS if access.space == "global" else WAYS
                assert access.units <= allowed * access.least, (name, access)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_product_of_few_tokens_reads_each_byte_of_the_weight_once(arch, tokens):
    rows, columns = 64, 1024
    [(name, counters)] = counted("linear_weight_only", weight_only(tokens, rows, columns), arch)
    assert name == f"few_4_bits_{tokens}"
    assert counters.bytes_read[f"{name}_w"] == rows * columns // 2
    assert counters.bytes_written == {f"{name}_y": 4 * tokens * rows}
    vectors = [each for each in counters.accesses if "nc.v4" in each.instruction]
    assert {each.bytes // each.requests for each in vectors} == {32 * 16}  # all lanes, 128 bits


def test_a_tile_of_codes_is_read_once_and_multiplied_by_matrix_instructions():
    rng = np.random.default_rng(0)
    tokens, columns, rows = 32, 256, 64
    [(name, counters)] = counted("linear_int8", kernel_draws_int8.codes(rng, tokens, columns, rows))
    assert name == "multiply_tile"
    assert counters.bytes_read[f"{name}_w"] == rows * columns
    assert counters.bytes_read[f"{name}_x"] == tokens * columns
    products = sum(n for opcode, n in counters.instructions.items() if opcode.startswith("mma."))
    assert products == 32 * (tokens // 16) * (rows // 8) * (columns // 32)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("multiply_tile", ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "cp.async.cg")),
        ("multiply_few", ("dp4a.s32.s32", "ld.global.nc.v4")),
        ("few_4_bits_1", ("ld.global.nc.v4", "shfl.sync.bfly", "ld.shared.v4")),
        ("tile_4_bits", ("ld.global.nc.v4", "ld.shared.v4", "st.global.v4")),
        ("quantize_tokens", ("ld.global.nc.v4", "shfl.sync.bfly", "cvt.rni.s32.f32")),
        ("attend_piece", ("shfl.sync.bfly", "ex2.approx")),
    ],
)
def test_the_instructions_that_make_them_fast_are_there(arch, name, instructions):
    from qframe_plugins.kernels.cuda.sources import SOURCES

    [kernel] = [each for each in SOURCES if each.name == name]
    text = compile_ptx(kernel, arch)
    assert [each for each in instructions if not re.search(rf"\b{re.escape(each)}", text)] == []
