"""Fixtures of all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from qframe import calibration, evaluation

TOKENIZERS = (".json", ".txt", ".model")  # what the files of a tokenizer, and beside it, end in

# A first call may compile a kernel, so no deadline; and the same examples in every run, so that
# a failure in CI is one that everybody sees. QFRAME_TEST_PROFILE=nightly searches further.
hypothesis.settings.register_profile("dev", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("QFRAME_TEST_PROFILE", "dev"))


def _neighbour(name: str) -> ModuleType:
    """Import a file beside this one; pytest's importlib mode has no folder on the path for it."""
    full_name = f"qframe_tests_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            full_name, Path(__file__).parent / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py: names, shapes, `write_llama`, `save_weights`."""
    return _neighbour("tiny")


@pytest.fixture
def tiny_llama(tiny: ModuleType, tmp_path: Path) -> Path:
    """A fresh folder with a tiny Llama, which the test may damage."""
    return tiny.write_llama(tmp_path / "model")


@pytest.fixture(scope="session", autouse=True)
def _tokens_once() -> Iterator[None]:
    """Split a text into the tokens of a model once: most tests calibrate on the same one."""
    kept: dict[tuple[bytes, ...], Any] = {}

    def tokenize(folder: Path, documents: Iterable[str]) -> Any:
        texts = list(documents)
        files = [file for file in sorted(Path(folder).iterdir()) if file.suffix in TOKENIZERS]
        key = (*(file.read_bytes() for file in files), *(text.encode() for text in texts))
        if key not in kept:
            kept[key] = original(folder, texts)
        return kept[key].copy()

    original = calibration.tokenize
    with pytest.MonkeyPatch.context() as patch:
        for module in (calibration, evaluation):
            patch.setattr(module, "tokenize", tokenize)
        yield


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; without one the test is skipped."""
    module = _neighbour("browser")
    program = module.find()
    if program is None:
        pytest.skip("no Chromium on this machine; QFRAME_TEST_BROWSER may name one")
    tab = module.Browser(program)
    yield tab
    tab.close()
