"""Layers whose rows have nothing to do with one another, quantized a panel of rows at a time.

A panel is read, rounded, packed, unpacked and certified in one go, by one thread. Then there are
left its codes, in their place among those of the layer, and what was found of it. So a layer takes
no more memory than its codes, however large it is, and threads have work whatever the shapes of
layers.

What is found of the panels of a layer is what would be found of the layer: their rounder says that
rows are independent, and their claims that they hold where they do in every panel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from qframe import parallel
from qframe.certificates import Evidence, applicable
from qframe.claims import claims_of
from qframe.contracts import Grid, QuantizedWeight, RoundingProblem
from qframe.errors import MemoryLimitError, QframeError
from qframe.out_of_memory import Where, memory_named
from qframe.packing import PackedWeight
from qframe.recipe import Method
from qframe.scheme import Scheme
from qframe.verdicts import Found

# Weights: with fewer, what Python does once for each panel, while other threads wait, costs more.
PANEL = 1 << 22

Round = Callable[[RoundingProblem, int], QuantizedWeight]
"""Rounds some rows of a layer, and is told the number of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A layer that is to be quantized panel by panel.

    read   returns some of its rows, [rows, columns] float32, contiguous and finite
    """

    name: str
    rows: int
    columns: int
    scheme: Scheme
    grid: Grid
    read: Callable[[slice], torch.Tensor]

    def panels(self) -> list[slice]:
        """Return all rows in panels; nothing but the shape decides how many there are."""
        height = max(1, PANEL // max(self.columns, 1))
        return [slice(top, min(top + height, self.rows)) for top in range(0, self.rows, height)]


@dataclass(frozen=True, slots=True)
class Done:
    """A layer that was quantized panel by panel.

    seconds   by stage, of all threads together
    """

    packed: PackedWeight
    found: Found
    seconds: dict[str, float]


def apart(method: Method, scheme: Scheme) -> bool:
    """Whether a layer may be quantized panel by panel, when it has no statistics.

    That is where its rounder says so, and neither the scheme nor a claim is about all rows at once.
    """
    own = applicable(claims_of(method.rounder), scheme)
    return (
        getattr(method.rounder, "by_rows", False)
        and method.rounder.capabilities.row_independent
        and not (method.needs or method.handlers or method.learns)
        and not (scheme.strategy == "tensor" or scheme.two_level or scheme.input_activations)
        and all(getattr(claim, "by_rows", False) for claim in own)
    )


def quantize(
    sheets: Sequence[Sheet], method: Method, act: Round, threads: int
) -> list[Done | None]:
    """Quantize layers panel by panel.

    act       rounds a panel
    threads   that share the panels of all layers; what comes of them does not depend on that

    None stands for a layer that has to be quantized whole: a panel could not be, or came with what
    is to be told of a layer, or is not finite. Whatever is wrong shows again then, and is said of
    the layer.
    """
    works = [_Work(sheet, method, act) for sheet in sheets if sheet.rows]
    pieces = [(work, rows) for work in works for rows in work.sheet.panels()]
    parallel.spread(lambda piece: piece[0].do(piece[1]), pieces, threads)
    done = {work.sheet.name: work.done() for work in works}
    return [done.get(sheet.name) for sheet in sheets]


class _Work:
    """A layer some of whose panels are quantized."""

    def __init__(self, sheet: Sheet, method: Method, act: Round) -> None:
        self.sheet, self._act = sheet, act
        self._packed = PackedWeight.empty(sheet.rows, sheet.columns, sheet.scheme, sheet.grid)
        self._claims = applicable(claims_of(method.rounder), sheet.scheme)
        self._parts: dict[int, tuple[Found, dict[str, float]]] = {}  # by the number of a first row
        self._whole = False  # whether it turned out that it cannot be quantized so

    def do(self, rows: slice) -> None:
        """Quantize a panel."""
        if self._whole:
            return
        try:
            with memory_named(Where(self.sheet.name, "rounding it", calibrated=False)):
                part = self._quantized(rows)
        except MemoryLimitError:
            raise
        except QframeError:
            part = None
        if part is None:
            self._whole = True
        else:
            self._parts[rows.start] = part

    def _quantized(self, rows: slice) -> tuple[Found, dict[str, float]] | None:
        """Put the codes of a panel in their place; return what was found of it, and seconds."""
        sheet = self.sheet
        problem = RoundingProblem(
            name=sheet.name, weight=sheet.read(rows), scheme=sheet.scheme, grid=sheet.grid
        )
        clocks = [time.perf_counter()]
        quantized = self._act(problem, rows.start)
        clocks.append(time.perf_counter())
        if quantized.info or quantized.events or quantized.order is not None:
            return None
        words = self._packed.words[rows]
        packed = PackedWeight.pack(
            quantized, sheet.scheme, sheet.grid, name=sheet.name, words=words
        )
        if packed.group_index is not None:
            return None
        del quantized  # what is unpacked may have the place of its codes
        self._packed.put(rows, packed)
        evidence = Evidence(problem, packed.unpack())
        clocks.append(time.perf_counter())
        found = Found.of(evidence, self._claims)
        clocks.append(time.perf_counter())
        spent = (after - before for before, after in pairwise(clocks))
        seconds = dict(zip(("round", "pack", "certify"), spent, strict=True))
        return (found, seconds) if found.finite else None

    def done(self) -> Done | None:
        """Return the layer, now that all its panels were quantized; None where some were not."""
        if self._whole:
            return None
        parts = sorted(self._parts.items())
        seconds: dict[str, float] = {}
        for _, (_, spent) in parts:
            for stage, each in spent.items():
                seconds[stage] = seconds.get(stage, 0) + each
        found = Found.together([(first, found) for first, (found, _) in parts])
        return Done(self._packed, found, seconds)
