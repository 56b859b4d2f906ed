"""The inputs of an input group: what its layers are calibrated on, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch

from qframe import parallel
from qframe.contracts import InputGroup
from qframe.ranks import ALONE, Ranks, rank_of, slot_of
from qframe.transforms import InputTransform
from qframe.weights import check_finite

Read = Callable[[int, torch.Tensor], torch.Tensor]
"""Returns an activation, given the number of its chunk: from the disk where it is there."""


class Later(Sequence[torch.Tensor]):
    """Chunks that are made whenever they are asked for, so that one at a time is in memory.

    made    makes chunk i
    count   how many there are
    """

    def __init__(self, made: Callable[[int], torch.Tensor], count: int) -> None:
        self._made, self._count = made, count

    def __len__(self) -> int:
        """How many chunks there are."""
        return self._count

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Later: ...
    def __getitem__(self, place: int | slice) -> torch.Tensor | Later:
        """Make a chunk, or say which of them are meant."""
        chosen = range(self._count)[place]
        if isinstance(chosen, int):
            return self._made(chosen)
        return Later(lambda i: self._made(chosen[i]), len(chosen))


@dataclass(frozen=True, slots=True)
class Waiting:
    """What chunks that wait bring to a layer, by their numbers.

    read   reads what may be on the disk; None where all of it is in memory
    """

    inputs: Mapping[int, torch.Tensor]
    read: Read | None = None

    def chunks(self, group: InputGroup, dtype: torch.dtype, threads: int) -> Sequence[torch.Tensor]:
        """Return them by rising number, [tokens, columns] float32 each, checked when they are read.

        dtype   to which they are rounded
        """
        numbers, read = sorted(self.inputs), self.read
        if read is None:
            return parallel.spread(
                lambda i: _tokens(self.inputs[i], group, dtype), numbers, threads
            )

        def made(i: int) -> torch.Tensor:
            x = self.inputs[numbers[i]]
            found = _tokens(read(numbers[i], x), group, dtype)
            # What numpy has seen can never be emptied.
            same = found.untyped_storage()._cdata == x.untyped_storage()._cdata
            return found.clone() if same else found

        return Later(made, len(numbers))


@dataclass(frozen=True, slots=True)
class Chunks:
    """Those chunks of some text that this rank has, as a group of layers reads them.

    tensors   [tokens, columns] float32 each
    numbers   which chunks they are, rising
    slots     in which slot of `qframe.ranks` each is
    lengths   number of a chunk -> its tokens, rising; of the chunks of all ranks
    """

    tensors: Sequence[torch.Tensor] = ()
    numbers: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    lengths: Mapping[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens the chunks of all ranks have."""
        return sum(self.lengths.values())

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Chunks:
        """Return the same chunks, each changed."""
        tensors: Sequence[torch.Tensor]
        if isinstance(self.tensors, Later):
            tensors = Later(lambda i: change(self.tensors[i]), len(self.tensors))
        else:
            tensors = tuple(map(change, self.tensors))
        return Chunks(tensors, self.numbers, self.slots, self.lengths)

    def beside(self, other: Chunks) -> Chunks:
        """Return [tokens, 2 columns] of each chunk and the same one of another network."""
        here, there = self.tensors, other.tensors
        tensors: Sequence[torch.Tensor]
        if isinstance(here, Later):
            tensors = Later(lambda i: torch.cat((here[i], there[i]), 1), len(here))
        else:
            tensors = tuple(torch.cat(each, 1) for each in zip(here, there, strict=True))
        return Chunks(tensors, self.numbers, self.slots, self.lengths)

    def everywhere(
        self, ranks: Ranks, place: str, found: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return what was found in each chunk, of all ranks, in the order of chunks.

        found   a tensor for each chunk of this rank
        """
        if not self.lengths:  # nobody has any
            return []
        # Every rank has chunks that follow one another.
        given = dict(zip(map(str, self.numbers), found, strict=True))
        every = ranks.exchange(place, given, None)
        return [tensor for tensors, _ in every for tensor in tensors.values()]

    def sample(self, most: int, ranks: Ranks, place: str) -> torch.Tensor:
        """Return at most so many of all tokens, at even distances, [tokens, columns].

        There must be a token.
        """
        step, begun, chosen = -(-self.tokens // most), 0, []
        places = {number: place for place, number in enumerate(self.numbers)}
        for number, length in self.lengths.items():
            if number in places:
                x = self.tensors[places[number]]
                chosen.append(x[-begun % step :: step].clone())
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
        waiting: Waiting,
        split: Split,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        originals: Waiting | None = None,
    ) -> GroupInputs:
        """Flatten and check activations.

        split       which of all chunks are whose, and for what
        dtype       in which the layers' products take them: what a layer is fitted on is its input
                    as it really multiplies it
        originals   the same of the network that is not quantized

        Raises NonFiniteError naming the layer.
        """
        numbers = sorted(waiting.inputs)
        tokens = {n: waiting.inputs[n].numel() // max(group.columns, 1) for n in numbers}
        every = split.ranks.exchange(f"the inputs of {group.name}", {}, list(tokens.items()))
        known = sorted((n, length) for _, each in every for n, length in each)
        chunks = waiting.chunks(group, dtype, threads)
        first, last = split.fitted, split.fitted + split.held_out
        return cls(
            _part(chunks, numbers, known, range(first)),
            _part(chunks, numbers, known, range(first, last)),
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


def _part(
    chunks: Sequence[torch.Tensor],
    numbers: Sequence[int],
    known: Sequence[tuple[int, int]],
    part: range,
) -> Chunks:
    """Return those chunks whose numbers are in a part of all.

    numbers   of the chunks, rising
    known     number and tokens of each chunk of all ranks
    """
    places = [place for place, number in enumerate(numbers) if number in part]
    first, last = (places[0], places[-1] + 1) if places else (0, 0)
    return Chunks(
        chunks[first:last],
        tuple(numbers[first:last]),
        tuple(slot_of(number - part.start, len(part)) for number in numbers[first:last]),
        {number: length for number, length in known if number in part},
    )


def _tokens(x: torch.Tensor, group: InputGroup, dtype: torch.dtype) -> torch.Tensor:
    """Return activations as [tokens, columns] float32, rounded to the dtype of the products."""
    flat = x.detach().reshape(-1, group.columns)
    check_finite(flat, f"layer {group.name!r}: its input during calibration")
    return flat.to(dtype).to(torch.float32).contiguous()
