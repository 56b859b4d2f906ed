"""AutoRound, for all layers of a block together: learn which way to round, and where to clip.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, arXiv:2309.05516,
algorithm 1. A weight gets the code clip(rint(w / s + v) + z), eq. (3), with an offset v in
[-1/2, 1/2] of its own and a scale s of a range whose ends are clipped by shares of their own. Both
are moved by the sign of the gradient of the error of the block's outputs, on some of the
calibration tokens in turn; inputs are those in the quantized network, outputs should be those in
the original one.
Error:  the squared error of the block's outputs on all calibration tokens is at most that of layers
        rounded to nearest (docs/bounds.md, B10.f), and no weight moves by more than a step (B10.a).

Where this departs from the paper:
  * a token that has moved far before the block counts less (`BlockProblem.importance`). Else a
    massive one decides about everything after the block that failed to make it what it was;
  * an iterate's error is compared with that of rounding to nearest on the same tokens, for they
    differ in how much there is to lose. The best and the last are tried on all tokens at the end.

A layer that is in no block, or in one that no token reaches, is learned by itself: `autoround`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qframe import Capabilities, QuantizedWeight, RoundingProblem, claims, hookimpl
from qframe_plugins.rounders.autoround import AutoRound

if TYPE_CHECKING:
    import numpy as np

    from qframe.blocks import BlockProblem
    from qframe_plugins.kernels.numba_cpu.autoround_block import Descent


@dataclass(frozen=True)
class AutoRoundBlock:
    """Learn offsets and ranges by signed gradient descent on the output error of a block.

    iterations      steps of the descent
    learning_rate   of the first step, in steps of the grid and shares of the range; it falls
                    linearly to 0. None: 1 / iterations, with which an offset can just reach 1/2
    batch_chunks    chunks of calibration text, of about 2048 tokens, behind each step
    """

    iterations: Annotated[int, Field(ge=0)] = 200
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    batch_chunks: Annotated[int, Field(ge=1)] = 2

    name: str = field(init=False, default="autoround_block")
    needs: frozenset[str] = field(init=False, default=frozenset({"hessian"}))
    capabilities: Capabilities = field(
        init=False, default=Capabilities(strategies=frozenset({"channel", "group"}))
    )
    claims: tuple[object, ...] = field(
        init=False, default=(claims.Radius(steps=1), claims.NoWorseBlock())
    )

    def learn(
        self, problem: BlockProblem, rng: np.random.Generator
    ) -> Mapping[str, QuantizedWeight]:
        """Return the learned codes of every layer of a block.

        Raises NonFiniteError for a weight that is not finite.
        """
        import torch

        from qframe import rounding

        nearest = {name: rounding.to_nearest(layer) for name, layer in problem.layers.items()}
        plain = {name: rounding.dequantize(q) for name, q in nearest.items()}
        descents = {name: _descent(problem.layers[name], q) for name, q in nearest.items()}
        before = [problem.error(plain, [number]) for number in problem.fitted]
        turns = batches(len(problem.fitted), self.batch_chunks, rng)
        rate = self.learning_rate or 1 / max(self.iterations, 1)
        best, most = nearest, math.inf  # by what is left of the error of the batch
        for step in range(self.iterations):
            batch = next(turns)
            weights = {name: torch.from_numpy(d.values()) for name, d in descents.items()}
            error, slopes = problem.slopes(weights, batch)
            usual = math.fsum(before[number] for number in batch) / len(batch)
            if error < most * usual:
                most = error / usual
                best = {name: _codes(d, nearest[name]) for name, d in descents.items()}
            for name, descent in descents.items():
                descent.step(slopes[name].numpy(), rate * (1 - step / self.iterations))
        last = {name: _codes(d, nearest[name]) for name, d in descents.items()}
        kept, start = nearest, problem.error(plain)
        least = start
        for made in (best, last):
            error = problem.error({name: rounding.dequantize(q) for name, q in made.items()})
            if error < least:
                kept, least = made, error
        info = {"block_error": least, "block_error_nearest": start}
        return {name: dataclasses.replace(q, info=info) for name, q in kept.items()}

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return the codes of a layer that is learned by itself; see `autoround`."""
        return AutoRound(self.iterations, self.learning_rate, correction=0.0).round(problem, rng)


def _descent(problem: RoundingProblem, start: QuantizedWeight) -> Descent:
    """Return the state of a layer that begins rounded to nearest."""
    from qframe.weights import check_finite
    from qframe_plugins.kernels.numba_cpu.autoround_block import Descent

    weight, scheme, grid = problem.weight, problem.scheme, problem.grid
    check_finite(weight, f"layer {problem.name!r}: its weight")
    return Descent(
        weight.numpy(),
        start.codes.numpy(),
        start.scale.numpy(),
        start.zero_point.numpy(),
        scheme.group_width(weight.shape[1]),
        grid.qmin,
        grid.qmax,
        symmetric=scheme.symmetric,
        scale_dtype=scheme.scale_dtype,
    )


def _codes(descent: Descent, start: QuantizedWeight) -> QuantizedWeight:
    """Return what a layer's state stands for."""
    import torch

    codes, scale, zero_point = map(torch.from_numpy, descent.codes())
    return QuantizedWeight(
        codes=codes, scale=scale, zero_point=zero_point, group_index=start.group_index
    )


def batches(chunks: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield the numbers of some chunks: all have had their turn before one has another."""
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, chunks):
            waiting += rng.permutation(chunks).tolist()
        batch, waiting = waiting[:size], waiting[size:]
        yield batch


@hookimpl
def qframe_rounders() -> Iterable[AutoRoundBlock]:
    """Register autoround_block."""
    return [AutoRoundBlock()]
