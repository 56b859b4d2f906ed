"""Folded norms of a folder, held against the reference's: which scale lies between the two.

What a norm was divided by is known from its weight before and after (`qframe.folds`), and the
layers must have been rewritten with just that. Which norm feeds which layers is taken as the
manifest says it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qframe.errors import QframeError
from qframe.folds import SMALLEST, divided, scale_between
from qframe.manifest import Manifest
from qframe.model import Network
from qframe.weights import ModelFolder

if TYPE_CHECKING:
    from qframe.verification import VerifyReport


class FoldedNorms:
    """Finds the scale of each folded norm, and takes down in `report` what is wrong with one.

    tensors   the names of all tensors of folded norms
    """

    def __init__(
        self, report: VerifyReport, manifest: Manifest, source: ModelFolder, network: Network
    ) -> None:
        self._report, self._source, self._network = report, source, network
        self._found: dict[str, torch.Tensor | None] = {}
        self._blamed: set[str] = set()
        names = {layer.folded for layer in manifest.layers.values()} - {None}
        parts = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        self.tensors = parts & manifest.tensors.keys()

    def scale(self, norm: str) -> torch.Tensor | None:
        """Return s', [columns] float32, of a norm; None where there can be none, which is said."""
        if norm not in self._found:
            self._found[norm] = self._scale(norm)
        return self._found[norm]

    def blame(self, norm: str, layer: str) -> None:
        """Say that a layer was rewritten with another scale than the norm's; once for each norm."""
        if norm not in self._blamed:
            self._blamed.add(norm)
            self._wrong(
                f"{norm}.weight",
                f"is not the reference's divided by the scale that layer {layer!r} was multiplied "
                f"with",
            )

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
