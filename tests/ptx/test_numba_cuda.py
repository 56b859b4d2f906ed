"""Kernels that numba.cuda has compiled, beside the same Python compiled for the CPU.

It needs the extra "cuda", which has a compiler and needs no GPU, and is skipped without it.
"""

import importlib.util
import math
import os
import random
import re

import numba
import numpy as np
import pytest

from qframe_plugins.kernels.cuda.compile import text_of
from qframe_plugins.ptx_host import Fresh, Module, numba_arguments

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None,
    reason='numba-cuda is not installed: pip install "qframe[cuda]"',
)
ARCHES = [(8, 0), (9, 0), (10, 0)]
SEEDS = 400 if os.environ.get("QFRAME_TEST_PROFILE") == "nightly" else 24
ORDERS = ("forward", "reverse", "random")


@pytest.mark.parametrize("arch", ARCHES)
def test_a_tiled_product_of_bytes(arch):
    from numba import cuda, int8, int32, types

    def product(a, b, out, rows, columns, depth):
        left = cuda.shared.array((8, 9), int8)
        right = cuda.shared.array((8, 9), int8)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        row, column = cuda.blockIdx.y * 8 + y, cuda.blockIdx.x * 8 + x
        total = int32(0)
        for start in range(0, depth, 8):
            fits = start + x < depth
            left[y, x] = a[row, start + x] if row < rows and fits else int8(0)
            other = cuda.blockIdx.x * 8 + y
            right[y, x] = b[other, start + x] if other < columns and fits else int8(0)
            cuda.syncthreads()
            for k in range(8):
                total += int32(left[y, k]) * int32(right[x, k])
            cuda.syncthreads()
        if row < rows and column < columns:
            out[row, column] = total

    matrix, whole = types.int8[:, ::1], types.int32
    signature = types.void(matrix, matrix, types.int32[:, ::1], whole, whole, whole)
    kernel = Module.from_ptx(text_of(product, signature, arch)).kernel()
    rng = np.random.default_rng(0)
    for rows, columns, depth in ((8, 8, 8), (11, 17, 21), (1, 3, 40)):
        a, b = (rng.integers(-128, 128, (n, depth)).astype(np.int8) for n in (rows, columns))
        for order in ORDERS:
            out = np.zeros((rows, columns), np.int32)
            given = numba_arguments(a, b, Fresh(out), rows, columns, depth)
            grid = (-(-columns // 8), -(-rows // 8))
            assert kernel.launch(grid, (8, 8), *given, order=order).findings == ()
            assert out.tolist() == (a.astype(int) @ b.astype(int).T).tolist()


NAMES = {"a": "int32", "b": "int64", "c": "uint8", "d": "float32", "e": "float64", "g": "int8"}


def expression(rng, depth, kind):
    """Return a random Python expression of the kind: "i" for integers, "f" for floats."""
    if depth == 0 or rng.random() < 0.15:
        if kind == "i":
            return rng.choice(["a", "b", "c", "g", str(rng.randint(-9, 300))])
        return rng.choice(["d", "e", "np.float32(1.5)", "np.float32(-3.25)"])
    x, y = (f"({expression(rng, depth - 1, kind)})" for _ in range(2))
    test = rng.choice(["<", "<=", "==", "!=", ">"])
    if kind == "i":
        whole = rng.choice([3, 7, -5, 32])
        other = f"np.int64({x}) if {x} {test} {y} else np.int64({y})"
        plain = [f"{x} {op} {y}" for op in "+-*&|^"]
        plain += [f"{x} {op} {rng.randint(0, 20)}" for op in ("<<", ">>")]
        casts = ["int8", "uint8", "int16", "int32", "uint32", "int64"]
        plain += [f"{x} // {whole}", f"{x} % {whole}", f"-{x}", f"~{x}", other]
        return rng.choice([*plain, f"np.{rng.choice(casts)}({x})"])
    plain = [f"{x} {op} {y}" for op in "+-*/"] + [f"abs({x})", f"math.sqrt(abs({x}))"]
    plain += [f"{x} if {x} {test} {y} else {y}", f"np.float32({x})", f"np.float64({x})"]
    return rng.choice([*plain, f"np.float32({expression(rng, depth - 1, 'i')})"])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_expressions_have_the_same_bits_on_the_cpu(seed):
    from numba import cuda, types

    rng = random.Random(seed)
    kind = rng.choice("if")
    out_type = "int64" if kind == "i" else "float64"
    body = expression(rng, 4, kind)
    names = ", ".join(NAMES)
    source = f"def on_cpu({names}, out):\n    for i in range(out.size):\n"
    source += "        out[i] = one(" + ", ".join(f"{n}[i]" for n in NAMES) + ")\n"
    source += f"def one({names}):\n    return {body}\n"
    source += f"def on_gpu({names}, out):\n    i = cuda.grid(1)\n    if i < out.size:\n"
    source += "".join(f"        _{n} = {n}[i]\n" for n in NAMES)
    used = re.sub(r"\b([a-eg])\b", r"_\1", body)
    source += f"        out[i] = {used}\n"
    space = {"np": np, "math": math, "cuda": cuda}
    exec(source, space)  # the source is made here
    plain = numba.njit(error_model="numpy")
    space["one"] = plain(space["one"])
    draw = np.random.default_rng(seed)
    given = []
    for name in NAMES.values():
        if name.startswith("float"):
            values = (draw.standard_normal(256) * 10.0 ** draw.integers(-3, 4, 256)).astype(name)
            with np.errstate(all="ignore"):
                special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45], name)
            values[: special.size] = special
        else:
            ends = np.iinfo(name)
            values = draw.integers(ends.min, ends.max, 256, dtype=name, endpoint=True)
        given.append(values)
    expected, made = np.zeros(256, out_type), np.zeros(256, out_type)
    plain(space["on_cpu"])(*given, expected)
    signature = types.void(
        *(getattr(types, name)[::1] for name in NAMES.values()), getattr(types, out_type)[::1]
    )
    kernel = Module.from_ptx(text_of(space["on_gpu"], signature, (8, 0))).kernel()
    assert kernel.launch(2, 128, *numba_arguments(*given, Fresh(made))).findings == ()
    same = (made == expected) | (np.isnan(made) & np.isnan(expected))
    assert same.all(), (body, made[~same][:3], expected[~same][:3])
