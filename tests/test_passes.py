"""Compiled passes do what their formulas say, and each mistake of a list is found out."""

import inspect
import math
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from hypothesis.extra import numpy as hnp

from qframe import bounds, passes
from qframe.contracts import Grid

WEIGHTS = (
    lambda rng, shape: rng.standard_normal(shape),
    lambda rng, shape: np.zeros(shape),
    lambda rng, shape: np.where(rng.random(shape) < 0.01, 3e4, rng.standard_normal(shape)),
    lambda rng, shape: rng.standard_normal(shape) * 1e-42,
    None,  # ties, of scales that are integers
)


@st.composite
def layers(draw):
    """Weights, any codes of a grid, scales and zero points by group, and who is in which group."""
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(1, 600))
    groups = draw(st.integers(1, min(columns, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    index = np.sort(rng.integers(0, groups, columns)).astype(np.int32)
    if draw(st.booleans()):
        rng.shuffle(index)
    own = draw(st.sampled_from([1, rows])) if rows else 0
    bits = draw(st.sampled_from([2, 4, 8]))
    grid = draw(
        st.sampled_from([Grid(-(1 << bits - 1), (1 << bits - 1) - 1), Grid(0, (1 << bits) - 1)])
    )
    scale = np.float32(np.exp(rng.normal(0, 2, (own, groups))))
    kind = draw(st.sampled_from(WEIGHTS))
    if kind is None:
        scale = np.float32(rng.integers(1, 99, (own, groups)))
        halves = rng.integers(-15, 16, (rows, columns)) / 2
        weight = np.float32(halves * np.broadcast_to(scale[:, index], halves.shape))
    else:
        weight = np.float32(kind(rng, (rows, columns)))
    zero = rng.integers(grid.qmin, grid.qmax + 1, (own, groups)).astype(np.int16)
    return SimpleNamespace(
        weight=weight,
        codes=rng.integers(grid.qmin, grid.qmax + 1, (rows, columns)).astype(np.int16),
        scale=scale,
        zero=zero,
        index=index,
        grid=grid,
        rng=rng,
    )


def of_each_weight(layer):
    """Scales and zero points of every weight, float32."""
    shape = layer.weight.shape
    return (
        np.broadcast_to(np.float32(each)[:, layer.index], shape)
        for each in (layer.scale, layer.zero)
    )


# Properties, of a module of passes --------------------------------------------------------------


def runs_are_those_of_the_index(module, layer):
    runs = module.runs_of(layer.index)
    whole = np.concatenate([np.arange(first, last) for first, last, _ in runs])
    groups = [group for _, _, group in runs]
    return (
        np.array_equal(whole, np.arange(len(layer.index)))
        and all((layer.index[first:last] == group).all() for first, last, group in runs)
        and all(one != other for one, other in pairwise(groups))
    )


def ends_are_those_of_each_strip(module, strips):
    lowest, highest = (np.empty(len(strips), np.float32) for _ in range(2))
    module.ends(*(each.view(np.int32) for each in (strips, lowest, highest)))

    def place(number):
        return number, math.copysign(1, number)  # zeros have a sign

    wanted = [[end(strip.tolist(), key=place) for strip in strips] for end in (min, max)]
    return all(
        np.float32(one).tobytes() == found.tobytes()
        for one, found in zip(wanted, (lowest, highest), strict=True)
    )


def codes_are_the_nearest(module, layer):
    scale, zero = of_each_weight(layer)
    with np.errstate(over="ignore"):
        place = np.rint(layer.weight / scale) + zero
    found = np.empty_like(layer.codes)
    grid = layer.grid
    arrays = (layer.weight, layer.scale, layer.zero, passes.runs_of(layer.index))
    module.encode(*arrays, grid.qmin, grid.qmax, found)
    return np.array_equal(found, np.clip(place, grid.qmin, grid.qmax).astype(np.int16))


def differences_are_those_of_all_weights(module, layer, table=()):
    scale, zero = of_each_weight(layer)
    grid, runs = layer.grid, passes.runs_of(layer.index)
    table = np.array(table, np.float32)
    value = (layer.codes - zero) * scale
    if len(table):
        value = table[layer.codes - grid.qmin] * scale
    most = np.full((len(layer.weight), len(runs)), np.nan)
    arrays = (layer.weight, layer.codes, layer.scale, layer.zero, runs, table)
    found = module.differences(*arrays, grid.qmin, grid.qmax, most)
    ends = ((np.float32(end) - zero) * scale for end in (grid.qmin, grid.qmax))
    apart = np.abs(value - np.clip(layer.weight, *ends)).astype(np.float64)
    wanted = [
        (apart[:, first:last] / (np.float64(scale[:, first:last]) / 2)).max(1)
        for first, last, _ in runs
    ]
    every = (layer.weight, value - layer.weight)
    sums = [math.fsum((np.float64(each) ** 2).ravel()) for each in every]
    allowed = bounds.gamma(layer.weight.size + 1, bounds.UNIT["float64"])
    return all(abs(a - b) <= allowed * b for a, b in zip(found, sums, strict=True)) and (
        len(table) > 0 or np.array_equal(most, np.stack(wanted, 1))
    )


def values_are_those_of_the_table(module, layer):
    grid = layer.grid
    table = np.sort(layer.rng.standard_normal(grid.qmax - grid.qmin + 1))
    return differences_are_those_of_all_weights(module, layer, table)


def closest_are_those_of_the_bound(module, layer, apart=True):
    scale, zero = (np.float64(each) for each in of_each_weight(layer))
    if not apart:
        scale, zero = scale[:, :1], zero[:, :1]
    scale, zero = np.ascontiguousarray(scale), np.ascontiguousarray(zero)
    delta = (layer.codes - zero) * scale - layer.weight
    gamma = bounds.gamma(2)
    added = float(bounds.zero_point_added(1.0, layer.grid))
    allowance = gamma * np.abs(layer.weight, dtype=np.float64)
    allowance += bounds.zero_point_added(scale, layer.grid)
    wanted = bounds.nearest(delta, layer.codes, scale, layer.grid, allowance)
    strips = layer.rng.permutation(len(delta))[: layer.rng.integers(0, 5)]
    found = np.full(len(strips), -1), *np.full((2, len(strips)), np.nan)
    arrays, grid = (layer.weight, layer.codes, scale, zero), layer.grid
    module.closest(*arrays, strips, grid.qmin, grid.qmax, gamma, added, *found)
    for strip, place, error, allowed in zip(strips, *found, strict=True):
        own = [each[strip] for each in np.broadcast_arrays(*wanted)]
        _, first = bounds.worst(*own)
        if (place, error, allowed) != (first, own[0][first], own[1][first]):
            return False
    return True


def closest_of_rows_with_one_scale_are_those_of_the_bound(module, layer):
    return closest_are_those_of_the_bound(module, layer, apart=False)


def streams_are_made_and_read(module, drawn):
    codes, bits, lowest = drawn
    fours = np.ascontiguousarray(codes).view(np.uint64)
    stream = np.empty(len(codes) * bits // 8, np.uint8)
    words = stream.view(np.uint32 if bits in (4, 8) else np.uint8)
    back = np.empty_like(fours)
    module.pack(fours, bits, lowest, words)
    module.unpack(words, bits, lowest, back)
    number = sum((int(code) - lowest) << bits * place for place, code in enumerate(codes))
    return int.from_bytes(stream.tobytes(), "little") == number and np.array_equal(
        back.view(np.int16), codes
    )


def strips():
    """Numbers without NaN, at least one in every strip."""
    numbers = st.floats(width=32, allow_nan=False)
    return st.tuples(st.integers(0, 3), st.integers(1, 40)).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=numbers)
    )


@st.composite
def streams(draw):
    """Codes, how many bits they have, and which one is stored as 0."""
    bits = draw(st.integers(1, 8))
    lowest = draw(st.sampled_from([0, -(1 << bits - 1), 3, -(1 << 15), (1 << 15) - 256]))
    octets = draw(st.integers(0, 6))
    numbers = st.integers(lowest, lowest + (1 << bits) - 1)
    return draw(hnp.arrays(np.int16, 32 * octets, elements=numbers)), bits, lowest


OF_LAYERS = (
    runs_are_those_of_the_index,
    codes_are_the_nearest,
    differences_are_those_of_all_weights,
    values_are_those_of_the_table,
    closest_are_those_of_the_bound,
    closest_of_rows_with_one_scale_are_those_of_the_bound,
)


@pytest.mark.parametrize("holds", OF_LAYERS, ids=lambda each: each.__name__)
@given(layer=layers())
def test_of_layers(holds, layer):
    assert holds(passes, layer)


@given(strips())
def test_of_strips(drawn):
    assert ends_are_those_of_each_strip(passes, drawn)


@given(streams())
def test_of_streams(drawn):
    assert streams_are_made_and_read(passes, drawn)


def test_what_is_not_finite_is_farther_than_anything():
    weight = np.float32([[0, np.nan, 1, 2, -np.inf, 3]])
    codes, ones, zeros = np.int16([[0, 0, 1, 2, -3, 3]]), np.ones((1, 3)), np.zeros((1, 3))
    runs, most = passes.runs_of(np.array([0, 0, 1, 1, 2, 2])), np.empty((1, 3))
    table = np.empty(0, np.float32)
    signal, noise = passes.differences(
        weight, codes, np.float32(ones), np.int16(zeros), runs, table, -8, 7, most
    )
    assert not math.isfinite(signal)
    assert not math.isfinite(noise)
    assert not most[0, 0] <= 1
    assert most[0, 1] == 0


def test_codes_off_the_grid_read_nothing_else_from_memory():
    codes = np.int16([[-1, 2, 300, -300]])
    ones, zeros = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int16)
    runs, most = passes.runs_of(np.zeros(4, int)), np.empty((1, 1))
    table, weight = np.float32([-1, 0, 1, 5]), np.zeros((1, 4), np.float32)
    _, noise = passes.differences(weight, codes, ones, zeros, runs, table, -1, 2, most)
    assert noise == 1 + 25 + 25 + 1


# Mistakes ---------------------------------------------------------------------------------------

MISTAKES = [
    ("prepend=-1", "prepend=0", runs_are_those_of_the_index),
    ("first[1:], len(index)", "first[1:], len(index) - 1", runs_are_those_of_the_index),
    ("np.rint(own[place] / step)", "np.floor(own[place] / step + 0.5)", codes_are_the_nearest),
    ("np.rint(own[place] / step)", "np.rint(own[place] * (1 / step))", codes_are_the_nearest),
    ("/ step) + shift", "/ step + shift)", codes_are_the_nearest),
    ("code = lowest if code < lowest else code", "pass", codes_are_the_nearest),
    ("code = highest if code > highest else code", "pass", codes_are_the_nearest),
    ("scale[min(row, len(scale) - 1)]", "scale[0]", codes_are_the_nearest),
    ("zero[min(row, len(zero) - 1)]", "zero[0]", codes_are_the_nearest),
    (
        "signal[lane] += whole * whole",
        "signal[lane] = whole * whole",
        differences_are_those_of_all_weights,
    ),
    (
        "np.float64(value[lane] - own[lane])",
        "np.float64(value[lane])",
        differences_are_those_of_all_weights,
    ),
    (
        "inside = lowest if inside < lowest else inside",
        "pass",
        differences_are_those_of_all_weights,
    ),
    (
        "inside = highest if inside > highest else inside",
        "pass",
        differences_are_those_of_all_weights,
    ),
    ("= abs(value[lane] - inside)", "= value[lane] - inside", differences_are_those_of_all_weights),
    ("range(first, last, _LANES)", "range(first, first + 1)", differences_are_those_of_all_weights),
    ("bit[0] = farthest", "bit[0] = bits[0]", differences_are_those_of_all_weights),
    ("(np.float64(step) / 2)", "np.float64(step)", differences_are_those_of_all_weights),
    ("found[lane] - qmin, 0)", "found[lane] - qmin - 1, 0)", values_are_those_of_the_table),
    ("table[code] * step", "table[code]", values_are_those_of_the_table),
    (" & (delta > 0)", "", closest_are_those_of_the_bound),
    ("(found[column] == highest) &", "(found[column] == lowest) &", closest_are_those_of_the_bound),
    (
        "= scale[strip], zero[strip]",
        "= scale[strip, 0], zero[strip, 0]",
        closest_are_those_of_the_bound,
    ),
    (
        "= scale[strip, 0], zero[strip, 0]",
        "= scale[0, 0], zero[0, 0]",
        closest_of_rows_with_one_scale_are_those_of_the_bound,
    ),
    ("while bits[first] != largest:", "while first + 1 < width:", closest_are_those_of_the_bound),
    ("bits[column] > largest", "bits[column] < largest", closest_are_those_of_the_bound),
    ("errors[column] / limits[column]", "errors[column]", closest_are_those_of_the_bound),
    ("strip = strips[number]", "strip = number", closest_are_those_of_the_bound),
    ("gamma * abs(w) + added * step", "gamma * abs(w)", closest_are_those_of_the_bound),
    ("gamma * abs(w) + added", "gamma * w + added", closest_are_those_of_the_bound),
]
OF_STRIPS = [
    ("key = own[place] ^ (own[place] >> np.int32(31) & magnitude)", "key = own[place]"),
    ("key = own[place] ^ (own[place] >> np.int32(31) & magnitude)", "key = own[place] & magnitude"),
    (
        "own, least, most = bits[strip], magnitude, ~magnitude",
        "own, least, most = bits[strip], 0, 0",
    ),
    ("min(least, key), max(most, key)", "min(least, key), key"),
    ("min(least, key), max(most, key)", "max(least, key), max(most, key)"),
    ("lowest[strip] = least ^ (least >> np.int32(31) & magnitude)", "lowest[strip] = least"),
    ("highest[strip] = most ^ (most >> np.int32(31) & magnitude)", "highest[strip] = most"),
    ("range(len(own))", "range(1, len(own))"),
]
OF_STREAMS = [
    ("(low ^ signs) - moved, (high ^ signs) - moved", "low, high"),
    ("return low | high << four", "return high | low << four"),
    ("(low | low >> one) & pairs", "(low | low >> one)"),
    ("high | high >> two", "high"),
    ("(low | low << one) & ones", "(low | low << one)"),
    ("return (low + moved) ^ signs, (high + moved) ^ signs", "return low, high"),
    ("np.uint32(word >> np.uint64(32))", "np.uint32(0)"),
    ("np.uint8(word >> np.uint64(8 * byte)", "np.uint8(word >> np.uint64(8)"),
]


def mistaken(old, new):
    """The module with a mistake, not compiled."""
    source = inspect.getsource(passes)
    assert old in source
    source = source.replace(old, new).replace("@compiled\n", "")
    module = SimpleNamespace()
    exec(compile(source, "mistaken", "exec"), module.__dict__)
    return module


def found_out(holds, module, drawn):
    """Whether one of many draws breaks a property, in whatever way."""

    def broken(example):
        try:
            with np.errstate(all="ignore"):
                return not holds(module, example)
        except (IndexError, OverflowError, ValueError):
            return True

    chosen = settings(max_examples=400, phases=[Phase.generate], deadline=None, database=None)
    find(drawn, broken, settings=chosen, random=Random(0))


@pytest.mark.parametrize(("old", "new", "holds"), MISTAKES, ids=[new for _, new, _ in MISTAKES])
def test_a_mistake_is_found_out(old, new, holds):
    found_out(holds, mistaken(old, new), layers())


@pytest.mark.parametrize(("old", "new"), OF_STRIPS, ids=[new for _, new in OF_STRIPS])
def test_a_mistake_about_ends_is_found_out(old, new):
    found_out(ends_are_those_of_each_strip, mistaken(old, new), strips())


@pytest.mark.parametrize(("old", "new"), OF_STREAMS, ids=[new for _, new in OF_STREAMS])
def test_a_mistake_of_packing_is_found_out(old, new):
    found_out(streams_are_made_and_read, mistaken(old, new), streams())


def test_without_a_mistake_nothing_is_found_out():
    module = mistaken("compiled", "compiled")
    for holds in OF_LAYERS:
        with pytest.raises(NoSuchExample):
            found_out(holds, module, layers())
    with pytest.raises(NoSuchExample):
        found_out(ends_are_those_of_each_strip, module, strips())
    with pytest.raises(NoSuchExample):
        found_out(streams_are_made_and_read, module, streams())
