"""The observers of magnitudes, held against NumPy: minmax, histogram, percentile and mse.

What any observer owes is the suite's business: `qframe check percentile`.
"""

import pickle
from collections import Counter
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import Grid, Host, InputGroup, LayerInfo, bounds
from qframe.activations import InputQuantizer, scale_of
from qframe.claims import LeastError, claims_of
from qframe.claims.observers import Seen
from qframe.errors import NonFiniteError
from qframe.grids import input_grid_of, reach_observer
from qframe.scheme import ActivationScheme, Scheme
from qframe_plugins.observers.histogram import BINS, STEP, HistogramObserver
from qframe_plugins.observers.minmax import MinMax
from qframe_plugins.observers.mse import CANDIDATES, EIGHT_BITS
from qframe_plugins.observers.mse import LeastError as Mse
from qframe_plugins.observers.percentile import Percentile
from tests.mutants.observers_search import Searched

INT4 = Grid(-7, 7)
FP4 = Grid.of([-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FINDERS = (MinMax(), Percentile(), Percentile(50), Mse(), Mse(INT4), Mse(FP4))
ALL = (*FINDERS, HistogramObserver())
PERCENTILES = st.sampled_from((1e-9, 0.1, 1, 50, 99, 99.9, 99.99, 100)) | st.floats(0.01, 100)
EVERY_SHARE = tuple(1 - k / CANDIDATES for k in range(CANDIDATES))


def group(columns):
    return InputGroup(layers=(LayerInfo(name="up", rows=2, columns=columns),))


def observed(observer, *batches):
    statistic = observer.start(group(batches[0].shape[1] if batches else 3))
    for batch in batches:
        statistic.update(torch.from_numpy(batch.copy()))
    return statistic


def value(observer, *batches):
    return observed(observer, *batches).value().numpy()


def magnitudes(*batches):
    """Return all magnitudes, ascending, float64."""
    return np.sort(np.abs(np.concatenate([b.ravel() for b in batches]).astype(np.float64)))


@st.composite
def inputs(draw):
    """Draw one to four batches: ordinary, heavy-tailed, integers, with zeros, and subnormal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 400))
    kind = draw(st.sampled_from(("normal", "tails", "integers", "relu", "subnormal", "wide")))
    x = rng.normal(size=(tokens, columns))
    if kind == "tails":
        x = rng.standard_t(2, size=(tokens, columns))
    elif kind == "integers":
        x = rng.integers(-20, 21, (tokens, columns)).astype(np.float64)
    elif kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "subnormal":
        x = x * 2.0**-140
    elif kind == "wide":
        x = x * 2.0 ** rng.integers(-120, 120, (tokens, columns))
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=3)))
    return np.split(x.astype(np.float32), cuts)


# A percentile ---------------------------------------------------------------------------------


@given(inputs(), PERCENTILES)
def test_a_percentile_is_the_order_statistic_up_to_the_width_of_a_bin(batches, percentile):
    size, share = magnitudes(*batches), percentile / 100
    [found] = value(Percentile(percentile), *batches)
    least, most = bounds.quantile(size, share, STEP)
    assert least <= found <= most
    # Those that are not above it are at least the share that was asked for; without it, fewer.
    assert (size <= found).sum() >= Fraction(share) * len(size)
    assert (size < least).sum() < Fraction(share) * len(size)


@given(inputs(), PERCENTILES)
def test_a_quantile_is_that_of_numpy(batches, percentile):
    """NumPy computes the rank in float64, so it may take the neighbour where p n rounds to one."""
    size, share = magnitudes(*batches), percentile / 100
    rank = Fraction(share) * len(size)
    if ceil(rank) == ceil(share * len(size)):
        wanted = np.quantile(size, share, method="inverted_cdf")
        assert bounds.quantile(size, share) == (wanted, wanted)


@given(inputs())
def test_the_whole_is_the_largest_and_so_is_minmax(batches):
    wanted = magnitudes(*batches)[-1:]
    assert np.array_equal(value(Percentile(100), *batches), wanted)
    assert np.array_equal(value(MinMax(), *batches), wanted)


def test_one_outlier_in_many_is_clipped():
    x = np.ones((100_000, 1), np.float32)
    x[777] = -1e6
    assert value(MinMax(), x) == 1e6
    assert value(Percentile(), x) <= 1 + STEP
    assert value(Percentile(100), x) == 1e6


# Counts ---------------------------------------------------------------------------------------


@given(inputs())
def test_a_histogram_counts_upper_bits(batches):
    counts = value(HistogramObserver(), *batches)
    every = np.concatenate([batch.ravel() for batch in batches])
    assert counts.dtype == np.int64
    assert np.array_equal(counts, bounds.magnitudes(every, BINS, 16))
    wanted = Counter(int(bits) for bits in np.abs(every).view(np.uint32) // 65536)
    assert {place: int(counts[place]) for place in np.flatnonzero(counts)} == wanted


@given(st.integers(0, 0x7F7FFFFF))
def test_a_bin_is_no_wider_than_a_step(bits):
    x = np.array([[bits]], np.uint32).view(np.float32)
    [place] = np.flatnonzero(value(HistogramObserver(), x))
    ends = np.array([place << 16, place << 16 | 0xFFFF], np.uint32).view(np.float32)
    assert ends[0] <= x[0, 0] <= ends[1]
    smallest_normal = np.finfo(np.float32).smallest_normal
    assert float(ends[1]) - float(ends[0]) < STEP * max(float(ends[0]), float(smallest_normal))


# The least squared error ----------------------------------------------------------------------


def root(x, reach, grid):
    """Return the root of the squared error of the codes of inputs, clipped at a reach."""
    static = ActivationScheme(strategy="tensor", dynamic=False)
    scale = scale_of(torch.tensor([reach], dtype=torch.float32), grid)
    size = torch.from_numpy(x.astype(np.float32))
    values = InputQuantizer(static, grid, scale).apply(size).double().numpy()
    return float(np.linalg.norm(x - values))


@given(inputs(), st.sampled_from((EIGHT_BITS, INT4, Grid(-1, 1), FP4)))
def test_no_candidate_loses_less_than_bins_can_hide(batches, grid):
    size = magnitudes(*batches)
    found = value(Mse(grid), *batches)
    assert 0 < found[0] <= size[-1] or found[0] == size[-1] == 0
    seen = Seen(columns=batches[0].shape[1], batches=tuple(batches))
    assert LeastError(grid, STEP, EVERY_SHARE).certify(seen, found).holds


@given(inputs(), st.sampled_from((EIGHT_BITS, INT4, FP4)))
def test_the_search_is_that_of_a_loop_in_float64(batches, grid):
    """Both look at the same bins; scales are rounded here and there, so near ties may differ."""
    size = magnitudes(*batches)
    reference = Searched(batches[0].shape[1], grid)
    for batch in batches:
        reference.update(torch.from_numpy(batch))
    [found], [other] = value(Mse(grid), *batches), reference.value().numpy()
    slack = 2 * bounds.binned_search(size, STEP)
    assert bounds.ratio(root(size, found, grid), root(size, other, grid) + slack) <= 1
    assert bounds.ratio(root(size, other, grid), root(size, found, grid) + slack) <= 1


@pytest.mark.parametrize(("grid", "outlier"), [(EIGHT_BITS, 100), (INT4, 30), (FP4, 30)])
def test_one_outlier_in_many_costs_less_than_coarse_steps_for_all(grid, outlier):
    x = np.random.default_rng(0).normal(size=(1000, 100)).astype(np.float32)
    x[5, 7] = -outlier
    [found] = value(Mse(grid), x)
    size = magnitudes(x)
    assert found < outlier
    slack = 2 * bounds.binned_search(size, STEP)
    assert root(size, found, grid) + slack < root(size, outlier, grid)


def test_an_outlier_that_nothing_can_be_gained_from_is_kept():
    """Half of 1000 would cost more than all the others are worth, which are rounded to 0."""
    x = np.random.default_rng(0).normal(size=(1000, 100)).astype(np.float32)
    x[5, 7] = 1000
    assert value(Mse(), x) == 1000


@given(st.integers(0, 2**32), st.sampled_from((EIGHT_BITS, INT4, FP4)))
def test_what_has_no_outlier_is_not_clipped_much(seed, grid):
    """What is clipped is lost, and all that is lost is bounded: so is what is clipped."""
    x = np.random.default_rng(seed).uniform(-3, 3, (500, 8)).astype(np.float32)
    size = magnitudes(x)
    [found] = value(Mse(grid), x)
    clipped = np.linalg.norm(np.maximum(size - found, 0))
    allowed = root(size, size[-1], grid) + 2 * bounds.binned_search(size, STEP)
    # A code's value is rounded twice: the scale's quotient, and its product with the code.
    slack = bounds.gamma(2) * np.linalg.norm(size)
    assert bounds.ratio(clipped, allowed + slack) <= 1


def test_with_fewer_codes_more_is_clipped():
    """Banner et al., arXiv:1810.05723: the best clipping value grows with the number of bits."""
    x = np.random.default_rng(0).normal(size=(1000, 100)).astype(np.float32)
    reaches = [float(value(Mse(Grid(-n, n)), x)[0]) for n in (127, 31, 7, 3, 1)]
    assert reaches == sorted(reaches, reverse=True)
    assert len(set(reaches)) == len(reaches)


def test_the_host_gives_the_codes():
    host = Host.discover()
    for fields in ({"num_bits": 4}, {"num_bits": 8}, {"format": "fp8_e4m3"}):
        scheme = ActivationScheme(strategy="tensor", dynamic=False, observer="mse", **fields)
        grid = input_grid_of(host, Scheme(input_activations=scheme))
        found = reach_observer(host, scheme, grid)
        assert found == Mse(grid)
        assert [c.grid for c in claims_of(found) if isinstance(c, LeastError)] == [grid]
    plain = ActivationScheme(strategy="tensor", dynamic=False, observer="percentile")
    assert reach_observer(host, plain, INT4) == Percentile()


# All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ALL)
@given(batches=inputs(), cut=st.integers(0, 4))
def test_merging_is_to_have_seen_both_bit_for_bit(observer, batches, cut):
    wanted = value(observer, *batches)
    left, right = (observed(observer, *part) for part in (batches[:cut], batches[cut:]))
    left.merge(pickle.loads(pickle.dumps(right)))
    assert left.value().numpy().tobytes() == wanted.tobytes()
    right.merge(observed(observer, *batches[:cut]))
    assert right.value().numpy().tobytes() == wanted.tobytes()
    whole = np.concatenate(batches)
    assert value(observer, whole[::-1]).tobytes() == wanted.tobytes()
    assert value(observer, -whole).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("observer", ALL)
@given(batches=inputs())
def test_where_numbers_lie_in_memory_does_not_matter(observer, batches):
    wanted, statistic = value(observer, *batches), observer.start(group(batches[0].shape[1]))
    for batch in batches:
        tokens, columns = batch.shape
        stored = torch.full((2 * columns, 3 * tokens), torch.nan)
        view = stored[::2, ::3].t()
        view.copy_(torch.from_numpy(batch))
        statistic.update(view)
    assert statistic.value().numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("observer", FINDERS)
@pytest.mark.parametrize("shapes", [(), ((0, 3),), ((4, 0),), ((0, 0), (2, 0))])
def test_of_nothing_the_reach_is_zero(observer, shapes):
    found = value(observer, *(np.zeros(shape, np.float32) for shape in shapes))
    assert found.dtype == np.float32
    assert found.tolist() == [0]
    assert not value(HistogramObserver(), *(np.zeros(s, np.float32) for s in shapes)).any()


@pytest.mark.parametrize("observer", FINDERS)
def test_of_zeros_the_reach_is_zero_and_the_scale_is_one(observer):
    x = np.zeros((5, 3), np.float32)
    x[1] = -0.0
    found = observed(observer, x).value()
    assert found.tolist() == [0]
    assert scale_of(found, INT4).tolist() == [1]
    assert value(HistogramObserver(), x)[0] == 15


def number(bits):
    return np.array([[bits]], np.uint32).view(np.float32)


@pytest.mark.parametrize("observer", FINDERS)
@pytest.mark.parametrize("bits", [1, 2, 0x10000, 0x7FFFFF, 0x800000, 0x3F80FFFF, 0x7EFFFFFF])
def test_of_one_number_the_reach_is_that_number(observer, bits):
    """From the smallest subnormal number on, at the edges of bins."""
    for sign in (1, -1):
        assert value(observer, sign * number(bits)) == number(bits)[0]


@pytest.mark.parametrize("bits", [0xFFFF, 0x7F7FFFFF])
def test_of_one_number_that_a_search_sees_badly(bits):
    """The first bin begins with 0, and 127 times fl(the largest float32 / 127) is not finite."""
    for observer in (MinMax(), Percentile(), Percentile(50)):
        assert value(observer, number(bits)) == number(bits)[0]
    [found] = value(Mse(), number(bits))
    assert 0 < found <= number(bits)[0, 0]
    seen = Seen(columns=1, batches=(number(bits),))
    assert LeastError(EIGHT_BITS, STEP, EVERY_SHARE).certify(seen, np.float32([found])).holds


@pytest.mark.parametrize("observer", ALL)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@given(st.integers(0, 49))
def test_what_is_not_finite_is_never_lost(observer, bad, place):
    x = np.ones((10, 5), np.float32)
    spoilt = x.copy()
    spoilt.flat[place] = bad
    merged = observed(observer, x)
    merged.merge(observed(observer, spoilt))
    for statistic in (observed(observer, spoilt), observed(observer, x, spoilt, x), merged):
        if isinstance(observer, HistogramObserver):
            with pytest.raises(NonFiniteError, match=r"an input is (nan|inf); look at"):
                statistic.value()
        else:
            assert not torch.isfinite(statistic.value()).all()
