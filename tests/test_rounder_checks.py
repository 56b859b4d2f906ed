"""What the checks of rounders promise: what is drawn, what applies, and what a failure shows."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch

from qframe import Capabilities, Grid, InputGroup, LayerInfo, Scheme, bounds, rounding
from qframe.errors import HessianError, NonFiniteError, UncalibratedLayerError
from qframe_conformance import check_plugin, kinds
from qframe_conformance.checks import checks_of
from qframe_conformance.engine import Search, explore
from qframe_conformance.reproduce import script
from qframe_conformance.rounder_layers import (
    KINDS,
    group_sizes,
    layer,
    row_kinds,
    scenarios,
    scheme_of,
    statistic,
)
from qframe_conformance.rounder_refusals import justified
from qframe_conformance.strategies import installed_grid, installed_observer, rounding_problem
from qframe_plugins.rounders.gptq import GPTQ
from qframe_plugins.rounders.rtn import RTN
from tests.mutants.rounder_reference import Nearest
from tests.mutants.rounders_rtn import RoundFloor

SHAPES = [(rows, columns) for rows in (0, 1, 5) for columns in (1, 2, 7, 12)]
RULES = [(True, "full"), (True, "restricted"), (False, "full")]
GRIDS = [
    Scheme(num_bits=bits, symmetric=symmetric, scale_rule=rule)
    for bits in (2, 4, 8)
    for symmetric, rule in RULES
]


# What is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", GRIDS, ids=Scheme.describe)
def test_weights_on_the_grid_need_no_rounding(shape, scheme):
    grid, rng = installed_grid(scheme), np.random.default_rng(0)
    for width in (1, 2, 5, shape[1]):
        weight = kinds.on_grid(rng, shape, grid, width, symmetric=scheme.symmetric)
        for first in range(0, shape[1], width):
            part = weight[:, first : first + width]
            for row in part:
                ideal = bounds.ideal_scale(row.min(), row.max(), grid, symmetric=scheme.symmetric)
                assert np.log2(ideal) == np.rint(np.log2(ideal))
                interior = row[np.abs(row) < np.abs(row).max()] / ideal
                assert np.array_equal(interior, np.rint(interior))


def test_weights_between_codes_are_ties_and_their_neighbours():
    grid, rng = installed_grid(Scheme()), np.random.default_rng(0)
    weight = kinds.between_codes(rng, (20, 30), grid, 30, symmetric=True)
    power = np.abs(weight).max() / ((grid.qmax - grid.qmin) / 2)
    away = np.abs(np.abs(weight[:, 1:] / power) % 1 - 1 / 2)
    assert np.count_nonzero(away == 0) > 0 < np.count_nonzero(away)
    assert bounds.ratio(away, 2 * bounds.UNIT["float32"] * (grid.qmax + 1)) <= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scale_of_the_range_fits_balanced_weights_but_for_rounding(symmetric):
    """And yet there are errors, by which other scales are worse."""
    grid, rng = Grid(-7, 7), np.random.default_rng(0)
    weight = kinds.balanced(rng, (20, 30), grid, 13, symmetric=symmetric).astype(np.float64)
    for first in (0, 13, 26):
        w = weight[:, first : first + 13]
        s = bounds.ideal_scale(w.min(1), w.max(1), grid, symmetric=symmetric)[:, None]
        k = np.rint(w / s)
        squares = (k**2).sum(1)
        moved = np.abs((w * k).sum(1) / squares - s[:, 0])
        unit = 2 * bounds.UNIT["float32"]  # of each weight, and of those that the range is of
        allowed = unit * ((np.abs(w) + s * np.abs(k)) * np.abs(k)).sum(1) / squares
        assert bounds.ratio(moved, allowed) <= 1
        assert np.abs(w / s - k).max() > 1 / 5


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 12, 17])
def test_groups_are_of_every_width(columns):
    whole, longer, ragged, dividing, one = group_sizes(columns)
    assert (whole, one) == (columns, 1)
    assert longer > columns
    assert columns % dividing == 0
    if columns > 2:
        assert columns % ragged


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_kind_of_rows_fits_every_scale_dtype(bits, calibrated):
    scheme, grid = scheme_of(bits, True, "channel", None, "restricted", "float16")
    rng = np.random.default_rng(0)
    chosen = row_kinds(grid, 12, True, calibrated)
    assert len(chosen) == KINDS
    for kind in chosen:
        weight = torch.from_numpy(np.float32(kind(rng, (50, 12))))
        rounding.fit_scales(weight, scheme, grid)


def test_a_layer_has_rows_of_all_kinds_and_shrinks_to_one():
    scheme, _ = scheme_of(4, True, "channel", None)
    choices = {"columns": 12, "width": 0, "scales": ("full", "float16", "minmax"), "inputs": 0}
    every = layer(RTN(), scheme, rows=KINDS, first=3, seed=7, **choices).weight
    for row in range(KINDS):
        kind = (3 + row) % KINDS
        alone = layer(RTN(), scheme, rows=1, first=kind, seed=7, **choices).weight
        assert torch.equal(alone[0], every[row])


@pytest.mark.parametrize("kind", kinds.INPUTS)
def test_statistics_are_those_of_the_installed_observers(kind):
    x = kind(np.random.default_rng(0), 9)
    given = torch.from_numpy(np.float32(x))
    group = InputGroup(layers=(LayerInfo(name="block.up", rows=1, columns=9),))
    for name in ("hessian", "absmax"):
        seen = installed_observer(name).start(group)
        seen.update(given)
        mine, its = statistic(name, x).double().numpy(), seen.value().double().numpy()
        assert statistic(name, x).dtype == seen.value().dtype
        size = 2 / len(x) * np.abs(x).T @ np.abs(x) if name == "hessian" else np.abs(x).max(0)
        rounded = bounds.gamma(2) + bounds.gamma(2) ** 2  # x is rounded to float32
        allowed = bounds.hessian_sum(size, len(x), len(x)) + rounded * size
        assert bounds.ratio(mine - its, allowed) <= 1


# What applies ---------------------------------------------------------------------------------


def ids(rounder):
    return [scenario.id for scenario in scenarios(rounder)]


def test_every_declared_scheme_is_a_scenario():
    found = ids(RTN())
    schemes = [name for name in found if name.startswith("int")]
    assert len(schemes) == 7 * 2 * 3
    assert found[0] == "declarations"
    assert {"threads-group", "threads-channel", "threads-tensor"} < set(found)
    assert "calibration" not in found
    assert "calibration" in ids(GPTQ())


def test_what_is_not_declared_is_no_scenario():
    class OneOnly(Nearest):
        capabilities = Capabilities(
            num_bits=frozenset({4}), strategies=frozenset({"group"}), symmetric=frozenset({True})
        )

    assert ids(OneOnly()) == ["declarations", "int4-symmetric-group", "threads-group"]


def test_a_rounder_without_claims_meets_the_universal_checks_alone():
    class BlackBox(Nearest):
        claims = ()

    report = check_plugin(BlackBox(), profile="fast")
    assert report.ok
    ran = {record.check for record in report.records if record.status == "held"}
    assert {"packs", "purity", "determinism", "serialization", "decodes", "zeros"} <= ran
    bound = {each.name for each in checks_of("rounder") if each.level in ("bound", "objective")}
    assert not ran & bound


@pytest.mark.parametrize("rounder", [RTN(), GPTQ(), GPTQ(actorder="group", static_groups=False)])
def test_the_installed_rounders_pass(rounder):
    report = check_plugin(rounder)
    assert report.ok, [(record.id, record.message) for record in report.failures]


# Refusals -------------------------------------------------------------------------------------


def large(rounder, dtype="float16", **more):
    scheme = Scheme(num_bits=4, scale_dtype=dtype)
    return rounding_problem(np.full((1, 2), 2.0**24), scheme, **more)


def test_a_scale_that_does_not_fit_may_be_refused():
    error = NonFiniteError("too large")
    assert justified(RTN(), large(RTN()), error)
    assert justified(RTN(), large(RTN(), "bfloat16"), error) is None


def test_a_layer_with_tokens_is_not_uncalibrated():
    error = UncalibratedLayerError("no tokens")
    problem = rounding_problem(np.ones((1, 2)), Scheme(), np.eye(2))
    assert justified(GPTQ(), problem, error) is None
    assert justified(GPTQ(), dataclasses.replace(problem, tokens=0), error)


def test_only_a_singular_hessian_may_be_refused():
    error = HessianError("not positive definite")
    weight = np.ones((1, 2))
    assert justified(GPTQ(), rounding_problem(weight, Scheme(), np.eye(2)), error) is None
    assert justified(GPTQ(), rounding_problem(weight, Scheme(), np.ones((2, 2))), error)


def test_no_other_error_is_justified():
    for error in (ValueError("shape"), KeyError("hessian")):
        assert justified(RTN(), large(RTN()), error) is None


# Failures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failure():
    report = check_plugin(RoundFloor(), only=["half_step"], scenarios=["int4-symmetric-channel"])
    [record] = report.failures
    return report, record


def test_a_failure_shrinks_to_a_layer_that_can_be_read(failure):
    _, record = failure
    weight = record.counterexample.arrays["weight"]
    assert len(weight) == 1
    assert weight.shape[1] <= 3
    assert record.ratio > 1
    assert record.theorem == "B1.b"


def test_a_failure_is_a_script_that_runs_alone(failure):
    report, record = failure
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(script(record, report.code), "counterexample", "exec"), {})
    assert "half_step is violated: half step, error/allowed = " in said.getvalue()


def test_a_layer_with_statistics_is_a_script_too():
    class Refuses(Nearest):
        needs = frozenset({"hessian"})

        def round(self, problem, rng):
            raise KeyError("hessian")

    report = check_plugin(Refuses(), only=["answers"], scenarios=["int4-symmetric-channel"])
    [record] = report.failures
    names = {"plugin": Refuses()}
    code = script(record, "plugin = plugin", file=None)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "counterexample", "exec"), names)
    assert "answers is violated: raised KeyError" in said.getvalue()


def test_what_cannot_be_stored_is_the_fault_of_one_check_alone():
    class OutOfRange(Nearest):
        def codes(self, codes, grid):
            return codes + 1000

    report = check_plugin(OutOfRange(), profile="fast", shrink=False)
    assert {record.check for record in report.failures} == {"packs"}


def test_an_error_is_the_fault_of_one_check_alone():
    class Crashes(Nearest):
        def steps(self, weight, scale):
            raise ZeroDivisionError

    report = check_plugin(Crashes(), profile="fast", shrink=False)
    assert {record.check for record in report.failures} == {"answers"}


def test_scenarios_of_one_seed_draw_different_layers():
    drawn = {}

    class Look:
        name = "look"

        @staticmethod
        def function(case):
            drawn.setdefault(case.scheme.symmetric, []).append(case.seed)

    for scenario in scenarios(RTN()):
        if scenario.id in ("int4-symmetric-group", "int4-asymmetric-group"):
            explore(scenario, [Look()], Search(5, 0))
    assert drawn[True] != drawn[False]
    assert all(isinstance(seed, int) for seeds in drawn.values() for seed in seeds)


def test_the_thread_count_is_tried_where_torch_splits_the_work():
    case = next(s for s in scenarios(RTN()) if s.id == "threads-tensor")
    seen = []

    class Look:
        name = "look"

        @staticmethod
        def function(case):
            seen.append(case.weight.numel())

    explore(case, [Look()], Search(5, 0))
    grain = 1 << 15  # at::internal::GRAIN_SIZE, in which torch splits
    assert min(seen) > grain
