"""`ptx_host`, a device that executes PTX on the CPU, and looks at every access to memory.

PTX text, from any compiler, is translated to machine code of the host: a kernel that was compiled
for a GPU runs, is checked and is counted where there is none. docs/ptx.md lists what it knows.
"""

from qframe_plugins.ptx_host.arguments import Fresh, numba_arguments
from qframe_plugins.ptx_host.errors import (
    KernelFaultError,
    LaunchError,
    PtxError,
    PtxUnsupportedError,
)
from qframe_plugins.ptx_host.findings import KINDS, Finding
from qframe_plugins.ptx_host.launch import Kernel, Module, Run
from qframe_plugins.ptx_host.plugin_kernel import Device, PtxKernel

__all__ = [
    "KINDS",
    "Device",
    "Finding",
    "Fresh",
    "Kernel",
    "KernelFaultError",
    "LaunchError",
    "Module",
    "PtxError",
    "PtxKernel",
    "PtxUnsupportedError",
    "Run",
    "numba_arguments",
]
