"""LLM.int8(): the few columns that hold outliers stay in 16 bits, the others can have eight.

Source: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339, section 3.2, eq. (8): columns O
of the input in which any magnitude reaches a threshold, 6.0, are multiplied apart in 16 bits, with
their weights; so they neither stretch the scale of a token, nor are rounded themselves.
Error:  float16's for the weights of O (docs/bounds.md, B4.g); the others as if O were not there
(B5.a). Threshold 0 keeps nothing: plain vector-wise int8, bit for bit.

Where the paper leaves a choice: "calibrated" takes O from the calibration tokens, and stores its
weights beside the codes, whose columns are zero then. "dynamic" finds O anew in each call, as the
published code does: what a token gets then depends on the others of its batch, and the weights of O
are what their codes stand for, since no others are stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator

from qframe import Capabilities, Rewrite, RewriteProblem, claims, hookimpl
from qframe.errors import NonFiniteError

if TYPE_CHECKING:
    import numpy as np


SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # what float32 holds, to full precision


def _threshold(number: float) -> float:
    """Return what inputs can be compared with. Raises ValueError for what they cannot."""
    if number == 0 or SMALLEST <= number <= LARGEST:
        return number
    raise ValueError(f"must be 0, or from {SMALLEST:.4g} to {LARGEST:.4g}")


@dataclass(frozen=True)
class LLMInt8:
    """Keep columns with outliers in 16 bits.

    threshold   magnitude from which on a column holds an outlier, rounded to float32; 0: none does
    outliers    calibrated: those of the calibration tokens; dynamic: of each call
    """

    threshold: Annotated[float, AfterValidator(_threshold)] = 6.0
    outliers: Literal["calibrated", "dynamic"] = "calibrated"

    name: str = field(init=False, default="llm_int8")
    keeps: bool = field(init=False, default=True)

    @property
    def needs(self) -> frozenset[str]:
        """The largest magnitudes of columns, unless they are found at run time."""
        return frozenset({"absmax"} if self.outliers == "calibrated" else ())

    @property
    def capabilities(self) -> Capabilities:
        """What is found at run time says how activations are rounded; so they have to be."""
        if self.outliers == "calibrated":
            return Capabilities.any_format()
        return Capabilities.any_format(quantized_inputs=frozenset({True}))

    @property
    def claims(self) -> tuple[object, ...]:
        """Which columns are kept does not depend on weights."""
        kept = (self.threshold, 0.0) if self.outliers == "calibrated" else (0.0, self.threshold)
        return (
            claims.FunctionPreserving(powers_of_two=True),
            claims.KeepsOutliers(*kept),
            claims.RowOrderFree(),
            claims.ScaleEquivariant(),
            claims.SignSymmetric(),
        )

    def rewrite(self, problem: RewriteProblem, rng: np.random.Generator) -> Rewrite:
        """Return the layers without their outlier columns. Needs statistics["absmax"].

        Raises NonFiniteError for a maximum that is not finite.
        """
        import torch

        if self.outliers == "dynamic":
            return problem.leaving(self.threshold)
        absmax = problem.statistics["absmax"]
        if not bool(torch.isfinite(absmax).all()):
            raise NonFiniteError(
                f"layer {problem.name!r}: its inputs are not finite; look at the network before it"
            )
        found = absmax >= self.threshold if self.threshold else torch.zeros_like(absmax).bool()
        return problem.keeping(torch.nonzero(found)[:, 0])


@hookimpl
def qframe_outlier_handlers() -> Iterable[LLMInt8]:
    """Register llm_int8."""
    return [LLMInt8()]
