"""What a rewritten layer does with its input before it multiplies: divide it, and rotate it.

With Q = diag(signs) H / sqrt(n), W x = W' ((x / s) Q)^T where W' = W diag(s) Q: the inverse of an
orthogonal map is its transpose, so weights and inputs, both of them rows, are rotated alike.
Source of the rotation: Ashkboos et al., QuaRot, NeurIPS 2024, arXiv:2404.00456, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qframe.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qframe.contracts import Rewrite

SCALE, SIGNS = "input_scale", "input_signs"  # what a rewritten layer is stored with


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """x -> x diag(signs) H / sqrt(n), n columns at a time; H is Sylvester's Hadamard matrix.

    signs   [columns / n, n] float32, each +1 or -1; n, the size of a block, is a power of two
    """

    signs: torch.Tensor

    @classmethod
    def drawn(cls, columns: int, rng: np.random.Generator) -> Rotation:
        """Return a rotation with random signs, in blocks as large as `columns` can be cut into.

        >>> import numpy as np
        >>> Rotation.drawn(576, np.random.default_rng(0)).block
        64
        """
        import torch

        block = block_of(columns)
        signs = rng.integers(0, 2, (columns // block, block)) * 2 - 1
        return cls(torch.from_numpy(signs).float())

    @property
    def block(self) -> int:
        """How many columns are mixed with one another."""
        return int(self.signs.shape[1])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows [..., columns] rotated, in their own dtype."""
        blocks = butterflies(x.unflatten(-1, self.signs.shape) * self.signs.to(x.dtype))
        return (blocks * self._norm).flatten(-2)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows [..., columns] rotated back, in their own dtype."""
        blocks = butterflies(x.unflatten(-1, self.signs.shape)) * self._norm
        return (blocks * self.signs.to(x.dtype)).flatten(-2)

    @property
    def _norm(self) -> float:
        return 1 / math.sqrt(self.block)


def block_of(columns: int) -> int:
    """Return the largest block that `columns` can be cut into, a power of two; 1 for none."""
    return max(columns & -columns, 1)


def butterflies(x: torch.Tensor) -> torch.Tensor:
    """Return x H for x [..., n], n a power of two, in its dtype; H H = n.

    Sums and differences on log2(n) levels and not a product of matrices: so a row has the same bits
    whatever rows come with it.
    """
    import torch

    size = int(x.shape[-1])
    half = 1
    while half < size:
        low, high = x.unflatten(-1, (size // (2 * half), 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return x


@dataclass(frozen=True, slots=True, eq=False)
class InputTransform:
    """All that the handlers of a group do to its input: x -> rotate(x / scale).

    scale      [columns] float32, positive; None for 1
    rotation   None for none
    """

    scale: torch.Tensor | None = None
    rotation: Rotation | None = None

    @classmethod
    def stored(cls, tensors: Mapping[str, torch.Tensor]) -> InputTransform | None:
        """Return what `tensors` made these tensors of; None where there are none."""
        scale, signs = tensors.get(SCALE), tensors.get(SIGNS)
        if scale is None and signs is None:
            return None
        return cls(scale, None if signs is None else Rotation(signs.float()))

    def then(self, rewrite: Rewrite, handler: str) -> InputTransform:
        """Return this and what another handler does after it.

        Raises UnsupportedError where a rotation would not come last.
        """
        plain = bool((rewrite.input_scale == 1).all())
        if self.rotation is not None and not (plain and rewrite.rotation is None):
            raise UnsupportedError(
                f"outlier handler {handler!r} would change channels that a rotation has mixed "
                f"already; put the one that rotates last of all handlers"
            )
        scale: torch.Tensor | None = rewrite.input_scale
        if rewrite.rotation is not None and plain:
            scale = self.scale
        elif self.scale is not None:
            scale = self.scale * rewrite.input_scale
        return InputTransform(scale, rewrite.rotation or self.rotation)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer multiplies with, for inputs x [..., columns], in their dtype."""
        if self.scale is not None:
            x = x / self.scale
        return x if self.rotation is None else self.rotation.apply(x)

    def rewrite(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' for W [rows, columns]."""
        if self.scale is not None:
            weight = weight * self.scale
        return weight if self.rotation is None else self.rotation.apply(weight)

    def undo(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that does to plain inputs what `weight` does to transformed ones."""
        if self.rotation is not None:
            weight = self.rotation.undo(weight)
        return weight if self.scale is None else weight / self.scale

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is stored: `input_scale` float32, and `input_signs` int8 in its blocks."""
        import torch

        found = {} if self.scale is None else {SCALE: self.scale.clone()}  # each layer its own
        if self.rotation is not None:
            found[SIGNS] = self.rotation.signs.to(torch.int8)
        return found

    def fault(self, columns: int) -> str:
        """Return what is wrong with it for inputs of so many columns, "" for nothing."""
        import torch

        if self.scale is not None:
            shape, dtype = tuple(self.scale.shape), self.scale.dtype
            if dtype != torch.float32 or shape != (columns,):
                return f"{SCALE} should be float32 [{columns}], got {dtype} {list(shape)}"
            if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
                return f"{SCALE} must be positive and finite"
        return "" if self.rotation is None else _fault_of_signs(self.rotation.signs, columns)


def _fault_of_signs(signs: torch.Tensor, columns: int) -> str:
    import torch

    if signs.dtype != torch.float32 or signs.ndim != 2 or signs.numel() != columns:
        return (
            f"signs should be float32 [blocks, columns of a block], {columns} in all, got "
            f"{signs.dtype} {list(signs.shape)}"
        )
    block = int(signs.shape[1])
    if block & (block - 1):
        return f"a block of signs should be a power of two, got {block}"
    if not bool((signs.abs() == 1).all()):
        return "signs should be +1 or -1"
    return ""
