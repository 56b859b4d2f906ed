"""Rounding for what a whole block computes: its layers are learned together, by slopes.

A rounder that has a method `learn` (`BlockRounder`) is shown every block before its first layer is
quantized: the block's inputs in the quantized network, and its outputs in the original one. What it
returns is what the layers get when it is their turn.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from qframe import parallel
from qframe.calibration import Arrival
from qframe.contracts import QuantizedWeight, Rounder, RoundingProblem
from qframe.errors import ModelError
from qframe.model import get_weight
from qframe.weights import check_finite

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockProblem:
    """Give every weight of a block's layers a code, so that the block's outputs stay as they were.

    name       of the block, for messages
    layers     layer name -> its rounding problem, without statistics
    run        (input number, layer name -> weight [rows, columns] float32) -> outputs, float32 of
               any shape. Slopes go through it. A layer that is not named has its own weight
    targets    outputs in the network that is not quantized, one tensor for each input; the numbers
               of a token lie along the last dimension
    moved      how far each token of the inputs has moved from where it is in the original network,
               like targets but for the last dimension, squared; None: not at all
    held_out   how many of the last inputs are kept aside: to choose with, never to fit
    threads    how many inputs run at once; no number depends on it
    """

    name: str
    layers: Mapping[str, RoundingProblem]
    run: Callable[[int, Weights], torch.Tensor]
    targets: Sequence[torch.Tensor]
    moved: Sequence[torch.Tensor] | None = None
    held_out: int = 0
    threads: int = 1

    @property
    def fitted(self) -> range:
        """The numbers of inputs to fit on."""
        return range(len(self.targets) - self.held_out)

    @cached_property
    def importance(self) -> Sequence[torch.Tensor]:
        """What the squared error of each token counts, float64: like `moved`.

        A token that has moved by d counts m / (m + d), m the mean of all d that are fitted on. A
        massive token that an earlier block has missed stays wrong whatever this one does, and would
        outweigh all others.
        """
        if self.moved is None:
            return [torch.ones(each.shape[:-1], dtype=torch.float64) for each in self.targets]
        fitted = [self.moved[i].double() for i in self.fitted]
        total = math.fsum(float(each.sum()) for each in fitted)
        mean = total / max(sum(each.numel() for each in fitted), 1)
        if not mean:
            return [torch.ones(each.shape, dtype=torch.float64) for each in self.moved]
        return [mean / (mean + each.double()) for each in self.moved]

    def error(self, weights: Weights, inputs: Sequence[int] | None = None) -> float:
        """Return the mean squared error of outputs, each token by its importance.

        inputs   the numbers of those whose outputs count; None for all that are fitted on
        """
        chosen = self.fitted if inputs is None else inputs

        def one(number: int) -> float:
            with torch.no_grad():
                return float(self._squares(number, weights))

        return self._mean(parallel.spread(one, chosen, self.threads), chosen)

    def slopes(
        self, weights: Weights, inputs: Sequence[int]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the error of some inputs, and the slope of the sum of squares by each weight.

        weights   of every layer
        inputs    the numbers of those whose outputs count

        A slope is [rows, columns] float32, zeros for a layer that no token reached. Raises
        NonFiniteError where one is not finite.
        """

        def one(number: int) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            with torch.enable_grad():
                leaves = {
                    name: weight.detach().requires_grad_() for name, weight in weights.items()
                }
                error = self._squares(number, leaves)
                if not error.requires_grad:
                    return float(error), (None,) * len(leaves)
                wanted = list(leaves.values())
                return float(error.detach()), torch.autograd.grad(error, wanted, allow_unused=True)

        found = parallel.spread(one, inputs, self.threads)
        total = {}
        for place, (name, weight) in enumerate(weights.items()):
            total[name] = torch.zeros_like(weight)
            for _, slopes in found:  # in the order of inputs, whatever ended first
                slope = slopes[place]
                if slope is not None:
                    total[name] += slope
            check_finite(total[name], f"block {self.name!r}: the slope of its error by {name!r}")
        return self._mean([error for error, _ in found], inputs), total

    def _mean(self, errors: Sequence[float], inputs: Sequence[int]) -> float:
        return math.fsum(errors) / max(sum(self.targets[i].numel() for i in inputs), 1)

    def _squares(self, number: int, weights: Weights) -> torch.Tensor:
        lost = (self.run(number, weights) - self.targets[number]).double().square()
        return (lost.sum(-1) * self.importance[number]).sum()


