"""Kernels for GPUs, run on the CPU: the suite holds, and every architecture gives the same bits."""

import numpy as np
import pytest
import torch

from qframe import KVScheme, Scheme, kernels
from qframe.kernel_judges import judge
from qframe_conformance import (
    check_plugin,
    kernel_draws,
    kernel_draws_int8,
    kernel_draws_other,
)
from qframe_conformance.kernel_scenarios import scenarios
from qframe_plugins.kernels import cuda_ops, numba_ops
from qframe_plugins.kernels.cuda.compile import ARCHS
from qframe_plugins.kernels.cuda.device import PtxHost
from tests.cuda.extra import answer, need_extra, on

need_extra()

SLOW = {"long", "tiles", "pieces"}  # families whose operands are large; below they meet no checker


def test_there_is_a_kernel_for_every_operation_and_backend():
    made = {(kernel.op, kernel.backend) for kernel in cuda_ops.qframe_kernels()}
    assert made == {(op, backend) for op in kernels.OPS for backend in ("cuda", "ptx_host")}


@pytest.mark.parametrize("op", kernels.OPS)
def test_the_suite_holds_with_every_access_looked_at(op):
    """Threads take turns in a random order; a finding is an error, and fails the call."""
    kernel = on(PtxHost("sm_90", order="random"), op)
    known = [each.id for each in scenarios(kernel) if each.id not in SLOW]
    report = check_plugin(kernel, profile="fast", scenarios=[known[0], known[len(known) // 2]])
    assert report.ran
    assert report.ok, str(report)


@pytest.mark.parametrize("op", [op for op in kernels.OPS if op != "dequantize"])
def test_the_suite_holds_for_large_operands(op):
    kernel = on(PtxHost("sm_100", check=False), op)
    known = [each.id for each in scenarios(kernel)]
    report = check_plugin(kernel, profile="fast", scenarios=[known[-1]])
    assert report.ran
    assert report.ok, str(report)


# Operands -------------------------------------------------------------------------------------

W4 = Scheme(num_bits=4, symmetric=False, group_size=7)
W8 = Scheme(num_bits=8, symmetric=False, group_size=64)
KV = KVScheme(num_bits=3, axis="channel", group_size=8), KVScheme(num_bits=4, group_size=12)


def drawn(op, rng):
    """Return two sets of operands: what few tokens, and many, or the like, are computed from."""
    if op == "dequantize":
        return [kernel_draws.weight(rng, W4, 5, 33), kernel_draws.weight(rng, W8, 3, 130)]
    if op == "linear_weight_only":
        found = []
        for scheme, columns in ((W4, 33), (W8, 130)):
            x = kernel_draws.activations(rng, columns, scheme.group_size)
            made = kernel_draws.shuffled_groups(rng, kernel_draws.weight(rng, scheme, 70, columns))
            found += [{"x": x, **made}, {"x": x[:3], **made}, {"x": x[:1], **made}]
        return found
    if op == "linear_int8":
        draw = kernel_draws_int8.codes
        return [draw(rng, 9, 131, 67), draw(rng, 3, 131, 17), draw(rng, 35, 96, 65)]
    if op == "linear_int8_groups":
        found = [kernel_draws_int8.groups(rng, 9, 131, 17, scheme) for scheme in (W4, W8)]
        found.append(kernel_draws_int8.groups(rng, 3, 131, 17, W4))
        return [kernel_draws.shuffled_groups(rng, each) for each in found]
    if op == "linear_int8_outliers":
        return [kernel_draws_int8.outliers(rng, 65, 17, size) for size in (1.0, 0.0)]
    if op == "quantize_activations":
        return [kernel_draws_int8.activations(rng, columns) for columns in (65, 260)]
    if op == "hadamard":
        return [kernel_draws_other.hadamard(rng, columns, 64) for columns in (192, 1088)]
    if op == "rms_norm":
        return [kernel_draws_other.norm(rng, columns) for columns in (65, 300)]
    if op == "attention_rotary":
        sizes = ((4, 2), 33, 20), ((2, 1), 700, 16), ((3, 3), 0, 6)
        return [kernel_draws_other.newest(rng, *size, 0.25) for size in sizes]
    if op == "hessian_update":
        return [kernel_draws_other.moments(rng, 300, 70, whole=whole) for whole in (False, True)]
    made = [kernel_draws_other.attention(rng, (4, 2), 33, 20, *pair) for pair in (KV, KV[::-1])]
    return [*made, kernel_draws_other.attention(rng, (2, 1), 700, 16, *KV)]


@pytest.mark.parametrize("op", kernels.OPS)
def test_architectures_and_orders_of_threads_give_the_same_bits(op):
    rng = np.random.default_rng(0)
    for operands in drawn(op, rng):
        first = answer(on(PtxHost("sm_80", check=False), op), operands)
        for arch, order in zip(ARCHS[1:], ("reverse", "random"), strict=True):
            device = PtxHost(arch, check=False, order=order, seed=1)
            again = answer(on(device, op), operands)
            for one, other in zip(first, again, strict=True):
                assert one.tobytes() == other.tobytes(), (arch, order)


@pytest.mark.parametrize("op", ["quantize_activations", "dequantize", "hadamard", "linear_int8"])
def test_the_bits_are_those_of_the_cpu_kernels(op):
    """Where the sums are integers, or made in the same order, nothing is left to rounding."""
    [cpu] = [each for each in numba_ops.qframe_kernels() if each.op == op]
    rng = np.random.default_rng(1)
    for operands in drawn(op, rng):
        made = answer(on(PtxHost(check=False), op), operands)
        for one, other in zip(made, answer(cpu, operands), strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("op", ["linear_weight_only", "linear_int8_groups", "hessian_update"])
def test_integers_are_added_exactly(op):
    """Integers, and scales that are powers of two: the CPU kernels and these have to agree."""
    [cpu] = [each for each in numba_ops.qframe_kernels() if each.op == op]
    rng = np.random.default_rng(2)
    for operands in drawn(op, rng):
        if "scale" in operands:
            shape = operands["scale"].shape
            operands["scale"] = 2.0 ** rng.integers(-2, 3, shape).astype(np.float32)
        if "x" in operands:
            operands["x"] = rng.integers(-9, 10, operands["x"].shape).astype(np.float32)
        if "x_scale" in operands:
            operands["x_scale"] = 2.0 ** rng.integers(-2, 3, len(operands["x_scale"]))
            operands["x_scale"] = operands["x_scale"].astype(np.float32)
        if "hessian" in operands:
            operands["hessian"] = np.rint(operands["hessian"])
        made = answer(on(PtxHost(check=False), op), operands)
        for one, other in zip(made, answer(cpu, operands), strict=True):
            assert one.tobytes() == other.tobytes()


SHORT_OPS = [kernel.op for kernel in cuda_ops.KERNELS if kernel.activations == kernels.ACTIVATIONS]


@pytest.mark.parametrize("dtype", kernels.ACTIVATIONS[1:])
@pytest.mark.parametrize("op", SHORT_OPS)
def test_16_bits_are_read_exactly_and_written_with_one_rounding(op, dtype):
    """The sums are those of float32: so are the bits, once they are rounded."""
    kernel = on(PtxHost(check=False), op)
    kind = getattr(torch, dtype)
    rng = np.random.default_rng(7)
    for operands in drawn(op, rng):
        constants = [
            torch.from_numpy(operands[o.name]) for o in kernels.OPS[op].operands if o.constant
        ]
        if "x_codes" in operands:
            x = torch.randn(len(operands["x_codes"]), operands["x_codes"].shape[1]).to(kind)
            laid = kernel.prepare(*constants)
            wide, short = (kernel.from_activations(each, laid) for each in (x.float(), x))
            assert short.dtype == kind
            assert torch.equal(wide.to(kind).view(torch.int16), short.view(torch.int16))
            continue
        x = torch.from_numpy(operands["x"]).clamp(-60000, 60000).to(kind)
        wide, short = ({**operands, "x": each} for each in (x.float(), x))
        for one, other in zip(called(kernel, wide), called(kernel, short), strict=True):
            assert other.dtype in (kind, torch.int8, torch.float32, torch.float64)
            assert torch.equal(one.to(other.dtype), other) or bool(one.isnan().any())


def called(kernel, operands):
    """Return the parts of the answer, as tensors."""
    given = [
        torch.from_numpy(each.copy()) if isinstance(each, np.ndarray) else each
        for each in (operands[o.name] for o in kernels.OPS[kernel.op].operands)
    ]
    made = kernels.run(kernel, given)
    if made is None:
        return [given[0]]
    return made if isinstance(made, tuple) else [made]


@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 8, 9])
def test_no_number_of_tokens_changes_a_bit_of_products_of_codes(tokens):
    """dp4a for few and matrix instructions for more: the sums of groups are the same integers."""
    rng = np.random.default_rng(3)
    operands = kernel_draws_int8.groups(rng, 40, 131, 17, W4)
    kernel = on(PtxHost(check=False), "linear_int8_groups")
    few = {name: operands[name][:tokens] for name in ("x_codes", "x_scale")}
    [whole], [part] = answer(kernel, operands), answer(kernel, {**operands, **few})
    assert whole[:tokens].tobytes() == part.tobytes()


def test_sums_of_few_tokens_keep_the_bound_of_their_tree():
    """4,096 columns: 41 roundings instead of 4,098, which a chain of sums does not keep."""
    rng = np.random.default_rng(6)
    operands = kernel_draws.weight(rng, Scheme(num_bits=4, strategy="tensor"), 1, 4096)
    operands["codes"][:], operands["scale"][:] = 1, 1
    x = np.full((1, 4096), np.nextafter(np.float32(2.0**-24), np.float32(0)))
    x[0, 0] = 1  # after it, a chain loses every other number
    operands = {"x": x, **operands}
    kernel = on(PtxHost(check=False), "linear_weight_only")
    arithmetic = kernels.arithmetic_of(kernel, operands)
    assert arithmetic.depth == 41
    held = judge("linear_weight_only", operands, answer(kernel, operands), arithmetic)["B9.b"]
    assert (np.abs(held.error) <= held.allowed).all()
    chain = [np.add.accumulate(x, axis=1, dtype=np.float32)[:, -1:]]
    refused = judge("linear_weight_only", operands, chain, arithmetic)["B9.b"]
    assert (np.abs(refused.error) > refused.allowed).all()


@pytest.mark.parametrize("op", ["linear_weight_only", "linear_int8_groups"])
def test_codes_of_more_than_eight_bits_are_refused(op):
    rng = np.random.default_rng(4)
    operands = kernel_draws_int8.groups(rng, 3, 40, 4, W4)
    if op == "linear_weight_only":
        operands["x"] = operands["x_codes"].astype(np.float32)
    operands["codes"][0, :2] = (-5, 251)
    with pytest.raises(kernels.UnsupportedError, match=r"codes lie in -5\.\.251, expected at most"):
        answer(on(PtxHost(), op), operands)
    operands["codes"][0, :2] = (-4, 251)
    assert np.isfinite(answer(on(PtxHost(), op), operands)[0]).all()


def test_sums_that_do_not_fit_are_refused():
    rng = np.random.default_rng(5)
    operands = kernel_draws_int8.groups(rng, 2, 520, 2, Scheme(num_bits=8, strategy="channel"))
    operands["zero_point"][:] = -32767
    kernel = on(PtxHost(), "linear_int8_groups")
    with pytest.raises(kernels.UnsupportedError, match=r"may not hold sums of 520 products"):
        answer(kernel, operands)
