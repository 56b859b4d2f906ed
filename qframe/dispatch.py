"""Which kernel computes a call: that of a backend by name, or the first that serves it.

With "auto" the kernels of an operation are asked in the order of their `priority`, the highest
first; those that simulate another machine (`by_name_only`) are not asked. Why one does not serve a
call is logged once, and is in the error where none does. This module imports neither torch nor
numba.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from qframe.contracts import Kernel, OpCall
from qframe.errors import UnsupportedError
from qframe.kernels import op_of

AUTO: Final = "auto"

log = logging.getLogger("qframe")


class Dispatch:
    """Chooses among kernels.

    backend   the one to be used, or "auto"
    """

    def __init__(self, kernels: Iterable[Kernel], backend: str = AUTO) -> None:
        """Raises UnsupportedError for a backend that no kernel has."""
        self.backend = backend
        self._kernels: dict[str, list[Kernel]] = {}
        for kernel in _sorted(kernels):
            self._kernels.setdefault(kernel.op, []).append(kernel)
        self._said: set[tuple[str, str, str]] = set()
        known = sorted({each.backend for found in self._kernels.values() for each in found})
        if backend != AUTO and backend not in known:
            raise UnsupportedError(
                f"there is no backend {backend!r}; choose {AUTO} or one of {', '.join(known)}"
            )

    def choose(self, call: OpCall) -> Kernel:
        """Return the kernel for a call.

        Raises UnsupportedError, with all reasons, where none serves it.
        """
        op_of(call.op)
        reasons: list[str] = []
        for kernel in self._kernels.get(call.op, []):
            if self.backend not in (AUTO, kernel.backend):
                continue
            if self.backend == AUTO and _by_name_only(kernel):
                reasons.append(
                    f"{kernel.op}/{kernel.backend}: it is taken only where "
                    f"kernels={kernel.backend!r} is asked for"
                )
                continue
            refused = kernel.supports(call)
            if refused is None:
                return kernel
            reasons.append(f"{kernel.op}/{kernel.backend}: {refused.reason}")
            key = kernel.op, kernel.backend, refused.reason
            if key not in self._said:
                self._said.add(key)
                log.info("%s does not serve a call: %s", f"{key[0]}/{key[1]}", refused.reason)
        whose = "no kernel" if self.backend == AUTO else f"backend {self.backend!r}"
        why = "; ".join(reasons) if reasons else "it has no kernel for this operation"
        raise UnsupportedError(
            f"{whose} computes {call.op} of {call.shape} on {call.device}: {why}"
        )


def in_order(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return the kernels that "auto" asks, in its order: the highest priority first."""
    return [kernel for kernel in _sorted(kernels) if not _by_name_only(kernel)]


def _sorted(kernels: Iterable[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: -int(getattr(kernel, "priority", 0)))


def _by_name_only(kernel: Kernel) -> bool:
    return bool(getattr(kernel, "by_name_only", False))
