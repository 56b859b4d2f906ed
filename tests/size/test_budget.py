"""--max-memory is kept or refused, with what is the least and why; the output is the same."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qframe
from qframe import pipeline
from qframe.budget import activation_budget
from qframe.cli.sizes import parse_size
from qframe.errors import MemoryLimitError, RecipeError
from qframe.peak import WAITING, peak_memory
from qframe.pipeline import plan_job

W4 = {"num_bits": 4, "group_size": 32}
GPTQ = {"method": "gptq", "scheme": W4}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("500 mb", 5 * 10**8),
        ("2GiB", 2 << 30),
        ("1.5k", 1500),
        ("700", 700),
        (" 3T ", 3 * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text, "--max-memory") == size


@given(st.text(max_size=6))
def test_anything_else_is_no_size(text):
    with contextlib.suppress(RecipeError):
        assert parse_size(text, "--max-memory") >= 1


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8iB", "8 GB RAM", "1e999", "nan", "0x8"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(RecipeError, match=r"--max-memory .*such as 8GB"):
        parse_size(text, "--max-memory")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "qronos"])
def test_no_more_is_given_than_there_is(tiny_llama, method, threads):
    job = plan_job(tiny_llama, {"method": method, "scheme": W4})
    whole = peak_memory(job, threads)
    least = sum(peak_memory(job, threads, 0).values())
    assert activation_budget(job, None, sum(whole.values()), threads) is None
    with pytest.raises(MemoryLimitError):
        activation_budget(job, None, least - 1, threads)
    if method == "rtn":
        assert least == sum(whole.values())
        return
    for limit in (least, least + 1, (least + sum(whole.values())) // 2):
        budget = activation_budget(job, None, limit, threads)
        assert 0 <= budget <= whole[WAITING]
        assert sum(peak_memory(job, threads, budget).values()) <= limit


def test_too_little_is_refused_before_any_work(run, tiny_llama, tmp_path):
    for more in ([], ["--dry-run"]):
        arguments = ["-m", "gptq", "--group-size", "32", "--max-memory", "100MB", *more]
        done = run("quantize", tiny_llama, "-o", tmp_path / "out", *arguments)
        assert done.code == 2
        assert "max_memory is 100 MB, but this run takes at least" in done.said
        assert "the largest layer is 'model.layers.0.mlp.gate_proj', [96, 64]" in done.said
        assert "--threads 1" in done.said
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_needs_all_inputs_at_once_is_refused_by_name(tiny_llama, tmp_path):
    job = plan_job(tiny_llama, {"method": "autoround_block", "scheme": W4})
    limit = sum(peak_memory(job, 1).values()) - 1
    with pytest.raises(MemoryLimitError, match=r"'autoround_block' learns .*--max-memory"):
        qframe.quantize(tiny_llama, job.recipe, out=tmp_path / "out", threads=1, max_memory=limit)
    assert not (tmp_path / "out").exists()


def test_the_flag_reaches_the_run(run, tiny_llama, tmp_path, monkeypatch):
    asked = []

    def none_wait(job, data, max_memory, threads):
        asked.append(max_memory)
        return 0

    monkeypatch.setattr(pipeline, "activation_budget", none_wait)
    flags = ["-m", "gptq", "--group-size", "32", "--num-calibration-samples", "4"]
    flags += ["--max-seq-length", "32", "--max-memory", "3GB"]
    assert run("quantize", tiny_llama, "-o", tmp_path / "out", *flags).code == 0
    assert set(asked) == {3 * 10**9}
