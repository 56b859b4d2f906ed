"""Random typed expressions: no bit differs from what NumPy and ml_dtypes compute.

Forty expressions of up to four levels are one kernel. QFRAME_TEST_PROFILE=nightly tries 5,000.
"""

import os

import numpy as np
import pytest

from tests.ptx.expressions import DTYPES, Expressions, bits_of
from tests.ptx.snippets import kernel
from tests.ptx.test_device import run

THREADS, EACH = 128, 40
KERNELS = 125 if os.environ.get("QFRAME_TEST_PROFILE") == "nightly" else 6


def text_of(made):
    """Return the kernel, with the inputs one column after another, 8 bytes each."""
    body = "mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, 8; add.u64 %d1, %x, %d0;\n"
    body += "add.u64 %d2, %y, %d0;\n"
    for column, kind in enumerate(DTYPES):
        if kind in made.leaves:
            loaded = kind if bits_of(kind) == 8 else f"b{bits_of(kind)}"
            place = f"[%d1+{8 * THREADS * column}]"
            body += f"ld.global.{loaded} {made.leaves[kind]}, {place};\n"
    body += "\n".join(made.lines) + "\n"
    for column, (kind, register, _) in enumerate(made.results):
        body += f"st.global.b{bits_of(kind)} [%d2+{8 * THREADS * column}], {register};\n"
    declared = "".join(f".reg .{kind} {name};\n" for name, kind in made.registers.items())
    return kernel(body, registers=declared)


@pytest.mark.parametrize("seed", range(KERNELS))
def test_expressions_are_computed_as_numpy_does(seed):
    made = Expressions(seed, EACH, THREADS)
    x = np.zeros((len(DTYPES), THREADS, 8), np.uint8)
    for column, values in enumerate(made.given.values()):
        size = values.dtype.itemsize
        x[column, :, :size] = np.ascontiguousarray(values).view(np.uint8).reshape(THREADS, size)
    y = np.zeros((EACH, THREADS, 8), np.uint8)
    run(text_of(made), x, y, block=THREADS, check=False)
    for column, (kind, register, expected) in enumerate(made.results):
        size = DTYPES[kind].itemsize
        got = np.ascontiguousarray(y[column, :, :size]).view(DTYPES[kind])[:, 0]
        expected = np.ascontiguousarray(expected.astype(DTYPES[kind]))
        same = got.view(f"u{size}") == expected.view(f"u{size}")
        if kind not in ("s16", "u16", "s32", "u32", "s64", "u64"):
            with np.errstate(invalid="ignore"):  # ml_dtypes warns of the NaN that it looks for
                same |= np.isnan(got) & np.isnan(expected)
        assert same.all(), (kind, register, got[~same][:3], expected[~same][:3])
