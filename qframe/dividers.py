"""What divides in a folder, held against the reference: which scale lies between the two.

What a norm was divided by is known from its weight before and after (`qframe.folds`); by which
powers of two the rows of a layer were divided, the manifest says (`qframe.feeders`). The layers
that read them must have been rewritten with just that. Which module feeds which layers is taken as
the manifest says it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qframe.errors import QframeError
from qframe.folds import SMALLEST, divided, scale_between
from qframe.manifest import Manifest
from qframe.model import Network
from qframe.stored import StoredLayer, divided_rows
from qframe.weights import ModelFolder

if TYPE_CHECKING:
    from qframe.verification import VerifyReport


class Dividers:
    """Finds the scale of each module that divides, and takes down in `report` what is wrong.

    tensors   the names of all their tensors, but for the codes of layers
    """

    def __init__(
        self, report: VerifyReport, manifest: Manifest, source: ModelFolder, network: Network
    ) -> None:
        self._report, self._source, self._network = report, source, network
        self._divisions = {name: each.division() for name, each in manifest.divisions.items()}
        self._found: dict[str, torch.Tensor | None] = {}
        self._blamed: set[str] = set()
        names = {layer.folded for layer in manifest.layers.values()} - {None}
        parts = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        self.tensors = parts & manifest.tensors.keys()

    def undivided(self, name: str, stored: StoredLayer) -> StoredLayer | None:
        """Return a layer as it was before its rows were divided; None where that cannot be."""
        division = self._divisions.get(name)
        if division is None:
            return stored
        exponents = division.exponents
        if not bool(stored.can_divide(-exponents).all()):
            self._report.add(
                "layer", name, "its scales cannot be what the manifest says they were divided by"
            )
            return None
        bias = self._pair(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        if bias is not None and not torch.equal(bias[1], divided_rows(bias[0], exponents)):
            self._wrong(f"{name}.bias", "is not the reference's divided as the manifest says")
        return stored.divided(-exponents)

    def scale(self, name: str) -> torch.Tensor | None:
        """Return s', [columns] float32, of a module; None where there can be none, which is said.

        name   of a norm, or of a layer whose rows are divided
        """
        if name not in self._found:
            division = self._divisions.get(name)
            self._found[name] = self._scale(name) if division is None else division.scale
        return self._found[name]

    def blame(self, name: str, layer: str) -> None:
        """Say that a layer was rewritten with another scale than its module's; once for each."""
        if name in self._blamed:
            return
        self._blamed.add(name)
        wrong = f"divided by the scale that layer {layer!r} was multiplied with"
        if name in self._divisions:
            self._report.add("layer", name, f"its rows were not {wrong}")
        else:
            self._wrong(f"{name}.weight", f"is not the reference's {wrong}")

    def _scale(self, norm: str) -> torch.Tensor | None:
        weights = self._pair(f"{norm}.weight")
        if weights is None:
            return None
        before, after = weights
        scale = scale_between(before, after)
        good = (scale >= SMALLEST) & torch.isfinite(scale) & ((before != 0) | (after == 0))
        if not bool(good.all()):
            place = int((~good).nonzero()[0])
            self._wrong(
                f"{norm}.weight",
                f"is {float(after[place])} in channel {place}, which no positive scale makes of "
                f"the reference's {float(before[place])}",
            )
            return None
        if f"{norm}.bias" in self.tensors:
            biases = self._pair(f"{norm}.bias")
            if biases is not None and not torch.equal(biases[1], divided(biases[0], scale)):
                self._wrong(f"{norm}.bias", "is not the reference's divided by the norm's scale")
        return scale

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a tensor of the reference and of the folder; None where they cannot be a pair."""
        try:
            before, after = self._network.own(name), self._source.read(name)
        except (QframeError, KeyError) as error:
            self._wrong(name, f"cannot be read here and in the reference: {error}")
            return None
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            self._wrong(
                name,
                f"is {after.dtype} {list(after.shape)}, the reference's {before.dtype} "
                f"{list(before.shape)}",
            )
            return None
        return before, after

    def _wrong(self, name: str, message: str) -> None:
        self._report.add("tensor", name, message)
