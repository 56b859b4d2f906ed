"""Draws layers for rounders: a seed and a few small choices, of which NumPy makes the rest.

The rows of a layer are of the nasty kinds one after another, so that a single call of the plugin
meets them all; with one scale for the whole tensor they are all of one kind. A failing layer
shrinks to one row of the first kind that still fails, and to few columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from hypothesis import strategies as st

from qframe import Capabilities, Grid, InputGroup, LayerInfo, RoundingProblem, Scheme
from qframe.claims import FittedScale, has_claim
from qframe_conformance import kinds, rounder_blocks
from qframe_conformance.engine import Scenario
from qframe_conformance.kinds import Float64, Kind
from qframe_conformance.rounder_cases import CalibrationCase, DeclarationCase, RounderCase
from qframe_conformance.strategies import installed_grid, installed_host, installed_observer

BITS: Final = (2, 3, 4, 5, 6, 7, 8)
STRATEGIES: Final = ("group", "channel", "tensor")
DECLARATIONS: Final = "declarations"
CALIBRATION: Final = "calibration"
THREADS: Final = "threads"
"""Subjects of the scenarios that are not about layers of one scheme."""

NAME = "block.up"
BALANCED = 13  # columns of a group: an end or two of its range, pairs, perhaps one more
TALL = (2048, 17)  # so many weights that torch splits them among threads


# Scenarios ------------------------------------------------------------------------------------


def scenarios(rounder: Any) -> list[Scenario]:
    """Return a scenario for every kind of scheme that the rounder declares, and a few more."""
    declared = [scheme for scheme in all_schemes() if is_declared(rounder, scheme)]
    found = [Scenario(DECLARATIONS, st.just(DeclarationCase(rounder)), DECLARATIONS)]
    if not rounder.needs <= set(installed_host().names("observer")):
        return found  # no layer can be made; the check of declarations says why
    for scheme in declared:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        name = f"{scheme.format_name}-{kind}-{scheme.strategy}"
        found.append(Scenario(name, layers(rounder, scheme), scheme))
    if declared and rounder.needs:
        case = calibration_case(rounder, declared[0])
        found.append(Scenario(CALIBRATION, st.just(case), CALIBRATION))
    for number, strategy in enumerate(STRATEGIES):
        fitting = [scheme for scheme in declared if scheme.strategy == strategy]
        if fitting:
            seeds = st.integers(2 * number + 1, 2 * number + 2)
            made = seeds.map(partial(tall_layer, rounder, fitting[-1]))
            found.append(Scenario(f"{THREADS}-{strategy}", made, THREADS))
    found += rounder_blocks.scenarios(rounder, declared)
    if has_claim(rounder, FittedScale):
        found += nearly_fitted(rounder, declared)
    return found


def nearly_fitted(rounder: Any, declared: Collection[Scheme]) -> Iterator[Scenario]:
    """Yield scenarios whose best scales are next to those of the range, with little to gain.

    That is where a search that leaves out what cannot be better leaves out too much.
    """
    for kind in declared:
        if kind.strategy != "group" or kind.type != "int":
            continue
        rule = "restricted" if kind.symmetric else "full"  # the range ends on a code
        scheme, grid = scheme_of(
            kind.num_bits, kind.symmetric, kind.strategy, BALANCED, rule, "float32"
        )
        if not is_declared(rounder, scheme):
            continue
        made = _SEEDS.map(partial(_balanced_layer, rounder, scheme, grid))
        sides = "symmetric" if kind.symmetric else "asymmetric"
        yield Scenario(f"nearly-fitted-{kind.format_name}-{sides}", made, scheme)


def _balanced_layer(rounder: Any, scheme: Scheme, grid: Grid, seed: int) -> RounderCase:
    rng = np.random.default_rng(seed)
    used = Grid(-grid.qmax, grid.qmax) if scheme.symmetric else grid
    weight = kinds.balanced(rng, (8, 2 * BALANCED), used, BALANCED, symmetric=scheme.symmetric)
    x = kinds.white_inputs(rng, 2 * BALANCED) if rounder.needs else None
    return RounderCase(rounder, problem_of(weight, scheme, grid, rounder.needs, x), seed)


def all_schemes() -> list[Scheme]:
    """Return one scheme of every class: bits, symmetric or not, strategy; floats by format."""
    classes = [(bits, each) for bits in BITS for each in (True, False)]
    sizes = [(strategy, 8 if strategy == "group" else None) for strategy in STRATEGIES]
    return [
        *(
            scheme_of(bits, symmetric, *granularity)[0]
            for (bits, symmetric), granularity in itertools.product(classes, sizes)
        ),
        *(
            scheme_of(bits, True, *granularity, format_name=name)[0]
            for (name, bits), granularity in itertools.product(float_formats(), sizes)
        ),
    ]


def float_formats() -> list[tuple[str, int]]:
    """Return (name, bits) of every installed number format whose codes stand for values."""
    host = installed_host()
    made = [host.get("number format", name) for name in host.names("number format")]
    return [(each.name, each.num_bits) for each in made if each.type == "float"]


def is_declared(rounder: Any, scheme: Scheme) -> bool:
    """Return whether the fields of a rounder's capabilities allow a scheme."""
    return Capabilities.objection(rounder.capabilities, scheme) is None


