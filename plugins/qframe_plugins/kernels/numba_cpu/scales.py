"""Scale and zero point of one group, as jitted functions for the solvers.

The twin of `scale_of_range` and `fit_scales` in qframe/rounding.py, operation by operation in
float32, so that both give the same bits:

    symmetric    scale = max(|lo|, |hi|) / ((qmax - qmin) / 2),  zero point 0
    asymmetric   scale = (max(hi, 0) - min(lo, 0)) / (qmax - qmin),
                 zero point = clip(rint(qmin - lo / scale), qmin, qmax)

A scale is rounded up to the dtype it is stored in before the zero point is taken, so storing it
never clips a weight. A group that is not all zero has a positive scale; an all-zero one has 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qframe_plugins.kernels.numba_cpu.simd import LANES, kernel

# Codes of the storage dtype of a scale.
SCALE_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}

CANDIDATES = 80  # of the mse search: the range shrunk by k percent, k = 0..79

_INFINITY = 0x7F800000  # bit patterns of float32
_HALF_NORMAL = (127 - 14) << 23  # the smallest normal float16
_HALF_LARGEST = ((127 + 15) << 23) | (0x3FF << 13)  # 65504


def grid_of(
    qmin: int, qmax: int, *, symmetric: bool, scale_dtype: str
) -> tuple[np.int64, np.int64, bool, np.int64]:
    """Return codes, rule and scale dtype as kernels take them. Raises ValueError."""
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"unknown scale_dtype={scale_dtype!r}")
    return np.int64(qmin), np.int64(qmax), bool(symmetric), np.int64(SCALE_DTYPES[scale_dtype])


def check_groups(shape: tuple[int, ...], group_size: int, *per_group: npt.NDArray[Any]) -> None:
    """Raise ValueError unless each array has one number for every group of a layer.

    shape   of the layer, (rows, columns)
    """
    rows, columns = shape
    if group_size < 1:
        raise ValueError(f"group_size={group_size}; give a positive number")
    wanted = (rows, -(-columns // group_size))
    for each in per_group:
        if each.shape != wanted:
            raise ValueError(
                f"scales and zero points must be {list(wanted)}, one for each group, got "
                f"{list(each.shape)}"
            )


@kernel
def round_up(scale, scale_dtype):  # type: ignore[no-untyped-def]
    """Return the least number of the storage dtype that is >= scale (float32, >= 0), or inf.

    Integer arithmetic on the bit pattern, which no rounding or flush-to-zero mode can change.
    """
    bits = np.int64(np.float32(scale).view(np.int32))
    if scale_dtype == 0 or bits >= _INFINITY or bits == 0:
        return np.float32(scale)
    if scale_dtype == 2:
        # Subnormals included: 16 bits of the pattern go, and the rest counts up past inf.
        return np.int32((bits + 0xFFFF) & ~0xFFFF).view(np.float32)
    if bits >= _HALF_NORMAL:
        up = (bits + 0x1FFF) & ~0x1FFF
        return np.int32(_INFINITY if up > _HALF_LARGEST else up).view(np.float32)
    # Below 2^-14 float16 has the multiples of 2^-24: divide 1.f * 2^(exponent - 127) by that.
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | (0x800000 if exponent > 0 else 0)
    shift = min(np.int64(126) - max(exponent, np.int64(1)), np.int64(40))
    steps = (mantissa + (np.int64(1) << shift) - 1) >> shift
    return np.float32(steps) * np.float32(2.0**-24)


@kernel
def group_scale(lo, hi, qmin, qmax, symmetric, scale_dtype):  # type: ignore[no-untyped-def]
    """Return (scale, zero point), both float32, of a group with values in [lo, hi] (float32).

    qmin, qmax    the integer range of the codes
    symmetric     bool: which rule
    scale_dtype   a value of SCALE_DTYPES
    """
    steps = np.float32(qmax - qmin)
    if symmetric:
        extent = max(abs(np.float32(lo)), abs(np.float32(hi)))
        scale = extent / (steps / np.float32(2))
    else:
        lo, hi = min(np.float32(lo), np.float32(0)), max(np.float32(hi), np.float32(0))
        extent = hi - lo
        scale = extent / steps
    scale = round_up(scale, scale_dtype)
    if scale == 0:
        # Either the group is zero, or its scale underflowed and takes the smallest number.
        smallest = np.int32(1).view(np.float32)
        if scale_dtype == 1:
            smallest = np.float32(2.0**-24)
        elif scale_dtype == 2:
            smallest = np.int32(1 << 16).view(np.float32)
        scale = smallest if extent > 0 else np.float32(1)
    if symmetric:
        return scale, np.float32(0)
    zero = np.rint(np.float32(qmin) - np.float32(lo) / scale)
    return scale, min(max(zero, np.float32(qmin)), np.float32(qmax))


@kernel
def panel_scale(w, first, count, grid, mse, scale, zero):  # type: ignore[no-untyped-def]
    """Set scale and zero [LANES] of the group w[first..first + count, LANES].

    grid   (qmin, qmax, symmetric, scale_dtype), as in `group_scale`
    mse    False: from the range of the group. True: from the shrunk range whose rounding error
           sum (w - value)^2 is least, float32 terms added in float64 in column order; of equal
           candidates the widest wins
    """
    qmin, qmax = np.float32(grid[0]), np.float32(grid[1])
    lo, hi = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    trial, trial_zero = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    error, best = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    for lane in range(LANES):
        lo[lane] = hi[lane] = w[first, lane]
    for row in range(first + 1, first + count):
        for lane in range(LANES):
            lo[lane] = min(lo[lane], w[row, lane])
            hi[lane] = max(hi[lane], w[row, lane])
    for k in range(CANDIDATES if mse else 1):
        shrink = np.float32(1 - k / 100)
        for lane in range(LANES):
            trial[lane], trial_zero[lane] = group_scale(
                lo[lane] * shrink, hi[lane] * shrink, grid[0], grid[1], grid[2], grid[3]
            )
            error[lane] = 0
        for row in range(first, first + count if mse else first):
            for lane in range(LANES):
                code = np.rint(w[row, lane] / trial[lane]) + trial_zero[lane]
                code = min(max(code, qmin), qmax)
                gap = w[row, lane] - trial[lane] * (code - trial_zero[lane])
                error[lane] += np.float64(gap * gap)
        for lane in range(LANES):
            if k == 0 or error[lane] < best[lane]:
                best[lane] = error[lane]
                scale[lane], zero[lane] = trial[lane], trial_zero[lane]
