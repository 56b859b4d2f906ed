"""Files that are written as tensors come are what safetensors reads; nothing waits in memory."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qframe
from qframe import parallel
from qframe.errors import NonFiniteError, WeightsError
from qframe.fingerprints import fingerprint, fingerprint_of_file
from qframe.shards import ALIGNMENT, Shards, write_tensors
from qframe.weights import DTYPE_NAMES, SIZES, ModelFolder
from qframe.writing import write_unread

DTYPES = list(DTYPE_NAMES)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensors(draw):
    """Tensors of all dtypes with any bits, empty ones and strided views among them."""
    found = {}
    for name in draw(st.lists(names, unique=True, max_size=8)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        count = SIZES[DTYPE_NAMES[dtype]] * torch.Size(shape).numel()
        raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
        if dtype == torch.bool:
            raw = raw % 2
        tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
        found[name] = tensor.T if tensor.ndim == 2 and draw(st.booleans()) else tensor
    return found


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def written(folder, found, limit):
    shards = Shards(folder, "model", limit)
    for name, tensor in found.items():
        shards.add(name, tensor)
    shards.finish()
    return shards


@given(found=tensors(), limit=st.sampled_from([1, 16, 100, 1 << 20]))
def test_files_are_what_safetensors_reads(tmp_path_factory, found, limit):
    folder = tmp_path_factory.mktemp("written")
    shards = written(folder, found, limit)
    files = sorted(folder.glob("*.safetensors"))
    assert {file.name for file in folder.iterdir()} - {f.name for f in files} <= {
        "model.safetensors.index.json"
    }
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == found.keys()
    for name, tensor in found.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(read[name]) == bits(tensor)
        assert shards.records[name]["blake3"] == fingerprint(tensor)
    for file in files:
        assert shards.files[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % ALIGNMENT == 0
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for entry in header.values():
            assert entry["data_offsets"][0] % SIZES[entry["dtype"]] == 0
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}


@given(found=tensors(), buffer=st.sampled_from([1, 8, 64, 4096]))
def test_numbers_move_up_whatever_the_length_of_the_header(tmp_path_factory, found, buffer):
    folder, whole = (tmp_path_factory.mktemp(name) for name in ("small", "whole"))
    written(whole, found, 1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qframe.shards.BUFFER", buffer)
        written(folder, found, 1 << 20)
    assert contents(folder) == contents(whole)


@given(found=tensors(), limit=st.sampled_from([1, 16, 1 << 20]), cuts=st.integers(1, 3))
def test_a_tensor_may_come_in_pieces(tmp_path_factory, found, limit, cuts):
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    written(whole, found, limit)
    shards = Shards(pieces, "model", limit)
    for name, tensor in found.items():
        parts = tensor.split(cuts) if tensor.ndim else (tensor,)
        shards.add_pieces(name, tensor.dtype, tuple(tensor.shape), parts)
    shards.finish()
    assert contents(whole) == contents(pieces)


def expected_of(found):
    return [(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in found.items()]


@given(found=tensors(), limit=st.sampled_from([1, 16, 100, 1 << 20]), way=st.integers(0, 5))
def test_what_is_expected_changes_nothing_but_spaces(tmp_path_factory, found, limit, way):
    """Whether it comes, or comes in another order, or is too little, or too much."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("expected")
    written(plain, found, limit)
    known = expected_of(found)
    known = {
        1: known[::-1],
        2: known[: len(known) // 2],
        3: [*known, ("something else", "F32", (10**9, 7))],
        4: [("first" * 50, "U8", (3,)), *known],
        5: [(name, "F32", shape) for name, _, shape in known],
    }.get(way, known)
    with pytest.MonkeyPatch.context() as patch:
        if way == 0:
            patch.setattr("qframe.shards.sha256", None)  # is known when the last number has come
        shards = Shards(folder, "model", limit, known)
        for name, tensor in found.items():
            shards.add(name, tensor)
        shards.finish()
    if way == 0:
        assert contents(plain) == contents(folder)
    assert {file.name for file in plain.iterdir()} == {file.name for file in folder.iterdir()}
    for file in sorted(folder.glob("*.safetensors")):
        assert shards.files[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
        one, other = load_file(plain / file.name), load_file(file)
        assert {n: bits(t) for n, t in one.items()} == {n: bits(t) for n, t in other.items()}


def test_a_run_stores_what_is_expected(tiny_llama, tmp_path, monkeypatch):
    """Else every file would be read once more for its hash."""
    monkeypatch.setattr("qframe.shards.sha256", None)
    recipe = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32, "symmetric": False}}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_a_spool_held_is_not_in_the_next_file(tmp_path):
    many, few = torch.arange(50), torch.arange(3)
    written(tmp_path, {"a": many, "b": few, "c": few + 1}, limit=100)
    read = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [sorted(each) for each in read] == [["a"], ["b", "c"]]
    assert read[1]["c"].tolist() == [1, 2, 3]


