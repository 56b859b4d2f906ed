"""The inputs of an input group: what its layers are calibrated on, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from qframe import parallel
from qframe.contracts import InputGroup
from qframe.transforms import InputTransform
from qframe.weights import check_finite

Read = Callable[[int, torch.Tensor], torch.Tensor]
"""Returns an activation, given the number of its chunk: from the disk where it is there."""


class Later(Sequence[torch.Tensor]):
    """Chunks that are made whenever they are asked for, so that one at a time is in memory.

    made     makes chunk i
    tokens   rows of each
    """

    def __init__(self, made: Callable[[int], torch.Tensor], tokens: Sequence[int]) -> None:
        self._made, self.tokens = made, tuple(tokens)

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self.tokens)

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Later: ...
    def __getitem__(self, place: int | slice) -> torch.Tensor | Later:
        """Make a chunk, or say which of them are meant."""
        chosen = range(len(self.tokens))[place]
        if isinstance(chosen, int):
            return self._made(chosen)
        return Later(lambda i: self._made(chosen[i]), [self.tokens[i] for i in chosen])


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """The inputs of one group, [tokens, columns] float32 each: fitted on, and held out.

    original   those of the same tokens in the network that is not quantized, where asked for
    """

    fitted: Sequence[torch.Tensor] = ()
    held_out: Sequence[torch.Tensor] = ()
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

    @classmethod
    def later(
        cls,
        group: InputGroup,
        inputs: Mapping[int, torch.Tensor],
        fitted: int,
        dtype: torch.dtype,
        read: Read,
        originals: tuple[Mapping[int, torch.Tensor], Read] | None = None,
    ) -> GroupInputs:
        """Return the same as `collect`, of activations that are read when they are asked for.

        They are checked then, too.

        originals   those of the network that is not quantized, and what reads them
        """

        def chunks(numbers: Sequence[int]) -> Later:
            def made(i: int) -> torch.Tensor:
                x = inputs[numbers[i]]
                found = _tokens(read(numbers[i], x), group, dtype)
                # What numpy has seen can never be emptied.
                same = found.untyped_storage()._cdata == x.untyped_storage()._cdata
                return found.clone() if same else found

            return Later(made, [inputs[i].numel() // max(group.columns, 1) for i in numbers])

        numbers = sorted(inputs)
        beside = None
        if originals is not None:
            beside = cls.later(group, originals[0], fitted, dtype, originals[1])
        return cls(
            chunks([i for i in numbers if i < fitted]),
            chunks([i for i in numbers if i >= fitted]),
            beside,
        )

    def transformed(self, transform: InputTransform) -> GroupInputs:
        """Return what a rewritten layer sees."""
        return GroupInputs(
            _mapped(transform.apply, self.fitted),
            _mapped(transform.apply, self.held_out),
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


def count(chunks: Sequence[torch.Tensor]) -> int:
    """Return the tokens of all chunks."""
    return sum(chunks.tokens if isinstance(chunks, Later) else map(len, chunks))


def _tokens(x: torch.Tensor, group: InputGroup, dtype: torch.dtype) -> torch.Tensor:
    """Return activations as [tokens, columns] float32, rounded to the dtype of the products."""
    flat = x.detach().reshape(-1, group.columns)
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat.to(dtype).to(torch.float32).contiguous()


def _mapped(
    work: Callable[[torch.Tensor], torch.Tensor], chunks: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    if isinstance(chunks, Later):
        return Later(lambda i: work(chunks[i]), chunks.tokens)
    return tuple(work(x) for x in chunks)


def _beside(here: Sequence[torch.Tensor], there: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if isinstance(here, Later):
        return Later(lambda i: torch.cat((here[i], there[i]), 1), here.tokens)
    return tuple(torch.cat(both, 1) for both in zip(here, there, strict=True))
