"""Draws the input groups that outlier handlers are tried on.

A drawn case is a seed and a few small integers; NumPy makes weights and activations of them. Their
columns are of the nasty kinds one after another: dead and quiet and loud channels, weights that
are all zero. Planted groups are those in which a search must find something.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from qframe import Scheme
from qframe.claims import (
    Incoherent,
    KeepsOutliers,
    NoWorseOnSample,
    ProtectsSalient,
    claims_of,
    has_claim,
)
from qframe.reference_ops import hadamard_matrix
from qframe_conformance.engine import Scenario
from qframe_conformance.kinds import Float64, on_grid
from qframe_conformance.outlier_cases import HandlerCase
from qframe_conformance.strategies import installed_grid

BITS = (4, 3, 8, 2, 5, 6, 7)
STRATEGIES = ("group", "channel", "tensor")
COLUMNS = (2, 5, 12, 16, 24, 9)  # cut into blocks of 2, 1, 4, 16, 8 and 1
ROWS = ((3,), (2, 3), (3, 1, 2))  # of the layers of a group
RULES = tuple(itertools.product(("full", "restricted"), ("float16", "float32", "bfloat16")))

# Loudness of a channel: ordinary, an outlier, dead, so quiet that its root underflows in float16,
# ordinary; and of the weights that read it: ordinary, all zero, small, large. The lengths have no
# common divisor, so that all pairs come up.
INPUTS = (1.0, 2.0**6, 0.0, 2.0**-60, 2.0**2)
WEIGHTS = (1.0, 2.0**-1, 0.0, 2.0**-20, 2.0**3, 1.0)

# Planted layers: 24 columns in groups of 8. The first two of a group are the ends of its range;
# the next one is loud in the first group; every second of the others is quiet.
STEP = 2.0**-4
LOUD = 2.0**8
QUIET = 2.0**-4

WIDE = 1024  # columns, so that B8.c says that no weight has a third of its row's length


# Scenarios ------------------------------------------------------------------------------------


def scenarios(handler: Any) -> list[Scenario]:
    """Return the scenarios: groups for the schemes that are declared, planted ones, not finite."""
    found, planted, declared = [], [], []
    gains = [claim.gain for claim in claims_of(handler) if isinstance(claim, ProtectsSalient)]
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):
        every = _schemes(symmetric, handler.capabilities.quantized_inputs)
        schemes = [s for s in every if handler.capabilities.objection(s) is None]
        declared += schemes
        if schemes:
            found.append(Scenario(name, groups(handler, schemes), "ordinary"))
        roomy = [s for s in schemes if (1 << s.num_bits) >= 3 * max(gains, default=np.inf)]
        if roomy:
            planted.append(Scenario(f"planted-{name}", planted_groups(handler, roomy), "planted"))
    edges = [c.threshold for c in claims_of(handler) if isinstance(c, KeepsOutliers)]
    if found and any(edges):
        found.append(Scenario("edges", edge_groups(handler, declared, max(edges)), "planted"))
    if found and has_claim(handler, Incoherent):
        found.append(Scenario("wide", wide_groups(handler, declared[0]), "wide"))
    both = True in handler.capabilities.quantized_inputs
    if found and both and has_claim(handler, NoWorseOnSample):
        found.append(Scenario("one-sided", one_sided_groups(handler, declared), "ordinary"))
    if found and handler.needs:
        poisoned = st.builds(_poisoned, found[0].cases, st.integers(0, 15), st.sampled_from(_BAD))
        found.append(Scenario("not-finite", poisoned, "not finite"))
    return found + planted


def _schemes(symmetric: bool, quantized_inputs: Container[bool]) -> list[Scheme]:
    """Return schemes of all bits and strategies; what capabilities leave free is drawn later.

    Inputs are quantized where they have to be.
    """
    inputs = None if False in quantized_inputs else {"num_bits": 8}
    return [
        Scheme.parse(
            {
                "input_activations": inputs,
                "num_bits": bits,
                "symmetric": symmetric,
                "strategy": strategy,
                "group_size": 8 if strategy == "group" else None,
            },
            "scheme",
        )
        for bits, strategy in itertools.product(BITS, STRATEGIES)
    ]


@st.composite
def groups(draw: st.DrawFn, handler: Any, schemes: Sequence[Scheme]) -> HandlerCase:
    """Draw groups of one to three layers, with channels and weights of all kinds.

    Layers may also lie on the grid as they are, so that a rewrite can only lose: all of them, or
    all but the first, which then must not decide for the others.
    """
    scheme, exact = _drawn(draw, handler, schemes), draw(st.sampled_from(("none", "all", "rest")))
    columns, rows = draw(st.sampled_from(COLUMNS)), draw(st.sampled_from(ROWS))
    tokens, seed = draw(st.sampled_from((1, 7, 48))), draw(st.integers(0, 2**32))
    first, second = draw(st.integers(0, len(INPUTS) - 1)), draw(st.integers(0, len(WEIGHTS) - 1))
    rng = np.random.default_rng(seed)
    place = np.arange(columns)
    loudness = np.array(INPUTS)[(first + place) % len(INPUTS)]
    sizes = np.array(WEIGHTS)[(second + place) % len(WEIGHTS)]
    if exact != "none":  # the grid that is its own mirror image holds both of its ends
        scheme = scheme.replace(scale_rule="restricted")
    weights: dict[str, torch.Tensor] = {}
    for name, count in zip(("block.q", "block.k", "block.v"), rows, strict=False):
        if exact == "all" or (exact == "rest" and weights):
            weight = _representable(rng, (count, columns), scheme)
        else:
            weight = rng.normal(size=(count, columns)) * sizes
        weights[name] = torch.from_numpy(weight.astype(np.float32))
    x = (rng.normal(size=(tokens, columns)) * loudness).astype(np.float32)
    return HandlerCase(handler, weights, x, scheme, seed)


def _representable(rng: np.random.Generator, shape: tuple[int, int], scheme: Scheme) -> Float64:
    """Return large weights that rounding to nearest leaves as they are."""
    width = shape[1] if scheme.strategy == "tensor" else scheme.group_width(shape[1])
    grid = installed_grid(scheme)
    steps = on_grid(rng, shape, grid, width, symmetric=scheme.symmetric)
    if scheme.strategy == "tensor":  # one power of two for all rows, and one zero point
        steps[1:] = rng.permuted(np.broadcast_to(steps[:1], (shape[0] - 1, shape[1])), axis=1)
    return steps * 2.0**6


_BAD = (float("nan"), float("inf"))


def _poisoned(case: HandlerCase, sixteenth: int, number: float) -> HandlerCase:
    case.poison = (sixteenth / 16, number)
    return case


@st.composite
def planted_groups(draw: st.DrawFn, handler: Any, schemes: Sequence[Scheme]) -> HandlerCase:
    """Draw layers with one loud channel, whose weights lie half a step off the grid.

    All other weights are on the grid, so that nothing else is lost. Twelve channels are quiet: to
    make a loud one larger costs them a lot of weight error, but next to no output error.
    """
    scheme, seed = _drawn(draw, handler, schemes, group_size=8), draw(st.integers(0, 2**32))
    rng, grid = np.random.default_rng(seed), installed_grid(scheme)
    columns, reach = 24, (grid.qmax - grid.qmin) / 2
    place = np.arange(columns) % 8
    loud = (2,)
    quiet = tuple(int(c) for c in np.flatnonzero(place >= 4))
    loudness = np.ones(columns)
    loudness[list(loud)], loudness[list(quiet)] = LOUD, QUIET
    x = (loudness * rng.choice([-1.0, 1.0], (64, columns))).astype(np.float32)
    weights = {}
    for name, rows in (("block.q", 4), ("block.k", 2)):
        steps = rng.integers(1 - int(reach), int(reach), (rows, columns)).astype(np.float64)
        steps[:, place == 0], steps[:, place == 1] = reach, -reach
        steps[:, list(loud)] = rng.choice([-0.5, 0.5], (rows, 1))
        weights[name] = torch.from_numpy(np.float32(STEP * steps))
    return HandlerCase(handler, weights, x, scheme, seed, loud, quiet)


@st.composite
def one_sided_groups(draw: st.DrawFn, handler: Any, schemes: Sequence[Scheme]) -> HandlerCase:
    """Draw layers of which one side alone is hard to round; what makes it easier spoils the other.

    Either weights of few bits lie on the grid, and inputs of 8 are uneven; or inputs of 4 bits are
    all 1 or -1, and one column of weights of many bits is far larger than the others.
    """
    uneven_inputs, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    rng, columns = np.random.default_rng(seed), 16
    few, many = min(s.num_bits for s in schemes), max(s.num_bits for s in schemes)
    bits = few if uneven_inputs else many
    scheme = _drawn(draw, handler, [s for s in schemes if s.num_bits == bits], group_size=8)
    inputs = {"num_bits": 8 if uneven_inputs else 4}
    scheme = scheme.replace(scale_rule="restricted", input_activations=inputs)
    loudness, sizes, signs = np.ones(columns), np.ones(columns), rng.choice([-1, 1], (48, columns))
    if uneven_inputs:
        loudness[::2] = 2.0**3
    else:
        sizes[rng.integers(columns)] = 2.0**6
    weights = {}
    for name, rows in (("block.q", 6), ("block.k", 3)):
        if uneven_inputs:
            weight = _representable(rng, (rows, columns), scheme)
        else:
            weight = rng.normal(size=(rows, columns)) * sizes
        weights[name] = torch.from_numpy(weight.astype(np.float32))
    x = rng.normal(size=(48, columns)) * loudness if uneven_inputs else signs
    return HandlerCase(handler, weights, x.astype(np.float32), scheme, seed)


@st.composite
def edge_groups(
    draw: st.DrawFn, handler: Any, schemes: Sequence[Scheme], threshold: float
) -> HandlerCase:
    """Draw layers whose columns reach a threshold in one token, just do, or just do not.

    The other tokens are far below it, whatever the column, so that a mean says nothing; and so are
    the weights of loud columns. Now and then no column reaches it, or all of them do.
    """
    scheme, seed = _drawn(draw, handler, schemes), draw(st.integers(0, 2**32))
    rng, edge = np.random.default_rng(seed), np.float32(threshold)
    below, above = (np.nextafter(edge, np.float32(end)) for end in (0, np.inf))
    reaching, quiet = [edge, -edge, above, 64 * edge], [below, -below, edge / 2, 0.0]
    columns = draw(st.sampled_from(COLUMNS))
    kinds = draw(st.sampled_from((reaching + quiet, reaching + quiet, reaching, quiet)))
    peaks = rng.permutation(np.resize(np.array(kinds, np.float32), columns))
    tokens = draw(st.sampled_from((1, 7, 48)))
    x = (rng.uniform(-1 / 8, 1 / 8, (tokens, columns)) * np.abs(peaks)).astype(np.float32)
    x[rng.integers(0, tokens, columns), np.arange(columns)] = peaks
    sizes = np.where(np.abs(peaks) >= edge, threshold / 8, threshold)
    weights = {}
    for name, rows in zip(
        ("block.q", "block.k", "block.v"), draw(st.sampled_from(ROWS)), strict=False
    ):
        weight = sizes * rng.uniform(-1, 1, (rows, columns))
        weights[name] = torch.from_numpy(weight.astype(np.float32))
    return HandlerCase(handler, weights, x, scheme, seed)


@st.composite
def wide_groups(draw: st.DrawFn, handler: Any, scheme: Scheme) -> HandlerCase:
    """Draw layers wide enough that a rotation spreads whatever stands out.

    Rows are single weights, rows of the Hadamard matrix, which it turns into single weights where
    no random signs come before it, and ordinary ones.
    """
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    weights = {}
    for name in ("block.q", "block.k"):
        weight = rng.normal(size=(4, WIDE))
        weight[0] = 0
        weight[0, rng.integers(WIDE)] = 1
        weight[1:3] = hadamard_matrix(WIDE)[rng.integers(0, WIDE, 2)]
        weights[name] = torch.from_numpy(weight.astype(np.float32))
    x = rng.normal(size=(2, WIDE)).astype(np.float32)
    return HandlerCase(handler, weights, x, scheme, seed)


def _drawn(
    draw: st.DrawFn, handler: Any, schemes: Sequence[Scheme], group_size: int | None = None
) -> Scheme:
    """Draw one of some schemes with what the handler's capabilities leave free."""
    scheme: Scheme = draw(st.sampled_from(list(schemes)))
    rule, dtype = draw(st.sampled_from(RULES))
    changes: dict[str, Any] = {"scale_rule": rule, "scale_dtype": dtype}
    if handler.capabilities.quantized_inputs == {True, False} and draw(st.booleans()):
        changes["input_activations"] = {"num_bits": 8}
    if scheme.strategy == "group":
        changes["group_size"] = group_size or draw(st.sampled_from((8, 5)))
    return scheme.replace(**changes)
