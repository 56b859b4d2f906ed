"""The inputs of an input group: what its layers are calibrated on, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qframe import parallel
from qframe.contracts import InputGroup
from qframe.transforms import InputTransform
from qframe.weights import check_finite


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """The inputs of one group, [tokens, columns] float32 each: fitted on, and held out.

    original   those of the same tokens in the network that is not quantized, where asked for
    """

    fitted: tuple[torch.Tensor, ...] = ()
    held_out: tuple[torch.Tensor, ...] = ()
    original: GroupInputs | None = None

    @classmethod
    def collect(
        cls,
        group: InputGroup,
        inputs: Mapping[int, torch.Tensor],
        fitted: int,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        originals: Mapping[int, torch.Tensor] | None = None,
    ) -> GroupInputs:
        """Flatten and check activations by input number; from `fitted` on they are held out.

        dtype       in which the layers' products take them: what a layer is fitted on is its input
                    as it really multiplies it
        originals   the same of the network that is not quantized

        Raises NonFiniteError naming the layer.
        """
        numbers = sorted(inputs)
        checked = parallel.spread(lambda i: _tokens(inputs[i], group, dtype), numbers, threads)
        flat = dict(zip(numbers, checked, strict=True))
        return cls(
            tuple(x for i, x in flat.items() if i < fitted),
            tuple(x for i, x in flat.items() if i >= fitted),
            None if originals is None else cls.collect(group, originals, fitted, dtype, threads),
        )

    def transformed(self, transform: InputTransform) -> GroupInputs:
        """Return what a rewritten layer sees."""
        return GroupInputs(
            tuple(transform.apply(x) for x in self.fitted),
            tuple(transform.apply(x) for x in self.held_out),
            None if self.original is None else self.original.transformed(transform),
        )

    def pairs(self) -> GroupInputs:
        """Return inputs and beside them the original ones, [tokens, 2 columns]; empty without."""
        if self.original is None:
            return GroupInputs()
        return GroupInputs(
            _beside(self.fitted, self.original.fitted),
            _beside(self.held_out, self.original.held_out),
        )

    @property
    def tokens(self) -> int:
        """How many tokens are fitted on."""
        return count(self.fitted)

    @property
    def tokens_held_out(self) -> int:
        """How many are held out."""
        return count(self.held_out)


def count(chunks: tuple[torch.Tensor, ...]) -> int:
    """Return the tokens of all chunks."""
    return sum(len(x) for x in chunks)


def _tokens(x: torch.Tensor, group: InputGroup, dtype: torch.dtype) -> torch.Tensor:
    """Return activations as [tokens, columns] float32, rounded to the dtype of the products."""
    flat = x.detach().reshape(-1, group.columns)
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat.to(dtype).to(torch.float32).contiguous()


def _beside(
    here: tuple[torch.Tensor, ...], there: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(both, 1) for both in zip(here, there, strict=True))
