"""Step 1, weights: a Hugging Face folder, read lazily, tensor by tensor. Safetensors only.

Nothing in a folder is trusted: an index must not point out of the folder, a shard must exist
and be whole, and pickle files are never opened.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qframe import direct, pages, parallel
from qframe.errors import NonFiniteError, WeightsError
from qframe.fingerprints import InParts, fingerprint_of

LONGEST_NAME = 255  # of a file
PIECE_BYTES = 1 << 24  # of a tensor that is read in pieces
HASH_BYTES = 1 << 19  # of a piece that is hashed
CACHE_BYTES = 1 << 20  # of a piece that is made another dtype at once
MODEL = "model"  # the stem of the files with weights
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
}
SIZES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""How safetensors names a dtype -> bytes of a number."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""torch's dtype -> the name that safetensors has for it."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""The same the other way."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what the header says of it.

    start   of its numbers in the file
    stamp   size of the file, and when it was changed
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stamp: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        size = SIZES.get(self.dtype, 4)
        for extent in self.shape:
            size *= extent
        return size


def index_name(stem: str) -> str:
    """Return the name of the file that says in which of several files a tensor is."""
    return f"{stem}.safetensors.index.json"


class ModelFolder:
    """A model folder in the layout of the Hugging Face Hub.

    stem        of the names of the files: STEM.safetensors, or those that an index lists
    from_disk   read what is on the disk, and not what the system still has of it in memory, where
                it can tell these apart; and take the fingerprint of every tensor that is read whole

    Raises WeightsError, naming file and remedy, when the folder is not what it should be.
    """

    def __init__(self, path: str | Path, stem: str = MODEL, *, from_disk: bool = False) -> None:
        self.path, self._stem, self._from_disk = Path(path), stem, from_disk
        self._fingerprints: dict[str, str] = {}
        self._parts: dict[str, InParts] = {}  # of tensors that come some rows at a time
        if not self.path.is_dir():
            raise WeightsError(
                f"{self.path}: no such folder; a model is a folder with config.json and "
                f"*.safetensors"
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / "config.json")

    @property
    def has_weights(self) -> bool:
        """Whether there is a file with weights; a config.json may lie alone."""
        names = (f"{self._stem}.safetensors", index_name(self._stem))
        return any((self.path / name).is_file() for name in names)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name, from the headers alone."""
        found: dict[str, StoredTensor] = {}
        for file in self._files():
            # Not "pt": that maps the file as a whole for writing, which limits of memory count.
            with _open(file, "np") as handle:
                starts, stamp = _starts(file)
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    view = handle.get_slice(name)
                    if name in found:
                        raise WeightsError(
                            f"tensor {name!r} is both in {found[name].file.name} and {file.name}"
                        )
                    kind, shape = view.get_dtype(), tuple(view.get_shape())
                    found[name] = StoredTensor(file, kind, shape, starts[name], stamp)
        index = self.path / index_name(self._stem)
        if index.is_file():
            promised = set(read_json(index)["weight_map"])
            missing = sorted(promised - found.keys())
            if missing:
                raise WeightsError(
                    f"{index}: tensor {missing[0]!r} is listed but in no shard "
                    f"({len(missing)} missing); download the folder again"
                )
        return found

    def raw(self, name: str) -> torch.Tensor:
        """Return a tensor as stored, whatever is in it."""
        there = self.tensors[name]
        if there.dtype in DTYPES:
            with _reading(there, self._from_disk) as stream:
                found = _numbers(stream, there)
            if self._from_disk:
                self._fingerprints.setdefault(name, fingerprint_of((found,)))
            return found
        with _open(there.file, "pt") as handle:
            try:
                tensor: torch.Tensor = handle.get_tensor(name)
            except SafetensorError as error:
                raise WeightsError(f"{there.file}: tensor {name!r}: {error}") from None
        return tensor

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as stored. Raises NonFiniteError for NaN or infinity in it."""
        tensor = self.raw(name)
        if tensor.is_floating_point() and tensor.element_size() > 1:
            check_finite(tensor, f"{self.tensors[name].file}: tensor {name!r}")
        return tensor

    def raw_pieces(self, name: str, size: int | None = None) -> Iterator[torch.Tensor]:
        """Yield a tensor as stored, whatever is in it, some of its rows at a time.

        size   bytes of a piece, PIECE_BYTES unless told; a row may have more
        """
        there, size = self.tensors[name], size or PIECE_BYTES
        if not there.shape or there.bytes <= size or there.dtype not in DTYPES:
            yield self.raw(name)
            return
        with _reading(there, self._from_disk) as stream:
            for rows in _cut(there, size):
                yield _numbers(stream, there, rows)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor as stored, some of its rows at a time; the same errors as for `read`."""
        for piece in self.raw_pieces(name):
            if _doubtful(piece):
                self.read(name)  # raises, and says where
            yield piece

    def read_float32(self, name: str) -> torch.Tensor:
        """Return a tensor as float32; the same errors as for `read`.

        What is read is made float32 while it is in the cache, piece by piece.
        """
        there = self.tensors[name]
        if there.bytes <= CACHE_BYTES or not there.shape or there.dtype not in DTYPES:
            return self.read(name).to(torch.float32)
        found = pages.empty(there.shape, torch.float32)

        def work(rows: slice) -> None:
            with _reading(there) as stream:
                piece = _numbers(stream, there, rows)
            if _doubtful(piece):
                self.read(name)  # raises, and says where
            found[rows] = piece

        parallel.each(work, _cut(there, CACHE_BYTES))
        return found

    def rows_float32(self, name: str, rows: slice) -> torch.Tensor:
        """Return some rows of a tensor as float32; the same errors as for `read`."""
        there = self.tensors[name]
        if there.dtype not in DTYPES:
            return self.read(name)[rows].to(torch.float32)
        with _reading(there) as stream:
            piece = _numbers(stream, there, rows)
        self._hash_part(name, rows, piece)
        if _doubtful(piece):
            self.read(name)  # raises, and says where
        if piece.dtype == torch.float32:
            return piece
        found = pages.empty(piece.shape, torch.float32)
        found.copy_(piece)
        return found

    def _hash_part(self, name: str, rows: slice, piece: torch.Tensor) -> None:
        """Take rows that were read into the fingerprint of their tensor."""
        if name in self._fingerprints:
            return
        parts = self._parts.setdefault(name, InParts(self.tensors[name].shape[0]))
        found = parts.add(rows.start, piece)
        if found is not None:
            self._fingerprints[name] = found
            self._parts.pop(name, None)

    @property
    def known_fingerprints(self) -> Mapping[str, str]:
        """Name of a tensor -> its fingerprint, of those whose is known by now."""
        return dict(self._fingerprints)

    def fingerprint(self, name: str) -> str:
        """Return the fingerprint of a tensor, which is read for it once.

        Whoever reads the tensor later reads the same bytes, or gets a WeightsError.
        """
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint_of(self.raw_pieces(name, HASH_BYTES))
            self._parts.pop(name, None)
        return self._fingerprints[name]

    def side_files(self) -> list[Path]:
        """Return every file that is not a weight: config, tokenizer, licence, ..."""
        return sorted(
            file
            for file in self.path.iterdir()
            if file.is_file()
            and file.suffix not in _WEIGHT_SUFFIXES
            and not file.name.endswith(index_name(""))
        )

    def _files(self) -> list[Path]:
        index = self.path / index_name(self._stem)
        single = f"{self._stem}.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) for name in weight_map.values()
            ):
                raise WeightsError(f"{index}: 'weight_map' must map tensor names to file names")
            files = []
            for name in sorted(set(weight_map.values())):
                if Path(name).name != name or name in {"", ".", ".."} or "\0" in name:
                    raise WeightsError(
                        f"{index}: file name {name!r} leads out of the folder; a shard must be a "
                        f"plain file name. Do not use this folder if you do not trust its source"
                    )
                if len(name) > LONGEST_NAME or not (self.path / name).is_file():
                    raise WeightsError(
                        f"{self.path / name[:LONGEST_NAME]}: shard is missing, though "
                        f"{index.name} lists it; download the folder again"
                    )
                files.append(self.path / name)
            return files
        if (self.path / single).is_file():
            return [self.path / single]
        pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise WeightsError(
                f"{self.path}: only pickle weights ({pickles[0]}), which can run code when "
                f"opened, so qframe does not; convert them to safetensors, e.g. with "
                f"transformers' save_pretrained on a machine where you trust the file"
            )
        raise WeightsError(f"{self.path}: neither {single} nor {index.name} in the folder")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file. Raises WeightsError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5000 digits
        raise WeightsError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise NonFiniteError naming `what` and the first index that is NaN or infinite."""
    if _sound(tensor):
        return
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        index = tuple(bad[0].tolist())
        raise NonFiniteError(
            f"{what} holds {float(tensor[index])} at index {list(index)} "
            f"({len(bad)} non-finite of {tensor.numel()})"
        )


def _doubtful(tensor: torch.Tensor) -> bool:
    """Whether a tensor may hold numbers that are not finite. Floats of 8 bits are not looked at."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and not _sound(tensor)


