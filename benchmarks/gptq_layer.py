"""GPTQ of one layer: qframe's numba solver against the paper's algorithm in PyTorch.

    python benchmarks/gptq_layer.py                        # 4096 x 4096, group 128, 4 bits
    python benchmarks/gptq_layer.py --rows 1536 --columns 576 --threads 1

Timed, the contenders in turn in one process: factorization + column loop from a damped Hessian
to codes, and X^T X. A ratio is taken per pair, the median is shown. Wall clock and all threads,
or with --threads 1 the CPU time of one, which means something on a busy machine too.

Checked on the same layer: how many codes equal those of the algorithm in float64; and for every
single code that it is nearest to its float64 target given the codes before it, up to the rounding
allowance of docs/bounds.md (B3.b, B3.g). The figure is (|q - t| - scale / 2) / allowance, which
must not exceed 1 where the allowance is computed, not tuned.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numba
import numpy as np
import torch

from qframe_plugins.kernels.numba_cpu import cholesky, gptq, hessian

U = 2.0**-24  # unit roundoff of float32


def paper_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, block_size: int, qmax: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes, scale, zero_point) by algorithm 1 of arXiv:2210.17323, asymmetric.

    Any float dtype. Scales come from the up-to-date weights, which in the published loop holds
    when every group starts a block: group_size is a multiple of block_size.
    """
    columns = weight.shape[1]
    weight = weight.clone()
    lower = torch.linalg.cholesky(hessian)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = weight[:, start:stop].clone()
        square = inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if (start + i) % group_size == 0:
                group = weight[:, start + i : start + i + group_size]
                lo, hi = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (hi - lo) / qmax
                scale[scale == 0] = 1
                zero = (-lo / scale).round().clamp(0, qmax)
                scales.append(scale)
                zeros.append(zero)
            column = block[:, i]
            code = ((column / scale).round() + zero).clamp(0, qmax)
            error = (column - scale * (code - zero)) / square[i, i]
            block[:, i:] -= error.unsqueeze(1) * square[i, i:].unsqueeze(0)
            codes[:, start + i] = code
            errors[:, i] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def feedback64(hessian: np.ndarray) -> np.ndarray:
    """Return the feedback matrix in float64, by LAPACK: Cholesky of the matrix turned around."""
    upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return np.tril((upper / np.diag(upper)).T, -1)


def worst_excess(
    weight: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    feedback: np.ndarray,
    exact: np.ndarray,
    group_size: int,
    qmax: int,
) -> float:
    """Return the worst (|q - t| - scale / 2) / allowance; <= 1 proves every code nearest."""
    columns = weight.shape[1]
    group = np.arange(columns) // group_size
    steps = codes - zero_point[:, group].astype(np.float32)
    value = (scale[:, group] * steps).astype(np.float64)
    delta = weight.astype(np.float64) - value
    excess = value - weight - delta @ exact.T
    # At an end code the target may lie anywhere beyond.
    sign = np.where(codes == qmax, excess, np.where(codes == 0, -excess, np.abs(excess)))
    excess = sign - scale[:, group].astype(np.float64) / 2
    np.abs(delta, out=delta)
    operations = np.arange(columns) + 3
    gamma = operations * U / (1 - operations * U)
    allowance = gamma * (np.abs(weight) + delta @ np.abs(feedback).T.astype(np.float64))
    allowance += delta @ np.abs(feedback - exact).T
    return float((excess / allowance).max())


def race(pairs: int, ours: Callable[[], object], theirs: Callable[[], object]) -> str:
    """Run both in turn and return the medians of the times and of the ratio."""
    clock = time.process_time if numba.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(pairs):
        start = clock()
        ours()
        middle = clock()
        theirs()
        times.append((middle - start, clock() - middle))
    ratios = sorted(theirs / ours for ours, theirs in times)
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    return (
        f"qframe {mine:.3f} s, torch {other:.3f} s, ratio {statistics.median(ratios):.2f} "
        f"(median of {pairs} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128, help="of the PyTorch loop")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of the X^T X race")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=numba.get_num_threads())
    parser.add_argument("--precision", choices=("float64", "float32"), default="float64")
    parser.add_argument("--skip-check", action="store_true", help="time only")
    args = parser.parse_args()
    if args.group_size % args.block_size:
        parser.error("--group-size must be a multiple of --block-size: else torch's scales differ")
    numba.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    qmax = (1 << args.bits) - 1

    generator = torch.Generator().manual_seed(0)
    spread = 1 + 3 * torch.rand(args.columns, generator=generator)
    x = torch.randn(args.columns + 256, args.columns, generator=generator) * spread
    weight = 0.05 * torch.randn(args.rows, args.columns, generator=generator)
    moments = np.zeros((args.columns, args.columns))
    hessian.accumulate(moments, x.numpy())
    hessian.symmetrize(moments)
    damped = torch.from_numpy(moments * (2 / len(x)))
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    damped32, damped64 = damped.float(), damped.numpy()

    def ours() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        factor = cholesky.feedback(damped64, args.precision)
        return gptq.solve_dynamic(weight.numpy(), factor, args.group_size, 0, qmax, symmetric=False)

    def theirs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return paper_gptq(weight, damped32, args.group_size, args.block_size, qmax)

    codes, scale, zero_point = ours()  # compiles
    print(
        f"{args.rows} x {args.columns}, group {args.group_size}, {args.bits} bits asymmetric, "
        f"factorization in {args.precision}, {args.threads} threads"
    )
    print("factor + solve:", race(args.pairs, ours, theirs))
    tokens = torch.randn(args.tokens, args.columns, generator=generator)
    sums64, sums32 = np.zeros_like(moments), torch.zeros_like(damped32)
    hessian.accumulate(sums64, tokens.numpy())
    print(
        f"X^T X of {args.tokens} tokens:",
        race(
            args.pairs,
            lambda: hessian.accumulate(sums64, tokens.numpy()),
            lambda: sums32.addmm_(tokens.T, tokens),
        ),
    )
    if args.skip_check:
        return
    reference = paper_gptq(weight.double(), damped, args.group_size, args.block_size, qmax)[
        0
    ].numpy()
    same_torch = float((theirs()[0].numpy() == reference).mean())
    print(
        f"codes equal to float64's: qframe {float((codes == reference).mean()):.6f}, "
        f"torch float32 {same_torch:.6f}"
    )
    factor = cholesky.feedback(damped64, args.precision).dense()
    exact = feedback64(damped64)
    worst = worst_excess(
        weight.numpy(), codes, scale, zero_point, factor, exact, args.group_size, qmax
    )
    verdict = "proved nearest, every code" if worst <= 1 else "NOT PROVED"
    print(f"worst (|q - t| - scale/2) / allowance = {worst:.3g}: {verdict}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
