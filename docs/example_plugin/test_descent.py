"""What `descent` promises: it is never worse than rounding to nearest, on any layer."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qframe_example_descent import Descent, output_errors

from qframe import Grid, Host, RoundingProblem, Scheme, rounding


@st.composite
def problems(draw):
    """Random layers, also with dead columns and with fewer tokens than columns."""
    rows, columns, tokens = draw(st.tuples(*[st.integers(1, 12)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    inputs = torch.from_numpy(rng.normal(size=(tokens, columns)))
    inputs[:, rng.random(columns) < draw(st.sampled_from([0, 0.3]))] = 0
    symmetric = draw(st.booleans())
    return RoundingProblem(
        name="layer",
        weight=torch.from_numpy(rng.normal(size=(rows, columns))).float(),
        scheme=Scheme(num_bits=3, group_size=draw(st.integers(1, 12)), symmetric=symmetric),
        grid=Grid(-4, 3) if symmetric else Grid(0, 7),
        statistics={"hessian": 2 / tokens * inputs.T @ inputs},
        tokens=tokens,
    )


@given(problem=problems(), sweeps=st.integers(1, 3))
@settings(deadline=None)
def test_no_row_is_worse_than_rounded_to_nearest(problem, sweeps):
    found = Descent(sweeps=sweeps).round(problem, np.random.default_rng(0))
    nearest = rounding.encode(
        problem.weight, found.scale, found.zero_point, found.group_index, problem.grid
    )
    rows = len(problem.weight)
    step = rounding.expand(found.scale, found.group_index, rows).double()
    zero = rounding.expand(found.zero_point, found.group_index, rows).double()

    def errors(codes):
        left = problem.weight.double() - step * (codes - zero)
        return output_errors(left, problem.statistics["hessian"])

    assert (errors(found.codes) <= errors(nearest)).all()
    assert found.codes.min() >= problem.grid.qmin
    assert found.codes.max() <= problem.grid.qmax


def test_it_is_found_by_its_entry_point():
    assert Host.discover().origin("rounder", "descent").source == "qframe-example-descent"
