"""Claims that the suite alone can check: it has to run the plugin more than once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScaleEquivariant:
    """B1.g: weights times 2^k give the same codes and scales times 2^k, bit for bit.

    Scales of groups of zeros are 1 and stay so; nothing may under- or overflow.
    """

    name = "scale equivariance"
    theorem = "B1.g"


@dataclass(frozen=True, slots=True)
class SignSymmetric:
    """B1.g: on a grid that is its own mirror image, -W has the codes of W with the other sign."""

    name = "sign symmetry"
    theorem = "B1.g"


@dataclass(frozen=True, slots=True)
class Idempotent:
    """B1.e: to quantize what the codes stand for gives the same values again.

    exact   a group that lies on the grid of its own scale is given back bit for bit, and so is any
            group with a scale of 16 bits. Not so where the scale is not one quotient, but e.g.
            1 / fl(qmax / absmax): then the codes are the same with a float32 scale, no more
    """

    exact: bool = True
    name = "idempotence"
    theorem = "B1.e"


@dataclass(frozen=True, slots=True)
class FunctionPreserving:
    """B4.a: a rewrite changes nothing in real numbers, W x = W' (x / input_scale).

    powers_of_two   all scales are powers of two, so nothing changes in floating point either
    """

    powers_of_two: bool = False
    name = "function preserved"
    theorem = "B4.a"


@dataclass(frozen=True, slots=True)
class Mergeable:
    """B12.b: seeing all tokens, or parts of them and merging, is the same, in any order of tokens.

    exact   bit for bit, whatever the tokens; else bit for bit where no sum has an error, which is
            so for small integers, and elsewhere within what is claimed of the value
    """

    exact: bool = False
    name = "mergeable"
    theorem = "B12.b"


@dataclass(frozen=True, slots=True)
class SignBlind:
    """B12.c: a token and its negative count the same, bit for bit."""

    name = "sign blind"
    theorem = "B12.c"


@dataclass(frozen=True, slots=True)
class Reproducible:
    """B12.c: the bits of a statistic do not depend on how many threads torch uses."""

    name = "reproducible"
    theorem = "B12.c"


@dataclass(frozen=True, slots=True)
class RowOrderFree:
    """B4.e: the order of rows does not count, bit for bit; maxima over rows have no order."""

    name = "row order"
    theorem = "B4.e"


@dataclass(frozen=True, slots=True)
class NoWorseBlock:
    """B10.f: a block that is learned has no larger output error than its layers rounded to nearest.

    Both are what `BlockProblem.error` returns for all inputs that are fitted on.
    """

    name = "no worse block"
    theorem = "B10.f"
