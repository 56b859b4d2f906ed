"""Memory of the kernels: where arrays begin, that they share nothing, and when it goes."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe.held import held_bytes
from qframe_plugins.kernels.numba_cpu import scratch
from qframe_plugins.kernels.numba_cpu.scratch import LINE, aligned

DTYPES = st.sampled_from(["uint8", "int32", "float32"])
SHAPES = st.one_of(
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(1, 70), st.integers(0, 5), st.integers(1, 64)),
)


@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=8))
def test_arrays_are_zeros_begin_where_a_line_does_and_do_not_overlap(wanted):
    made = [aligned(shape, dtype) for shape, dtype in wanted]
    for number, (array, (shape, dtype)) in enumerate(zip(made, wanted, strict=True)):
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.size == 0 or array.ctypes.data % LINE == 0
        assert not array.any()
        array[...] = number + 1
    for number, array in enumerate(made):
        assert (array == number + 1).all()


@pytest.mark.parametrize("size", [scratch._SHARED - 1, scratch._SHARED, scratch._CHUNK + 1])
def test_large_arrays_are_like_small_ones(size):
    before, made, after = aligned((3,), "uint8"), aligned((size,), "uint8"), aligned((3,), "uint8")
    made[:] = 1
    assert made.ctypes.data % LINE == 0
    assert not before.any()
    assert not after.any()
    assert held_bytes([before, made, after]) == size + 6


def test_memory_goes_with_its_last_array():
    made = aligned((scratch._SHARED,), "uint8")
    owner = weakref.ref(made.base)
    part = made[5:9]
    del made
    gc.collect()
    assert owner() is not None
    assert part.shape == (4,)
    del part
    gc.collect()
    assert owner() is None


def test_without_mapped_memory_arrays_still_begin_where_a_line_does(monkeypatch):
    monkeypatch.delattr(scratch.mmap, "MAP_ANONYMOUS")
    made = aligned((scratch._SHARED // 4,), np.float32)
    assert made.ctypes.data % LINE == 0
    assert not made.any()
