"""GPTQ on the CPU: codes from weights, feedback and scales.

Source: Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323, in the form of LDLQ (QuIP,
        arXiv:2307.13304), which is Babai's nearest plane: column i is rounded to the code
        nearest to t_i = w_i + sum_{j<i} (w_j - q_j) F_ij, F from cholesky.py.
Error:  the code of every weight is nearest to its float64 target given the codes before it, up to
        gamma_{n+3} (|w_i| + sum_j |w_j - q_j| |F_ij|)  +  sum_j |w_j - q_j| |F_ij - F64_ij|
        with n = i terms (docs/bounds.md, B3.b and B3.g).

The codes of a row depend on that row alone, not on threads or other rows (gptq_panel.py).
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.feedback import Feedback
from qframe_plugins.kernels.numba_cpu.gptq_panel import share_panels
from qframe_plugins.kernels.numba_cpu.scales import grid_of
from qframe_plugins.kernels.numba_cpu.simd import LANES
from qframe_plugins.kernels.numba_cpu.threads import share

_OWN: Final = ("C", "W")  # contiguous and writeable, so that there is one compiled variant

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


def solve_static(
    weight: Float32,
    feedback: Feedback,
    scale: Float32,
    zero_point: Int16,
    group_of_column: npt.NDArray[np.int32],
    qmin: int,
    qmax: int,
) -> Int16:
    """Return the GPTQ codes of a layer whose scales are given.

    weight            [rows, columns] float32, columns in processing order
    feedback          of the damped Hessian in the same order
    scale             [rows or 1, groups] float32, > 0
    zero_point        [rows or 1, groups] int16
    group_of_column   [columns] integers, the group of each column of `weight`
    codes             [rows, columns] int16: clip(rint(t / scale) + zero_point, qmin, qmax)

    Raises ValueError for operands that do not fit, and for numbers that are not finite.
    """
    rows, columns = _check_weight(weight, feedback, qmin, qmax)
    if scale.ndim != 2 or scale.shape[0] not in (1, rows) or scale.shape != zero_point.shape:
        raise ValueError(
            f"scale {scale.shape} and zero_point {zero_point.shape} do not fit {rows} rows"
        )
    if scale.dtype != np.float32 or zero_point.dtype != np.int16:
        raise ValueError(
            f"scale is {scale.dtype}, zero_point {zero_point.dtype}; give float32, int16"
        )
    if not ((scale > 0) & (scale < np.inf)).all():
        raise ValueError("a scale is not positive and finite")
    groups = np.require(group_of_column, np.int32, _OWN)
    if groups.shape != (columns,) or not ((groups >= 0) & (groups < scale.shape[1])).all():
        raise ValueError(f"group_of_column must name one of {scale.shape[1]} groups per column")
    scale = np.require(np.broadcast_to(scale, (rows, scale.shape[1])), requirements=_OWN)
    zero_point = np.require(np.broadcast_to(zero_point, scale.shape), requirements=_OWN)
    grid = (np.int64(qmin), np.int64(qmax), False, np.int64(0))
    return _solve(weight, feedback, grid, 0, False, groups, scale, zero_point)


def solve_dynamic(
    weight: Float32,
    feedback: Feedback,
    group_size: int,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    scale_dtype: str = "float32",
    observer: Literal["minmax", "mse"] = "minmax",
) -> tuple[Int16, Float32, Int16]:
    """Return (codes, scale, zero_point) of GPTQ with scales taken when a group begins.

    At the first column of a group its scale comes from the group's weights as compensated so
    far for all earlier columns, whatever the block size (the published loop uses stale weights
    when a group does not begin a block).

    weight        [rows, columns] float32, columns in processing order
    group_size    consecutive columns that share a scale; the last group may be smaller
    observer      the rule of scales.py: the range, or the shrunk range of least squared error
    codes         [rows, columns] int16;  scale float32 and zero_point int16 [rows, groups]

    A scale that overflows its dtype is returned as inf, for the caller to refuse: the codes of
    its row mean nothing from there on. Raises ValueError for anything else that is not finite.
    """
    rows, columns = _check_weight(weight, feedback, qmin, qmax)
    if group_size < 1:
        raise ValueError(f"group_size={group_size}; give a positive number")
    if observer not in ("minmax", "mse"):
        raise ValueError(f"unknown observer={observer!r}")
    grid = grid_of(qmin, qmax, symmetric=symmetric, scale_dtype=scale_dtype)
    group_size = min(group_size, columns)
    groups = np.arange(columns, dtype=np.int32) // np.int32(group_size)
    scale = np.empty((rows, groups[-1] + 1), np.float32)
    zero_point = np.empty(scale.shape, np.int16)
    mse = observer == "mse"
    codes = _solve(weight, feedback, grid, group_size, mse, groups, scale, zero_point)
    return codes, scale, zero_point


def _solve(
    weight: Float32,
    feedback: Feedback,
    grid: tuple[np.int64, np.int64, bool, np.int64],
    group_size: int,
    mse: bool,
    groups: npt.NDArray[np.int32],
    scale: Float32,
    zero_point: Int16,
) -> Int16:
    """Run `share_panels` and return the codes; scale and zero_point are read or written."""
    weight = np.require(weight, requirements=_OWN)
    codes = np.empty(weight.shape, np.int16)
    finite = np.ones(len(weight), np.bool_)
    share(
        share_panels,
        -(-len(weight) // LANES),
        weight,
        feedback.packed,
        grid,
        np.int64(group_size),
        mse,
        groups,
        scale,
        zero_point,
        codes,
        finite,
    )
    bad = np.flatnonzero(~finite)
    if len(bad) and not np.isfinite(weight[bad]).all():
        raise ValueError(f"weights are not finite, first in row {bad[0]}")
    if len(bad) and np.isfinite(scale[bad]).all():
        raise ValueError(f"compensated weights overflow float32, first in row {bad[0]}")
    return codes


def _check_weight(weight: Float32, feedback: Feedback, qmin: int, qmax: int) -> tuple[int, int]:
    """Return (rows, columns), or raise ValueError."""
    if weight.ndim != 2 or weight.shape[1] != feedback.columns:
        raise ValueError(f"weight {weight.shape} does not fit {feedback.columns} feedback columns")
    if weight.dtype != np.float32:
        raise ValueError(f"weight is {weight.dtype}; give float32")
    if not -(1 << 15) <= qmin < qmax < 1 << 15:
        raise ValueError(f"codes in [{qmin}, {qmax}] do not fit int16")
    return weight.shape
