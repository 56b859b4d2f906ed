"""Kernels for GPUs become PTX where there is neither a GPU nor a driver."""

import importlib.metadata
import importlib.util
import re
import sys

import pytest

from qframe.errors import MissingExtraError, UnsupportedError
from qframe_plugins.kernels.cuda import compile as compiling
from tests.cuda.extra import need_extra

need_extra()

SOURCES = importlib.import_module("qframe_plugins.kernels.cuda.sources").SOURCES

NAMES = [each.name for each in SOURCES]


def test_names_tell_kernels_apart():
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("arch", compiling.ARCHS)
@pytest.mark.parametrize("kernel", SOURCES, ids=NAMES)
def test_nothing_is_computed_in_64_bits_or_kept_outside_registers(kernel, arch):
    """Nor is anything contracted: a product with a sum is a fused one only where it says so."""
    text = compiling.compile_ptx(kernel, arch)
    assert f".target {arch}" in text
    assert re.findall(r"\.entry (\w+)\(", text) == [kernel.name]
    declared = re.findall(r"\.param .*?(\w+),?$", text.partition("{")[0], re.MULTILINE)
    assert declared == [f"{kernel.name}_{each}" for each in kernel.parameters]
    code = text.partition("{")[2]
    forbidden = r"(?:div|rem)\.[su]64|(?:ld|st)\.local|\bcall\b|(?:add|sub|mul)(?:\.ftz)?\.f32"
    forbidden += "" if kernel.fp64 else r"|\.f64"
    assert re.findall(forbidden, code) == []


def test_the_same_text_is_kept_and_made(tmp_path, monkeypatch):
    """What is in the folder is what would be compiled now, whatever was compiled before."""
    kernel = SOURCES[0]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    made = []
    for _ in range(2):
        compiling._kept.cache_clear()
        made.append(compiling.compile_ptx(kernel, "sm_80"))
        [file] = (tmp_path / "ptx").iterdir()
        assert file.read_text(encoding="utf-8") == made[-1]
    assert made[0] == made[1] == compiling._compile(kernel, (8, 0))
    file.write_text("changed", encoding="utf-8")
    compiling._kept.cache_clear()
    assert compiling.compile_ptx(kernel, "sm_80") == "changed"
    compiling._kept.cache_clear()


def test_a_folder_that_cannot_be_written_to_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "ptx").write_text("a file")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    compiling._kept.cache_clear()
    assert ".entry" in compiling.compile_ptx(SOURCES[0], "sm_80")
    compiling._kept.cache_clear()


@pytest.mark.parametrize("arch", ["sm_75", "sm_8", "90", "sm_90a", "compute_80"])
def test_what_is_no_architecture_is_an_error(arch):
    with pytest.raises(UnsupportedError, match=re.escape(f"architecture {arch!r}, expected sm_80")):
        compiling.compile_ptx(SOURCES[0], arch)


def test_without_the_extra_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'numba-cuda'.*pip install \"qframe\[cuda\]\""):
        compiling.compile_ptx(SOURCES[0], "sm_80")


def test_without_the_compiler_an_error_says_what_to_install(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingExtraError, match=r"'nvidia-nvvm'.*pip install \"qframe\[cuda\]\""):
        compiling.compile_ptx(SOURCES[0], "sm_80")


def test_registering_kernels_compiles_nothing():
    code = "import sys, qframe_plugins.kernels.cuda_ops as c; list(c.qframe_kernels()); "
    code += "print({'numba', 'torch'} & sys.modules.keys())"
    done = __import__("subprocess").run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"