# Reading in pieces ------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("qframe.weights.PIECE_BYTES", 64)


def folder_with(path: Path, tensor: torch.Tensor) -> ModelFolder:
    path.mkdir(exist_ok=True)
    save_file({"x": tensor}, path / "model.safetensors")
    return ModelFolder(path)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1, 100), (7, 9), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_pieces_are_the_tensor(tmp_path, small_pieces, shape, dtype):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    pieces = list(folder_with(tmp_path / "m", tensor).pieces("x"))
    assert torch.equal(torch.cat(pieces) if shape else pieces[0], tensor)
    assert shape != (7, 9) or dtype is torch.int8 or len(pieces) > 1


@pytest.mark.parametrize("row", [0, 6])
def test_a_number_that_is_none_is_named_by_its_place_in_the_tensor(tmp_path, small_pieces, row):
    tensor = torch.ones(7, 9)
    tensor[row, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"at index \[{row}, 4\]"):
        list(folder_with(tmp_path / "m", tensor).pieces("x"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1, 100), (7, 9), (40, 3, 5)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
)
def test_float32_is_made_piece_by_piece_of_the_same_numbers(
    tmp_path, monkeypatch, shape, dtype, threads
):
    monkeypatch.setattr("qframe.weights.CACHE_BYTES", 48)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    folder = folder_with(tmp_path / "m", tensor)
    with parallel.sharing(threads):
        found = folder.read_float32("x")
    assert found.dtype is torch.float32
    assert torch.equal(found, tensor.float())


@pytest.mark.parametrize("row", [0, 38])
def test_a_number_that_is_none_is_named_by_its_place_in_what_becomes_float32(
    tmp_path, monkeypatch, row
):
    monkeypatch.setattr("qframe.weights.CACHE_BYTES", 48)
    tensor = torch.ones(40, 9, dtype=torch.bfloat16)
    tensor[row, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"at index \[{row}, 4\]"):
        folder_with(tmp_path / "m", tensor).read_float32("x")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1, 100), (7, 9), (300, 41), (4096,)])
def test_what_is_read_from_the_disk_is_what_is_there(tmp_path, monkeypatch, shape, dtype, direct):
    first = torch.arange(1, 4, dtype=torch.uint8)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    file = tmp_path / "model.safetensors"
    own, calls = os.open, []

    def opened(path, flags, *arguments, **options):
        if flags & getattr(os, "O_DIRECT", 0):
            calls.append(path)
            if not direct:
                raise OSError(errno.EINVAL, "Invalid argument")
        return own(path, flags, *arguments, **options)

    save_file({"x": tensor, "first": first}, file)
    monkeypatch.setattr(os, "open", opened)
    folder = ModelFolder(tmp_path, from_disk=True)
    assert bits(folder.raw("x")) == bits(tensor)
    assert folder.raw("first").tolist() == [1, 2, 3]
    assert len(calls) == (2 if hasattr(os, "O_DIRECT") else 0)
    monkeypatch.setattr("qframe.weights._numbers", None)  # what was read has its fingerprint
    assert folder.fingerprint("x") == fingerprint(tensor)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system reads through memory alone")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_file_system_may_refuse_when_a_file_is_read(tmp_path, monkeypatch, code):
    """Others open files to be read from the disk, and cannot."""
    import fcntl

    refusals = []

    class Refusing(io.FileIO):
        def readinto(self, view):
            if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT or code == errno.EIO:
                refusals.append(view)
                raise OSError(code, os.strerror(code))
            return super().readinto(view)

    numbers = torch.arange(5000.0)
    save_file({"x": numbers}, tmp_path / "model.safetensors")
    folder = ModelFolder(tmp_path, from_disk=True)
    monkeypatch.setattr(io, "FileIO", Refusing)
    if code == errno.EIO:
        with pytest.raises(WeightsError, match="cannot be read: Input/output error"):
            folder.raw("x")
    else:
        assert torch.equal(folder.raw("x"), numbers)
    assert len(refusals) == 1


