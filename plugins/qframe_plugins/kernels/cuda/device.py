"""Where kernels run: on a GPU, or on the CPU by the device that executes PTX. The PTX is the same.

Operands are tensors on the device that a launcher says; numbers are made what the kernel's
parameters are. `Fresh` marks a tensor that holds nothing yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qframe.errors import UnsupportedError
from qframe_plugins.kernels.cuda.compile import Source, compile_ptx

if TYPE_CHECKING:
    import torch

    from qframe_plugins.ptx_host import Kernel, Run

ALIGNMENT = 16  # bytes that one load takes at most
MOST_BLOCKS = 65535  # of a grid, in its second and third direction
MOST_NUMBERS = 2**32

Size = int | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True)
class Fresh:
    """A tensor that a kernel writes, and does not read before."""

    tensor: torch.Tensor


class Launcher(Protocol):
    """Runs kernels. `device` is where their operands are, in PyTorch's words."""

    device: str

    def launch(self, kernel: Source, grid: Size, block: Size, *given: Any, shared: int = 0) -> None:
        """Run a kernel on contiguous tensors and numbers; `shared`: bytes of dynamic memory."""
        ...


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its numbers side by side, where vectors of them can be loaded."""
    made = tensor.contiguous()
    return made if made.data_ptr() % ALIGNMENT == 0 else made.clone()


def _prepared(kernel: Source, grid: Size, given: Sequence[Any]) -> list[Any]:
    """Return the arguments with numbers in the types of the parameters.

    Raises UnsupportedError for more than kernels can count.
    """
    if isinstance(grid, tuple) and max(grid[1:]) > MOST_BLOCKS:
        raise UnsupportedError(
            f"{kernel.name}: {max(grid[1:])} blocks, expected at most {MOST_BLOCKS}; "
            "call with fewer tokens at a time"
        )
    made = []
    for kind, parameter, value in zip(kernel.types, kernel.parameters, given, strict=True):
        if not kind.endswith("*"):
            made.append(np.dtype(kind).type(value))
            continue
        tensor = value.tensor if isinstance(value, Fresh) else value
        if tensor.numel() >= MOST_NUMBERS:
            raise UnsupportedError(
                f"{kernel.name}: {parameter} has {tensor.numel()} numbers, expected less than "
                "2^32, as places are counted in 32 bits; call with fewer tokens at a time"
            )
        made.append(value)
    return made


@dataclass
class PtxHost:
    """The CPU, by `qframe_plugins.ptx_host`.

    arch          the architecture that is compiled for
    check         look at every access; a finding is an error
    count         fill `Run.counters`
    order, seed   in which threads take turns
    runs          what every launch has shown, with the kernel's name, if it is a list

    Raises KernelFaultError where a kernel does what it must not.
    """

    arch: str = "sm_90"
    check: bool = True
    count: bool = False
    order: str = "forward"
    seed: int = 0
    runs: list[tuple[str, Run]] | None = field(default=None, repr=False)
    device: str = field(default="cpu", init=False)

    def launch(self, kernel: Source, grid: Size, block: Size, *given: Any, shared: int = 0) -> None:
        """Run a kernel."""
        from qframe_plugins import ptx_host

        arguments: list[Any] = []
        for value in _prepared(kernel, grid, given):
            if isinstance(value, Fresh):
                arguments.append(ptx_host.Fresh(value.tensor.numpy()))
            else:
                arguments.append(value if isinstance(value, np.generic) else value.numpy())
        run = _on_host(kernel, self.arch).launch(
            grid,
            block,
            *arguments,
            shared_bytes=shared,
            order=self.order,
            seed=self.seed,
            check=self.check,
            count=self.count,
        )
        if run.findings:
            told = "\n".join(map(str, run.findings))
            raise ptx_host.KernelFaultError(
                f"{kernel.name} for {self.arch}: {len(run.findings)} findings\n{told}",
                run.findings,
            )
        if self.runs is not None:
            self.runs.append((kernel.name, run))


@cache
def _on_host(kernel: Source, arch: str) -> Kernel:
    from qframe_plugins.ptx_host import Module

    return Module.from_ptx(compile_ptx(kernel, arch)).kernel(kernel.name)


class Gpu:
    """The GPU on which the operands are. It has not been tried: there was none."""

    device = "cuda"

    def launch(self, kernel: Source, grid: Size, block: Size, *given: Any, shared: int = 0) -> None:
        """Run a kernel on PyTorch's stream."""
        import torch
        from cuda.core import LaunchConfig, Stream, launch

        tensors = [value.tensor if isinstance(value, Fresh) else value for value in given]
        places = {each.device for each in tensors if isinstance(each, torch.Tensor)}
        if len(places) != 1:
            raise UnsupportedError(
                f"{kernel.name}: operands on {', '.join(sorted(map(str, places)))}, "
                "expected on one device"
            )
        index = places.pop().index
        with torch.cuda.device(index):
            arguments = [
                value if isinstance(value, np.generic) else np.uint64(value.data_ptr())
                for value in _prepared(kernel, grid, tensors)
            ]
            stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
            config = LaunchConfig(grid=grid, block=block, shmem_size=shared)
            launch(stream, config, _loaded(kernel, index), *arguments)


@cache
def _loaded(kernel: Source, index: int) -> Any:
    """Return a kernel on a GPU."""
    import torch
    from cuda.core import Device, ObjectCode

    Device(index).set_current()
    major, minor = torch.cuda.get_device_capability(index)
    ptx = compile_ptx(kernel, f"sm_{major}{minor}")
    return ObjectCode.from_ptx(ptx.encode(), name=kernel.name).get_kernel(kernel.name)
