"""What an assembler makes of GPU kernels, with no GPU and no driver: registers, memory, SASS.

The tools are those of the extra "cuda": ptxas and nvdisasm come as Python packages. A system's CUDA
is never looked for, so the figures are those of the tested versions everywhere.
"""

from qframe_plugins.cuda_build.assembly import Figures, assemble
from qframe_plugins.cuda_build.budgets import Budget, Verdict, judge, read_budgets
from qframe_plugins.cuda_build.tools import ToolError, release

__all__ = [
    "Budget",
    "Figures",
    "ToolError",
    "Verdict",
    "assemble",
    "judge",
    "read_budgets",
    "release",
]
