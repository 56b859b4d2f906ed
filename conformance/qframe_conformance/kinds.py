"""Kinds of weights and of inputs, the nasty ones by name.

A kind of weights is a function of a random generator and a shape; a kind of inputs is one of a
generator and a number of columns, and returns activations [tokens, columns]. Everything is cheap
NumPy, so a test can draw a seed and make the rest of it. What is returned is float64 or float32;
numbers that must survive as they are, are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qframe.contracts import Grid

Float64 = NDArray[np.float64]
Shape = tuple[int, int]
Kind = Callable[[np.random.Generator, Shape], NDArray[Any]]
InputKind = Callable[[np.random.Generator, int], Float64]


# Weights --------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return ordinary weights."""
    return rng.normal(size=shape)


def zeros(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return zeros: every group is without a range."""
    return np.zeros(shape)


def sparse(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return ordinary weights, about half of them zero."""
    return rng.normal(size=shape) * (rng.random(shape) < 1 / 2)


def constant(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return one number everywhere."""
    return np.full(shape, rng.normal(), np.float64)


def one_outlier(rng: np.random.Generator, shape: Shape, size: float = 2.0**13) -> Float64:
    """Return ordinary weights and among them a single one of `size`."""
    weight: Float64 = rng.normal(size=shape)
    if weight.size:
        weight.flat[rng.integers(weight.size)] = size
    return weight


def heavy_tailed(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return weights of Student's t distribution with 2 degrees of freedom, up to 2^9."""
    return np.clip(rng.standard_t(2, shape), -(2.0**9), 2.0**9)


def subnormal(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return subnormal numbers of float32: their scales underflow."""
    return rng.integers(-300, 300, shape).astype(np.float64) * 2.0**-149


def tiny_and_huge(rng: np.random.Generator, shape: Shape, top: int = 14) -> Float64:
    """Return numbers from the subnormal range up to about 2^top side by side."""
    return rng.normal(size=shape) * 2.0 ** rng.integers(-140, top, shape)


def small(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return ordinary weights of 2^-20: smaller than any absolute epsilon allows for."""
    return rng.normal(size=shape) * 2.0**-20


def halves(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return multiples of a half: exact ties wherever the scale is a power of two."""
    return rng.integers(-16, 16, shape) / 2


def ties(rng: np.random.Generator, shape: Shape) -> NDArray[np.float32]:
    """Return odd multiples of a half, and the float32 numbers next to them."""
    return nudged(rng, rng.integers(-8, 8, shape) + 0.5)


def one_sided(rng: np.random.Generator, shape: Shape) -> Float64:
    """Return weights of one sign, all far from zero: the range must still hold zero."""
    sign = 1 - 2 * int(rng.integers(2))
    return sign * (2 + rng.random(shape))


def nudged(rng: np.random.Generator, middle: NDArray[Any]) -> NDArray[np.float32]:
    """Return each number as float32, or one of the two float32 numbers next to it."""
    centre = np.float32(middle)
    sides = rng.integers(-1, 2, centre.shape).astype(np.float32)
    return np.asarray(np.nextafter(centre, centre + sides), np.float32)


def on_grid(
    rng: np.random.Generator, shape: Shape, grid: Grid, width: int, *, symmetric: bool
) -> Float64:
    """Return codes of `grid` times a power of two; each group spans its whole range.

    So the power of two is the scale, and nothing needs rounding. A symmetric grid that is not its
    own mirror image ends at half a step: there the largest weight of a group is half a step off.

    width   columns of a group
    """
    steps, _ = _steps(rng, shape, grid, width, symmetric=symmetric)
    return steps * 2.0 ** int(rng.integers(-8, 3))


def between_codes(
    rng: np.random.Generator, shape: Shape, grid: Grid, width: int, *, symmetric: bool
) -> NDArray[np.float32]:
    """Return exact ties of `grid`, and the float32 numbers next to them; arguments as `on_grid`."""
    steps, ends = _steps(rng, shape, grid, width, symmetric=symmetric)
    middle = np.where(steps > 0, steps - 0.5, steps + 0.5)
    if grid.values is not None:
        values = np.array(grid.values)
        middle = rng.choice((values[1:] + values[:-1]) / 2, shape)
    numbers = np.where(ends, steps, nudged(rng, middle))
    return np.asarray(numbers * 2.0 ** int(rng.integers(-8, 3)), np.float32)


def balanced(
    rng: np.random.Generator, shape: Shape, grid: Grid, width: int, *, symmetric: bool
) -> NDArray[np.float32]:
    """Return weights whose best scale is next to that of their range; arguments as `on_grid`.

    Each row is codes of `grid` times a number that is no power of two, with pairs of equal codes
    one of which is as much above it as the other one is below: the errors of a pair, up to a
    quarter of a step, do not move the least squares of the scale. Pairs of the least or largest
    code have none, so that the range stays. A symmetric grid has to be its own mirror image, or
    its end would be half a step off.
    """
    steps, ends = _steps(rng, shape, grid, width, symmetric=symmetric)
    free = np.flatnonzero(~ends[0]) if len(ends) else np.empty(0, np.int64)
    one, other = free[:-1:2], free[1::2]
    same_group = one // width == other // width
    one, other = one[same_group], other[same_group]
    codes = steps[:, one]
    low, high = (end(steps, axis=1, initial=0)[:, None] for end in (np.min, np.max))
    inside = (codes > low) & (codes < high)
    off = np.where(inside, (rng.random(codes.shape) - 0.5) / 2, 0)
    steps[:, other] = steps[:, one] - off
    steps[:, one] += off
    return np.asarray(steps * (1 + rng.random((shape[0], 1))), np.float32)


def _steps(
    rng: np.random.Generator, shape: Shape, grid: Grid, width: int, *, symmetric: bool
) -> tuple[Float64, NDArray[np.bool_]]:
    """Return weights as multiples of the scale, and which of them are the ends of their group."""
    place = np.arange(shape[1]) % width
    levels = grid.qmax - grid.qmin
    if symmetric:
        reach = grid.reach
        if grid.values is None:
            steps = rng.integers(-int(reach), int(reach) + 1, shape).astype(np.float64)
        else:
            steps = rng.choice(np.array(grid.values), shape)
        signs = np.where(rng.random((shape[0], 1)) < 1 / 2, -reach, reach)
        ends = place == 0
        steps[:, ends] = signs
        return steps, np.broadcast_to(ends, shape)
    zero = int(rng.integers(0, levels + 1))
    steps = rng.integers(-zero, levels - zero + 1, shape).astype(np.float64)
    first, last = place == 0, place == 1
    steps[:, first] = -zero
    steps[:, last] = levels - zero
    alone = first & ~np.append(last[1:], False)  # a group of one column: from zero to its weight
    steps[:, alone] = levels
    return steps, np.broadcast_to(first | last, shape)


NASTY: tuple[Kind, ...] = (
    zeros,
    sparse,
    constant,
    one_outlier,
    subnormal,
    tiny_and_huge,
    halves,
    ties,
    one_sided,
    normal,
)


# Inputs ---------------------------------------------------------------------------------------


def white_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return three tokens per column, independent, the columns of very different size."""
    return rng.normal(size=(3 * columns, columns)) * 2.0 ** rng.integers(-3, 4, columns)


def correlated_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return inputs that mostly move together."""
    return white_inputs(rng, columns) + 8 * rng.normal(size=(3 * columns, 1))


def few_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return fewer tokens than columns: the Hessian has not full rank."""
    return white_inputs(rng, columns)[: max(1, columns // 3)]


def dead_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return inputs about a third of which are always zero."""
    return white_inputs(rng, columns) * (rng.random(columns) >= 1 / 3)


def all_dead_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return nothing but zeros."""
    return np.zeros((3, columns))


def repeated_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return inputs of which some are the same: the Hessian is singular."""
    return white_inputs(rng, columns)[:, rng.integers(0, columns, columns)]


def outlier_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return inputs one of which is 64 times as large."""
    x = white_inputs(rng, columns)
    x[:, rng.integers(columns)] *= 2.0**6
    return x


def almost_equal_inputs(rng: np.random.Generator, columns: int) -> Float64:
    """Return inputs that differ by 2^-10 of themselves: the Hessian is ill-conditioned."""
    common = rng.normal(size=(3 * columns, 1))
    return common * (1 + 2.0**-10 * rng.normal(size=(3 * columns, columns)))


INPUTS: tuple[InputKind, ...] = (
    white_inputs,
    correlated_inputs,
    few_inputs,
    dead_inputs,
    all_dead_inputs,
    repeated_inputs,
    outlier_inputs,
    almost_equal_inputs,
)


def hessian_of(x: Float64) -> Float64:
    """Return 2/n X^T X of activations [tokens, columns]: [columns, columns], symmetric."""
    moments: Float64 = x.T @ x  # as one product it is symmetric to the last bit
    return moments * (2 / len(x))


def original_inputs(x: Float64) -> Float64:
    """Return what inputs [tokens, columns] might have been before anything was quantized.

    An eighth of the token before, and of the column before, is missing in x: so the difference goes
    with x where tokens or columns go with one another, and a dead column was not always dead.
    """
    return x + (np.roll(x, 1, axis=0) + np.roll(x, 1, axis=1)) / 8
