"""The device that executes kernels on the CPU, and what is said where something is missing."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qframe import OpCall, Scheme
from qframe.dispatch import Dispatch
from qframe.errors import UnsupportedError
from qframe_conformance import kernel_draws
from qframe_plugins.kernels import cuda_ops
from qframe_plugins.kernels.cuda import device as devices
from qframe_plugins.kernels.cuda.compile import source
from qframe_plugins.kernels.cuda.device import Fresh, PtxHost
from qframe_plugins.ptx_host import KernelFaultError
from tests.cuda.extra import answer, need_extra, on

need_extra()

from numba import cuda, float32, uint32  # noqa: E402 - numba.cuda is the extra's


@source("float32*, float32*, uint32")
def shift(x, y, count):
    """Set y[i] to x[i + 1], also for the last one, which has none."""
    i = uint32(cuda.blockIdx.x * uint32(32) + cuda.threadIdx.x)
    if i < count:
        y[i] = x[uint32(i + uint32(1))]


@source("float32*, float32*")
def sums(x, y):
    """Add x to y, which holds nothing yet."""
    i = uint32(cuda.threadIdx.x)
    y[i] = y[i] + x[i]


@source("float32*, float32")
def fill(y, number):
    """Set y to a number."""
    y[uint32(cuda.threadIdx.x)] = float32(number)


def test_what_a_kernel_must_not_do_is_an_error_that_says_what():
    x, y = torch.ones(32), torch.empty(32)
    with pytest.raises(KernelFaultError, match=r"shift for sm_80: 1 findings\nout-of-bounds"):
        PtxHost("sm_80").launch(shift, 1, 32, x, Fresh(y), 32)
    with pytest.raises(KernelFaultError, match=r"sums for sm_90: 1 findings\nuninitialized"):
        PtxHost().launch(sums, 1, 32, x, Fresh(y))
    PtxHost().launch(shift, 1, 32, x, Fresh(y), 31)
    assert y[:31].tolist() == [1.0] * 31


def test_runs_are_kept_where_they_are_asked_for():
    device = PtxHost("sm_100", count=True, runs=[])
    device.launch(fill, 1, 32, Fresh(torch.empty(32)), 0.5)
    [(name, run)] = device.runs
    assert (name, run.findings) == ("fill", ())
    assert run.counters.bytes_written == {"fill_y": 128}


def test_numbers_are_made_what_parameters_are():
    y = torch.empty(32)
    PtxHost().launch(fill, 1, 32, Fresh(y), 1 / 3)
    assert y.tolist() == [float(np.float32(1 / 3))] * 32


def test_what_32_bits_do_not_count_is_an_error(monkeypatch):
    monkeypatch.setattr(devices, "MOST_NUMBERS", 32)
    with pytest.raises(UnsupportedError, match=r"fill: y has 32 numbers.*fewer tokens"):
        PtxHost().launch(fill, 1, 32, Fresh(torch.empty(32)), 1)
    with pytest.raises(UnsupportedError, match=r"fill: 65536 blocks, expected at most 65535"):
        PtxHost().launch(fill, (1, 65536), 32, Fresh(torch.empty(8)), 1)


def test_vectors_are_never_loaded_from_where_they_do_not_begin():
    whole = torch.arange(12.0)
    assert devices.dense(whole) is whole
    for part in (whole[1:], whole[::2], whole.reshape(3, 4).T):
        made = devices.dense(part)
        assert made.is_contiguous()
        assert made.data_ptr() % devices.ALIGNMENT == 0
        assert made.tolist() == part.tolist()


@pytest.mark.parametrize("op", ["linear_weight_only", "quantize_activations"])
def test_operands_that_begin_anywhere_are_read_right(op):
    rng = np.random.default_rng(0)
    made = kernel_draws.weight(rng, Scheme(num_bits=4, group_size=32), 5, 64)
    x = rng.normal(size=(4, 64)).astype(np.float32)
    operands = {"x": x[1:], **made}
    buffer = torch.from_numpy(np.append(np.float32(9), x.reshape(-1)))
    kernel = on(PtxHost(), op)
    constants = ()
    if op == "linear_weight_only":
        constants = (kernel.prepare(*(torch.from_numpy(each) for each in made.values())),)
    moved = kernel(buffer[1:].reshape(4, 64)[1:], *constants)
    moved = moved if isinstance(moved, tuple) else (moved,)
    for one, other in zip(answer(kernel, operands), moved, strict=True):
        assert one.tobytes() == other.numpy().tobytes()


def test_a_gpu_is_given_addresses_and_numbers_of_the_types_of_the_parameters(monkeypatch):
    """There is none here, so what stands behind is: all that is ours is looked at."""
    from cuda import core
    from cuda.core._kernel_arg_handler import ParamHolder

    told = []
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(core, "launch", lambda *given: told.append(given))
    monkeypatch.setattr(core, "Stream", SimpleNamespace(from_handle=lambda handle: handle))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(devices, "_loaded", lambda kernel, index: (kernel.name, index))
    x, y = torch.ones(32), torch.empty(32)
    devices.Gpu().launch(shift, (3, 2), 32, x, Fresh(y), 31, shared=64)
    [(handle, config, kernel, *arguments)] = told
    assert (handle, kernel) == (7, ("shift", None))
    assert (config.grid, config.block, config.shmem_size) == ((3, 2, 1), (32, 1, 1), 64)
    assert arguments == [x.data_ptr(), y.data_ptr(), 31]
    assert [type(each) for each in arguments] == [np.uint64, np.uint64, np.uint32]
    assert ParamHolder(tuple(arguments)).ptr
    with pytest.raises(UnsupportedError, match="shift: operands on cpu, meta, expected on one"):
        devices.Gpu().launch(shift, 1, 32, x, Fresh(y.to("meta")), 31)


# What is missing ------------------------------------------------------------------------------


def call(device):
    return OpCall(op="hadamard", device=device, dtype="float32", scheme=None, shape=(2, 64, 64))


def kernel_of(backend):
    return cuda_ops.Hadamard(backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    said = kernel_of("cuda").supports(call("cuda:0")).reason
    assert said == "PyTorch finds no CUDA device"
    assert "computes on cuda, not on cpu" in kernel_of("cuda").supports(call("cpu")).reason
    assert "computes on cpu, not on cuda" in kernel_of("ptx_host").supports(call("cuda")).reason


@pytest.mark.parametrize("backend", ["cuda", "ptx_host"])
def test_without_the_extra_the_backend_says_what_to_install(backend, monkeypatch):
    monkeypatch.setattr("qframe_plugins.kernels.cuda.compile.missing", lambda: "numba-cuda")
    cuda_ops._absent.cache_clear()
    kernel = kernel_of(backend)
    said = kernel.supports(call(kernel.device)).reason
    cuda_ops._absent.cache_clear()
    assert said == 'numba-cuda is not installed; run: pip install "qframe[cuda]"'


def test_the_simulating_backend_is_never_taken_by_auto(caplog):
    kernels = list(cuda_ops.qframe_kernels())
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(UnsupportedError, match="'ptx_host' is asked"),
    ):
        Dispatch(kernels).choose(call("cpu"))
    assert Dispatch(kernels, "ptx_host").choose(call("cpu")).backend == "ptx_host"


@pytest.mark.parametrize("block", [3, 48, 16384])
def test_blocks_that_cannot_be_transformed_are_refused(block):
    asked = OpCall(
        op="hadamard", device="cpu", dtype="float32", scheme=None, shape=(2, 3 * block, block)
    )
    assert kernel_of("ptx_host").supports(asked) is not None
    odd = OpCall(op="hadamard", device="cpu", dtype="float32", scheme=None, shape=(2, 96, 64))
    assert "does not divide" in kernel_of("ptx_host").supports(odd).reason


def test_the_largest_block_is_transformed():
    block = cuda_ops.LARGEST_BLOCK
    x = torch.zeros(1, block)
    x[0, 1] = 64 * 2**0.5  # the root of the block: rows of H are +1 and -1
    made = on(PtxHost(check=False), "hadamard")(x, torch.ones(block), block)
    assert made.abs().unique().numel() == 1
    assert made[0, :4].sign().tolist() == [1, -1, 1, -1]
