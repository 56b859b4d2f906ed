"""Sums over gradients by the weights, and what they say of weights that are rounded.

The mathematics stands in `qframe.sensitivity`, which makes the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qframe import rounding
from qframe.contracts import RoundingProblem
from qframe.grids import grid_of
from qframe.host import Host
from qframe.scheme import Scheme

Schemes = Mapping[str, Sequence[Scheme]]  # layer -> the schemes that are tried


class Rounded:
    """The weights of the layers, and what rounding them to nearest changes."""

    def __init__(self, weights: Mapping[str, torch.Tensor], schemes: Schemes, host: Host) -> None:
        self.weights, self._schemes, self._host = weights, schemes, host

    def changes(self, name: str) -> Iterator[torch.Tensor]:
        """Yield Q - W, [rows, columns], for each scheme of a layer."""
        weight = self.weights[name]
        for scheme in self._schemes[name]:
            grid = grid_of(self._host, scheme)
            problem = RoundingProblem(name=name, weight=weight, scheme=scheme, grid=grid)
            yield rounding.dequantize(rounding.to_nearest(problem)) - weight


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """What is known of a layer, with each of its schemes.

    predicted   of the network's loss
    relative    energy of the weight's error over that of the weight
    """

    predicted: tuple[float, ...]
    relative: tuple[float, ...]


@dataclass(slots=True)
class Lane:
    """Sums over some windows.

    squares   layer -> sum of G o G, [rows, columns]
    along     layer -> for each draw, the sums of the rows of G o W, [rows]
    errors    layer -> energy of the output, and of its error with each scheme: without logits
    why       why there are no logits, "" where there are
    """

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    along: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    tokens: int = 0
    why: str = ""

    @classmethod
    def added(cls, lanes: Sequence[Lane]) -> Lane:
        """Return the sum of lanes, in their order; they are used up."""
        total = cls()
        for each in lanes:
            for name, squares in each.squares.items():
                total._add_squares(name, squares)
            for name, rows in each.along.items():
                total.along.setdefault(name, []).extend(rows)
            for name, errors in each.errors.items():
                total.add_errors(name, errors)
            each.squares.clear()
            total.reached |= each.reached
            total.tokens += each.tokens
            total.why = total.why or each.why
        return total

    def add_gradient(self, name: str, gradient: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a draw, whose gradient [rows, columns] is used up."""
        self.along.setdefault(name, []).append((gradient * weight).sum(1, dtype=torch.float64))
        self._add_squares(name, gradient.square_())

    def add_errors(self, name: str, errors: Sequence[float]) -> None:
        """Add energies of outputs and errors."""
        before = self.errors.get(name, [0.0] * len(errors))
        self.errors[name] = [a + b for a, b in zip(before, errors, strict=True)]

    def _add_squares(self, name: str, squares: torch.Tensor) -> None:
        before = self.squares.get(name)
        self.squares[name] = squares if before is None else before.add_(squares)

    def losses(self, name: str, rounded: Rounded) -> LayerLoss:
        """Return the losses of a layer with each of its schemes; 0 where nothing came of it."""
        weight = rounded.weights[name]
        squares, along = self.squares.get(name), self.along.get(name, [])
        own = weight.square().sum(1, dtype=torch.float64)
        whole = float(own.sum())
        predicted, relative = [], []
        for change in rounded.changes(name):
            energy = float(change.square().sum(1, dtype=torch.float64).sum())
            relative.append(energy / whole if whole else 0.0)
            if squares is None:
                predicted.append(0.0)
                continue
            inner = (change * weight).sum(1, dtype=torch.float64)
            share = torch.where(own > 0, inner / own, 0.0)
            rest = change.sub_(share.to(torch.float32)[:, None] * weight).square_()
            apart = float((rest * squares).sum(1, dtype=torch.float64).sum())
            together = sum(float((share * rows).sum()) ** 2 for rows in along)
            predicted.append((together + apart) / (2 * self.tokens))
        if self.why:
            output, *errors = self.errors.get(name, [0.0])
            predicted = [e / output for e in errors] if output else [0.0] * len(relative)
        return LayerLoss(tuple(predicted), tuple(relative))
