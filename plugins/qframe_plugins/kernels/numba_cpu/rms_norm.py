"""RMS norms: `rms_norm`.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, arXiv:1910.07467.
Error:  docs/bounds.md, B13.a. Squares are added in float64, which holds each without error; what
        they come to is rounded to float32 once, and then two products are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qframe_plugins.kernels.numba_cpu.simd import claim, kernel
from qframe_plugins.kernels.numba_cpu.threads import share, worth_sharing
from qframe_plugins.kernels.numba_cpu.vectors import FLOAT32, INT64, Vectors

_LANES = 16
_TOKENS = 8  # of a task

Float32 = npt.NDArray[np.float32]


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Return weight x / sqrt(mean(x^2) + eps), token by token, [tokens, columns] float32.

    x        [tokens, columns] float32
    weight   [columns] float32
    """
    y = np.empty(x.shape, np.float32)
    tasks = worth_sharing(-(-len(x) // _TOKENS), x.nbytes + y.nbytes, 0)
    share(_share_tokens, tasks, np.ascontiguousarray(x), np.ascontiguousarray(weight), eps, y)
    return y


@intrinsic
def _squares(typing: Any, x: Any, token: Any, count: Any) -> Any:
    """Return the sum of the squares of a token's first numbers, whole registers, in float64."""
    signature = types.float64(x, types.int64, types.int64)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = Vectors(context, builder)
        at, (_, columns) = v.array(signature.args[0], values[0])
        at = v.at(at, builder.mul(builder.mul(values[1], columns), INT64(4)))
        wide = ir.VectorType(ir.DoubleType(), _LANES)
        passes = builder.sdiv(values[2], INT64(_LANES))
        with v.loop(passes, [v.const(wide, 0.0)]) as loop:
            here = v.at(at, builder.mul(loop.index, INT64(4 * _LANES)))
            number = builder.fpext(v.load(here, ir.VectorType(FLOAT32, _LANES)), wide)
            loop.hand_on([builder.fadd(loop.values[0], builder.fmul(number, number))])
        return v.total(loop.values[0])

    return signature, emit


@kernel
def _share_tokens(counter, x, weight, eps, y):  # type: ignore[no-untyped-def]
    """Claim tokens, some at a time."""
    tokens, columns = x.shape
    whole = columns // _LANES * _LANES
    first = claim(counter) * _TOKENS
    while first < tokens:
        for token in range(first, min(first + _TOKENS, tokens)):
            total = _squares(x, token, whole)
            for column in range(whole, columns):
                total += np.float64(x[token, column]) * np.float64(x[token, column])
            factor = np.float32(1 / np.sqrt(total / columns + eps))
            for column in range(columns):
                y[token, column] = x[token, column] * factor * weight[column]
        first = claim(counter) * _TOKENS
