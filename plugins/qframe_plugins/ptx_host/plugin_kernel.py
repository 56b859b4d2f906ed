"""`PtxKernel`: someone's PTX and a function that launches it, as a kernel of an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from qframe import OpCall, Unsupported
from qframe_plugins.ptx_host.errors import KernelFaultError
from qframe_plugins.ptx_host.launch import Module, Run

Launch = Callable[..., Any]


@dataclass
class Device:
    """What a launch function is given: it runs kernels of one text, and looks at every access.

    runs   of every launch, in order
    """

    module: Module
    order: str = "forward"
    seed: int = 0
    count: bool = False
    runs: list[Run] = field(default_factory=list, repr=False)

    def launch(
        self, name: str | None, grid: Any, block: Any, *given: Any, shared_bytes: int = 0
    ) -> None:
        """Run a kernel; without a name, the only one there is. `Kernel.launch` takes the rest.

        Raises KernelFaultError, which holds the findings, where a kernel does what it must not.
        """
        kernel = self.module.kernel(name)
        run = kernel.launch(
            grid,
            block,
            *given,
            shared_bytes=shared_bytes,
            order=self.order,
            seed=self.seed,
            count=self.count,
        )
        self.runs.append(run)
        if run.findings:
            told = "\n".join(map(str, run.findings))
            raise KernelFaultError(f"{len(run.findings)} findings\n{told}", run.findings)


@dataclass(frozen=True)
class PtxKernel:
    """A kernel for `qframe_conformance.check_kernel`.

    op       an operation of `qframe.kernels.OPS`
    ptx      the text
    run      called as run(device, *operands) for each call of the operation. Operands come as
             C-contiguous NumPy arrays of their own, and numbers; it launches kernels by
             `device.launch` and returns the answer as an array, or a tuple of them
    serves   None, or a function of an `OpCall` that returns why a call is not served, or None
    order, seed   in which threads take turns

    Other orders are its `variants`, which have to give the same bits.
    """

    op: str
    ptx: str = field(repr=False)
    run: Launch
    serves: Callable[[OpCall], str | None] | None = None
    order: str = "forward"
    seed: int = 0
    by_name_only = True

    @cached_property
    def module(self) -> Module:
        """The text, read once. Raises PtxError and PtxUnsupportedError."""
        return Module.from_ptx(self.ptx)

    @property
    def backend(self) -> str:
        """Where it runs: "ptx_host", and the target that the text names."""
        return f"ptx_host {self.module.source.target}"

    @property
    def variants(self) -> dict[str, PtxKernel]:
        """The kernel in other orders of threads."""
        return {order: replace(self, order=order, seed=1) for order in ("reverse", "random")}

    def supports(self, call: OpCall) -> Unsupported | None:
        """Serve what `serves` has nothing against."""
        if call.op != self.op or call.device != "cpu":
            return Unsupported(f"{self.op} on the CPU, not {call.op} on {call.device}")
        why = None if self.serves is None else self.serves(call)
        return None if why is None else Unsupported(why)

    def __call__(self, *operands: Any) -> Any:
        """Launch it; return tensors."""
        import torch

        device = Device(self.module, self.order, self.seed)
        given = [
            each.contiguous().clone().numpy() if isinstance(each, torch.Tensor) else each
            for each in operands
        ]
        made = self.run(device, *given)
        parts = made if isinstance(made, tuple) else (made,)
        tensors = tuple(
            torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts
        )
        return tensors if isinstance(made, tuple) else tensors[0]
