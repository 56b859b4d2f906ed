"""What the small kernels of the mutants share: NumPy inside, one step to a method."""

from __future__ import annotations

import numpy as np
import torch

from qframe.contracts import Unsupported
from tests.mutants.mutant import Mutant, Twin

F32 = np.float32


class SmallKernel:
    """A kernel in NumPy. A mutant replaces one of its steps."""

    op = ""
    backend = "small"

    def supports(self, call):
        if call.op != self.op or call.device != "cpu":
            return Unsupported(f"{self.op} on the cpu, not {call.op} on {call.device}")
        return None

    def __call__(self, *operands):
        arrays = [o.numpy() if isinstance(o, torch.Tensor) else o for o in operands]
        with np.errstate(all="ignore"):
            made = self.compute(*arrays)
        if made is None:
            return None
        parts = made if isinstance(made, tuple) else (made,)
        tensors = tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
        return tensors if isinstance(made, tuple) else tensors[0]


def changed(base, **steps):
    """Return a function that makes a kernel with other steps or declarations."""
    return type(f"Changed{base.__name__}", (base,), steps)


def mutant(base, name, bug, killed_by, **steps):
    return Mutant(
        name=f"{base.op}:{name}",
        kind="kernel",
        bug=f"{bug[0].upper()}{bug[1:].rstrip('.')}.",
        make=changed(base, **steps),
        correct=base,
        killed_by=killed_by,
    )


def twin(base, name, why, **steps):
    return Twin(name=f"{base.op}:{name}", kind="kernel", why=why, make=changed(base, **steps))


# Arithmetic -----------------------------------------------------------------------------------


def keep_bits(x, bits):
    """Round float32 numbers to so many significant bits, half to even."""
    dropped = np.uint32(24 - bits)
    raw = np.ascontiguousarray(x, F32).view(np.uint32)
    odd = (raw >> dropped) & np.uint32(1)
    half = np.uint32((1 << (int(dropped) - 1)) - 1)
    rounded = (raw + half + odd) >> dropped << dropped
    return np.where(np.isfinite(x), rounded.view(F32), x).astype(F32)


def bfloat16(x):
    return keep_bits(x, 8)


def tf32(x):
    return keep_bits(x, 11)


def cut(x):
    """Round float64 numbers toward zero to float32, as matrix units add."""
    near = np.asarray(x).astype(F32)
    away = np.abs(near.astype(np.float64)) > np.abs(x)
    return np.where(away, np.nextafter(near, F32(0)), near).astype(F32)


def summed(x, w, order=None, to=F32):
    """Return x w^T, [tokens, rows], one product after another, each sum rounded by `to`."""
    total = np.zeros((len(x), len(w)), F32)
    for k in range(x.shape[1]) if order is None else order:
        total = np.asarray(to(total + x[:, k, None] * w[None, :, k])).astype(F32)
    return total
