"""Tensors as PyTorch's kernels must have them in memory."""

from __future__ import annotations

import torch


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose strides are those of its shape, also where a size is 1.

    There `contiguous` leaves any stride as it is. torch._int_mm reads it as the length of a row:
    what comes out is then not even written (pytorch/pytorch#195066). And no words of such a tensor
    can be looked at as bytes.
    """
    if min(tensor.shape) > 1:
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)