class BlockRounder(Rounder, Protocol):
    """A rounder that learns the layers of a block together; `round` is for those in none."""

    def learn(
        self, problem: BlockProblem, rng: np.random.Generator
    ) -> Mapping[str, QuantizedWeight]:
        """Return codes for every layer of problem.layers. Must not change their weights."""
        ...


class NetworkBlock:
    """A block of a network, which runs on inputs that wait at its door.

    name     of the block, and `module` itself, with weights in memory
    layers   full name -> module of the linear layers in it that are quantized
    dtype    torch.bfloat16 lets matrix products run in bfloat16 (autocast), else float32
    """

    def __init__(
        self, name: str, module: nn.Module, layers: Mapping[str, nn.Module], dtype: torch.dtype
    ) -> None:
        self._name, self._module, self._layers, self._dtype = name, module, layers, dtype
        self._here = threading.local()

    @contextmanager
    def problem(
        self,
        layers: Mapping[str, RoundingProblem],
        arrivals: Sequence[Arrival],
        originals: Sequence[Arrival],
        *,
        held_out: int,
        threads: int,
    ) -> Iterator[BlockProblem]:
        """Give what is to be learned; it can be run until the context is left.

        layers      layer name -> rounding problem, without statistics
        arrivals    inputs in the quantized network; the last `held_out` are not fitted on
        originals   the same in the original one

        Raises ModelError for a block that returns no tensor, NonFiniteError for outputs that are
        not finite.
        """

        def target(arrival: Arrival) -> torch.Tensor:
            with torch.no_grad():
                return self._run(arrival, {})

        for name, module in self._layers.items():
            module.forward = self._forward(name, module)
        try:
            targets = parallel.spread(target, originals, threads)
            for each in targets:
                check_finite(each, f"block {self._name!r}: its output during calibration")
            yield BlockProblem(
                name=self._name,
                layers=layers,
                run=lambda number, weights: self._run(arrivals[number], weights),
                targets=targets,
                moved=[_moved(*each) for each in zip(arrivals, originals, targets, strict=True)],
                held_out=held_out,
                threads=threads,
            )
        finally:
            for module in self._layers.values():
                del module.forward

    def _forward(self, name: str, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a layer's forward, with the weight that the thread has for it."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = self._here.weights.get(name)
            if weight is None:
                weight = get_weight(module)
            return nn.functional.linear(x, weight, module._parameters.get("bias"))

        return forward

    def _run(self, arrival: Arrival, weights: Weights) -> torch.Tensor:
        """Return the first tensor that the block returns, float32."""
        low = self._dtype != torch.float32
        self._here.weights = weights
        try:
            with torch.autocast("cpu", self._dtype if low else torch.bfloat16, enabled=low):
                made: Any = self._module(*arrival.args, **arrival.kwargs)
        finally:
            self._here.weights = {}
        while isinstance(made, tuple | list) and made:
            made = made[0]
        if not isinstance(made, torch.Tensor):
            raise ModelError(
                f"block {self._name!r} returns {type(made).__name__}, and what is learned for a "
                f"block's outputs needs a tensor; use a method that learns layer by layer"
            )
        return made.float()


def _moved(here: Arrival, there: Arrival, target: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each token of a block's first argument from the original one.

    Zeros where that is no tensor with as many tokens as the outputs have.
    """
    x, y = (next(iter((*each.args, *each.kwargs.values())), None) for each in (here, there))
    tokens = target.shape[:-1]
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return torch.zeros(tokens, dtype=torch.float64)
    if x.shape != y.shape or x.shape[:-1] != tokens:
        return torch.zeros(tokens, dtype=torch.float64)
    return (x.double() - y.double()).square().sum(-1)
