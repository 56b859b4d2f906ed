"""`--target-bits` on the command line: the plan, the run, and what cannot be."""

import json
import math

import pytest

CALIBRATION = ["--num-calibration-samples", "4", "--max-seq-length", "32"]
MIXED = ["--group-size", "32", "--target-bits", "5", *CALIBRATION]


def test_the_plan_says_what_is_chosen_from_and_writes_nothing(run, tiny_llama, tmp_path):
    out = tmp_path / "out"
    shown = run("quantize", tiny_llama, "--dry-run", "-o", out, *MIXED, "--candidate-bits", "3,4,8")
    assert shown.code == 0, shown.err
    assert not out.exists()
    flat = " ".join(shown.out.split())
    assert "at most 5 bits per weight" in flat
    assert "with 3, 4, 8 bits: to be chosen" in flat


def test_the_run_keeps_to_the_target_and_prints_the_allocation(run, tiny_llama, tmp_path):
    out = tmp_path / "out"
    arguments = [*MIXED, "--candidate_bits", "3,4,8", "-o", out]
    shown = run("quantize", tiny_llama, *arguments)
    assert shown.code == 0, shown.err
    flat = " ".join(shown.out.split())
    assert "per weight, of at most 5" in flat
    ran = run("quantize", tiny_llama, *arguments, "--overwrite", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert 0 < found["bits_per_weight"] <= 5
    layers = json.loads((out / "qframe.json").read_text())["layers"]
    chosen = {layer["scheme"]["num_bits"] for layer in layers.values()}
    assert chosen <= {3, 4, 8}
    assert len(chosen) > 1
    losses = found["report"]["allocation"]
    assert math.isfinite(losses["predicted"])
    assert losses["target_bits"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-bits", "1"], ["target_bits", "1"]),
        (["--target-bits", "5", "--candidate-bits", "3,nine"], ["candidate", "nine"]),
        (["--candidate-bits", "3,4"], ["candidate_bits", "target_bits"]),
        (
            ["--target-bits", "5", "--candidate-bits", "3,8", "-m", "optimal_rtn"],
            ["candidate_bits", "num_bits=8", "not supported"],
        ),
        (["--target-bits", "5", "--scheme", "MXFP4"], ["target_bits", "nothing to choose"]),
    ],
    ids=["too few", "no number", "no target", "not of the method", "a format"],
)
def test_what_cannot_be_is_refused_before_any_work(run, tiny_llama, tmp_path, arguments, words):
    out = tmp_path / "out"
    ran = run("quantize", tiny_llama, *arguments, *CALIBRATION, "-o", out)
    assert ran.code == 2, ran.out + ran.err
    assert not out.exists()
    for word in words:
        assert word in ran.err, ran.err
