"""The output error of a change of weights, in float32, of weights and inputs of any size."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframe import bounds
from qframe.hessian import energy

SIZES = st.sampled_from([0.0, 1e-44, 1e-30, 1e-18, 1e-9, 1.0, 1e9, 1e30])


@st.composite
def changes(draw):
    """(delta, M): columns of weights and of inputs as large or small as drawn; M has largest 1."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    columns = np.array(draw(st.lists(SIZES, min_size=n, max_size=n)))
    x = rng.standard_normal((5, n)) * 10.0 ** rng.integers(-25, 1, n)
    moment = x.T @ x / max(np.square(x).sum(0).max(), 2.0**-1000)
    delta = np.float32(rng.standard_normal((rows, n)) * columns)
    return torch.from_numpy(delta), torch.from_numpy(moment.astype(np.float32))


@given(changes())
def test_energy_is_the_squared_error_whatever_its_size(drawn):
    delta, moment = (each.double().numpy() for each in drawn)
    n = delta.shape[1]
    size, length = (np.abs(delta) @ np.abs(moment) * np.abs(delta)).sum(), np.abs(delta).sum(1)
    lost = bounds.ETA["float32"] * (n * (1 + 2 * length) + n / 2**31 * length**2).sum()
    exact = ((delta @ moment) * delta).sum()
    own = 2 * bounds.gamma(2 * n + len(delta) + 4, bounds.UNIT["float32"]) * size
    assert abs(energy(*drawn) - max(exact, 0.0)) <= own + lost


@given(changes(), st.integers(-60, 60))
def test_a_power_of_two_times_the_change_has_its_square_times_the_energy(drawn, power):
    delta, moment = drawn
    times = delta * 2.0**power
    if torch.equal(times / 2.0**power, delta):  # nothing left the range of float32
        assert energy(times, moment) == math.ldexp(energy(delta, moment), 2 * power)


def test_nothing_is_no_error():
    assert energy(torch.zeros(0, 4), torch.eye(4)) == energy(torch.zeros(3, 4), torch.eye(4)) == 0
