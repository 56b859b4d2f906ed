"""Certificates: what they compute is what the theorems say, wherever the layer is cut."""

import json
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qframe
from qframe import CalibrationData, Capabilities, Grid, Host, Scheme, bounds, hookimpl, rounding
from qframe.certificates import Certificate, Closest, Evidence, function_preserved
from qframe.claims import Babai, Covers, HalfStep, SchemeScale
from qframe.contracts import RoundingProblem
from qframe.errors import CertificateError, HessianError
from qframe.hessian import Feedback, inverse_spread
from qframe.transforms import InputTransform, Rotation

W4 = {"num_bits": 4, "group_size": 16}


def a_problem(rows, columns, seed=0, **scheme):
    generator = torch.Generator().manual_seed(seed)
    chosen = Scheme.model_validate({"num_bits": 4, "group_size": 16, **scheme})
    half = 1 << (chosen.num_bits - 1)
    return RoundingProblem(
        name="layer",
        weight=torch.randn(rows, columns, generator=generator),
        scheme=chosen,
        grid=Grid(-half, half - 1) if chosen.symmetric else Grid(0, 2 * half - 1),
    )


def inputs_of(columns, seed=0):
    """Correlated inputs, and few of them, so that the Hessian is singular."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(columns // 2, columns, generator=generator) @ mix


def damped_hessian(columns, seed=0):
    x = inputs_of(columns, seed).double()
    hessian = 2 / len(x) * x.T @ x
    hessian = hessian.tril() + hessian.tril(-1).T  # not every BLAS gives the same above and below
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


# Nearest codes ----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([1, 7, 16, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_half_step_certificate_is_the_search_for_the_nearest_code(
    rows, columns, group_size, symmetric, seed
):
    problem = a_problem(rows, columns, seed, group_size=group_size, symmetric=symmetric)
    good = rounding.to_nearest(problem)
    generator = np.random.default_rng(seed)
    codes = good.codes.clone()
    place = (int(generator.integers(rows)), int(generator.integers(columns)))
    moved = int(codes[place]) + (1 if codes[place] < problem.grid.qmax else -1)
    codes[place] = moved
    for quantized in (good, replace(good, codes=codes)):
        certificate = HalfStep().certify(Evidence(problem, quantized))
        index = quantized.group_index.long()
        scale, zero = quantized.scale[:, index].double(), quantized.zero_point[:, index].double()
        error = (problem.weight - scale * (quantized.codes - zero)).abs()
        allowed = bounds.nearest_code(problem.weight, scale, zero, problem.grid)
        assert certificate.holds == (bounds.ratio(error, allowed) <= 1)
    assert certificate.place == place


def test_certificates_do_not_depend_on_the_threads():
    problem = a_problem(300, 576, num_bits=3, group_size=64)
    hessian = damped_hessian(576)
    problem = replace(problem, statistics={"hessian": hessian}, tokens=1)
    claims = (HalfStep(), SchemeScale(), Covers(), Babai(dampening_frac=0.01))
    quantized = rounding.to_nearest(problem)
    found = [Evidence(problem, quantized, {}, n).certificates(claims) for n in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    assert [c.holds for c in found[0]] == [True, True, True, False]  # nearest is not GPTQ


def test_the_worst_place_is_named_with_its_error():
    error, allowed = np.array([[0.0, 1.0], [3.0, 2.0]]), np.full((2, 2), 2.0)
    worst = Closest.of(error, allowed, first=10)
    assert (worst.place, worst.error, worst.allowed) == ((11, 0), 3.0, 2.0)
    assert Closest.of(np.zeros((2, 3, 4)), np.ones((2, 3, 1))).place == (0, 0)
    assert Closest.of(np.array([0.0, np.nan]), np.ones(2)).ratio == np.inf
    assert Closest.of(np.zeros((0, 3)), np.zeros((0, 3))) == Closest()


@given(st.floats(0, 4) | st.sampled_from([np.nextafter(1, 2), 1.0000001, 1.0, np.inf]))
def test_what_is_stored_never_has_another_verdict(ratio):
    certificate = Certificate(claim="c", theorem="B1.b", ratio=float(ratio))
    stored = Certificate(**{**certificate.record(), "place": ()})
    assert stored.holds == certificate.holds


# The scale rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(exponent=st.integers(-20, 10), seed=st.integers(0, 10**6))
def test_the_scale_rule_leaves_16_bit_storage_no_room(dtype, exponent, seed):
    ideal = np.random.default_rng(seed).uniform(1, 2, 500) * 2.0**exponent
    _, highest = bounds.scale_rule(ideal, dtype)
    stored = torch.from_numpy(highest).to(getattr(torch, dtype))
    assert torch.equal(stored.double(), torch.from_numpy(highest))
    below = torch.nextafter(stored, torch.zeros_like(stored)).double().numpy()
    assert (below < ideal * (1 + bounds.gamma(2)) + bounds.ETA["float32"]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_scale_that_is_off_by_its_last_bit_is_found(dtype):
    problem = a_problem(64, 64, scale_dtype=dtype)
    good = rounding.to_nearest(problem)
    assert SchemeScale().certify(Evidence(problem, good)).holds
    stored = good.scale.to(getattr(torch, dtype))
    for towards in (torch.inf, 0.0):
        moved = torch.nextafter(stored, torch.full_like(stored, towards)).float()
        for row, group in ((0, 0), (63, 3)):
            scale = good.scale.clone()
            scale[row, group] = moved[row, group]
            found = SchemeScale().certify(Evidence(problem, replace(good, scale=scale)))
            assert not found.holds
            assert found.place == (row, group)


# The factorization ------------------------------------------------------------------------------


def exact_inverse(upper):
    """Return the inverse of an upper triangular matrix in rational numbers."""
    n = len(upper)
    r = [[Fraction(float(x)) for x in row] for row in upper]
    inverse = [[Fraction(0)] * n for _ in range(n)]
    for j in range(n):
        for i in range(j, -1, -1):
            rest = sum((r[i][k] * inverse[k][j] for k in range(i + 1, j + 1)), Fraction(0))
            inverse[i][j] = ((1 if i == j else 0) - rest) / r[i][i]
    return inverse


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (5, 1), (24, 2), (24, 3)])
def test_the_spread_of_the_inverse_is_bounded_from_above_and_sharply(n, seed):
    upper = torch.linalg.cholesky(damped_hessian(max(n, 2), seed)[:n, :n]).T.contiguous()
    lengths = np.sqrt([float(sum(Fraction(float(x)) ** 2 for x in row)) for row in upper])
    reach = [
        float(sum(abs(x) * Fraction(float(d)) for x, d in zip(row, lengths, strict=True)))
        for row in exact_inverse(upper)
    ]
    true, found = float(np.square(reach).sum()), inverse_spread(upper)
    own = 1 + bounds.gamma(4 * n + 8, bounds.UNIT["float64"])  # of this test's arithmetic
    assert true <= found * own
    assert found <= true * own**2 / (1 - bounds.gamma(n, bounds.UNIT["float64"]) * found) ** 4


def test_the_factor_in_pieces_is_the_factor():
    hessian, order = damped_hessian(300), np.random.default_rng(0).permutation(300)
    one, other = (Feedback.of(hessian, order, "float64", threads) for threads in (1, 4))
    assert torch.equal(one.unit, other.unit)
    assert one.moved == other.moved
    unit, delta = one.unit.numpy(), np.random.default_rng(1).standard_normal((7, 300))
    u64 = bounds.UNIT["float64"]
    product = (unit * one.diagonal) @ unit.T
    allowed = 3 * bounds.gamma(303, u64) * (np.abs(unit) * one.diagonal) @ np.abs(unit).T
    assert bounds.ratio(product - hessian.numpy()[np.ix_(order, order)], allowed) <= 1
    allowed = 2 * bounds.gamma(300, u64) * np.abs(delta) @ np.abs(unit)
    assert bounds.ratio(one.residual(delta) - delta @ unit, allowed) <= 1


def test_an_indefinite_matrix_has_no_factor():
    hessian = damped_hessian(32)
    hessian[3, 3] = -1
    assert Feedback.of(hessian, np.arange(32), "float64") is None


# Rewrites ---------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), handlers=st.integers(1, 3))
def test_a_rewrite_keeps_every_weight_but_for_its_roundings(seed, handlers):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 30, generator=generator)
    rewritten, scale = weight, torch.ones(30)
    for _ in range(handlers):
        factor = torch.exp(torch.randn(30, generator=generator))
        rewritten, scale = rewritten * factor, scale * factor
    transform = InputTransform(scale)
    assert function_preserved(weight, rewritten, transform, handlers=handlers).holds
    place = (int(seed % 20), int(seed % 30))
    rewritten[place] *= 1 + 2 * bounds.gamma(4 * handlers + 2)
    broken = function_preserved(weight, rewritten, transform, handlers=handlers)
    assert not broken.holds
    assert broken.place == place


def test_powers_of_two_change_nothing_at_all():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    scale = 2.0 ** torch.arange(-4, 4)
    assert function_preserved(weight, weight * scale, InputTransform(scale)).ratio == 0


@given(seed=st.integers(0, 999), scales=st.booleans())
def test_a_rotation_keeps_every_block_but_for_its_roundings(seed, scales):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 24, generator=generator)
    scale = torch.exp(torch.randn(24, generator=generator)) if scales else None
    rotation = Rotation.drawn(24, np.random.default_rng(seed))
    transform = InputTransform(scale, rotation)
    rewritten = transform.rewrite(weight)
    assert function_preserved(weight, rewritten, transform).holds
    row, block = seed % 20, seed % 3
    length = torch.linalg.vector_norm(rewritten[row, 8 * block : 8 * block + 8])
    rewritten[row, 8 * block] += 4 * bounds.gamma(7) * length
    broken = function_preserved(weight, rewritten, transform)
    assert not broken.holds
    assert broken.theorem == "B4.f"
    assert broken.place == (row, block)


# In the pipeline --------------------------------------------------------------------------------


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))


def data():
    generator = torch.Generator().manual_seed(1)
    return CalibrationData.from_tensors(
        [torch.randn(20, 32, generator=generator) for _ in range(3)]
    )


def host_with(rounder):
    class Plugin:
        @hookimpl
        def qframe_rounders(self):
            return [rounder]

    host = Host.discover()
    host.add(Plugin(), rounder.name)
    return host


@dataclass(frozen=True)
class Floors:
    """Rounds down and claims to round to nearest."""

    name: str = "floors"
    needs: frozenset = frozenset()
    capabilities: Capabilities = field(default=Capabilities())
    claims = (HalfStep(), SchemeScale())

    def round(self, problem, rng):
        good = rounding.to_nearest(problem)
        steps = torch.floor(problem.weight / good.scale[:, good.group_index.long()])
        codes = steps.clamp(problem.grid.qmin, problem.grid.qmax).to(torch.int16)
        return replace(good, codes=codes)


@dataclass(frozen=True)
class Fails:
    """Can do no layer at all."""

    name: str = "fails"
    needs: frozenset = frozenset()
    capabilities: Capabilities = field(default=Capabilities())
    claims = (Babai(dampening_frac=0.01),)

    def round(self, problem, rng):
        raise HessianError("made to fail")


def test_every_layer_has_a_certificate_for_every_claim():
    for method, wanted in (
        ("rtn", {"half step", "scale", "coverage"}),
        ("gptq", {"gptq residual", "scale", "coverage"}),
    ):
        report = qframe.quantize(network(), {"method": method, "scheme": W4}, calibration=data())
        for layer in report.report.layers:
            assert {c.claim for c in layer.certificates} == wanted
            assert all(c.holds for c in layer.certificates)
            assert all(c.error <= c.allowed * bounds.CHECKER for c in layer.certificates)
            assert "certify" in layer.seconds


def test_a_broken_promise_is_an_error_that_says_where_and_leaves_nothing(tmp_path):
    with pytest.raises(CertificateError, match=r"layer '0': half step \(B1.b\).*at \[\d+, \d+\]"):
        qframe.quantize(
            network(),
            {"method": "floors", "scheme": W4},
            out=tmp_path / "out",
            host=host_with(Floors()),
        )
    assert list(tmp_path.iterdir()) == []
    assert CertificateError.exit_code == 3


def test_a_broken_promise_may_be_reported_instead(tmp_path):
    recipe = {"method": "floors", "scheme": W4, "on_violated_certificate": "warn"}
    result = qframe.quantize(network(), recipe, out=tmp_path / "out", host=host_with(Floors()))
    broken = [e.layer for e in result.report.events if e.kind == "certificate violated"]
    assert broken == ["0", "2"]
    manifest = json.loads((tmp_path / "out" / "qframe.json").read_text())
    for layer in manifest["layers"].values():
        half_step, scale = layer["certificates"]
        assert half_step["ratio"] > 1
        assert half_step["error"] > half_step["allowed"]
        assert scale["ratio"] <= 1
        assert layer["clipped"] == 0


def test_a_layer_that_fell_back_is_held_against_what_nearest_claims():
    recipe = {"method": "fails", "scheme": W4, "max_fallback_frac": 1}
    report = qframe.quantize(network(), recipe, host=host_with(Fails())).report
    for layer in report.layers:
        assert [c.claim for c in layer.certificates] == ["half step", "scale", "coverage"]


def test_packing_is_under_the_certificate(monkeypatch):
    """A code that is lost on its way into the file is found, though the rounder was right."""
    from qframe.packing import PackedWeight

    honest = PackedWeight.unpack

    def lossy(self):
        found = honest(self)
        codes = found.codes.clone()
        codes[0, 0] += 1 if codes[0, 0] < 7 else -1
        return replace(found, codes=codes)

    monkeypatch.setattr(PackedWeight, "unpack", lossy)
    with pytest.raises(CertificateError, match=r"half step.*at \[0, 0\]"):
        qframe.quantize(network(), {"method": "rtn", "scheme": W4})
