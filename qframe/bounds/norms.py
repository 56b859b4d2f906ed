"""B13: norms, and positions that are angles."""

from __future__ import annotations

from qframe.bounds.arithmetic import ETA, UNIT, Array, Numbers, as_array, compound, gamma


def rms_norm(
    y: Numbers,
    weight: Numbers,
    columns: int,
    unit: float = UNIT["float32"],
    inputs: float = 0.0,
) -> Array:
    """B13.a: the error of y = w x / sqrt(mean(x^2) + eps), for eps of at least 2^-100.

    y, weight   broadcast against one another
    columns     of which the mean is taken
    """
    mean = compound(gamma(columns, unit), gamma(4), inputs, inputs)
    relative = compound((1 - mean) ** -0.5 - 1, gamma(5), inputs, inputs)
    return as_array(relative * abs(as_array(y)) + 2 * ETA["float32"] * (1 + abs(as_array(weight))))


def rotary(magnitude: Numbers, unit: float = UNIT["float32"], inputs: float = 0.0) -> Array:
    """B13.b: the error of x cos + x' sin, pairs of numbers being turned by an angle.

    magnitude   |x cos| + |x' sin|
    """
    relative = compound(gamma(1), gamma(1, unit), inputs, inputs)
    return as_array(relative * as_array(magnitude) + 3 * ETA["float32"])
