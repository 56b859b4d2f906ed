"""What tests of kernels for GPUs need: the extra "cuda", which needs no GPU."""

import importlib.util

import pytest


def need_extra():
    """Skip a module, and say why, where kernels cannot be compiled."""
    if importlib.util.find_spec("numba_cuda") is None:
        reason = 'numba-cuda is not installed: pip install "qframe[cuda]"'
        pytest.skip(reason, allow_module_level=True)
