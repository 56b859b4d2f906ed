"""Hypothesis strategies: what a plugin may be given, with the nasty cases by name.

Draw a whole rounding problem, or the parts of one:

    @given(rounding_problems(max_columns=8, symmetric=True))
    @given(rounding_problems(hessian_kinds=HESSIANS))
    @given(schemes(columns=12, num_bits=4, group_size=5))

A kind of weights, such as `ties`, is a function of a random generator and a shape (`kinds`), so a
test can also call it directly, or bring its own. Shapes without rows are drawn on purpose: a
plugin must not mind them. Nothing here changes a Hypothesis profile or knows of any plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qframe import Grid, Host, RoundingProblem, Scheme
from qframe.contracts import Observer
from qframe_conformance.kinds import (
    NASTY,
    Float64,
    InputKind,
    Kind,
    Shape,
    all_dead_inputs,
    constant,
    correlated_inputs,
    dead_inputs,
    few_inputs,
    halves,
    hessian_of,
    normal,
    one_outlier,
    one_sided,
    outlier_inputs,
    repeated_inputs,
    sparse,
    subnormal,
    ties,
    tiny_and_huge,
    white_inputs,
    zeros,
)

__all__ = [
    "HESSIANS",
    "NASTY",
    "HessianKind",
    "Kind",
    "all_dead",
    "constant",
    "correlated",
    "dead",
    "generators",
    "halves",
    "hessians",
    "installed_grid",
    "installed_host",
    "installed_observer",
    "look_in",
    "looking_in",
    "normal",
    "one_outlier",
    "one_sided",
    "outlier_channel",
    "rank_deficient",
    "repeated",
    "rounding_problem",
    "rounding_problems",
    "schemes",
    "sparse",
    "subnormal",
    "ties",
    "tiny_and_huge",
    "weights",
    "white",
    "zeros",
]

HessianKind = Callable[[np.random.Generator, int], Float64]
Setting = Any  # a value, or a strategy that draws one


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Draw random generators, each from a seed that Hypothesis replays."""
    return st.integers(0, 2**32).map(np.random.default_rng)


# Schemes and their grids ----------------------------------------------------------------------


_LOOKED_IN: ContextVar[Host | None] = ContextVar("looked in", default=None)


def installed_host() -> Host:
    """Return the host of all installed plugins, or the one that `looking_in` puts in its place."""
    return _LOOKED_IN.get() or _discovered()


@cache
def _discovered() -> Host:
    return Host.discover()


def look_in(host: Host) -> None:
    """Look formats and observers up in `host` from now on: for scripts."""
    _LOOKED_IN.set(host)


@contextmanager
def looking_in(host: Host | None) -> Iterator[None]:
    """Look formats and observers up in `host`, which may know files that are not installed.

    host   None changes nothing
    """
    token = _LOOKED_IN.set(host or _LOOKED_IN.get())
    try:
        yield
    finally:
        _LOOKED_IN.reset(token)


def installed_grid(scheme: Scheme) -> Grid:
    """Return the grid of `scheme`, from the number format that is installed for it."""
    number_format = installed_host().get("number format", scheme.format_name)
    grid: Grid = number_format.grid(symmetric=scheme.symmetric, scale_rule=scheme.scale_rule)
    return grid


def installed_input_grid(scheme: Scheme) -> Grid | None:
    """Return the grid of activations, where `scheme` quantizes them."""
    inputs = scheme.input_activations
    if inputs is None:
        return None
    number_format = installed_host().get("number format", inputs.format_name)
    grid: Grid = number_format.grid(symmetric=True, scale_rule="restricted")
    return grid


def installed_observer(name: str) -> Observer:
    """Return the observer that is installed under a name. Raises UnknownNameError for none."""
    observer: Observer = installed_host().get("observer", name)
    return observer


@st.composite
def schemes(draw: st.DrawFn, /, columns: int, **settings: Setting) -> Scheme:
    """Draw schemes of integers for a layer with `columns` inputs.

    settings  fields of `Scheme`, each a value or a strategy. What is not given is drawn; only
              the observer is minmax unless given.

    Groups are of one column, of the whole row, longer than it, dividing it or not (ragged).
    A `group_size` that is given goes with strategy "group", also if no strategy is given.
    """
    if "group_size" in settings:
        settings = {"strategy": "group", **settings}
    choices = {
        "num_bits": st.sampled_from([2, 3, 4, 8]),
        "symmetric": st.booleans(),
        "strategy": st.sampled_from(["tensor", "channel", "group"]),
        "scale_rule": st.sampled_from(["full", "restricted"]),
        "scale_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
    } | settings
    drawn = {
        name: draw(choice) if isinstance(choice, st.SearchStrategy) else choice
        for name, choice in choices.items()
    }
    if drawn["strategy"] == "group" and "group_size" not in drawn:
        drawn["group_size"] = draw(st.integers(1, columns + 3))
    return Scheme.model_validate(drawn)


