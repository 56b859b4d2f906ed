"""What tests of kernels for GPUs share: the extra "cuda", which needs no GPU, and a call."""

import importlib.util

import pytest
import torch

from qframe import kernels
from qframe_plugins.kernels import cuda_ops


def need_extra():
    """Skip a module, and say why, where kernels cannot be compiled."""
    if importlib.util.find_spec("numba_cuda") is None:
        reason = 'numba-cuda is not installed: pip install "qframe[cuda]"'
        pytest.skip(reason, allow_module_level=True)


def on(device, op):
    """Return the kernel of an operation, as `device` launches it."""
    [kernel] = [each for each in cuda_ops.kernels_on(device) if each.op == op]
    return kernel


def answer(kernel, operands):
    """Return what a kernel makes of operands, as arrays."""
    op = kernels.op_of(kernel.op)
    given = [
        torch.from_numpy(operands[each.name].copy()) if each.is_tensor else operands[each.name]
        for each in op.operands
    ]
    made = kernels.run(kernel, given)
    if op.in_place:
        made = given[0]
    return [part.numpy() for part in (made if isinstance(made, tuple) else (made,))]