def test_another_error_of_reading_from_the_disk_is_one(tmp_path, monkeypatch):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    folder = ModelFolder(tmp_path, from_disk=True)
    assert folder.tensors

    def refused(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(WeightsError, match="cannot be read: Input/output error"):
        folder.raw("x")


def test_a_tensor_that_lies_anywhere_is_read(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + 1)
    numbers = torch.tensor([1.5, -2.0])
    content = len(text).to_bytes(8, "little") + text + bytes(numbers.view(torch.uint8).tolist())
    (tmp_path / "model.safetensors").write_bytes(content)
    for from_disk in (False, True):
        assert torch.equal(ModelFolder(tmp_path, from_disk=from_disk).raw("x"), numbers)


def test_fingerprints_are_blake3():
    """The hash of nothing, and of abc, as the authors of BLAKE3 give them."""
    nothing = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    abc = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert fingerprint(torch.empty(0)) == nothing
    assert fingerprint(torch.tensor(list(b"abc"), dtype=torch.uint8)) == abc


def test_a_file_has_the_fingerprint_of_its_bytes(tmp_path):
    for size in (0, 1, 9, 10, 100):
        (tmp_path / "file").write_bytes(bytes(range(size)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qframe.fingerprints.BUFFER", 10)
            found = fingerprint_of_file(tmp_path / "file")
        assert found == blake3(bytes(range(size))).hexdigest()


def test_a_fingerprint_is_that_of_the_bytes_and_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.setattr("qframe.weights.HASH_BYTES", 64)
    tensor = torch.arange(63, dtype=torch.bfloat16).reshape(7, 9)
    folder = folder_with(tmp_path / "m", tensor)
    assert folder.fingerprint("x") == fingerprint(tensor)
    monkeypatch.setattr("qframe.weights._numbers", None)  # nothing is read any more
    assert folder.fingerprint("x") == fingerprint(tensor)


@pytest.mark.parametrize("reading", ["raw", "read", "read_float32", "fingerprint"])
def test_a_file_that_was_changed_meanwhile_is_not_read(tmp_path, reading):
    folder = folder_with(tmp_path / "m", torch.ones(300, 1000))
    assert folder.tensors
    file = tmp_path / "m" / "model.safetensors"
    save_file({"x": torch.zeros(300, 1000)}, file)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(WeightsError, match=r"model.safetensors: it was changed"):
        getattr(folder, reading)("x")


def test_a_spool_takes_no_more_disk_than_what_is_in_it(tmp_path):
    shards = Shards(tmp_path, "model", 100)
    shards.add("first", torch.zeros(25))
    shards.add("second", torch.zeros(2))
    shards._spool.finish()
    assert (tmp_path / "model-spool").stat().st_size == torch.zeros(2).nbytes
    shards.close()


# Files that are not read soon ---------------------------------------------------------------------

PARTS = st.lists(st.binary(max_size=40), max_size=6)


@given(parts=PARTS, at_once=st.sampled_from([4096, 8192]), times=st.sampled_from([1, 200]))
def test_a_file_that_is_not_read_soon_holds_what_was_written(
    tmp_path_factory, parts, at_once, times
):
    file = tmp_path_factory.mktemp("unread") / "file"
    file.write_bytes(b"what was there" * 9999)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qframe.writing._AT_ONCE", at_once)
        write_unread(file, [memoryview(part * times) for part in parts])
    assert file.read_bytes() == b"".join(part * times for part in parts)


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_that_writes_only_through_memory_does_so(tmp_path, monkeypatch, refused):
    own, direct = getattr(os, refused), getattr(os, "O_DIRECT", 0)
    calls = []

    def refuse(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return own(*arguments)

    monkeypatch.setattr("qframe.writing._AT_ONCE", 4096)
    monkeypatch.setattr(os, refused, refuse)
    parts = [b"one" * 3000, b"two" * 3000]
    write_unread(tmp_path / "file", map(memoryview, parts))
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert refused == "write" or calls[0][1] & direct == direct


def test_a_disk_that_takes_some_of_a_block_gets_the_rest(tmp_path, monkeypatch):
    own, calls = os.write, []

    def some(handle, part):
        calls.append(len(part))
        return own(handle, part[: max(1, len(part) // 3)])

    monkeypatch.setattr("qframe.writing._AT_ONCE", 8192)
    monkeypatch.setattr(os, "write", some)
    write_unread(tmp_path / "file", [memoryview(bytes(range(250)) * 100)])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == bytes(range(250)) * 100
    assert len(calls) > 4


def test_another_error_of_the_disk_is_one(tmp_path, monkeypatch):
    calls = []

    def full(*arguments):
        calls.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_unread(tmp_path / "file", [memoryview(b"one")])
    assert len(calls) == 1  # a full disk is not tried again


@given(found=tensors())
def test_tensors_that_are_at_hand_are_what_safetensors_reads(tmp_path_factory, found):
    file = tmp_path_factory.mktemp("at-hand") / "file.safetensors"
    digest = write_tensors(file, found, {"said": "something"})
    assert digest == blake3(file.read_bytes()).hexdigest()
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"said": "something"}
        assert sorted(handle.keys()) == sorted(found)
        for name, tensor in found.items():
            assert bits(handle.get_tensor(name)) == bits(tensor)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    assert all(e["data_offsets"][0] % SIZES[e["dtype"]] == 0 for e in header.values())
