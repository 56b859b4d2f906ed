"""A small network of five blocks, runs that are stopped, and what they leave."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

import qframe
from qframe.unfinished import unfinished_folder
from tests.ran import command

BLOCKS = 5
FLAGS = ["-m", "gptq", "--group-size", "32", "--num-calibration-samples", "8"]
FLAGS += ["--max-seq-length", "32"]


class StoppedError(Exception):
    """Ends a run between two blocks, as anything might."""


@pytest.fixture(scope="session")
def model(tiny, tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("survival") / "model", layers=BLOCKS)


@pytest.fixture(scope="session")
def recipe():
    """Return the fields of a recipe."""

    def of(method="rtn", **others):
        fields = {"method": method, "scheme": {"num_bits": 4, "group_size": 32}, **others}
        if method != "rtn" or "calibration" in others or "target_bits" in others:
            fields.setdefault("calibration", {"num_calibration_samples": 8, "max_seq_length": 32})
        return fields

    return of


@pytest.fixture(scope="session")
def contents():
    """Return file name -> bytes of a folder."""
    return lambda folder: {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def kept_files():
    """Return what a stopped run has left of its blocks."""
    return lambda out: sorted((unfinished_folder(out) / "blocks").glob("*"))


@pytest.fixture(scope="session")
def stopped():
    """Run until so many blocks are told of as done; the next one is done as well by then."""

    def run(model, fields, out, *, after, **options):
        def stop(progress):
            if progress.done >= after:
                raise StoppedError

        with pytest.raises(StoppedError):
            qframe.quantize(model, fields, out=out, progress=stop, **options)
        assert not out.exists()

    return run


@pytest.fixture(scope="session")
def undisturbed(model, contents, tmp_path_factory):
    """Return the files that a run makes when nothing stops it; each recipe is run once."""
    made = {}

    def run(fields, **options):
        key = repr((fields, options))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            qframe.quantize(model, fields, out=out, **options)
            made[key] = contents(out)
        return made[key]

    return run


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `qframe ARGUMENTS`."""
    monkeypatch.delenv("QFRAME_THREADS", raising=False)
    return partial(command, capsys)
