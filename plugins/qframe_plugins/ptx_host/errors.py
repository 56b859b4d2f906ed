"""What can be wrong with PTX, or with a launch of it."""

from __future__ import annotations

from qframe.errors import QframeError, UnsupportedError
from qframe_plugins.ptx_host.findings import Finding


class PtxError(QframeError):
    """The text is no PTX: a syntax error, an unknown name, an operand of the wrong type."""


class PtxUnsupportedError(UnsupportedError):
    """An instruction, modifier or directive that is not in docs/ptx.md. Nothing is guessed."""


class LaunchError(QframeError):
    """A kernel is launched with arguments, a grid or an option that it cannot take."""


class KernelFaultError(QframeError):
    """A kernel cannot go on: a trap, a deadlock, a loop without end."""

    exit_code = 3

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
