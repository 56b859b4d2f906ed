"""Operands of kernels as tensors that are awkward in memory: strided, transposed, inside poison.

A kernel may be given any strides. Around the numbers of an operand lies poison: NaN beside floats,
the largest integer beside integers. Who reads there gets it into the answer, who writes there is
found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LAYOUTS = ("packed", "transposed", "strided")
MARGIN = 13  # numbers of poison before and after; odd, so that no vector is aligned


@dataclass(eq=False, slots=True)
class Frame:
    """A tensor, the buffer around it, and what the buffer held at first.

    tensor   a view into buffer
    """

    tensor: torch.Tensor
    buffer: torch.Tensor
    before: bytes

    def unchanged(self) -> bool:
        """Return whether every bit of the buffer is as it was."""
        return _bits(self.buffer) == self.before

    def restore(self, changed: torch.Tensor) -> None:
        """Take what was changed on purpose into `before`; `changed` is a mask on the tensor."""
        now = self.tensor.clone()
        held = self.buffer.clone()
        flat = np.frombuffer(self.before, held.cpu().numpy().dtype).copy()
        self.buffer.copy_(torch.from_numpy(flat))
        self.tensor.copy_(torch.where(changed, now, self.tensor))
        self.before = _bits(self.buffer)
        self.buffer.copy_(held)


def _bits(buffer: torch.Tensor) -> bytes:
    return buffer.cpu().view(torch.uint8).numpy().tobytes()


def frame(
    array: np.ndarray[Any, Any], layout: str, device: str = "cpu", dtype: str | None = None
) -> Frame:
    """Return an array as a tensor inside poison.

    dtype    of the tensor, in torch's words; None: the array's
    layout   "packed": C-contiguous. "transposed": Fortran order. "strided": every second number of
             rows that lie apart
    """
    shape = array.shape
    if layout == "strided":
        pitches = [2]
        for size in reversed(shape[1:]):
            pitches.append(pitches[-1] * max(size, 1) + 3)
        strides = tuple(reversed(pitches[: len(shape)]))
    else:
        order = range(len(shape)) if layout == "transposed" else reversed(range(len(shape)))
        steps, step = dict[int, int](), 1
        for axis in order:
            steps[axis] = step
            step *= max(shape[axis], 1)
        strides = tuple(steps[axis] for axis in range(len(shape)))
    extent = 1 + sum(s * max(n - 1, 0) for s, n in zip(strides, shape, strict=True))
    buffer = np.full(extent + 2 * MARGIN, _poison(array.dtype), array.dtype)
    whole = torch.from_numpy(buffer)
    whole.as_strided(shape, strides, MARGIN).copy_(torch.from_numpy(array))
    whole = whole if dtype is None else whole.to(getattr(torch, dtype))
    before, whole = _bits(whole), whole.to(device)
    return Frame(whole.as_strided(shape, strides, MARGIN), whole, before)


def _poison(dtype: np.dtype[Any]) -> float | int:
    return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).max)
