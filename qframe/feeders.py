"""An input scale that is folded into the layer before: its rows are divided by powers of two.

A rewrite divides the input of a group by a scale s. Where channel j of that input is row r(j) of a
layer's output times something that does not depend on this output, as down_proj reads
act(gate) * up, and o_proj sums values of v_proj, that layer may return its rows divided instead. It
is quantized by then: what can be divided are its scales, and its codes stay. A quotient by a power
of two is exact, so s becomes s' = 2^e, and both layers together are the same function, bit for bit
(docs/bounds.md, B4.j). Rows that feed several channels, values that grouped queries share, have one
e for all of them; rows whose scales leave the range of their dtype keep them, and s' = 1.

Which layers feed which is found, and tried, by `qframe.fold_search`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qframe.folds import Division, Folded
from qframe.stored import StoredLayer, divided_rows

STEEPEST = 64  # the largest exponent

ONE_SCALE = "comes from a layer that has one scale for all its rows"


@dataclass(frozen=True, slots=True, eq=False)
class Feeder:
    """A layer whose output becomes the input of a group of layers, and is read by nothing else.

    name     of the module
    rows     [columns] int64: which of its rows each channel of the input is
    stored   the layer, quantized
    bias     [rows of the layer], in the dtype that it is stored in; None for none
    """

    name: str
    rows: torch.Tensor
    stored: StoredLayer
    bias: torch.Tensor | None = None

    def objection(self) -> str:
        """Return why the layer cannot take up a scale, "" where it can."""
        packed = self.stored.packed
        return ONE_SCALE if packed.scale.shape[0] != packed.rows else ""

    def folded(self, scale: torch.Tensor) -> Folded:
        """Return the layer that divides by a scale, as nearly as powers of two allow.

        scale   s, [columns] float32, positive and finite
        """
        wanted = self._exponents(scale)
        exact = self.stored.can_divide(wanted)
        if self.bias is not None:
            back = divided_rows(divided_rows(self.bias, wanted), -wanted)
            exact &= back == self.bias
        exponents = torch.where(exact, wanted, 0)
        division, tensors = Division(exponents, self.rows), {}
        if self.bias is not None:
            tensors[f"{self.name}.bias"] = divided_rows(self.bias, exponents)
        stored = self.stored.divided(exponents)
        return Folded(self.name, division.scale, tensors, division, stored)

    def _exponents(self, scale: torch.Tensor) -> torch.Tensor:
        """Return for each row the whole exponent next to the mean over its channels, int64."""
        total = torch.zeros(self.stored.packed.rows, dtype=torch.float64)
        counts = torch.zeros_like(total)
        total.index_add_(0, self.rows, scale.double().log2())
        counts.index_add_(0, self.rows, torch.ones(len(self.rows), dtype=torch.float64))
        mean = total / counts.clamp(min=1)
        return mean.round().clamp(-STEEPEST, STEEPEST).long()
