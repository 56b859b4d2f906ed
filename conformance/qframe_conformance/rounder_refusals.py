"""When a rounder may refuse a layer of a scheme that it declares, instead of rounding it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qframe import RoundingProblem, bounds
from qframe.certificates import group_ranges
from qframe.errors import HessianError, NonFiniteError, UncalibratedLayerError
from qframe.rounding import group_index

_LARGEST = {
    "float32": torch.finfo(torch.float32).max,
    "float16": torch.finfo(torch.float16).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
    "e8m0": 2.0**127,
    "e4m3": torch.finfo(torch.float32).max,  # of the product with the scale of the tensor
}


def justified(rounder: Any, problem: RoundingProblem, error: BaseException) -> str | None:
    """Return why a rounder may raise this error for this layer, or None where it may not."""
    if isinstance(error, UncalibratedLayerError):
        return "no token reached the layer" if problem.tokens == 0 else None
    if isinstance(error, HessianError):
        return "the Hessian is not positive definite" if _is_singular(problem) else None
    if isinstance(error, NonFiniteError):
        if not bool(torch.isfinite(problem.weight).all()):
            return "a weight is not finite"
        if rounder.needs and problem.scheme.scale_dtype == "float16":
            return "compensated weights may be too large for a float16 scale"
        if _overflows(problem):
            return "a minmax scale does not fit its dtype"
    return None


def _overflows(problem: RoundingProblem) -> bool:
    """Return whether a scale of the minmax rule may be too large for its dtype (B1.c)."""
    index = group_index(problem.weight.shape[1], problem.scheme)
    lo, hi = group_ranges(problem, index)
    ideal = bounds.ideal_scale(lo, hi, problem.grid, symmetric=problem.scheme.symmetric)
    dtype = problem.scheme.scale_dtype
    if problem.scheme.two_level and ideal.max(initial=0) > 0:
        ideal = bounds.tensor_scale(ideal.max())[1] * 448
    _, highest = bounds.scale_rule(ideal, "float32" if problem.scheme.two_level else dtype)
    return bool((highest > _LARGEST[dtype]).any())


def _is_singular(problem: RoundingProblem) -> bool:
    """Return whether a float32 Cholesky factorization of the Hessian may fail.

    It cannot where the least eigenvalue is above n gamma_{n+1} times the largest (Higham,
    theorem 10.7).
    """
    if "hessian" not in problem.statistics:
        return False
    hessian = problem.statistics["hessian"].double().numpy()
    if not np.isfinite(hessian).all():
        return True
    eigenvalues = np.linalg.eigvalsh(hessian)
    n = len(eigenvalues)
    return bool(eigenvalues[0] <= n * bounds.gamma(n + 1) * eigenvalues[-1])
