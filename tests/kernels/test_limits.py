"""What kernels are compared with: it does what it says, or all shares of limits are wrong."""

import numpy as np

from qframe_plugins.kernels.numba_cpu import limits


def test_every_byte_is_read():
    """Wherever a bit lies, it comes out."""
    data = limits.memory(3 << 18)
    assert limits.read(data) == data.nbytes == 3 << 18
    for place in (0, 16, len(data) // 2 - 1, len(data) - 1):
        data[:] = 0
        data[place] = 1 << 20
        found = np.zeros(3, np.int32)
        limits._share_reads(np.zeros(1, np.int64), data, found)
        assert np.bitwise_or.reduce(found) == 1 << 20


def test_memory_is_that_of_no_other():
    """Pages of zeros that nobody wrote are all one page, which lies in the cache."""
    assert limits.memory(1000).all()


def test_as_many_products_as_are_asked_for():
    assert limits.products(4) == 2 * limits.products(2)
