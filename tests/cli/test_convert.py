"""qframe convert: between layouts, and what it says."""

import json

import pytest
import torch

import qframe
from qframe.stored_model import StoredModel

RECIPE = {"method": "rtn", "scheme": {"group_size": 32}, "kv_cache_scheme": "KV8"}


@pytest.fixture
def quantized(tiny_llama, tmp_path):
    qframe.quantize(tiny_llama, RECIPE, out=tmp_path / "out")
    return tmp_path / "out"


def test_there_and_back_is_the_same_folder(run, quantized, tiny_llama, tmp_path):
    done = run("convert", quantized, "--to", "qframe", "-o", tmp_path / "own")
    assert done.code == 0, done.err
    assert "14 quantized layers" in " ".join(done.out.split())
    assert "qframe, for qframe" in done.out
    section = json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "qframe"
    assert section["kv_cache_scheme"]["method"] == "kivi"
    assert qframe.verify(tmp_path / "own", tiny_llama).problems == []
    back = run("convert", tmp_path / "own", "--to", "compressed-tensors", "-o", tmp_path / "back")
    assert back.code == 0, back.err
    for file in quantized.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert qframe.verify(tmp_path / "back", tiny_llama).problems == []


def test_statistics_that_were_kept_go_along(run, tiny_llama, tmp_path):
    recipe = {"method": "gptq", "scheme": {"group_size": 32}, "keep_statistics": True}
    recipe["calibration"] = {"num_calibration_samples": 4, "max_seq_length": 32}
    qframe.quantize(tiny_llama, recipe, out=tmp_path / "out")
    assert run("convert", tmp_path / "out", "--to", "qframe", "-o", tmp_path / "own").code == 0
    report = qframe.verify(tmp_path / "own", tiny_llama)
    assert report.problems == []
    assert report.statistics == qframe.verify(tmp_path / "out").statistics > 0
    assert report.recomputed


def test_a_folder_of_others_stays_without_a_manifest(run, quantized, tmp_path):
    (quantized / "qframe.json").unlink()
    done = run("convert", quantized, "--to", "qframe", "-o", tmp_path / "own")
    assert done.code == 4
    assert "no manifest" in done.said
    assert not (tmp_path / "own").exists()
    done = run("convert", quantized, "--to", "compressed-tensors", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    assert not (tmp_path / "again" / "qframe.json").exists()
    one, other = StoredModel.open(quantized), StoredModel.open(tmp_path / "again")
    for name, layer in one.layers():
        assert torch.equal(layer.weight(), other.layer(name).weight())


def test_mistakes_are_said_in_a_line(run, quantized, tiny_llama, tmp_path):
    wrong = run("convert", quantized, "--to", "guff", "-o", tmp_path / "new")
    assert wrong.code == 2
    assert "no format 'guff'; did you mean 'gguf'?" in wrong.said
    plain = run("convert", tiny_llama, "--to", "qframe", "-o", tmp_path / "new")
    assert plain.code == 4
    assert "not quantized" in plain.said
    there = run("convert", quantized, "--to", "qframe", "-o", quantized)
    assert there.code == 2
    assert "pass --overwrite" in there.said
    assert not (tmp_path / "new").exists()


def test_json_is_all_of_it(run, quantized, tmp_path):
    done = run("convert", quantized, "--to", "qframe", "-o", tmp_path / "own", "--json")
    record = json.loads(done.out)
    assert record["layers"] == 14
    assert record["sizes"]["model.safetensors"] > 0
    assert sum(record["schemes"].values()) == 14
