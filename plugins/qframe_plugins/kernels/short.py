"""Activations of 16 bits for kernels that compute in float32: a shared detour.

A number of bfloat16 or float16 is a float32 number, so reading is exact. What a kernel returns in
the dtype of activations is rounded to it once, at the end.

Error: docs/bounds.md, B9.e.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from qframe import OpCall, Unsupported
from qframe.kernels import ACTIVATIONS, op_of


class ThroughFloat32:
    """A kernel whose methods take activations of 16 bits through float32."""

    op: str

    @property
    def activations(self) -> tuple[str, ...]:
        """The dtypes of activations that it takes."""
        takes = op_of(self.op).takes_activations or hasattr(self, "from_activations")
        return ACTIVATIONS if takes else ACTIVATIONS[:1]


def objection(call: OpCall, known: tuple[str, ...]) -> Unsupported | None:
    """Return why activations of a call are not served, where they are of none of these dtypes."""
    if call.dtype in known:
        return None
    return Unsupported(f"activations must be {' or '.join(known)}, not {call.dtype}")


@cache
def _short() -> frozenset[Any]:
    """Return the dtypes of 16 bits."""
    import torch

    return frozenset((torch.bfloat16, torch.float16))


def through_float32(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let a kernel's method take activations of 16 bits, too, and give such outputs."""

    @wraps(call)
    def called(self: Any, *operands: Any) -> Any:
        short = _short()  # looked up once: a call takes microseconds
        for operand in operands:
            dtype = getattr(operand, "dtype", None)
            if dtype in short:
                break
        else:
            return call(self, *operands)
        given = [
            each.float() if getattr(each, "dtype", None) == dtype else each for each in operands
        ]
        made = call(self, *given)
        if call.__name__ == "from_activations":
            return made.to(dtype)
        promised = op_of(self.op).answer
        if not isinstance(made, tuple):
            return made.to(dtype) if promised and promised[0].activation else made
        return tuple(
            part.to(dtype) if each.activation else part
            for part, each in zip(made, promised, strict=True)
        )

    return called
