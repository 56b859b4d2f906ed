"""A dry run promises what a real run does, and writes nothing."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

CASES = {
    "rtn": ["--method", "rtn", "--group-size", "32"],
    "channel": ["--scheme", "W8A16"],
    "asymmetric 3 bits": ["--scheme", "W3A16", "--group-size", "24", "--asymmetric"],
    "some": ["--targets", "re:.*mlp.*", "--ignore", "re:.*up_proj", "--min-coverage", "0.1"],
    "activations": ["--scheme", "W8A8", "--method", "smoothquant", "--no-fold-scales"],
    "activations, one scale": ["--scheme", "W8A8_STATIC"],
    "override": ["--group_size", "32", "--override", "re:.*down_proj:num_bits=8,group_size=-1"],
    "gptq": ["--method", "gptq", "--group-size", "32"],
    "gptq, groups by activation": ["-m", "gptq", "--group-size", "32", "--set", "actorder=group"],
}
MISS = 2 / 100  # of a size: what a prediction may be wrong by
CALIBRATION = ["--num-calibration-samples", "4", "--max-seq-length", "32"]


def quantized_layers(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = file.keys()
    return {n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale")}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plan_is_what_a_real_run_does(run, tiny, tmp_path, arguments, tied):
    model, out = tiny.write_llama(tmp_path / "model", tied=tied), tmp_path / "out"
    arguments = [*arguments, *CALIBRATION]
    planned = run("quantize", model, "--dry-run", "--json", "-o", out, *arguments)
    assert planned.code == 0
    assert not out.exists()
    plan = json.loads(planned.out)

    ran = run("quantize", model, "--json", "-o", out, *arguments)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert {layer["name"] for layer in plan["layers"]} == quantized_layers(out)
    assert {layer["name"] for layer in plan["layers"]} == {
        layer["name"] for layer in result["report"]["layers"]
    }
    assert plan["coverage"]["left"] == result["report"]["coverage"]["left"]

    sizes = {file.name: file.stat().st_size for file in out.iterdir()}
    assert sizes == result["bytes"]
    weights = sizes["model.safetensors"]
    assert abs(plan["output_bytes"]["total"] - sum(sizes.values())) <= MISS * sum(sizes.values())
    assert abs(plan["output_bytes"]["weights"] - weights) <= MISS * weights
    count = sum(layer["rows"] * layer["columns"] for layer in plan["layers"])
    assert round(plan["bits_per_weight"] * count) == round(result["bits_per_weight"] * count)


def test_scales_that_go_into_norms_are_promised_at_most(run, tiny_llama, tmp_path):
    arguments = ["-m", "awq", "--group-size", "32", *CALIBRATION]
    plan = run("quantize", tiny_llama, "--dry-run", *arguments)
    assert "at most" in plan.out
    assert "scales" in plan.out
    stays = run("quantize", tiny_llama, "--dry-run", "--no-fold-scales", *arguments)
    assert "at most" not in stays.out
    promised = json.loads(run("quantize", tiny_llama, "--dry-run", "--json", *arguments).out)
    ran = run("quantize", tiny_llama, "--json", "-o", tmp_path / "out", *arguments)
    found = json.loads(ran.out)
    # Bits of a scale of 64 columns in q, k, v, o, gate and up, and of 96 in down, of two blocks.
    saved = 32 * (64 * 12 + 96 * 2)
    count = sum(layer["rows"] * layer["columns"] for layer in promised["layers"])
    less = promised["bits_per_weight"] - found["bits_per_weight"]
    assert round(less * count) == saved
    assert len(found["report"]["folding"]["folded"]) == 8
    shown = run("quantize", tiny_llama, "--overwrite", "-o", tmp_path / "out", *arguments)
    assert "8 of 8 input scales are folded into norms and layers" in " ".join(shown.out.split())


def test_it_prints_what_is_done_with_each_layer_and_why_not(run, tiny_llama):
    shown = run("quantize", tiny_llama, "--dry-run", "--all-layers", "--ignore", "re:.*v_proj")
    assert shown.code == 0
    assert "model.layers.1.self_attn.q_proj" in shown.out
    assert "left: ignored by the recipe" in shown.out
    assert "bits per weight" in shown.out
    assert "at the peak" in shown.out


def test_blocks_of_the_same_make_are_one_row(run, tiny_llama):
    assert "model.layers.{0..1}.self_attn.q_proj" in run("quantize", tiny_llama, "--dry-run").out


def test_static_checks_are_run(run, tiny_llama, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert run("quantize", tiny_llama, "--dry-run", "-o", tmp_path / "there").code == 2
    assert run("quantize", tiny_llama, "--dry-run", "--ignore", "nothing").code == 2
    missing = run("quantize", tiny_llama, "--dry-run", "-m", "gptq", "--dataset", "no_such.txt")
    assert missing.code == 2
    assert "no_such.txt" in missing.said


def test_inspect_shows_the_same_plan(run, tiny_llama):
    arguments = [tiny_llama, "--json", "--group-size", "32", "--override", "re:.*o_proj:num_bits=8"]
    inspected = json.loads(run("inspect", *arguments).out)
    planned = json.loads(run("quantize", *arguments, "--dry-run").out)
    assert inspected["layers"] == planned["layers"]


def test_inspect_needs_no_weights(run, tiny_llama, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((tiny_llama / "config.json").read_text())
    shown = run("inspect", alone, "--json")
    assert shown.code == 0, shown.err
    assert len(json.loads(shown.out)["layers"]) == 14
    assert "INT4" in run("inspect", alone).out


def test_what_is_kept_in_16_bits_is_said_to_be_unknown(run, tiny_llama):
    shown = run("inspect", tiny_llama, "-m", "llm_int8", "--scheme", "W8A8")
    assert shown.code == 0
    assert "the columns that llm_int8 keeps come on top" in " ".join(shown.out.split())
    assert "come on top" not in run("inspect", tiny_llama, "--scheme", "W8A8").out
