"""ptx_host beside numba-cuda's own simulator: the same kernel, the same shape, in turn.

    python benchmarks/simulator.py --rounds 3

Prints ratios of medians and nothing else of time. The simulator runs in a process of its own, as
numba.cuda is either the one or the other. It needs the extra "cuda", and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np

TILE = 16
SIZES = (64, 256)


def product(a, b, out, size):  # type: ignore[no-untyped-def]
    """Codes of eight bits, [size, size] twice, in tiles of shared memory."""
    left = cuda.shared.array((16, 17), int8)
    right = cuda.shared.array((16, 17), int8)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    row, column = cuda.blockIdx.y * 16 + y, cuda.blockIdx.x * 16 + x
    other = cuda.blockIdx.x * 16 + y
    total = int32(0)
    for start in range(0, size, 16):
        left[y, x] = a[row, start + x]
        right[y, x] = b[other, start + x]
        cuda.syncthreads()
        for k in range(16):
            total += int32(left[y, k]) * int32(right[x, k])
        cuda.syncthreads()
    out[row, column] = total


def operands(size: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(size)
    a, b = (rng.integers(-128, 128, (size, size)).astype(np.int8) for _ in range(2))
    return a, b, np.zeros((size, size), np.int32)


def grid(size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (size // TILE, size // TILE), (TILE, TILE)


def simulated() -> None:
    """Answer each line on stdin with the seconds of one launch."""
    kernel = cuda.jit(product)
    for line in sys.stdin:
        size = int(line)
        a, b, out = operands(size)
        began = time.perf_counter()
        kernel[grid(size)](a, b, out, size)
        seconds = time.perf_counter() - began
        right = out.tolist() == (a.astype(int) @ b.astype(int).T).tolist()
        sys.stdout.write(json.dumps({"seconds": seconds, "right": right}) + "\n")
        sys.stdout.flush()


def on_host(size: int, kernel: Any, *, check: bool) -> float:
    from qframe_plugins.ptx_host import Fresh, numba_arguments

    a, b, out = operands(size)
    given = numba_arguments(a, b, Fresh(out), size)
    began = time.perf_counter()
    kernel.launch(*grid(size), *given, check=check)
    seconds = time.perf_counter() - began
    if out.tolist() != (a.astype(int) @ b.astype(int).T).tolist():
        raise SystemExit(f"ptx_host is wrong for {size}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    from qframe_plugins.ptx_host import Module

    matrix = types.int8[:, ::1]
    signature = types.void(matrix, matrix, types.int32[:, ::1], types.int32)
    text, _ = cuda.compile(product, signature, cc=(8, 0), device=False, abi="numba", output="ptx")
    kernel = Module.from_ptx(text).kernel()
    child = subprocess.Popen(
        [sys.executable, __file__, "--simulated"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
    )
    for check in (True, False):
        on_host(64, kernel, check=check)  # translated, and not timed
    times: dict[str, list[float]] = {"simulator 64": []}
    for _ in range(rounds):
        child.stdin.write("64\n")
        child.stdin.flush()
        told = json.loads(child.stdout.readline())
        wrong = "" if told["right"] else " (and its answer is wrong)"
        times["simulator 64"].append(told["seconds"])
        for size in SIZES:
            for check in (False, True):
                name = f"ptx_host {size}^3{', checked' if check else ''}"
                times.setdefault(name, []).append(on_host(size, kernel, check=check))
    child.stdin.close()
    child.wait()
    middle = {name: median(found) for name, found in times.items()}
    print(f"the simulator's time for 64^3{wrong} over that of ptx_host, medians of {rounds} rounds")
    for name, seconds in middle.items():
        if name != "simulator 64":
            print(f"{name:24} {middle['simulator 64'] / seconds:10.1f}")


if __name__ == "__main__":
    from numba import cuda, int8, int32, types

    if sys.argv[1:] == ["--simulated"]:
        simulated()
    else:
        main()