def _sound(tensor: torch.Tensor) -> bool:
    """Whether it is clear at a glance that all numbers are finite.

    A sum is NaN or inf where any term is; only then is it worth looking at each one (a sum of
    finite terms may overflow too).
    """
    return bool(torch.isfinite(tensor.sum()))


def _starts(file: Path) -> tuple[dict[str, int], tuple[int, int]]:
    """Return where the numbers of each tensor begin, of a file whose header is sound; its stamp."""
    with file.open("rb") as stream:
        stamp = _stamp(stream)
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    starts = {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return starts, stamp


@contextmanager
def _reading(there: StoredTensor, from_disk: bool = False) -> Iterator[io.FileIO]:
    """Open the file of a tensor to read from it. Raises WeightsError, also where that fails."""
    try:
        with io.FileIO(there.file, opener=direct.opened if from_disk else None) as stream:
            if _stamp(stream) != there.stamp:
                raise WeightsError(f"{there.file}: it was changed while it was being used")
            yield stream
    except OSError as error:
        raise WeightsError(f"{there.file}: cannot be read: {error.strerror}") from None


def _stamp(stream: io.FileIO | io.BufferedReader) -> tuple[int, int]:
    """Return what tells whether a file has been changed."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _cut(there: StoredTensor, size: int) -> list[slice]:
    """Return slices of all rows of a tensor, of so many bytes each, unless a row has more."""
    rows = there.shape[0]
    step = max(1, size * rows // max(there.bytes, 1))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _some(stream: io.FileIO, view: memoryview) -> int:
    """Read some bytes into memory; return how many, 0 at the end."""
    try:
        return stream.readinto(view)
    except OSError as error:
        if not direct.cannot(error, stream.fileno()):
            raise
        return stream.readinto(view)


def _numbers(stream: io.FileIO, there: StoredTensor, rows: slice | None = None) -> torch.Tensor:
    """Read a tensor, or some of its rows. Raises WeightsError."""
    size, start, shape = SIZES[there.dtype], there.start, there.shape
    if rows is not None:
        start += rows.start * (there.bytes // there.shape[0])
        shape = (rows.stop - rows.start, *there.shape[1:])
    size *= math.prod(shape)
    # Whole blocks of the disk into memory that begins like one, as reading from it needs them.
    block = direct.BLOCK
    before = start % block
    whole = before + size + -(before + size) % block
    room = pages.empty((whole + block,), torch.uint8)
    room = room[-room.data_ptr() % block :][:whole]
    view, filled = memoryview(room.numpy().data), 0
    stream.seek(start - before)
    while filled < before + size and (count := _some(stream, view[filled:])):
        filled += count
    if filled < before + size:
        raise WeightsError(f"{there.file}: it ends within a tensor: download it again")
    data = room[before : before + size]
    if before % DTYPES[there.dtype].itemsize:  # others place tensors as they like
        data = data.clone()
    return data.view(DTYPES[there.dtype]).reshape(shape)


def _open(file: Path, framework: str) -> Any:
    try:
        return safe_open(str(file), framework=framework)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file}: not a whole safetensors file ({error}); it may be truncated: download it "
            f"again"
        ) from None
