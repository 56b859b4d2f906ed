"""`qframe verify`: one screen, and an exit code that scripts can trust."""

from __future__ import annotations

import json

import pytest

GPTQ = ["-m", "gptq", "--num-calibration-samples", "8", "--max-seq-length", "32"]
PLUGIN = """
from dataclasses import dataclass, field
from qframe import Capabilities, claims, hookimpl, rounding

@dataclass(frozen=True)
class Mine:
    name: str = field(init=False, default="mine")
    needs: frozenset = field(init=False, default=frozenset())
    capabilities: Capabilities = field(init=False, default=Capabilities())
    claims = (claims.HalfStep(), claims.Radius(SHARE))

    def round(self, problem, rng):
        return rounding.to_nearest(problem)

@hookimpl
def qframe_rounders():
    return [Mine()]
"""


@pytest.fixture
def quantized(run, tiny_llama, tmp_path):
    """Return a function that quantizes the tiny model, and the folder."""

    def call(*arguments):
        out = tmp_path / "out"
        done = run("quantize", tiny_llama, "-o", out, "--group-size", "32", *arguments)
        assert done.code == 0, done.err
        return out

    return call


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def plugin(tmp_path, share):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.replace("SHARE", str(share)))
    return file


def test_the_report_of_a_run_says_what_became_of_the_claims(run, tiny_llama, tmp_path):
    shown = run("quantize", tiny_llama, "-o", tmp_path / "out", "--group-size", "32")
    said = " ".join(shown.out.split())
    assert "42 hold on 14 layers; closest to its bound:" in said
    for word in ("half step B1.b", "scale B1.c", "coverage B1.f", "error/allowed"):
        assert word in said


def test_a_good_folder_alone(run, quantized):
    shown = run("verify", quantized())
    assert shown.code == 0, shown.err
    said = " ".join(shown.out.split())
    assert "14 packed weights are well-formed" in said
    assert "42 hold on 14 layers" in said
    assert "no --reference was given" in said
    assert "as far as hashes tell" in said


def test_a_good_folder_beside_its_reference_fits_on_a_screen(run, quantized, tiny_llama):
    out = quantized(*GPTQ, "--keep-statistics")
    shown = run("verify", out, "--reference", tiny_llama)
    assert shown.code == 0, shown.err
    assert "every certificate was computed once more and holds" in shown.out
    assert "gptq residual" in shown.out
    assert len(shown.out.splitlines()) < 25
    assert max(map(len, shown.out.splitlines())) <= 100


def test_without_statistics_it_says_what_was_only_read(run, quantized, tiny_llama):
    shown = run("verify", quantized(*GPTQ), "--reference", tiny_llama)
    said = " ".join(shown.out.split())
    assert "gptq residual (B3.b) on 14 layers: its calibration statistics were not kept" in said
    assert "verified, but for the certificates that were read only" in said


def test_a_flipped_bit_is_exit_code_4_and_names_the_tensor(run, quantized):
    out = quantized()
    flip(out / "model.safetensors", -1)
    failed = run("verify", out)
    assert failed.code == 4
    assert "this is not the folder that was written" in failed.out
    found = json.loads(run("verify", out, "--json").out)
    assert (found["ok"], found["exit_code"]) == (False, 4)
    file, tensor = found["problems"]
    assert (file["kind"], file["name"]) == ("file", "model.safetensors")
    assert tensor["kind"] == "tensor"
    assert tensor["name"].startswith("model.")


def test_json_says_everything(run, quantized, tiny_llama):
    out = quantized()
    found = json.loads(run("verify", out, "--reference", tiny_llama, "--json").out)
    assert found["ok"]
    assert found["reference"] == str(tiny_llama)
    assert len(found["recomputed"]) == 14
    [first, *_] = found["recomputed"]["model.layers.0.self_attn.q_proj"]
    assert set(first) == {"claim", "theorem", "ratio", "place", "error", "allowed", "note"}
    assert found["unchecked"] == []


def test_another_reference_is_refused(run, quantized, tiny, tmp_path):
    out = quantized()
    other = tiny.write_llama(tmp_path / "other", seed=1)
    failed = run("verify", out, "--reference", other)
    assert failed.code == 4
    assert "model.layers.0.self_attn.q_proj.weight" in failed.out


def test_a_folder_that_qframe_did_not_write(run, tiny_llama):
    failed = run("verify", tiny_llama)
    assert failed.code == 4
    assert "qframe.json" in failed.said


def test_a_claim_that_does_not_hold_stops_the_run(run, tiny_llama, tmp_path):
    method = ["-m", "mine", "--plugin", plugin(tmp_path, 0.25), "--group-size", "32"]
    failed = run("quantize", tiny_llama, "-o", tmp_path / "out", *method)
    assert failed.code == 3
    assert "layer 'model.layers.0.self_attn.q_proj': radius (B10.a) is violated" in failed.said
    assert "--on-violated-certificate warn" in failed.said
    assert not (tmp_path / "out").exists()

    method += ["--on-violated-certificate", "warn"]
    warned = run("quantize", tiny_llama, "-o", tmp_path / "out", *method)
    assert warned.code == 0
    said = " ".join(warned.out.split())
    assert "14 of 28 violated on 14 layers" in said
    assert "certificate violated 14" in said
    failed = run("verify", tmp_path / "out")
    assert failed.code == 3
    assert "a bound does not hold" in failed.out


def test_the_plugin_of_the_method_may_be_a_file(run, quantized, tiny_llama, tmp_path):
    file = plugin(tmp_path, 1)
    out = quantized("-m", "mine", "--plugin", file)
    without = run("verify", out, "--reference", tiny_llama)
    assert without.code == 0
    said = " ".join(without.out.split())
    assert "the plugin of method 'mine' is not here; it came from mine.py" in said
    shown = run("verify", out, "--reference", tiny_llama, "--plugin", file)
    assert "every certificate was computed once more and holds" in shown.out
