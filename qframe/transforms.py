"""What a rewritten layer does with its input before it multiplies: divide it, rotate it, split it.

With Q = diag(signs) H / sqrt(n), W x = W' ((x / s) Q)^T where W' = W diag(s) Q: the inverse of an
orthogonal map is its transpose, so weights and inputs, both of them rows, are rotated alike.
Columns that are kept are taken out of both, and multiplied apart in 16 bits.
Sources: Ashkboos et al., QuaRot, NeurIPS 2024, arXiv:2404.00456, section 3 (the rotation); Dettmers
et al., LLM.int8(), NeurIPS 2022, arXiv:2208.07339, section 3.2 (what is kept).
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

# What a rewritten layer is stored with.
SCALE, SIGNS, KEPT, THRESHOLD = "input_scale", "input_signs", "input_kept", "input_threshold"
TRANSFORM_PARTS = (SCALE, SIGNS, KEPT, THRESHOLD)
STEP = "input_step"  # and one whose activations have a stored scale


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
    """All that the handlers of a group do to its input: x -> rotate(x / scale), and what they keep.

    scale       [columns] float32, positive; None for 1
    rotation    None for none
    kept        [k] int64, ascending: columns of the result that the codes do not multiply, as they
                are multiplied in 16 bits; None for none
    threshold   columns of the result in which any number of a call is at least as large are not
                rounded where activations are; None for no such columns
    """

    scale: torch.Tensor | None = None
    rotation: Rotation | None = None
    kept: torch.Tensor | None = None
    threshold: float | None = None

    @classmethod
    def stored(cls, tensors: Mapping[str, torch.Tensor]) -> InputTransform | None:
        """Return what `tensors` made these tensors of; None where there are none."""
        found = {name: tensors[name] for name in TRANSFORM_PARTS if name in tensors}
        if not found:
            return None
        signs, kept, threshold = (found.get(name) for name in (SIGNS, KEPT, THRESHOLD))
        return cls(
            scale=found.get(SCALE),
            rotation=None if signs is None else Rotation(signs.float()),
            kept=None if kept is None else kept.long(),
            threshold=None if threshold is None else float(threshold),
        )

    @classmethod
    def of(cls, rewrite: Rewrite) -> InputTransform:
        """Return what one rewrite does to the input."""
        return cls(rewrite.input_scale, rewrite.rotation, rewrite.kept, rewrite.threshold)

    def then(self, rewrite: Rewrite, handler: str) -> InputTransform:
        """Return this and what another handler does after it.

        Raises UnsupportedError where channels would change that a rotation has mixed, or that are
        kept.
        """
        plain = bool((rewrite.input_scale == 1).all())
        if self.kept is not None or self.threshold is not None:
            raise UnsupportedError(
                f"outlier handler {handler!r} comes after one that decides which columns are kept "
                f"as they are; put the one that keeps columns last of all handlers"
            )
        if self.rotation is not None and not (plain and rewrite.rotation is None):
            raise UnsupportedError(
                f"outlier handler {handler!r} would change channels that a rotation has mixed "
                f"already; put the one that rotates last of all handlers"
            )
        scale: torch.Tensor | None = rewrite.input_scale
        if plain and (rewrite.rotation or rewrite.kept is not None or rewrite.threshold):
            scale = self.scale
        elif self.scale is not None:
            scale = self.scale * rewrite.input_scale
        rotation = rewrite.rotation or self.rotation
        return InputTransform(scale, rotation, rewrite.kept, rewrite.threshold)

    def folded(self) -> InputTransform | None:
        """Return what is left to do when a norm divides by the scale; None for nothing."""
        if self.rotation is None and self.kept is None and self.threshold is None:
            return None
        return InputTransform(None, self.rotation, self.kept, self.threshold)

    def move(self, x: torch.Tensor) -> torch.Tensor:
        """Return inputs x [..., columns] scaled and rotated, in their dtype, nothing taken out."""
        if self.scale is not None:
            x = x / self.scale
        return x if self.rotation is None else self.rotation.apply(x)

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] without the columns that are kept: zero there."""
        return x if self.kept is None else x.index_fill(-1, self.kept, 0.0)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the codes multiply, for inputs x [..., columns], in their dtype."""
        return self.rest(self.move(x))

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W [rows, columns] scaled and rotated, nothing taken out."""
        if self.scale is not None:
            weight = weight * self.scale
        return weight if self.rotation is None else self.rotation.apply(weight)

    def rewrite(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' for W [rows, columns]."""
        return self.rest(self.whole(weight))

    def undo(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that does to plain inputs what `weight` does to moved ones."""
        if self.rotation is not None:
            weight = self.rotation.undo(weight)
        return weight if self.scale is None else weight / self.scale

    def with_kept(self, values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Return what codes stand for, with the weights [rows, k] put in that are kept, if any."""
        if self.kept is None or weight is None:
            return values
        return values.index_copy(1, self.kept, weight.to(values.dtype))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is stored.

        `input_scale` float32, `input_signs` int8 in its blocks, `input_kept` int32 and
        `input_threshold` [1] float32.
        """
        import torch

        found = {} if self.scale is None else {SCALE: self.scale.clone()}  # each layer its own
        if self.rotation is not None:
            found[SIGNS] = self.rotation.signs.to(torch.int8)
        if self.kept is not None:
            found[KEPT] = self.kept.to(torch.int32)
        if self.threshold is not None:
            found[THRESHOLD] = torch.tensor([self.threshold])
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
        if self.threshold is not None:
            stored = float(torch.tensor(self.threshold, dtype=torch.float32))
            if not 0 < stored < math.inf:
                return f"{THRESHOLD} must be positive and finite, got {stored} in float32"
        wrong = "" if self.rotation is None else _fault_of_signs(self.rotation.signs, columns)
        return wrong or ("" if self.kept is None else _fault_of_kept(self.kept, columns))


def _fault_of_kept(kept: torch.Tensor, columns: int) -> str:
    import torch

    if kept.dtype != torch.int64 or kept.ndim != 1:
        return f"{KEPT} should be int64 [k], got {kept.dtype} {list(kept.shape)}"
    places = kept.tolist()
    if places != sorted(set(places)) or (places and not 0 <= places[0] <= places[-1] < columns):
        return f"{KEPT} should be columns 0..{columns - 1}, ascending, each once, got {places[:8]}"
    return ""


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
