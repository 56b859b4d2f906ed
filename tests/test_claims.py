"""Claims hold of what is right, and of nothing else: certificates of layers, good and bad."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qframe import Scheme, bounds, claims, parallel
from qframe.certificates import Certificate, Evidence, LayerClaim
from qframe.contracts import Event
from qframe_conformance.strategies import (
    all_dead,
    correlated,
    dead,
    halves,
    normal,
    one_outlier,
    rank_deficient,
    rounding_problem,
    sparse,
)
from qframe_plugins.rounders.gptq import GPTQ
from qframe_plugins.rounders.rtn import RTN

RNG = np.random.default_rng(0)  # neither method takes random numbers
OPTIONS = {
    "natural, dynamic": {"actorder": None},
    "natural, static": {"actorder": None, "static_groups": True},
    "ordered, static": {"actorder": "static"},
    "groups by order, dynamic": {"actorder": "group"},
    "groups by order, static": {"actorder": "group", "static_groups": True},
}
SCHEMES = {
    "ragged groups": {"group_size": 5},
    "ragged groups, asymmetric": {"group_size": 5, "symmetric": False},
    "groups of one": {"group_size": 1},
    "a group longer than the row": {"group_size": 40},
    "channel": {"strategy": "channel", "num_bits": 8},
    "tensor": {"strategy": "tensor", "symmetric": False},
    "mse": {"group_size": 8, "observer": "mse"},
    "float32 scales": {"group_size": 4, "scale_dtype": "float32", "scale_rule": "restricted"},
    "bfloat16 scales": {"group_size": 4, "scale_dtype": "bfloat16", "num_bits": 2},
}


def problem(rows=12, columns=18, seed=0, weights=normal, hessian=correlated, **settings):
    rng = np.random.default_rng(seed)
    weight = weights(rng, (rows, columns))
    scheme = Scheme(**(settings or {"group_size": 5}))
    return rounding_problem(weight, scheme, hessian(rng, columns))


def certify(plugin, given, made=None, **evidence):
    """Return certificates by name."""
    made = plugin.round(given, RNG) if made is None else made
    found = Evidence(given, made, **evidence).certificates(claims.claims_of(plugin))
    return {certificate.claim: certificate for certificate in found}


def broken(plugin, given, made):
    """Return the names of the claims that do not hold."""
    return {name for name, each in certify(plugin, given, made).items() if not each.holds}


def changed(made, **changes):
    return dataclasses.replace(made, **changes)


# What is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_everything_that_gptq_claims_holds(options, settings):
    for kind in (sparse, halves, one_outlier):
        given = problem(weights=kind, **settings)
        given = dataclasses.replace(given, weight=given.weight / 16)  # outliers fit float16
        for certificate in certify(GPTQ(**options), given).values():
            assert certificate.holds, str(certificate)


@pytest.mark.parametrize("settings", SCHEMES.values(), ids=SCHEMES)
def test_everything_that_rtn_claims_holds(settings):
    for kind in (sparse, halves, one_outlier):
        for certificate in certify(RTN(), problem(weights=kind, **settings)).values():
            assert certificate.holds, str(certificate)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 18), (1, 1), (0, 1), (3, 2), (300, 3)])
def test_layers_may_be_of_no_row_or_of_one_column(options, rows, columns):
    for plugin in (GPTQ(**options), RTN()):
        for certificate in certify(plugin, problem(rows, columns)).values():
            assert certificate.holds, str(certificate)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("hessian", [dead, all_dead, rank_deficient])
def test_dead_columns_and_few_tokens_are_no_excuse_and_no_obstacle(options, hessian):
    certificates = certify(GPTQ(**options), problem(hessian=hessian, seed=3))
    assert all(each.holds and not each.note for each in certificates.values())
    assert certificates["gptq residual"].ratio > 1 / 2


def test_what_is_claimed_depends_on_where_scales_come_from():
    def claimed(scheme, **options):
        found = claims.claims_of(GPTQ(**options))
        layer = [each for each in found if isinstance(each, LayerClaim)]
        return [each.name for each in layer if each.objection(scheme) is None]

    group, channel = Scheme(group_size=4), Scheme(strategy="channel")
    whole = ["gptq residual", "scale", "coverage"]
    assert claimed(group, actorder=None) == ["gptq residual", "compensated scale"]
    assert claimed(channel, actorder=None) == whole
    assert claimed(group, actorder="static") == claimed(channel, actorder="static") == whole
    assert claimed(Scheme(group_size=4, observer="mse"), static_groups=True) == whole[:2]


@pytest.mark.parametrize("claim", [claims.Radius(1), claims.OutputBound(1), claims.NoWorseThan()])
@pytest.mark.parametrize("kind", [normal, sparse, halves, one_outlier])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_to_nearest_keeps_what_holds_for_methods_of_any_kind(claim, kind, symmetric):
    given = problem(weights=kind, group_size=5, symmetric=symmetric)
    certificate = claim.certify(Evidence(given, RTN().round(given, RNG)))
    assert certificate.holds, str(certificate)
    assert certificate.ratio > 0


# What is wrong --------------------------------------------------------------------------------


def off_by_one(made, row, column):
    codes = made.codes.clone()
    codes[row, column] += 1 if codes[row, column] <= 0 else -1
    return changed(made, codes=codes)


def test_a_single_code_that_is_off_by_one_is_found_and_named():
    given = problem(30, group_size=5)
    made = off_by_one(RTN().round(given, RNG), 21, 16)
    certificate = certify(RTN(), given, made)["half step"]
    assert not certificate.holds
    assert certificate.place == (21, 16)
    assert "violated" in str(certificate)
    for options in OPTIONS.values():
        made = GPTQ(**options).round(given, RNG)
        last = int(made.order[-1])  # no other column makes up for this one
        certificate = certify(GPTQ(**options), given, off_by_one(made, 21, last))["gptq residual"]
        assert not certificate.holds
        assert certificate.place == (21, last)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rounding_to_nearest_is_not_gptq(options):
    given = problem(group_size=5)
    made = GPTQ(**options).round(given, RNG)
    nearest = RTN().round(given, RNG)
    assert "gptq residual" in broken(GPTQ(**options), given, changed(made, codes=nearest.codes))


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (lambda made: changed(made, scale=made.scale * 2), "scale"),
        (lambda made: changed(made, scale=made.scale / 2), "coverage"),
        (lambda made: changed(made, zero_point=made.zero_point + 1), "half step"),
        (lambda made: changed(made, group_index=made.group_index.flip(0)), "scale"),
        (lambda made: changed(made, scale=made.scale.roll(1, 0)), "scale"),
    ],
)
def test_wrong_scales_zero_points_and_groups_are_found(change, claim):
    given = problem(group_size=6, symmetric=False)
    assert claim in broken(RTN(), given, change(RTN().round(given, RNG)))


@pytest.mark.parametrize("actorder", [None, "group"])
@pytest.mark.parametrize(
    "change",
    [
        lambda made: changed(made, scale=made.scale * 2),
        lambda made: changed(made, scale=made.scale / 2),
        lambda made: changed(made, zero_point=made.zero_point + 1),
        lambda made: changed(made, group_index=made.group_index.flip(0)),
    ],
)
def test_wrong_scales_of_dynamic_groups_are_found(actorder, change):
    plugin, given = GPTQ(actorder=actorder), problem(group_size=6, symmetric=False)
    made = plugin.round(given, RNG)
    assert "compensated scale" in broken(plugin, given, change(made))


def test_scales_of_the_original_weights_are_not_those_of_dynamic_groups():
    given = problem(group_size=6)
    dynamic = GPTQ(actorder=None)
    static = GPTQ(actorder=None, static_groups=True).round(given, RNG)
    assert broken(dynamic, given, static) == {"compensated scale"}
    assert broken(GPTQ(actorder=None, static_groups=True), given, dynamic.round(given, RNG)) >= {
        "scale"
    }


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda made: changed(made, info={"damp": 0.02}), "not one of the declared 0.01, 0.1, 1"),
        (lambda made: changed(made, info={"damp": 0.1}), "no event says so"),
        (lambda made: changed(made, order=None), "not ordered by falling diagonal"),
        (lambda made: changed(made, order=made.order.flip(0)), "not ordered by falling diagonal"),
        (lambda made: changed(made, order=made.order * 0), "not a permutation"),
    ],
)
def test_what_was_done_otherwise_than_declared_is_said_in_words(change, note):
    given = problem(group_size=6)
    certificate = certify(GPTQ(), given, change(GPTQ().round(given, RNG)))["gptq residual"]
    assert certificate.ratio == np.inf
    assert note in certificate.note
    assert note in str(certificate)


def test_another_damping_than_was_reported_is_found():
    given = problem(group_size=6)
    event = Event(kind="damping raised", layer="block.up", message="0.1 was used")
    made = changed(GPTQ().round(given, RNG), info={"damp": 0.1}, events=(event,))
    assert "gptq residual" in broken(GPTQ(), given, made)


def test_methods_that_do_worse_than_nearest_are_found():
    given = problem(group_size=6)
    made = RTN().round(given, RNG)
    far = changed(made, codes=(made.codes + 2).clamp(max=given.grid.qmax))
    for claim in (claims.Radius(1), claims.NoWorseThan(), claims.NoWorseThan("weight")):
        assert not claim.certify(Evidence(given, far)).holds
    ends = changed(made, codes=torch.full_like(made.codes, given.grid.qmax))
    assert not claims.OutputBound(1).certify(Evidence(given, ends)).holds


# Numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_that_is_not_finite_passes(bad):
    given = problem(group_size=6)
    for plugin in (RTN(), GPTQ(), GPTQ(actorder=None)):
        made = plugin.round(given, RNG)
        scale = made.scale.clone()
        scale[3, 1] = bad
        certificates = certify(plugin, given, changed(made, scale=scale))
        assert not any(each.holds for each in certificates.values())
    extra = (claims.Radius(1), claims.NoWorseThan(), claims.OutputBound(1))
    made = changed(RTN().round(given, RNG), scale=scale)
    assert not any(each.holds for each in Evidence(given, made).certificates(extra))


def test_a_hessian_that_is_not_finite_proves_nothing():
    given = problem(group_size=6)
    made = GPTQ().round(given, RNG)
    given.statistics["hessian"][2, 2] = np.nan
    assert "gptq residual" in broken(GPTQ(), given, made)


# Hessians near to singular ------------------------------------------------------------------------


def test_of_a_hessian_that_is_singular_to_working_precision_nothing_is_said_and_that_is_said():
    tiny = bounds.UNIT["float64"] / 4
    plugin = GPTQ(dampening_frac=tiny, dampening_cap=tiny)
    given = problem(hessian=lambda rng, n: np.ones((n, n)) + np.eye(n) * tiny, group_size=6)
    usual = GPTQ().round(given, RNG)
    made = changed(usual, info={"damp": tiny}, codes=torch.zeros_like(usual.codes))
    certificate = certify(plugin, given, made)["gptq residual"]
    assert certificate.holds
    assert certificate.note.startswith("nothing can be said")


def test_no_solver_can_have_factorized_an_indefinite_hessian():
    def indefinite(rng, columns):
        hessian = np.eye(columns)
        hessian[0, 1] = hessian[1, 0] = 3
        return hessian

    given = problem(hessian=indefinite, group_size=6)
    made = GPTQ(dampening_cap=10.0).round(given, RNG)
    assert made.info["damp"] == 10
    assert broken(GPTQ(dampening_cap=10.0), given, made) == set()
    made = changed(made, info={"damp": 1.0})
    certificate = certify(GPTQ(), given, made)["gptq residual"]
    assert certificate.note == "the damped Hessian is not positive definite"
    assert not certificate.holds


# Threads, sharing, plugins ------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_certificates_do_not_depend_on_threads_or_on_what_is_shared(options):
    given = problem(400, 40, group_size=16, symmetric=False)
    extra = (claims.Radius(1), claims.NoWorseThan(), claims.OutputBound(1))
    for plugin in (GPTQ(**options), RTN()):
        made = plugin.round(given, RNG)
        claimed = (*claims.claims_of(plugin), *extra)
        with parallel.one_torch_thread():
            shared = {}
            found = [
                Evidence(given, made, shared if again else {}, threads).certificates(claimed)
                for threads in (1, 4)
                for again in (False, True)
            ]
        assert found.count(found[0]) == len(found)


def test_layers_of_one_input_share_the_factorization():
    one, other = problem(seed=0, group_size=6), problem(seed=1, group_size=6)
    other = dataclasses.replace(other, statistics=one.statistics)
    shared = {}
    for given in (one, other):
        certify(GPTQ(), given, shared=shared)
    assert len(shared) == 1


@dataclasses.dataclass(frozen=True)
class EvenCodes:
    """A theorem of a third party: all codes are even."""

    name = "even codes"
    theorem = "own"

    def objection(self, scheme):
        return "of 2 bits there are too few" if scheme.num_bits == 2 else None

    def certify(self, evidence):
        odd = evidence.quantized.codes % 2 != 0
        return Certificate(claim=self.name, theorem=self.theorem, ratio=2.0 * bool(odd.any()))


def test_a_plugin_may_bring_a_theorem_of_its_own():
    given = problem(group_size=6)
    made = RTN().round(given, RNG)
    claimed = (EvenCodes(), claims.HalfStep(), claims.Idempotent())
    own, half = Evidence(given, made).certificates(claimed)
    assert (own.claim, own.holds) == ("even codes", False)
    assert half.claim == "half step"  # a flag gives no certificate
    even = changed(made, codes=made.codes // 2 * 2)
    assert Evidence(given, even).certificates(claimed)[0].holds
    given = problem(group_size=6, num_bits=2)
    made = RTN().round(given, RNG)
    assert len(Evidence(given, made).certificates(claimed)) == 1


def test_claims_are_read_from_any_object():
    assert claims.claims_of(object()) == ()
    assert claims.has_claim(RTN(), claims.HalfStep)
    assert not claims.has_claim(GPTQ(), claims.HalfStep)


@pytest.mark.parametrize(
    "claim",
    [
        claims.Radius(1),
        claims.Babai(0.01),
        claims.CompensatedScale(claims.Babai(0.01)),
        claims.NoWorseThan(),
        claims.OutputBound(1),
        claims.FittedScale(),
        claims.NoWorsePower(0.5),
    ],
)
def test_claims_about_integers_say_nothing_of_floats(claim):
    assert isinstance(claim, LayerClaim)
    assert "not equal" in claim.objection(Scheme(type="float", group_size=4))


def test_every_theorem_is_in_the_document():
    document = (Path(__file__).parents[1] / "docs" / "bounds.md").read_text(encoding="utf-8")
    named = [getattr(claims, name) for name in claims.__all__]
    theorems = {each.theorem for each in named if isinstance(each, type)}
    missing = [t for t in theorems if not re.search(rf"^### {t} ", document, re.MULTILINE)]
    assert missing == []


def test_importing_claims_is_light():
    code = "import sys, qframe.claims; print(sorted(sys.modules.keys() & {'torch', 'numba'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# B1.g: what GPTQ claims of symmetries, and what it does not ---------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gptq_gives_minus_w_the_codes_of_w_with_the_other_sign(options):
    given = problem(30, group_size=5, scale_rule="restricted", weights=sparse)
    made = GPTQ(**options).round(given, RNG)
    mirrored = GPTQ(**options).round(dataclasses.replace(given, weight=-given.weight), RNG)
    assert torch.equal(made.codes, -mirrored.codes)
    assert torch.equal(made.scale, mirrored.scale)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gptq_commutes_with_powers_of_two_where_no_group_is_zero(options):
    given = problem(30, group_size=5)
    made = GPTQ(**options).round(given, RNG)
    scaled = GPTQ(**options).round(dataclasses.replace(given, weight=given.weight * 2**4), RNG)
    assert torch.equal(made.codes, scaled.codes)
    assert torch.equal(made.scale * 2**4, scaled.scale)


def test_a_group_of_zeros_makes_up_for_errors_in_steps_of_one():
    """So that GPTQ does not claim scale equivariance."""
    scheme = Scheme(num_bits=2, group_size=2, scale_rule="restricted")
    hessian = np.full((4, 4), 1.0) + np.eye(4)
    plugin = GPTQ(actorder=None, static_groups=True)

    def codes(size):
        weight = [[size, size / 4, 0.0, 0.0]]
        return plugin.round(rounding_problem(weight, scheme, hessian), RNG).codes

    assert codes(1.0)[0, 2:].tolist() == [0, 0]
    assert codes(64.0)[0, 2:].tolist() != [0, 0]
    assert not claims.has_claim(plugin, claims.ScaleEquivariant)
