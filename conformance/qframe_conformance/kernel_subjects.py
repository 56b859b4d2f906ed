"""`check_kernel`: someone's own kernel, as an object or as a function, held to the suite.

    from qframe_conformance import check_kernel

    report = check_kernel(my_function, "linear_int8")
    print(report)

For PTX, from whatever compiler, there are executors that make such a kernel of the text and a
function that launches it: docs/check_your_gpu_kernel.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qframe.contracts import OpCall, Unsupported
from qframe.errors import PluginError
from qframe.host import Host
from qframe.kernels import op_of
from qframe_conformance.kernel_case import beside
from qframe_conformance.report import Report
from qframe_conformance.suite import check_plugin


class FunctionKernel:
    """A function that takes the operands of an operation, as a kernel.

    backend   what reports call it
    """

    def __init__(self, op: str, function: Callable[..., Any], backend: str = "") -> None:
        self.op = op_of(op).name
        self.function = function
        self.backend = backend or getattr(function, "__name__", "function")

    def supports(self, call: OpCall) -> Unsupported | None:
        """Serve everything on the CPU."""
        if call.op != self.op or call.device != "cpu":
            return Unsupported(f"{self.op} on the CPU, not {call.op} on {call.device}")
        return None

    def __call__(self, *operands: Any) -> Any:
        """Call the function."""
        return self.function(*operands)


def check_kernel(
    kernel: Any,
    op: str | None = None,
    *,
    peers: Sequence[Any] | None = None,
    profile: str = "fast",
    seed: int = 0,
    only: Sequence[str] | None = None,
    scenarios: Sequence[str] | None = None,
    shrink: bool = True,
    host: Host | None = None,
) -> Report:
    """Run the suite on a kernel, beside the kernels that are installed.

    kernel   keeps the contract `qframe.contracts.Kernel`; or a function of the operands of `op`
    op       what a function computes; of a kernel its own
    peers    kernels whose answers are told where this one is wrong; None: those of the host for the
             same operation that do not simulate another machine

    The others are those of `check_plugin`. A report tells of what fails the theorem, the first
    number that is wrong, what float64 and the peers have there and who is furthest from float64,
    the smallest operands found, and Python that shows it again.

    Raises PluginError for what is no kernel, UnsupportedError for an operation that is not defined.
    """
    declared = getattr(kernel, "op", None)
    if declared is None:
        if op is None or not callable(kernel):
            raise PluginError(
                f"{kernel!r} is no kernel: expected one with `op`, `backend`, `supports` and a "
                f"call, or a function and the operation that it computes, op=..."
            )
        kernel = FunctionKernel(op, kernel)
    elif op not in (None, declared):
        raise PluginError(f"the kernel computes {declared!r}, not {op!r}; leave `op` out")
    host = host or Host.discover()
    if peers is None:
        every = (host.get("kernel", name) for name in host.names("kernel"))
        peers = [each for each in every if not getattr(each, "by_name_only", False)]
    with beside(peers):
        return check_plugin(
            kernel,
            kind="kernel",
            profile=profile,
            seed=seed,
            only=only,
            scenarios=scenarios,
            shrink=shrink,
            host=host,
        )