@cache
def scheme_of(
    bits: int,
    symmetric: bool,
    strategy: Any,
    size: int | None,
    rule: Any = "full",
    dtype: Any = "float16",
    observer: Any = "minmax",
    format_name: str | None = None,
) -> tuple[Scheme, Grid]:
    """Return a scheme and the grid of the installed format.

    format_name   of floats; None for integers
    """
    scheme = Scheme(
        num_bits=bits,
        type="int" if format_name is None else "float",
        format=format_name,
        symmetric=symmetric,
        strategy=strategy,
        group_size=size,
        scale_rule=rule,
        scale_dtype=dtype,
        observer=observer,
    )
    return scheme, installed_grid(scheme)


# Layers ---------------------------------------------------------------------------------------

_COLUMNS = st.sampled_from((1, 2, 3, 5, 8, 12, 16, 17, 20, 24))
_WIDTHS = st.integers(0, 4)
_SEEDS = st.integers(0, 2**32 - 1)
_INPUTS = st.integers(0, len(kinds.INPUTS) - 1)

_RULES = tuple(
    (rule, dtype, "minmax")
    for dtype in ("float16", "float32", "bfloat16")
    for rule in ("full", "restricted")
)
# The search of the mse observer costs as much as all the rest, so it is rare.
_SEARCH = ("full", "float16", "mse")
# Scales of eight bits, for those who declare them; only floats have the last rule.
_EIGHT_BITS = (("full", "e8m0", "minmax"), ("full", "e4m3", "minmax"), ("ocp", "e8m0", "minmax"))


@cache
def scale_rules(dtypes: frozenset[str], floats: bool) -> st.SearchStrategy[tuple[str, str, str]]:
    """Draw (scale_rule, scale_dtype, observer) of the dtypes that a rounder declares."""
    more = [each for each in _EIGHT_BITS[: 3 if floats else 2] if each[1] in dtypes]
    rules = [each for each in _RULES if each[1] in dtypes]
    searches = [(_SEARCH[0], each, _SEARCH[2]) for _, each, _ in more[:2]]
    searches += [_SEARCH] * (_SEARCH[1] in dtypes)
    return st.sampled_from((*(*rules, *more) * 8, *searches))


KINDS = 14
_FIRST = st.integers(0, KINDS - 1)
_ROWS = st.sampled_from((0, 1, 2, 3, *[KINDS] * 8))  # mostly of every kind, often of none


def layers(rounder: Any, scheme: Scheme) -> st.SearchStrategy[RounderCase]:
    """Draw layers with this kind of scheme: rows of all kinds, groups of any width."""
    inputs = _INPUTS if rounder.needs else st.just(0)
    scales = scale_rules(rounder.capabilities.scale_dtypes, scheme.type == "float")
    drawn = st.tuples(_ROWS, _FIRST, _COLUMNS, _WIDTHS, scales, inputs, _SEEDS)

    def make(choices: tuple[Any, ...]) -> RounderCase:
        return layer(rounder, scheme, *choices)

    return drawn.map(make)


def layer(
    rounder: Any,
    kind: Scheme,
    rows: int,
    first: int,
    columns: int,
    width: int,
    scales: tuple[str, str, str],
    inputs: int,
    seed: int,
) -> RounderCase:
    """Return a layer.

    kind    bits, symmetry and strategy
    rows    how many
    first   the kind of the first row
    width   which of the ways to cut a row into groups
    scales  (scale_rule, scale_dtype, observer)
    inputs  which kind of activations the statistics are of
    """
    size = group_sizes(columns)[width] if kind.strategy == "group" else None
    name = kind.format if kind.type == "float" else None
    scheme, grid = scheme_of(
        kind.num_bits, kind.symmetric, kind.strategy, size, *scales, format_name=name
    )
    rng = np.random.default_rng(seed)
    x = kinds.INPUTS[inputs](rng, columns) if rounder.needs else None
    choice = row_kinds(grid, scheme.group_width(columns), scheme.symmetric, x is not None)
    if scheme.strategy == "tensor":
        made = choice[first](rng, (min(rows, 4), columns))
        weight = np.asarray(made, np.float32)
    else:
        every = np.concatenate([np.float32(each(rng, (1, columns))) for each in choice])
        weight = every[np.arange(first, first + rows) % KINDS]
    return RounderCase(rounder, problem_of(weight, scheme, grid, rounder.needs, x), seed)


