"""The whole table of instructions: importing it fills `forms.TABLE`."""

from __future__ import annotations

from qframe_plugins.ptx_host import (
    ops_control,
    ops_convert,
    ops_float,
    ops_integer,
    ops_logic,
    ops_memory,
    ops_mma,
    ops_warp,
)
from qframe_plugins.ptx_host.forms import TABLE

GROUPS = {
    module.__name__.rpartition("_")[2]: (module.__doc__ or "").strip()
    for module in (
        ops_integer, ops_logic, ops_float, ops_convert, ops_memory, ops_control, ops_warp, ops_mma,
    )
}  # fmt: skip
"""Group of forms -> what its module says of it, in the order of the documents."""

__all__ = ["GROUPS", "TABLE"]
