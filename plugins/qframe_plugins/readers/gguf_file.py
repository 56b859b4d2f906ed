"""The header of a GGUF file: metadata, and where tensors lie.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. Nothing in the
file is trusted: a size is compared with what is left of the file before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qframe.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the metadata have no other
MOST_AXES = 4
STRING, ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Type of a value -> the letter that the module struct has for it."""

Value = int | float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """A tensor of the file.

    kind      ggml's name of its type: "Q4_K"
    shape     rows first, as others have it
    block     weights of a block, and bytes of one
    start     where its data begin in the file
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    start: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return self.count // self.block[0] * self.block[1]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF file: its metadata but for lists, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, FileTensor]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the header. Raises WeightsError, naming what is wrong in the file and where."""
        import numpy as np

        try:
            data = np.memmap(path, mode="r", dtype=np.uint8)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: cannot be read: {error}") from None
        return _Header(path, data).read()

    def data(self, tensor: FileTensor) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor."""
        import numpy as np

        return np.fromfile(self.path, np.uint8, tensor.bytes, offset=tensor.start)


class _Header:
    """A place in the file, moved by what is read."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self._path, self._data, self._place = path, data, 0

    def read(self) -> GGUFFile:
        if self._take(4) != MAGIC:
            raise WeightsError(f"{self._path}: no GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise WeightsError(
                f"{self._path}: GGUF of version {version}; known: 2 and 3, little-endian"
            )
        tensors, pairs = self._number("Q"), self._number("Q")
        metadata: dict[str, Value] = {}
        seen = set()
        for _ in range(pairs):
            key = self._string()
            if key in seen:
                raise self._wrong(f"key {key!r} is there twice")
            seen.add(key)
            value = self._value(self._number("I"))
            if value is not None:
                metadata[key] = value
        found: dict[str, FileTensor] = {}
        for _ in range(tensors):
            tensor = self._tensor()
            if tensor.name in found:
                raise self._wrong(f"tensor {tensor.name!r} is there twice")
            found[tensor.name] = tensor
        return GGUFFile(self._path, metadata, self._placed(found, metadata))

    def _placed(
        self, found: Mapping[str, FileTensor], metadata: Mapping[str, Value]
    ) -> dict[str, FileTensor]:
        """Return tensors with their places in the file, which they do not share."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {alignment!r}, which is no power of two")
        base = -(-self._place // alignment) * alignment
        placed = {
            name: FileTensor(
                name=name,
                kind=tensor.kind,
                shape=tensor.shape,
                block=tensor.block,
                start=base + tensor.start,
            )
            for name, tensor in found.items()
        }
        end, before = base, ""
        for tensor in sorted(placed.values(), key=lambda each: (each.start, each.bytes)):
            if tensor.start % alignment:
                raise self._wrong(f"tensor {tensor.name!r} is not aligned to {alignment} bytes")
            if tensor.start < end:
                raise self._wrong(f"tensors {before!r} and {tensor.name!r} lie in the same place")
            end, before = tensor.start + tensor.bytes, tensor.name
            if end > len(self._data):
                raise self._wrong(
                    f"tensor {tensor.name!r} ends at byte {end}, the file at {len(self._data)}; it "
                    f"may be truncated: download it again"
                )
        return placed

    def _tensor(self) -> FileTensor:
        """Return the next tensor, its place counted from where data begin."""
        import gguf

        name = self._string()
        axes = self._number("I")
        if not 1 <= axes <= MOST_AXES:
            raise self._wrong(f"tensor {name!r} has {axes} axes; 1 to {MOST_AXES} are possible")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        number, start = self._number("I"), self._number("Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self._wrong(f"tensor {name!r} has type {number}, which ggml does not") from None
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % weights:
            raise self._wrong(
                f"tensor {name!r} is {list(shape)}, and {kind.name} has blocks of {weights}"
            )
        return FileTensor(
            name=name, kind=kind.name, shape=shape, block=(weights, size), start=start
        )

    def _value(self, kind: int) -> Value | None:
        """Return the next value; None for a list, which is passed over."""
        if kind == STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != ARRAY:
            raise self._wrong(f"a value has type {kind}, which GGUF does not")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._skip(struct.calcsize(_SCALARS[inner]) * count)
        elif inner == STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise self._wrong(f"a list holds values of type {inner}; numbers and texts are known")
        return None

    def _string(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._wrong("a text is no UTF-8") from None

    def _number(self, letter: str) -> int:
        [found] = struct.unpack(f"<{letter}", self._take(struct.calcsize(letter)))
        return found  # type: ignore[no-any-return]

    def _take(self, count: int) -> bytes:
        start = self._place
        self._skip(count)
        return self._data[start : self._place].tobytes()

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._place:
            raise self._wrong(f"{count} bytes are promised, which the file does not have")
        self._place += count

    def _wrong(self, said: str) -> WeightsError:
        return WeightsError(f"{self._path}: at byte {self._place}: {said}")
