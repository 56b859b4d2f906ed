"""Second moments keep their bound, whichever way the activations are laid out.

Activations that are bfloat16 numbers go another way than others (pairs of tokens). What tells them
apart is looked at from the outside: a spy on the layout, and the results of both.
"""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features

from qframe import bounds
from qframe_plugins.kernels.numba_cpu import hessian as kernel

SHAPES = st.tuples(st.integers(1, 700), st.sampled_from([1, 5, 63, 64, 65, 130]))


def bfloat16(x):
    """Return the nearest bfloat16 numbers, as float32."""
    return torch.from_numpy(np.asarray(x, np.float32)).bfloat16().float().numpy()


def moments(x):
    found = np.zeros((x.shape[1], x.shape[1]))
    kernel.accumulate(found, x)
    return np.tril(found)


def ratio(x, found=None):
    """Return the largest error over what B12.a allows H = (2/n) sum x x^T in runs of RUN tokens."""
    wide, factor = x.astype(np.float64), 2 / len(x)
    exact, magnitude = factor * wide.T @ wide, factor * np.abs(wide).T @ np.abs(wide)
    allowed = bounds.hessian_sum(magnitude, len(x), kernel.RUN, 2)
    own = bounds.accumulate(magnitude, len(x) + 2, bounds.UNIT["float64"])
    error = factor * (moments(x) if found is None else found) - np.tril(exact)
    return bounds.ratio(error, np.tril(allowed + own))


def went_in_pairs(x, monkeypatch):
    """Whether the sums were those of pairs of tokens."""
    seen = []
    share = kernel.share

    def spy(function, tasks, *operands):
        if function is kernel._share_blocks:
            seen.append(operands[0].dtype == np.int32)
        share(function, tasks, *operands)

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "share", spy)
        moments(x)
    return all(seen)


@given(shape=SHAPES, seed=st.integers(0, 2**32), spread=st.integers(0, 20))
def test_bfloat16_activations_keep_the_bound(shape, seed, spread):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
    assert ratio(bfloat16(x)) <= 1


@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_small_integers_are_summed_exactly_in_pairs_too(shape, seed):
    x = np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float32)
    assert np.array_equal(moments(x), np.tril(x.T.astype(np.float64) @ x))


def test_only_ordinary_bfloat16_numbers_go_in_pairs(monkeypatch):
    x = bfloat16(np.random.default_rng(0).normal(size=(301, 70)))
    assert went_in_pairs(x, monkeypatch)
    for alien in (np.float32(1 + 2**-20), np.float32(2**-56), np.inf, np.nan):
        changed = x.copy()
        changed[-1, -1] = alien
        assert not went_in_pairs(changed, monkeypatch), alien


@pytest.mark.parametrize("size", [2.0**-60, 2.0**-75, 2.0**-127, 2.0**-133])
def test_sums_that_underflow_keep_the_bound(size):
    """Processors that multiply bfloat16 flush such numbers to zero, which B12.a does not allow."""
    x = bfloat16(np.random.default_rng(1).integers(1, 128, (300, 5)) * size)
    assert ratio(x) <= 1


def test_what_is_not_finite_comes_out():
    x = bfloat16(np.random.default_rng(2).normal(size=(300, 5)))
    x[7, 3] = np.nan
    assert np.isnan(moments(x)[3]).any()


@pytest.mark.parametrize("processor", ["generic", "haswell", "skylake-avx512"])
def test_processors_without_the_instruction_keep_the_bound(processor):
    """The code for them is compiled in another process, which says so to numba."""
    if processor == "skylake-avx512" and not get_host_cpu_features().get("avx512f"):
        pytest.skip("this processor cannot run its code")
    x = bfloat16(np.random.default_rng(0).normal(size=(333, 70)))
    code = (
        "import io, sys\n"
        "import numpy as np\n"
        "from qframe_plugins.kernels.numba_cpu import hessian\n"
        "x = np.load(io.BytesIO(sys.stdin.buffer.read()))\n"
        "found = np.zeros((x.shape[1], x.shape[1]))\n"
        "hessian.accumulate(found, x)\n"
        "np.save(sys.stdout.buffer, np.tril(found))\n"
    )
    given_x = io.BytesIO()
    np.save(given_x, x)
    features = "+sse2" if processor == "generic" else ""
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=given_x.getvalue(),
        capture_output=True,
        check=True,
        env=environment,
    )
    assert ratio(x, np.load(io.BytesIO(done.stdout))) <= 1
