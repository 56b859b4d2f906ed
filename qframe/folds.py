"""An input scale that is folded into a norm: the norm divides, and the layers have nothing to do.

A rewrite divides the input of a group by a scale s. Where that input is h w, the output of a norm
with weight w, the norm may have the weight w / s instead. It has to be stored in a dtype of its
own, so that quotient is rounded to v first, and the layers are rewritten with s' = w / v, which
makes up for the rounding (docs/bounds.md, B4.i). Of a channel whose scale does not survive this,
and of one where w is 0, the norm keeps its weight and the layers get s' = 1. So s' is known from
w and v alone, and `qframe verify` finds it again.

Which norms are such norms is found, and tried, by `qframe.fold_search`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from qframe.stored import StoredLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of norms that can be folded into: every number of them is a float32 number."""

SMALLEST = torch.finfo(torch.float32).tiny  # a scale below it would have lost digits


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """By what the rows of a layer are divided, and which channel of an input each is.

    exponents   [rows of the layer] int64, e: a row is divided by 2^e
    rows        [columns] int64, the row of each channel
    """

    exponents: torch.Tensor
    rows: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """What the layers that read the input are rewritten with: 2^e, [columns] float32."""
        return torch.from_numpy(np.ldexp(np.float32(1), self.exponents[self.rows].numpy()))


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A norm, or a layer, that divides by a scale.

    name       of the module
    scale      s', [columns] float32, positive: what the layers are to be rewritten with
    tensors    parameter name, in full -> its values, in their own dtype
    division   of a layer, None for a norm; with
    stored     the layer
    """

    name: str
    scale: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    division: Division | None = None
    stored: StoredLayer | None = None


class Divider(Protocol):
    """What returns the input of a group and can divide it: `Fold` and `qframe.feeders.Feeder`."""

    def folded(self, scale: torch.Tensor) -> Folded:
        """Return it dividing by a scale, [columns] float32, positive and finite."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A norm whose output is the input of a group of layers, and is read by nothing else.

    name     of the module
    weight   [columns], in the dtype that it is stored in, one of `DTYPES`
    bias     the same; None for none
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def objection(self) -> str:
        """Return why the norm cannot take up a scale, "" where it can."""
        if self.weight.dtype not in DTYPES:
            return f"comes from a norm in {_name(self.weight.dtype)}"
        # Weight and bias must be divided by the same number, and only one quotient can be made
        # exact by choosing it. In float32 the other is as good as a quotient at run time.
        if self.bias is not None and self.bias.dtype != torch.float32 and bool(self.bias.any()):
            return f"comes from a norm with a bias in {_name(self.bias.dtype)}"
        return ""

    def folded(self, scale: torch.Tensor) -> Folded:
        """Return the norm that divides by a scale, as nearly as its dtype allows.

        scale   s, [columns] float32, positive and finite
        """
        stored = (self.weight.float() / scale).to(self.weight.dtype)
        left = self.weight.float() / stored.float()
        good = torch.isfinite(stored) & torch.isfinite(left) & (left >= SMALLEST)
        stored = torch.where(good, stored, self.weight)
        left = scale_between(self.weight, stored)
        tensors = {f"{self.name}.weight": stored}
        if self.bias is not None:
            tensors[f"{self.name}.bias"] = divided(self.bias, left)
        return Folded(self.name, left, tensors)


def scale_between(weight: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return s' = w / v, [columns] float32; 1 where w is 0.

    weight, stored   w and v, [columns] each, of the norm as it was and as it is stored
    """
    return torch.where(weight == 0, 1.0, weight.float() / stored.float())


def divided(bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a bias [columns] divided by s', in its own dtype."""
    return (bias.float() / scale).to(bias.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
