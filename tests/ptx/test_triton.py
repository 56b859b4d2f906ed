"""Kernels that Triton has compiled, on ptx_host, beside NumPy.

Triton needs no GPU to compile; where it is not installed this is skipped: pip install triton
"""

import importlib.util
import sys

import numpy as np
import pytest

from qframe import bounds
from qframe_plugins.ptx_host import Fresh, Module

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install triton",
)
ORDERS = ("forward", "reverse", "random")
SOURCE = """
import triton
import triton.language as tl


@triton.jit
def nibbles(packed, scale, out, count, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = place < count
    byte = tl.load(packed + place // 2, mask=inside, other=0).to(tl.int32)
    code = (byte >> ((place % 2) * 4)) & 15
    step = tl.load(scale + place // GROUP, mask=inside, other=0.0)
    tl.store(out + place, (code - 8).to(tl.float32) * step, mask=inside)


@triton.jit
def product(x, w, out, tokens, rows, columns, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    token = tl.program_id(0) * T + tl.arange(0, T)
    row = tl.program_id(1) * R + tl.arange(0, R)
    total = tl.zeros((T, R), tl.int32)
    for first in range(0, columns, K):
        column = first + tl.arange(0, K)
        inside = column < columns
        left = tl.load(x + token[:, None] * columns + column[None, :],
                       mask=(token < tokens)[:, None] & inside[None, :], other=0)
        right = tl.load(w + row[None, :] * columns + column[:, None],
                        mask=(row < rows)[None, :] & inside[:, None], other=0)
        total += tl.dot(left, right, out_dtype=tl.int32)
    tl.store(out + token[:, None] * rows + row[None, :], total,
             mask=(token < tokens)[:, None] & (row < rows)[None, :])


@triton.jit
def largest(x, out, columns, WIDTH: tl.constexpr):
    place = tl.arange(0, WIDTH)
    number = tl.load(x + tl.program_id(0) * columns + place, mask=place < columns, other=0.0)
    tl.store(out + tl.program_id(0), tl.max(tl.abs(number), 0))


@triton.jit
def total(x, out, columns, WIDTH: tl.constexpr):
    place = tl.arange(0, WIDTH)
    number = tl.load(x + tl.program_id(0) * columns + place, mask=place < columns, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(number, 0))
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return what compiles a kernel: (name, types, constants, arch) -> launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    (tmp_path / "triton_kernels.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "triton_kernels", raising=False)
    import triton
    import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_(name, types, constants, arch):
        types = {**types, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(getattr(triton_kernels, name), types, constants)
        target = GPUTarget("cuda", arch, 32)
        made = triton.compile(source, target=target, options={"num_warps": 4})
        kernel = Module.from_ptx(made.asm["ptx"]).kernel(name)

        def launch(grid, *given, order):
            unused = [np.zeros(1, np.uint8), np.zeros(1, np.uint8)]
            shared = made.metadata.shared
            run = kernel.launch(grid, 128, *given, *unused, shared_bytes=shared, order=order)
            assert run.findings == ()

        return launch

    return compile_


@pytest.mark.parametrize("arch", [80, 90])
def test_weights_of_four_bits(compiled, arch):
    types = {"packed": "*u8", "scale": "*fp32", "out": "*fp32", "count": "i32"}
    launch = compiled("nibbles", types, {"GROUP": 32, "WIDTH": 256}, arch)
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, 1000), rng.random(32).astype(np.float32)
    packed = (codes[::2] | codes[1::2] << 4).astype(np.uint8)
    expected = (codes - 8).astype(np.float32) * scale[np.arange(1000) // 32]
    for order in ORDERS:
        out = np.zeros(1000, np.float32)
        launch(4, packed, scale, Fresh(out), 1000, order=order)
        assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("arch", [80])
def test_products_of_bytes_on_matrix_units(compiled, arch):
    names = ("tokens", "rows", "columns")
    types = {"x": "*i8", "w": "*i8", "out": "*i32", **dict.fromkeys(names, "i32")}
    launch = compiled("product", types, {"T": 32, "R": 32, "K": 32}, arch)
    rng = np.random.default_rng(0)
    for tokens, rows, columns in ((32, 32, 32), (33, 35, 67), (1, 70, 5)):
        x, w = (rng.integers(-128, 128, (n, columns)).astype(np.int8) for n in (tokens, rows))
        for order in ORDERS:
            out = np.zeros((tokens, rows), np.int32)
            grid = (-(-tokens // 32), -(-rows // 32))
            launch(grid, x, w, Fresh(out), tokens, rows, columns, order=order)
            assert out.tolist() == (x.astype(int) @ w.astype(int).T).tolist()


@pytest.mark.parametrize("arch", [80, 90])
def test_reductions_over_warps(compiled, arch):
    types = {"x": "*fp32", "out": "*fp32", "columns": "i32"}
    most = compiled("largest", types, {"WIDTH": 512}, arch)
    both = compiled("total", types, {"WIDTH": 512}, arch)
    x = np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)
    allowed = bounds.accumulate(np.abs(x.astype(float)).sum(1), 512)
    for order in ORDERS:
        out = np.zeros(3, np.float32)
        most(3, x, Fresh(out), 300, order=order)
        assert out.tolist() == np.abs(x).max(1).tolist()
        both(3, x, Fresh(out), 300, order=order)
        assert (np.abs(out - x.astype(float).sum(1)) <= allowed).all()
