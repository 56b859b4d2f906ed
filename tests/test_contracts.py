"""The default plugins keep their contracts: observers add up, capabilities say what they mean."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Capabilities, Grid, InputGroup, LayerInfo, Scheme, bounds
from qframe.host import KINDS, Host, objection
from qframe_plugins.kernels.numba_cpu.hessian import RUN
from qframe_plugins.observers.absmax import Absmax
from qframe_plugins.observers.hessian import HessianObserver

OBSERVERS = [Absmax(), HessianObserver()]


def group_of(columns):
    layers = tuple(LayerInfo(name=f"block.{n}", rows=4, columns=columns) for n in "qkv")
    return InputGroup(layers=layers)


@st.composite
def batches(draw, max_tokens=12):
    """Lists of activations [tokens, columns], some of them empty, of any order of magnitude."""
    columns, count = draw(st.integers(1, 8)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = 2.0 ** rng.integers(-60, 30, columns)
    return columns, [
        torch.from_numpy(
            np.float32(rng.normal(size=(rng.integers(max_tokens + 1), columns)) * size)
        )
        for _ in range(count)
    ]


def seen(observer, columns, parts):
    statistic = observer.start(group_of(columns))
    for x in parts:
        statistic.update(x)
    return statistic


def hessian_and_bound(columns, parts, tile=RUN, extra=0):
    """H of all parts in float64, and what B9.a allows a sum in tiles."""
    x = np.float64(torch.cat([torch.zeros(0, columns), *parts]).numpy())
    factor = 2 / max(len(x), 1)
    magnitude = np.abs(x).T @ np.abs(x) * factor
    allowed = bounds.hessian_sum(magnitude, len(x), tile, len(parts) + 1 + extra)
    # The float64 sum that the check makes is as far from the truth as its own bound says.
    own = bounds.accumulate(magnitude, len(x) + 2, bounds.UNIT["float64"])
    return x.T @ x * factor, allowed + own


# Observers ------------------------------------------------------------------------------------


@given(batches())
def test_absmax_is_the_largest_magnitude(drawn):
    columns, parts = drawn
    value = seen(Absmax(), columns, parts).value()
    everything = torch.cat([torch.zeros(1, columns), *parts])
    assert torch.equal(value, everything.abs().amax(0))


@given(batches())
def test_the_hessian_is_the_mean_of_squares_to_its_bound(drawn):
    columns, parts = drawn
    value = seen(HessianObserver(), columns, parts).value()
    assert value.dtype == torch.float64
    assert torch.equal(value, value.T)
    exact, allowed = hessian_and_bound(columns, parts)
    assert bounds.ratio(value.numpy() - exact, allowed) <= 1


def test_many_tokens_keep_the_bound_too():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.float32(rng.normal(size=(3 * RUN + 17, 70)) + 5))
    value = seen(HessianObserver(), 70, [x]).value()
    exact, allowed = hessian_and_bound(70, [x])
    assert bounds.ratio(value.numpy() - exact, allowed) <= 1
    # A bound that a forgotten token would keep would be no bound.
    short = seen(HessianObserver(), 70, [x[:-1]]).value().numpy() * ((len(x) - 1) / len(x))
    assert bounds.ratio(short - exact, allowed) > 1


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda each: each.name)
@given(drawn=batches(), data=st.data())
def test_merging_is_having_seen_both(observer, drawn, data):
    columns, parts = drawn
    cut = data.draw(st.integers(0, len(parts)))
    one, other = seen(observer, columns, parts[:cut]), seen(observer, columns, parts[cut:])
    before = other.value().clone()
    one.merge(other)
    assert torch.equal(other.value(), before)
    whole = seen(observer, columns, parts).value()
    if observer.name == "absmax":
        assert torch.equal(one.value(), whole)
    else:
        _, allowed = hessian_and_bound(columns, parts, extra=1)
        assert bounds.ratio(one.value().numpy() - whole.numpy(), 2 * allowed) <= 1


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda each: each.name)
@given(drawn=batches())
def test_statistics_can_be_pickled_and_do_not_change_what_they_see(observer, drawn):
    columns, parts = drawn
    before = [x.clone() for x in parts]
    statistic = seen(observer, columns, parts)
    value = statistic.value()
    again = pickle.loads(pickle.dumps(statistic))
    again.update(torch.ones(1, columns))
    assert all(torch.equal(x, y) for x, y in zip(parts, before, strict=True))
    assert torch.equal(statistic.value(), value)
    value.zero_()
    assert torch.equal(statistic.value(), seen(observer, columns, parts).value())


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda each: each.name)
def test_nothing_seen_is_zero(observer):
    assert not observer.start(group_of(3)).value().any()


# Declarations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_default_plugin_keeps_its_contract(kind):
    host = Host.discover()
    _, contract = KINDS[kind]
    assert [objection(host.get(kind, name), contract) for name in host.names(kind)] == [
        None for _ in host.names(kind)
    ]


@pytest.mark.parametrize(
    ("declared", "scheme", "said"),
    [
        ({"num_bits": frozenset({4})}, {"num_bits": 3}, "num_bits=3 is not supported"),
        ({}, {"type": "float"}, "type='float' is not supported (supported: ['int'])"),
        ({"strategies": frozenset({"group"})}, {}, "strategy='channel' is not supported"),
        ({"symmetric": frozenset({True})}, {"symmetric": False}, "symmetric=False"),
    ],
)
def test_what_is_not_declared_is_objected_to_with_what_is(declared, scheme, said):
    assert said in Capabilities(**declared).objection(Scheme(**scheme))
    assert Capabilities().objection(Scheme()) is None


def test_a_group_is_named_after_its_first_layer():
    group = group_of(8)
    assert (group.name, group.columns, group.layers[0].size) == ("block.q", 8, 32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_grids_have_all_codes_of_their_bits_but_one_when_restricted(bits):
    integer = Host.discover().get("number format", f"int{bits}")
    full = integer.grid(symmetric=True, scale_rule="full")
    restricted = integer.grid(symmetric=True, scale_rule="restricted")
    asymmetric = integer.grid(symmetric=False, scale_rule="full")
    assert full.levels == asymmetric.levels == 2**bits == restricted.levels + 1
    assert full == Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert restricted.qmin == -restricted.qmax
    assert asymmetric.qmin == 0
