"""CUDA C++ that NVRTC has compiled: functions, structures, warps, and what becomes of them.

NVRTC comes with the extra "cuda" and needs no GPU; without it this is skipped.
"""

import importlib.util
import struct

import numpy as np
import pytest

from qframe_plugins.ptx_host import Fresh, Module

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason='NVRTC is not installed: pip install "qframe[cuda]"',
)
ARCHES = ("compute_80", "compute_90", "compute_100")
ORDERS = ("forward", "reverse", "random")

CALLS = """
struct Table { int a[5]; float b; };
__device__ __noinline__ float scaled(float x, float y) { return x * y + 1.0f; }
__device__ __noinline__ int neighbour(int a, int* out) {
    out[threadIdx.x] = a; __syncthreads(); return out[(threadIdx.x + 1) % blockDim.x];
}
extern "C" __global__ void k(float* x, int* y, Table table, long long q) {
    __shared__ int tile[32];
    int i = threadIdx.x;
    int next = neighbour(i * table.a[i % 5], tile);
    y[i] = next + __popcll(q) + __clz(i) + __ffs(i) + (int)(q / (i + 1)) + (int)(q % (i + 3));
    x[i] = scaled(x[i], table.b);
}
"""
WARPS = """
extern "C" __global__ void k(int* x, unsigned* y) {
    int i = threadIdx.x, v = x[i];
    for (int d = 16; d; d >>= 1) v += __shfl_down_sync(0xffffffffu, v, d);
    unsigned same = __match_any_sync(0xffffffffu, i & 3);
    int sum = __reduce_add_sync(0xffffffffu, i), few = __syncthreads_count(i < 5);
    if (i & 1) y[i] = __activemask(); else y[i] = same;
    if (i == 0) { x[0] = v + sum + few; atomicMax(&x[32], 50); atomicCAS(&x[33], 33, 7); }
}
"""


def kernel_of(source, arch):
    from cuda.bindings import nvrtc

    def call(function, *given):
        status, *made = function(*given)
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, (function.__name__, status)
        return made[0] if made else None

    program = call(nvrtc.nvrtcCreateProgram, source.encode(), b"kernel.cu", 0, [], [])
    options = [f"--gpu-architecture={arch}".encode(), b"-lineinfo"]
    call(nvrtc.nvrtcCompileProgram, program, len(options), options)
    text = b" " * call(nvrtc.nvrtcGetPTXSize, program)
    call(nvrtc.nvrtcGetPTX, program, text)
    return Module.from_ptx(text.decode().rstrip("\0")).kernel()


@pytest.mark.parametrize("arch", ARCHES)
def test_functions_and_structures(arch):
    kernel, q, table = kernel_of(CALLS, arch), 12345678901, [1, 2, 3, 4, 5]
    expected = []
    for i in range(32):
        after = (i + 1) % 32
        total = after * table[after % 5] + q.bit_count() + 32 - i.bit_length()
        total += (i & -i).bit_length() + q // (i + 1) + q % (i + 3)
        expected.append((total + 2**31) % 2**32 - 2**31)
    for order in ORDERS:
        x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.int32)
        run = kernel.launch(1, 32, x, Fresh(y), struct.pack("5if", *table, 0.5), q, order=order)
        assert run.findings == ()
        assert y.tolist() == expected
        assert x.tolist() == [i / 2 + 1 for i in range(32)]


@pytest.mark.parametrize("arch", ARCHES)
def test_operations_of_warps(arch):
    kernel = kernel_of(WARPS, arch)
    for order in ORDERS:
        x, y = np.arange(34, dtype=np.int32), np.zeros(32, np.uint32)
        assert kernel.launch(1, 32, x, Fresh(y), order=order).findings == ()
        assert [x[0], x[32], x[33]] == [sum(range(32)) * 2 + 5, 50, 7]
        odd = sum(1 << i for i in range(1, 32, 2))
        assert y.tolist() == [odd if i & 1 else 0x11111111 << (i & 3) for i in range(32)]


@pytest.mark.parametrize("arch", ARCHES)
def test_a_finding_names_the_line_of_the_source(arch):
    source = WARPS.replace("y[i] = same;", "y[i + 40] = same;")
    line = 1 + source[: source.index("y[i + 40]")].count("\n")
    x, y = np.arange(34, dtype=np.int32), np.zeros(32, np.uint32)
    [found] = kernel_of(source, arch).launch(1, 32, x, y).findings
    assert found.kind == "out-of-bounds"
    assert found.place.endswith(f"(kernel.cu:{line})")
