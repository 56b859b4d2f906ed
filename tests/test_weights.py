"""Nothing in a model folder is trusted."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from qframe.errors import NonFiniteError, WeightsError
from qframe.weights import MODEL, ModelFolder, check_finite, index_name

INDEX = index_name(MODEL)


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / name))
    return folder


def with_index(folder, weight_map):
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_headers_tell_everything_but_the_values(tmp_path):
    folder = ModelFolder(write(tmp_path / "m", {"a": torch.zeros(3, 5, dtype=torch.bfloat16)}))
    stored = folder.tensors["a"]
    assert (stored.shape, stored.dtype, stored.bytes) == ((3, 5), "BF16", 30)
    assert folder.read("a").dtype == torch.bfloat16


def test_shards_are_read_through_the_index(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(2)}, "one.safetensors")
    write(folder, {"b": torch.zeros(2)}, "two.safetensors")
    with_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    assert set(ModelFolder(folder).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, name):
    write(tmp_path / "elsewhere", {"a": torch.ones(1)}, "outside.safetensors")
    folder = with_index(tmp_path / "m", {"a": name})
    with pytest.raises(WeightsError, match="leads out of the folder"):
        _ = ModelFolder(folder).tensors


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.safetensors: shard is missing"):
        _ = ModelFolder(with_index(tmp_path / "m", {"a": "gone.safetensors"})).tensors


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(1)}, "one.safetensors")
    with_index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(WeightsError, match="tensor 'b' is listed but in no shard"):
        _ = ModelFolder(folder).tensors


@pytest.mark.parametrize("keep", [0, 4, 12, 60, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    folder = write(tmp_path / "m", {"a": torch.ones(64)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        _ = ModelFolder(folder).tensors


def test_a_header_that_claims_petabytes_allocates_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        _ = ModelFolder(tmp_path).tensors


def test_pickle_files_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match=r"only pickle weights \(pytorch_model.bin\)"):
        _ = ModelFolder(tmp_path).tensors


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_is_named_with_its_place(tmp_path, bad):
    weight = torch.ones(4, 6)
    weight[2, 3] = bad
    folder = ModelFolder(write(tmp_path / "m", {"layer.weight": weight}))
    with pytest.raises(NonFiniteError, match=r"'layer.weight' holds .* at index \[2, 3\]"):
        folder.read("layer.weight")


def test_large_finite_numbers_are_finite():
    check_finite(torch.full((8,), torch.finfo(torch.float64).max, dtype=torch.float64), "x")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsError, match="no such folder"):
        ModelFolder(tmp_path / "nowhere")


def test_side_files_are_everything_but_weights(tmp_path):
    write(tmp_path, {"a": torch.ones(1)})
    for name in ("config.json", "tokenizer.json", "LICENSE", "pytorch_model.bin", INDEX):
        (tmp_path / name).write_text("{}")
    assert [f.name for f in ModelFolder(tmp_path).side_files()] == [
        "LICENSE",
        "config.json",
        "tokenizer.json",
    ]
