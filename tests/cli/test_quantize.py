"""`qframe quantize`: options on top of recipes, what is printed where, and what is written."""

from __future__ import annotations

import csv
import json

import pytest

from qframe.cli.flags import RecipeFlags, parse_overrides, parse_settings
from qframe.errors import RecipeError

SMALL = ["--group-size", "32", "--num-calibration-samples", "16", "--max-seq-length", "32"]
GPTQ = ["-m", "gptq", *SMALL]

RECIPE = """
method: gptq
options: {dampening_frac: 0.02, actorder: group}
scheme: {num_bits: 3, group_size: 16, observer: mse}
ignore: [lm_head, 're:.*v_proj']
calibration: {num_calibration_samples: 7, held_out_fraction: 0.25}
seed: 5
"""

PLUGIN = """
from dataclasses import dataclass, field
from qframe import Capabilities, QuantizedWeight, hookimpl
from qframe.errors import HessianError

@dataclass(frozen=True)
class Fails:
    name: str = field(init=False, default="fails")
    needs: frozenset = field(init=False, default=frozenset({"absmax"}))
    capabilities: Capabilities = field(init=False, default=Capabilities())

    def round(self, problem, rng):
        raise HessianError(f"layer {problem.name!r}: made to fail")

@hookimpl
def qframe_rounders():
    return [Fails()]
"""


# Options and recipes ----------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def test_without_options_the_file_is_the_recipe(recipe_file):
    recipe = RecipeFlags(recipe=recipe_file).to_recipe()
    assert recipe.method == "gptq"
    assert recipe.scheme.num_bits == 3
    assert recipe.calibration.num_calibration_samples == 7


def test_options_override_the_file_and_leave_the_rest(recipe_file):
    flags = RecipeFlags(
        recipe=recipe_file,
        group_size=-1,
        options=["dampening_frac=0.5"],
        max_seq_length=64,
        override=["re:.*down_proj:num_bits=8"],
        seed=0,
    )
    recipe = flags.to_recipe()
    assert recipe.options == {"dampening_frac": 0.5, "actorder": "group"}
    assert recipe.scheme.strategy == "channel"
    assert (recipe.scheme.num_bits, recipe.scheme.observer) == (3, "mse")
    assert recipe.calibration.num_calibration_samples == 7
    assert recipe.calibration.max_seq_length == 64
    assert recipe.overrides == {"re:.*down_proj": {"num_bits": 8}}
    assert recipe.ignore == ("lm_head", "re:.*v_proj")
    assert recipe.seed == 0


def test_a_preset_takes_the_place_of_the_scheme_in_the_file(recipe_file):
    scheme = RecipeFlags(recipe=recipe_file, scheme="w8a16", symmetric=False).to_recipe().scheme
    assert (scheme.num_bits, scheme.strategy, scheme.symmetric) == (8, "channel", False)
    assert scheme.observer == "minmax"


def test_zero_is_a_value_that_was_given():
    recipe = RecipeFlags(max_fallback_frac=0.0, min_coverage=0.0, seed=0).to_recipe()
    assert (recipe.max_fallback_frac, recipe.min_coverage, recipe.seed) == (0, 0, 0)


def test_values_of_settings_are_typed():
    texts = ["a=1", "b=0.5", "c=true", "d=null", "e=static", "f=[1, 2]", "g=x=y"]
    expected = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "static", "f": [1, 2], "g": "x=y"}
    assert parse_settings(texts, "--set") == expected


@pytest.mark.parametrize("text", ["a", "=1", "a=[1"])
def test_settings_that_cannot_be_read(text):
    with pytest.raises(RecipeError, match="--set"):
        parse_settings([text], "--set")


def test_overrides_of_one_pattern_are_joined():
    found = parse_overrides(["re:a:b:num_bits=8", "re:a:b:group_size=16,symmetric=false"])
    assert found == {"re:a:b": {"num_bits": 8, "group_size": 16, "symmetric": False}}


