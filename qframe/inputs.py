"""The inputs of an input group: what its layers are calibrated on, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qframe import parallel
from qframe.contracts import InputGroup
from qframe.ranks import ALONE, Ranks, rank_of, slot_of
from qframe.transforms import InputTransform
from qframe.weights import check_finite


@dataclass(frozen=True, slots=True)
class Chunks:
    """Those chunks of some text that this rank has, as a group of layers reads them.

    tensors   [tokens, columns] float32 each
    numbers   which chunks they are, rising
    slots     in which slot of `qframe.ranks` each is
    lengths   number of a chunk -> its tokens, rising; of the chunks of all ranks
    """

    tensors: tuple[torch.Tensor, ...] = ()
    numbers: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    lengths: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Chunks:
        """Return chunks of a rank that is alone, all of which reached the group."""
        numbers = tuple(range(len(tensors)))
        slots = tuple(slot_of(number, len(tensors)) for number in numbers)
        lengths = dict(enumerate(map(len, tensors)))
        return cls(tuple(tensors), numbers, slots, lengths)

    @property
    def tokens(self) -> int:
        """How many tokens the chunks of all ranks have."""
        return sum(self.lengths.values())

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Chunks:
        """Return the same chunks, each changed."""
        return Chunks(tuple(map(change, self.tensors)), self.numbers, self.slots, self.lengths)

    def beside(self, other: Chunks) -> Chunks:
        """Return [tokens, 2 columns] of each chunk and the same one of another network."""
        both = zip(self.tensors, other.tensors, strict=True)
        tensors = tuple(torch.cat(each, 1) for each in both)
        return Chunks(tensors, self.numbers, self.slots, self.lengths)

    def everywhere(
        self, ranks: Ranks, place: str, found: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return what was found in each chunk, of all ranks, in the order of chunks.

        found   a tensor for each chunk of this rank
        """
        if not self.lengths:  # nobody has any
            return []
        given = dict(zip(map(str, self.numbers), found, strict=True))
        every = [tensors for tensors, _ in ranks.exchange(place, given, None)]
        by_number = {int(number): tensor for each in every for number, tensor in each.items()}
        return [by_number[number] for number in sorted(by_number)]

    def sample(self, most: int, ranks: Ranks, place: str) -> torch.Tensor:
        """Return at most so many of all tokens, at even distances, [tokens, columns].

        There must be a token.
        """
        step, begun, chosen = -(-self.tokens // most), 0, []
        own = dict(zip(self.numbers, self.tensors, strict=True))
        for number, length in self.lengths.items():
            if number in own:
                chosen.append(own[number][-begun % step :: step].contiguous())
            begun += length
        return torch.cat(self.everywhere(ranks, place, chosen))


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """The inputs of one group: fitted on, and held out.

    original   those of the same tokens in the network that is not quantized, where asked for
    """

    fitted: Chunks = field(default_factory=Chunks)
    held_out: Chunks = field(default_factory=Chunks)
    original: GroupInputs | None = None

    @classmethod
    def collect(
        cls,
        group: InputGroup,
        inputs: Mapping[int, torch.Tensor],
        split: Split,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        originals: Mapping[int, torch.Tensor] | None = None,
    ) -> GroupInputs:
        """Flatten and check activations by input number.

        split       which of all chunks are whose, and for what
        dtype       in which the layers' products take them: what a layer is fitted on is its input
                    as it really multiplies it
        originals   the same of the network that is not quantized

        Raises NonFiniteError naming the layer.
        """
        numbers = sorted(inputs)
        checked = parallel.spread(lambda i: _tokens(inputs[i], group, dtype), numbers, threads)
        flat = dict(zip(numbers, checked, strict=True))
        lengths = {str(number): len(x) for number, x in flat.items()}
        every = split.ranks.exchange(f"the inputs of {group.name}", {}, lengths)
        known = sorted((int(n), length) for _, each in every for n, length in each.items())
        return cls(
            _chunks(flat, known, range(split.fitted)),
            _chunks(flat, known, range(split.fitted, split.fitted + split.held_out)),
            None if originals is None else cls.collect(group, originals, split, dtype, threads),
        )

    def transformed(self, transform: InputTransform) -> GroupInputs:
        """Return what a rewritten layer sees."""
        return GroupInputs(
            self.fitted.map(transform.apply),
            self.held_out.map(transform.apply),
            None if self.original is None else self.original.transformed(transform),
        )

    def pairs(self) -> GroupInputs:
        """Return inputs and beside them the original ones, [tokens, 2 columns]; empty without."""
        if self.original is None:
            return GroupInputs()
        return GroupInputs(
            self.fitted.beside(self.original.fitted),
            self.held_out.beside(self.original.held_out),
        )


@dataclass(frozen=True, slots=True)
class Split:
    """How many chunks are fitted on, how many after them are held out, and who shares them.

    ranks   every chunk is one rank's
    """

    fitted: int
    held_out: int
    ranks: Ranks = ALONE

    @property
    def own(self) -> list[int]:
        """The numbers of the chunks that this rank runs."""
        both = ((0, self.fitted), (self.fitted, self.held_out))
        return [
            first + place
            for first, count in both
            for place in range(count)
            if rank_of(place, count, self.ranks.size) == self.ranks.rank
        ]


def _chunks(
    flat: Mapping[int, torch.Tensor], known: Sequence[tuple[int, int]], part: range
) -> Chunks:
    """Return those chunks whose numbers are in a part of all."""
    numbers = tuple(number for number in flat if number in part)
    return Chunks(
        tuple(flat[number] for number in numbers),
        numbers,
        tuple(slot_of(number - part.start, len(part)) for number in numbers),
        {number: length for number, length in known if number in part},
    )


def _tokens(x: torch.Tensor, group: InputGroup, dtype: torch.dtype) -> torch.Tensor:
    """Return activations as [tokens, columns] float32, rounded to the dtype of the products."""
    flat = x.detach().reshape(-1, group.columns)
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat.to(dtype).to(torch.float32).contiguous()
