"""Hardware beside ptx_host: `pytest -m gpu`, on a machine with a GPU. Elsewhere it is skipped.

The same PTX runs on both. Integers, and floats that hold integers, have to be the same bits; all
else is held to the suite on the hardware, as approximate instructions have their own bits there.
"""

import importlib.util

import numpy as np
import pytest
import torch

from qframe.kernels import OPS
from qframe_conformance import check_kernel
from qframe_conformance.checks import Check
from qframe_conformance.engine import Search, explore
from qframe_conformance.kernel_agreement import whole_case
from qframe_conformance.kernel_scenarios import scenarios

WHY = (
    "numba-cuda is not installed: pip install 'qframe[cuda]'"
    if importlib.util.find_spec("numba_cuda") is None
    else "no GPU: PyTorch finds no CUDA device, so hardware is not compared with ptx_host"
    if not torch.cuda.is_available()
    else ""
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY)]
TRANSCENDENTAL = {"attention_kv"}  # of which no number is an integer


def pair(op):
    """Return the kernel on the GPU, and on the CPU for the GPU's architecture."""
    from qframe_plugins.kernels.cuda.device import Gpu, PtxHost
    from qframe_plugins.kernels.cuda_ops import kernels_on

    major, minor = torch.cuda.get_device_capability()
    made = (kernels_on(on) for on in (Gpu(), PtxHost(f"sm_{major}{minor}")))
    return [next(each for each in kernels if each.op == op) for kernels in made]


def cases(host_kernel):
    """Return calls that the device is tried on, of every family."""
    drawn = []
    keep = Check("keep", "kernel", "structure", "", "", drawn.append, lambda *_: None)
    for scenario in scenarios(host_kernel):
        explore(scenario, [keep], Search(examples=2, seed=0))
    return [case for case in drawn if not case.optional]


@pytest.mark.parametrize("op", sorted(set(OPS) - TRANSCENDENTAL))
def test_integers_have_the_bits_of_the_device(op):
    gpu, host = pair(op)
    compared = 0
    for case in cases(host):
        whole = whole_case(case)
        if whole is None:
            continue
        for here, there in zip(whole.answer, whole.by(gpu).answer, strict=True):
            assert here.dtype == there.dtype
            assert here.tobytes() == there.tobytes(), case.call
        compared += 1
    assert compared


def test_codes_of_tokens_have_the_bits_of_the_device():
    """Of any numbers: a division is rounded alike by both."""
    gpu, host = pair("quantize_activations")
    for case in cases(host):
        for here, there in zip(case.answer, case.by(gpu).answer, strict=True):
            assert np.array_equal(here, there, equal_nan=here.dtype.kind == "f"), case.call


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_hardware_keeps_every_bound(op):
    gpu, _ = pair(op)
    report = check_kernel(gpu)
    assert report.ok, str(report)