# Weights --------------------------------------------------------------------------------------


@st.composite
def weights(
    draw: st.DrawFn, /, shape: Shape, kinds: Sequence[Kind | None] = (None, *NASTY)
) -> NDArray[np.float32]:
    """Draw weights of one of `kinds`, as float32; the kind None is any numbers up to 2^15.

    Up to 2^15 every scale fits float16.
    """
    kind = draw(st.sampled_from(kinds))
    if kind is None:
        numbers = st.floats(-(2.0**15), 2.0**15, width=32)
        return draw(hnp.arrays(np.float32, shape, elements=numbers))
    return np.asarray(kind(draw(generators()), shape), np.float32)


# Hessians -------------------------------------------------------------------------------------


def _hessian(kind: InputKind) -> HessianKind:
    """Return the kind of Hessians that belongs to a kind of inputs."""

    def hessian(rng: np.random.Generator, columns: int) -> Float64:
        return hessian_of(kind(rng, columns))

    return hessian


white = _hessian(white_inputs)
correlated = _hessian(correlated_inputs)
rank_deficient = _hessian(few_inputs)
dead = _hessian(dead_inputs)
all_dead = _hessian(all_dead_inputs)
repeated = _hessian(repeated_inputs)
outlier_channel = _hessian(outlier_inputs)

HESSIANS: tuple[HessianKind, ...] = (
    white,
    correlated,
    rank_deficient,
    dead,
    all_dead,
    repeated,
    outlier_channel,
)


@st.composite
def hessians(draw: st.DrawFn, /, columns: int, kinds: Sequence[HessianKind] = HESSIANS) -> Float64:
    """Draw Hessians 2/n X^T X [columns, columns] of one of `kinds`."""
    return draw(st.sampled_from(kinds))(draw(generators()), columns)


# Rounding problems ----------------------------------------------------------------------------


def rounding_problem(
    weight: Any,
    scheme: Scheme,
    hessian: Any = None,
    tokens: int = 100,
    grid_of: Callable[[Scheme], Grid] = installed_grid,
) -> RoundingProblem:
    """Return the problem of a layer called "block.up", from arrays or nested lists.

    Without a Hessian it is that of a data-free run: no statistics and no tokens.
    """
    statistics = {}
    if hessian is not None:
        statistics["hessian"] = torch.from_numpy(np.array(hessian, np.float64))
    return RoundingProblem(
        name="block.up",
        weight=torch.from_numpy(np.array(weight, np.float32)),
        scheme=scheme,
        grid=grid_of(scheme),
        statistics=statistics,
        tokens=tokens if statistics else 0,
    )


@st.composite
def rounding_problems(
    draw: st.DrawFn,
    /,
    max_rows: int = 3,
    max_columns: int = 12,
    weight_kinds: Sequence[Kind | None] = (None, *NASTY),
    hessian_kinds: Sequence[HessianKind] = (),
    grid_of: Callable[[Scheme], Grid] = installed_grid,
    **settings: Setting,
) -> RoundingProblem:
    """Draw layers to be rounded: of no row or some, of one column or more.

    weight_kinds   the weights to draw from, as for `weights`
    hessian_kinds  the Hessians to draw from; none by default, which is a data-free run
    grid_of        gives a scheme its grid; by default the installed number formats do
    settings       as for `schemes`

    The default weights are for rounders that look at each weight alone. One that moves errors
    from weight to weight, as GPTQ does, can make an outlier of 2^13 too large for a float16
    scale: give it smaller ones, `partial(one_outlier, size=2.0**9)`.
    """
    rows, columns = draw(st.integers(0, max_rows)), draw(st.integers(1, max_columns))
    return rounding_problem(
        weight=draw(weights((rows, columns), weight_kinds)),
        scheme=draw(schemes(columns, **settings)),
        hessian=draw(hessians(columns, hessian_kinds)) if hessian_kinds else None,
        grid_of=grid_of,
    )
