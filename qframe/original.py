"""The pass of the network as it was, beside that of the quantized one.

Some methods ask what a layer's inputs would be if nothing before it had been quantized. So the
same chunks go through the network a second time, one stop ahead of those of the quantized pass:
both wait before a group of layers, the group is solved on both inputs, the original's chunks go on
through the weights that are still the original ones, and only then are these replaced. That costs a
second forward pass, and the memory of its activations.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from qframe.calibration import Arrival, Lockstep, Stop
from qframe.errors import UnsupportedError


class OriginalPass:
    """Chunks of the original network, which wait where those of the quantized network do.

    steps    a `Lockstep` of its own, on the same module and with the same stops
    inputs   of all chunks, and `kwargs`, as `Lockstep.run` takes them
    """

    def __init__(
        self, steps: Lockstep, inputs: Mapping[int, tuple[Any, ...]], kwargs: Mapping[str, Any]
    ) -> None:
        self._meetings: Generator[tuple[Stop, dict[int, Arrival]], None, None]
        self._meetings = steps.meetings(inputs, kwargs, self._passes)
        self._stop: Stop | None = None
        self._arrivals: dict[int, Arrival] = {}
        self._group: frozenset[str] = frozenset()

    def arrivals(self, stop: Stop, chunks: Collection[int]) -> Mapping[int, Arrival]:
        """Return what the chunks bring to a stop where the quantized pass waits.

        Raises UnsupportedError where they are not there: the network went another way.
        """
        if self._stop is None:
            self._go_on()
        if self._stop != stop or self._arrivals.keys() != set(chunks):
            where = "at the end" if self._stop is None else f"before {self._stop.name!r}"
            raise UnsupportedError(
                f"before {stop.kind} {stop.name!r}: the method asks for the inputs of the network "
                f"that is not quantized, whose pass takes another way: it waits {where}. A layer "
                f"that runs again after others, or that only some tokens reach, is not possible; "
                f"ignore these layers, or use a method that does not ask"
            )
        return self._arrivals

    def advance(self, group: Iterable[str] = ()) -> None:
        """Let the chunks go on to their next stop, through the weights as they are now.

        group   layers at which they need not stop: their weights are still the original ones
        """
        self._group = frozenset(group)
        self._go_on()

    def close(self) -> None:
        """End all chunks."""
        self._meetings.close()

    def _go_on(self) -> None:
        self._stop, self._arrivals = None, {}
        with suppress(StopIteration):
            self._stop, self._arrivals = next(self._meetings)

    def _passes(self, stop: Stop, number: int, arrival: Arrival) -> bool:
        return stop.kind == "layer" and stop.name in self._group


def check_pairs(
    layer: str, inputs: Mapping[int, torch.Tensor], originals: Mapping[int, torch.Tensor]
) -> None:
    """Raise UnsupportedError where the tokens of the two passes are not the same ones."""
    for number, x in inputs.items():
        if originals[number].shape != x.shape:
            raise UnsupportedError(
                f"layer {layer!r}: chunk {number} brings {list(x.shape)} in the quantized network "
                f"and {list(originals[number].shape)} in the original one, so their tokens are no "
                f"pairs, which the method asks for; ignore the layer, or use another method"
            )