def test_underscores_in_options_are_hyphens(run, tiny_llama):
    shown = run("quantize", tiny_llama, "--dry_run", "--group_size", "16", "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["recipe"]["scheme"]["group_size"] == 16


def test_numbers_of_threads_from_the_environment(run, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("QFRAME_THREADS", "1")
    assert run("quantize", tiny_llama, "-o", tmp_path / "out", "--group-size", "32").code == 0
    monkeypatch.setenv("QFRAME_THREADS", "none")
    assert run("quantize", tiny_llama, "-o", tmp_path / "out2", "--group-size", "32").code == 2


# What is printed --------------------------------------------------------------------------------


def test_the_table_shows_every_layer_beside_rtn(run, tiny_llama, tmp_path):
    shown = run("quantize", tiny_llama, "-o", tmp_path / "out", *GPTQ)
    assert shown.code == 0, shown.err
    for word in ("error %", "RTN's", "held out %", "gain", "SQNR dB"):
        assert word in shown.out
    assert "damp" not in shown.out  # it is the same for all
    assert "model.layers.1.mlp.down_proj" in shown.out
    assert "quantized" in shown.out
    assert "bits per quantized weight" in shown.out
    assert str(tmp_path / "out") in shown.out.replace("\n", "")
    assert max(map(len, shown.out.splitlines())) <= 100


def test_progress_is_a_line_for_each_block_and_not_on_stdout(run, tiny_llama, tmp_path):
    shown = run("quantize", tiny_llama, "-o", tmp_path / "out", *GPTQ)
    assert "[1/2] model.layers.0: 7 layers" in shown.err
    assert "[2/2] model.layers.1: 7 layers" in shown.err
    assert "[1/2]" not in shown.out


def test_json_on_stdout_is_clean(run, tiny_llama, tmp_path):
    shown = run("quantize", tiny_llama, "-o", tmp_path / "out", "--json", *GPTQ)
    found = json.loads(shown.out)
    assert found["output"] == str(tmp_path / "out")
    assert len(found["report"]["layers"]) == 14
    assert all(layer["seconds"] for layer in found["report"]["layers"])


def test_the_report_folder_has_timings_and_the_output_has_none(run, tiny_llama, tmp_path):
    shown = run("quantize", tiny_llama, "-o", tmp_path / "out", "--report", tmp_path / "r", *GPTQ)
    assert shown.code == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["seconds"]["total"] > 0
    with (tmp_path / "r" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert all(float(row["seconds"]) > 0 for row in rows)
    stored = json.loads((tmp_path / "out" / "qframe_report.json").read_text())
    assert "seconds" not in stored
    assert "seconds" not in stored["layers"][0]


def test_fallbacks_are_named_and_too_many_are_an_error(run, tiny_llama, tmp_path):
    plugin = tmp_path / "fails.py"
    plugin.write_text(PLUGIN)
    arguments = [tiny_llama, "-o", tmp_path / "out", "-m", "fails", "--plugin", plugin, *SMALL]
    failed = run("quantize", *arguments)
    assert failed.code == 3
    assert "14 of 14 layers got a weaker method" in failed.said
    assert "made to fail" in failed.said
    assert not (tmp_path / "out").exists()

    stopped = run("quantize", *arguments, "--on-fallback", "error")
    assert stopped.code == 3
    assert "model.layers.0.self_attn.q_proj" in stopped.said

    allowed = run("quantize", *arguments, "--max-fallback-frac", "1")
    assert allowed.code == 0
    assert "fallback" in allowed.out
    assert "model.layers.0.self_attn.q_proj" in allowed.out
    assert "7 fell back to RTN" in allowed.err


def test_a_plugin_in_a_file_runs_and_shows_in_the_report(run, tiny_llama, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        PLUGIN.replace('"fails"', '"mine"').replace(
            'raise HessianError(f"layer {problem.name!r}: made to fail")',
            "from qframe import rounding\n        return rounding.to_nearest(problem)",
        )
    )
    arguments = [tiny_llama, "-o", tmp_path / "out", "-m", "mine", "--plugin", plugin, "--json"]
    found = json.loads(run("quantize", *arguments, *SMALL).out)
    assert {layer["method"] for layer in found["report"]["layers"]} == {"mine"}


# Evaluation and demonstration -------------------------------------------------------------------


def test_eval_prints_the_protocol_with_the_numbers(run, tiny_llama, tmp_path):
    outs = [tmp_path / "w8", tmp_path / "w3"]
    for out, scheme in zip(outs, ("W8A16", "W3A16"), strict=True):
        assert run("quantize", tiny_llama, "-o", out, "--scheme", scheme).code == 0
    arguments = [*outs, "--reference", tiny_llama, "--window", "32", "--limit", "4"]
    shown = run("eval", *arguments)
    assert shown.code == 0, shown.err
    for word in ("protocol", "4 windows of 32 tokens", "stride 32", "full precision", "KL p99"):
        assert word in " ".join(shown.out.split())
    found = json.loads(run("eval", *arguments, "--json").out)
    full, w8, w3 = found["networks"]
    assert found["protocol"]["tokens_scored"] == 4 * 31
    assert full["kl_mean"] is None
    assert full["bits_per_weight"] == 32
    assert w8["kl_mean"] < w3["kl_mean"]
    assert w3["bits_per_weight"] < w8["bits_per_weight"] < 9
    assert w8["folder_bytes"] == sum(file.stat().st_size for file in outs[0].iterdir())


def test_eval_through_a_kv_cache(run, tiny_llama, tmp_path):
    out = tmp_path / "out"
    made = run("quantize", tiny_llama, "-o", out, "--scheme", "W8A16", "--kv-scheme", "KV4")
    assert made.code == 0, made.err
    small = ["--reference", tiny_llama, "--window", "128", "--limit", "2"]
    shown = run("eval", out, *small, "--kv-chunk", "8")
    assert shown.code == 0, shown.err
    for word in ("KV cache int4", "KV %", "8 tokens at a time", "keys int4 asymmetric"):
        assert word in " ".join(shown.out.split())
    own = json.loads(run("eval", out, *small, "--json").out)
    assert own["protocol"]["kv_chunk"] == 16
    assert [row["kv_cache"] is None for row in own["networks"]] == [True, False]

    without = json.loads(run("eval", out, *small, "--kv-scheme", "none", "--json").out)
    assert without["protocol"]["kv_chunk"] == 0
    assert without["networks"][1]["kl_mean"] < own["networks"][1]["kl_mean"]

    alone = json.loads(run("eval", *small, "--kv-scheme", "kv8", "--json").out)
    full, cached = alone["networks"]
    assert cached["name"] == f"{full['name']}, KV cache int8"
    assert cached["kl_mean"] < own["networks"][1]["kl_mean"]
    assert cached["weights_bytes"] == full["weights_bytes"]

    both = json.loads(run("eval", out, *small, "--kv-scheme", "KV2", "--json").out)
    names = [row["name"] for row in both["networks"]]
    assert [name.rpartition(", KV cache ")[2] for name in names[1:]] == ["int2", "int2"]


def test_eval_needs_something_to_score(run, tiny_llama):
    failed = run("eval", "--reference", tiny_llama)
    assert failed.code == 2
    assert "--kv-scheme" in failed.said
    unknown = run("eval", "--reference", tiny_llama, "--kv-scheme", "KV9")
    assert unknown.code == 2
    assert "did you mean 'KV8'" in unknown.said


def test_demo_writes_its_table(run, tiny, tmp_path, monkeypatch):
    from qframe import demo

    model = tiny.write_llama(tmp_path / "model")
    monkeypatch.setattr(demo, "model_folder", lambda progress: model)
    monkeypatch.setattr(demo, "CALIBRATION_SAMPLES", 8)
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "GROUP_SIZE", 32)
    shown = run("demo", "--out", tmp_path / "results", "--windows", "3")
    assert shown.code == 0, shown.err
    names = ["full precision", "RTN W8", "RTN W4", "GPTQ W4", "RTN W3", "GPTQ W3"]
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [row["name"] for row in found["networks"]] == names
    markdown = (tmp_path / "results" / "results.md").read_text()
    for text in (*names, "protocol", "not a multiple of 128", "never judge"):
        assert text in " ".join(shown.out.split())
        assert text in markdown
    assert "GPTQ W4: quantizing" in shown.err
