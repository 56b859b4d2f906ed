"""Draws keys and values, the pieces in which they come, and lives; the nasty ones by name."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st

from qframe.kv_scheme import KVScheme
from qframe_conformance.engine import Scenario
from qframe_conformance.kv_cases import KVCase, Operation
from qframe_conformance.kv_lanes import LANES, lanes

BITS = (2, 4, 8)
AXES: tuple[Literal["token", "channel"], ...] = ("token", "channel")
DTYPES = ("float32", "float16", "bfloat16")


def scenarios(quantizer: Any) -> list[Scenario]:
    """Return a scenario for every kind of scheme that the quantizer declares."""
    found = []
    for num_bits, axis, symmetric in itertools.product(BITS, AXES, (False, True)):
        scheme = KVScheme(num_bits=num_bits, axis=axis, symmetric=symmetric, group_size=8)
        if quantizer.capabilities.objection(scheme) is None:
            name = f"int{num_bits}-{'symmetric' if symmetric else 'asymmetric'}-{axis}"
            found.append(Scenario(name, cases(quantizer, scheme), scheme))
    return found


def planted(scheme: KVScheme) -> dict[str, tuple[Operation, ...]]:
    """Return lives by name, each with enough tokens that there are two groups of codes."""
    sinks, step, window = scheme.sink_tokens, scheme.step, scheme.residual_length
    grow: Operation = ("append", sinks + window + 2 * step + 1)
    flush: Operation = ("append", window + step)
    one: Operation = ("append", 1)
    inside = sinks + step + (step + 1) // 2
    return {
        "crop into a group": (grow, ("crop", inside), flush, one),
        "crop into the window": (grow, ("crop", -2), one, flush),
        "crop codes, then more": (grow, ("crop", -window - 2), ("crop", -step), flush, flush),
        "crop to nothing": (("crop", 0), grow, one),
        "crop into the sinks": (grow, ("crop", sinks // 2), grow),
        "beam search": (grow, ("select", 4), one, ("select", 7), flush),
        "keep one sequence": (grow, ("select", 9), flush, ("crop", inside), flush),
        "speculate": (grow, ("append", 4), ("crop", -3), ("append", 4), ("crop", -3), flush),
    }


_SIZES = st.tuples(
    st.sampled_from((1, 8, 16, 48, 96)),  # head_dim
    st.integers(0, 4),  # which group size
    st.sampled_from((0, 1, 6, 12)),  # residual_length
    st.sampled_from((0, 0, 1, 4)),  # sink_tokens
    st.integers(1, 3),  # heads
    st.integers(0, 48),  # tokens, in all
)
_OPERATIONS: tuple[st.SearchStrategy[Any], ...] = (
    st.tuples(st.just("append"), st.integers(0, 30)),
    st.tuples(st.just("crop"), st.integers(-10, 40)),
    st.tuples(st.just("select"), st.integers(0, 9)),
)
_LIVES = st.lists(st.one_of(*_OPERATIONS), max_size=6)
_PLANTED = st.integers(0, 2 * len(planted(KVScheme())) - 1)  # half of the lives are planted ones
_SEEDS = st.integers(0, 2**32)


@st.composite
def cases(draw: st.DrawFn, quantizer: Any, base: KVScheme) -> KVCase:
    """Draw cases with the bits, axis and symmetry of `base`.

    What a smaller example should have less of is drawn; all else comes from a drawn seed.
    """
    head_dim, choice, window, sinks, heads, tokens = draw(_SIZES)
    seed = draw(_SEEDS)
    rng = np.random.default_rng(seed)
    sizes = (4, 1, 8, 12, 5) if base.axis == "channel" else (None, 1, 5, 8, 32)
    scheme = base.model_copy(
        update={
            "group_size": sizes[choice],
            "residual_length": window,
            "sink_tokens": sinks,
            "scale_dtype": DTYPES[rng.integers(3)],
        }
    )
    names, number = list(planted(scheme).values()), draw(_PLANTED)
    life = names[number] if number < len(names) else tuple(draw(_LIVES))
    dtype, first = DTYPES[rng.integers(3)], int(rng.integers(len(LANES)))
    shape = 2, heads, tokens, head_dim
    query = rng.normal(size=(2, heads * int(rng.integers(1, 4)), head_dim))
    query *= (1.0, 8.0, 2.0**9)[rng.integers(3)]  # the last: exp of the logits overflows
    return KVCase(
        quantizer,
        scheme,
        keys=lanes(rng, shape, dtype, first),
        values=lanes(rng, shape, dtype, first + 1),
        pieces=(_whole, _prefill, _random)[rng.integers(3)](rng, tokens),
        query=torch.from_numpy(query.astype(np.float32)),
        kind=("key", "value")[rng.integers(2)],
        life=life,
        seed=seed,
    )


def _whole(rng: np.random.Generator, tokens: int) -> tuple[int, ...]:
    return (tokens,)


def _prefill(rng: np.random.Generator, tokens: int) -> tuple[int, ...]:
    """A prompt, and some tokens one by one."""
    single = min(int(rng.integers(7)), tokens)
    return (tokens - single, *(1,) * single)


def _random(rng: np.random.Generator, tokens: int) -> tuple[int, ...]:
    """Pieces of any size, some of nothing."""
    cuts = np.sort(rng.integers(0, tokens + 1, 3))
    return tuple(int(n) for n in np.diff([0, *cuts, tokens]))