@cache
def group_sizes(columns: int) -> tuple[int, ...]:
    """Return widths of groups: the whole row, more, ragged, dividing (where there is one), one."""
    dividing = max(d for d in range(1, columns + 1) if columns % d == 0 and d < max(columns, 2))
    return columns, columns + 3, columns // 2 + 1, dividing, 1


@cache
def row_kinds(grid: Grid, width: int, symmetric: bool, calibrated: bool) -> tuple[Kind, ...]:
    """Return the kinds of rows, the simplest first.

    Where errors move from weight to weight outliers are smaller, so that scales fit float16.
    """
    top = 9 if calibrated else 13
    on_grid = partial(kinds.on_grid, grid=grid, width=width, symmetric=symmetric)
    between = partial(kinds.between_codes, grid=grid, width=width, symmetric=symmetric)
    chosen: tuple[Kind, ...] = (
        kinds.normal,
        kinds.zeros,
        kinds.constant,
        kinds.one_sided,
        kinds.sparse,
        kinds.halves,
        on_grid,
        between,
        kinds.ties,
        partial(kinds.one_outlier, size=2.0**top),
        kinds.heavy_tailed,
        kinds.small,
        partial(kinds.tiny_and_huge, top=top),
        kinds.subnormal,
    )
    return chosen


def problem_of(
    weight: Any, scheme: Scheme, grid: Grid, needs: Collection[str], x: Float64 | None
) -> RoundingProblem:
    """Return the problem of a layer with inputs x [tokens, columns], None for a data-free run.

    Each held-out token is one of x with its numbers a column further: of the same size, and with
    correlations of their own.
    """

    def values(seen: Float64 | None) -> dict[str, Any]:
        return {} if seen is None else {name: statistic(name, seen) for name in sorted(needs)}

    return RoundingProblem(
        name=NAME,
        weight=torch.from_numpy(np.ascontiguousarray(weight)),
        scheme=scheme,
        grid=grid,
        statistics=values(x),
        tokens=0 if x is None else len(x),
        held_out=values(None if x is None else np.roll(x, 1, axis=1)),
    )


def statistic(name: str, x: Float64) -> Any:
    """Return the value of the installed observer of this name for inputs x [tokens, columns].

    Those that every installation has are computed here, as their docstrings promise. One of pairs
    is shown `kinds.original_inputs` beside them.
    Raises UnknownNameError where no observer has the name.
    """
    if name == "hessian":
        return torch.from_numpy(kinds.hessian_of(x))
    if name == "absmax":
        return torch.from_numpy(np.float32(np.abs(x).max(0)))
    group = InputGroup(layers=(LayerInfo(name=NAME, rows=1, columns=x.shape[1]),))
    observer = installed_observer(name)
    if getattr(observer, "pairs", False):
        x = np.concatenate([x, kinds.original_inputs(x)], axis=1)
    seen = observer.start(group)
    seen.update(torch.from_numpy(np.float32(x)))
    return seen.value()


# Special layers -------------------------------------------------------------------------------


def tall_layer(rounder: Any, scheme: Scheme, seed: int) -> RounderCase:
    """Return a layer large enough for torch to split its work among threads."""
    rng = np.random.default_rng(seed)
    weight = np.float32(rng.normal(size=TALL))
    x = kinds.correlated_inputs(rng, TALL[1]) if rounder.needs else None
    scheme = scheme.replace(scale_dtype="float32")  # which shows the last bit
    problem = problem_of(weight, scheme, installed_grid(scheme), rounder.needs, x)
    return RounderCase(rounder, problem, seed)


def calibration_case(rounder: Any, scheme: Scheme) -> CalibrationCase:
    """Return layers with two sets of statistics each, which have nothing in common."""
    rng = np.random.default_rng(0)
    grid, pairs = installed_grid(scheme), []
    for _ in range(3):
        weight = np.float32(rng.normal(size=(8, 16)))
        one = kinds.correlated_inputs(rng, 16)
        # Each input against its neighbour, and what was large is small.
        other = rng.normal(size=(48, 8)).repeat(2, axis=1) * np.tile((1.0, -1.0), 8)
        other = (other + rng.normal(size=(48, 16)) / 4) / np.abs(one).max(0)
        pair = tuple(
            RounderCase(rounder, problem_of(weight, scheme, grid, rounder.needs, x))
            for x in (one, other)
        )
        pairs.append((pair[0], pair[1]))
    return CalibrationCase(rounder, scheme, tuple(pairs))
