"""Step 4 for rounders that learn the layers of a block together, before the first one's turn."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import nn

from qframe import rounding
from qframe.blocks import BlockProblem, BlockRounder, NetworkBlock
from qframe.calibration import Arrival
from qframe.contracts import QuantizedWeight, RoundingProblem
from qframe.errors import PluginError
from qframe.fallbacks import OVERFIT, Fallbacks
from qframe.grids import grid_of, input_grid_of
from qframe.host import Host
from qframe.recipe import Method, Recipe
from qframe.scheme import Scheme


class Learner:
    """Shows blocks to the method's rounder, and keeps what it returns until a layer asks for it."""

    def __init__(
        self, recipe: Recipe, method: Method, host: Host, threads: int, falls: Fallbacks
    ) -> None:
        self._recipe, self._host, self._threads, self._falls = recipe, host, threads, falls
        self._method = method
        self._learned: dict[str, tuple[QuantizedWeight, str, float]] = {}

    def learn(
        self,
        name: str,
        module: nn.Module,
        layers: Mapping[str, tuple[nn.Module, torch.Tensor, Scheme]],
        arrivals: Mapping[int, tuple[Arrival, Arrival]],
        *,
        fitted: int,
        dtype: torch.dtype,
    ) -> None:
        """Let the rounder learn a block.

        module     the block, with weights in memory
        layers     full name -> module, weight [rows, columns] float32 and scheme
        arrivals   input number -> what comes in in the quantized network, and in the original one;
                   from `fitted` on they are held out
        dtype      torch.bfloat16 lets matrix products run in bfloat16

        Does nothing where no token is fitted on. Raises PluginError for codes that are not those of
        the block's layers, and for a weight that was changed.
        """
        clock = time.perf_counter()
        numbers = sorted(arrivals)
        held_out = sum(number >= fitted for number in numbers)
        if not layers or held_out == len(numbers):
            return
        problems = {
            layer: RoundingProblem(
                name=layer,
                weight=weight,
                scheme=scheme,
                grid=grid_of(self._host, scheme),
                input_grid=input_grid_of(self._host, scheme),
            )
            for layer, (_, weight, scheme) in layers.items()
        }
        block = NetworkBlock(name, module, {n: part for n, (part, _, _) in layers.items()}, dtype)
        here, there = zip(*(arrivals[number] for number in numbers), strict=True)
        with block.problem(
            problems, here, there, held_out=held_out, threads=self._threads
        ) as problem:
            rng = np.random.default_rng([self._recipe.seed, zlib.crc32(name.encode())])
            before = {layer: weight._version for layer, (_, weight, _) in layers.items()}
            made = cast(BlockRounder, self._method.rounder).learn(problem, rng)
            self._check(problem, made, before)
            used, codes = self._recipe.method, self._no_worse(problem, made)
        if codes is not made:
            used = OVERFIT
        seconds = (time.perf_counter() - clock) / len(layers)
        self._learned = {layer: (codes[layer], used, seconds) for layer in layers}

    def take(self, layer: str) -> tuple[QuantizedWeight, str, float] | None:
        """Return the codes of a layer, by what method and in how many seconds; None if not learned.

        They are forgotten.
        """
        return self._learned.pop(layer, None)

    def _check(self, problem: BlockProblem, made: object, before: Mapping[str, int]) -> None:
        """Raise PluginError for what is not one QuantizedWeight for each layer.

        before   layer name -> version of its weight before it was shown to the rounder
        """
        rounder = f"rounder {self._method.rounder.name!r}"
        if not isinstance(made, Mapping) or made.keys() != problem.layers.keys():
            got = sorted(made) if isinstance(made, Mapping) else type(made).__name__
            raise PluginError(
                f"{rounder} returned {got} for block {problem.name!r}, expected codes for "
                f"{sorted(problem.layers)}"
            )
        for layer, codes in made.items():
            if not isinstance(codes, QuantizedWeight):
                raise PluginError(
                    f"{rounder} returned {type(codes).__name__} for layer {layer!r}, expected "
                    f"QuantizedWeight"
                )
            if problem.layers[layer].weight._version != before[layer]:
                raise PluginError(
                    f"{rounder} changed the weight of layer {layer!r} in place; work on a copy"
                )

    def _no_worse(
        self, problem: BlockProblem, made: Mapping[str, QuantizedWeight]
    ) -> Mapping[str, QuantizedWeight]:
        """Return the codes, or those rounded to nearest where held-out tokens lose less by them."""
        total = len(problem.targets)
        held_out = range(total - problem.held_out, total)
        if self._recipe.on_overfit == "warn" or not held_out:
            return made
        nearest = {name: rounding.to_nearest(layer) for name, layer in problem.layers.items()}
        found, plain = (
            problem.error({n: rounding.dequantize(q) for n, q in codes.items()}, held_out)
            for codes in (made, nearest)
        )
        if not found > plain:
            return made
        message = (
            f"the mean squared error of its outputs on held-out tokens is {found:.3g}, and "
            f"{plain:.3g} when all its layers are rounded to nearest"
        )
        self._falls.overfitted(f"block {problem.name!r}", problem.name, message)
        return nearest
