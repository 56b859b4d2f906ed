"""Bad input: one screen that names file, layer or parameter and what to do, and nothing left.

Each case is a command that must fail with this exit code and these words, leaving neither the
output folder nor a temporary one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

REQUEST, NUMBERS, CHECKPOINT = 2, 3, 4  # exit codes
GPTQ = ["-m", "gptq", "--group-size", "32", "--num-calibration-samples", "4"]
GPTQ += ["--max-seq-length", "32"]


@pytest.fixture
def fails(run, tmp_path):
    """Run quantize on a folder; check exit code, words, and that nothing was left behind."""

    def call(model, *arguments, code=REQUEST, words=()):
        before = sorted(file.name for file in tmp_path.iterdir())
        failed = run("quantize", model, "-o", tmp_path / "out", *arguments)
        assert failed.code == code, failed.err
        assert failed.out == ""
        for word in words:
            assert word in failed.said
        assert "Traceback" not in failed.err
        assert len(failed.err.splitlines()) < 25  # one screen
        assert sorted(file.name for file in tmp_path.iterdir()) == before
        return failed

    return call


# The model folder -------------------------------------------------------------------------------


def test_no_such_folder(fails, tmp_path):
    fails(tmp_path / "nothing", words=["no such folder", "config.json"])


def test_truncated_safetensors(fails, tiny_llama):
    file = tiny_llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    fails(tiny_llama, words=[str(file), "truncated"])


def test_missing_shard(fails, tiny, tmp_path):
    model = tiny.write_llama(tmp_path / "sharded", shards=3)
    shard = model / "model-00002-of-00003.safetensors"
    shard.unlink()
    fails(model, words=[shard.name, "missing", "download"])


def test_path_traversal_in_the_index(fails, tiny, tmp_path):
    model = tiny.write_llama(tmp_path / "sharded", shards=2)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../etc/secret.safetensors"
    index.write_text(json.dumps(content))
    fails(model, words=[index.name, "../../etc/secret.safetensors", "out of the folder"])


def test_pickle_checkpoint(fails, tiny_llama):
    (tiny_llama / "model.safetensors").unlink()
    (tiny_llama / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    fails(tiny_llama, words=["pickle", "pytorch_model.bin", "safetensors"])


def test_config_that_is_no_json(fails, tiny_llama):
    (tiny_llama / "config.json").write_text("{")
    fails(tiny_llama, words=["config.json", "not JSON"])


def test_an_architecture_that_transformers_does_not_have(fails, tiny_llama):
    file = tiny_llama / "config.json"
    content = json.loads(file.read_text()) | {"architectures": ["NoSuchModel"]}
    file.write_text(json.dumps(content))
    fails(tiny_llama, words=["NoSuchModel"])


# Numbers ----------------------------------------------------------------------------------------


def test_nan_in_a_weight(fails, tiny, tiny_llama):
    weights = tiny.llama_weights(tied=True, vocab_size=256)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    tiny.save_weights(tiny_llama, weights)
    words = ["model.layers.1.mlp.up_proj.weight", "nan", "[3, 5]"]
    fails(tiny_llama, "--group-size", "32", code=NUMBERS, words=words)


def test_activations_that_overflow(fails, tiny, tiny_llama):
    weights = tiny.llama_weights(tied=True, vocab_size=256)
    weights["model.layers.1.input_layernorm.weight"] *= torch.finfo(torch.float32).max
    tiny.save_weights(tiny_llama, weights)
    words = ["model.layers.1.self_attn", "input", "inf"]
    fails(tiny_llama, *GPTQ, code=NUMBERS, words=words)


def test_a_scale_that_does_not_fit_its_dtype(fails, tiny, tiny_llama):
    weights = tiny.llama_weights(tied=True, vocab_size=256)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e30
    tiny.save_weights(tiny_llama, weights)
    words = ["model.layers.0.mlp.up_proj", "scale_dtype"]
    fails(tiny_llama, "--group-size", "32", code=NUMBERS, words=words)


# The request ------------------------------------------------------------------------------------


def test_calibration_text_too_short(fails, tiny_llama, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("hello")
    fails(tiny_llama, *GPTQ, "--dataset", text, words=["short.txt", "5 tokens", "max_seq_length"])


def test_no_such_calibration_text(fails, tiny_llama):
    fails(tiny_llama, *GPTQ, "--dataset", "nothing.txt", words=["nothing.txt", "topics"])


def test_a_scheme_in_the_place_of_a_recipe(fails, tiny_llama):
    fails(tiny_llama, "--recipe", "W4A16", words=["No such file", "--scheme W4A16"])
    fails(tiny_llama, "--recipe", "gptq", words=["No such file", "--scheme", "--method"])
    fails(tiny_llama, "--recipe", "gptq.yaml", words=["gptq.yaml: No such file"])


def test_unknown_recipe_key(fails, tiny_llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: rtn\nscheme:\n  num_bits: 4\n  grup_size: 32\n")
    words = [f"{recipe}:4", "grup_size", "did you mean 'group_size'"]
    fails(tiny_llama, "--recipe", recipe, words=words)


def test_unknown_option_of_a_method(fails, tiny_llama):
    words = ["damping_frac", "did you mean 'dampening_frac'"]
    fails(tiny_llama, *GPTQ, "--set", "damping_frac=0.1", words=words)


def test_wrong_value_of_an_option(fails, tiny_llama):
    fails(tiny_llama, *GPTQ, "--set", "dampening_frac=lots", words=["dampening_frac", "'lots'"])


@pytest.mark.parametrize("flag", ["--ignore", "--targets"])
def test_pattern_that_matches_nothing(fails, tiny_llama, flag):
    name = "model.layers.0.mlp.up_prj"
    fails(tiny_llama, flag, name, words=[name, "matches no layer", "did you mean"])


def test_override_that_matches_nothing(fails, tiny_llama):
    words = ["re:.*experts.*", "matches no layer"]
    fails(tiny_llama, "--override", "re:.*experts.*:num_bits=8", words=words)


@pytest.mark.parametrize("text", ["num_bits=8", "re:.*down_proj", "re:.*:num_bits", ":num_bits=8"])
def test_override_that_cannot_be_read(fails, tiny_llama, text):
    fails(tiny_llama, "--override", text, words=["--override", "PATTERN:KEY=VALUE"])


def test_unknown_method(fails, tiny_llama):
    fails(tiny_llama, "-m", "gtpq", words=["unknown method 'gtpq'", "did you mean 'gptq'"])


def test_unknown_scheme(fails, tiny_llama):
    fails(tiny_llama, "--scheme", "W4A61", words=["W4A61", "did you mean 'W4A16'"])


def test_a_plugin_that_is_not_there(fails, tiny_llama):
    fails(tiny_llama, "--plugin", "no_such.py", words=["no_such.py", "no such file"])


def test_too_little_coverage(fails, tiny_llama):
    fails(tiny_llama, "--targets", "re:.*k_proj", words=["min_coverage"])


def test_no_output_folder_given(run, tiny_llama):
    failed = run("quantize", tiny_llama)
    assert failed.code == REQUEST
    assert "-o OUT" in failed.said


def test_output_folder_exists(run, tiny_llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep me")
    failed = run("quantize", tiny_llama, "-o", out, "--group-size", "32")
    assert failed.code == REQUEST
    assert str(out) in failed.said
    assert "--overwrite" in failed.said
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert run("quantize", tiny_llama, "-o", out, "--group-size", "32", "--overwrite").code == 0
    assert not (out / "mine").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out"]


# Checkpoints ------------------------------------------------------------------------------------


def test_a_folder_that_qframe_did_not_write_cannot_be_evaluated(run, tiny_llama):
    failed = run("eval", tiny_llama, "--reference", tiny_llama)
    assert failed.code == CHECKPOINT
    assert "qframe.json" in failed.said


# What nobody foresaw ----------------------------------------------------------------------------


@pytest.fixture
def broken_inside(monkeypatch):
    from qframe import pipeline

    def fail(*arguments, **options):
        secret = "s3cret"
        raise ZeroDivisionError(f"division by zero{secret[:0]}")

    monkeypatch.setattr(pipeline, "plan_job", fail)


def test_an_internal_error_is_one_line_and_a_hint(run, tiny_llama, tmp_path, broken_inside):
    failed = run("quantize", tiny_llama, "-o", tmp_path / "out")
    assert failed.code == 1
    assert "internal error: ZeroDivisionError: division by zero" in failed.said
    assert "--debug" in failed.said
    assert "Traceback" not in failed.err


def test_debug_shows_the_traceback_without_locals(run, tiny_llama, tmp_path, broken_inside):
    failed = run("quantize", tiny_llama, "-o", tmp_path / "out", "--debug")
    assert failed.code == 1
    assert "Traceback" in failed.err
    assert "'s3cret'" not in failed.err


def test_debug_shows_the_traceback_of_an_error_of_ours(run, tmp_path):
    failed = run("quantize", tmp_path / "nothing", "-o", tmp_path / "out", "--debug")
    assert failed.code == REQUEST
    assert "Traceback" in failed.err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'torch'"), ["'torch'", "qframe doctor"]),
        (OSError(28, "No space left on device", "/there"), ["/there: No space left on device"]),
    ],
)
def test_errors_of_the_machine_are_no_internal_errors(
    run, tiny_llama, tmp_path, monkeypatch, error, words
):
    from qframe import pipeline

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(pipeline, "plan_job", fail)
    failed = run("quantize", tiny_llama, "-o", tmp_path / "out")
    assert failed.code == 1
    assert "internal" not in failed.said
    assert all(word in failed.said for word in words)


def test_out_of_memory_says_what_lowers_it(run, tiny_llama, tmp_path, monkeypatch):
    from qframe import pipeline

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(pipeline, "plan_job", fail)
    failed = run("quantize", tiny_llama, "-o", tmp_path / "out")
    assert failed.code == 1
    assert "--num-calibration-samples" in failed.said


def test_an_interrupt_leaves_nothing(tiny_llama, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qframe", "quantize", str(tiny_llama), "-o", str(out), *GPTQ]
    command[-1] = "128"  # long enough to be interrupted
    command += ["--num-calibration-samples", "1000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores interrupts, and what it starts would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob(".out.*/folder")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]
