"""The auditor on folders that qframe did not write: planted faults are named, and no others."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import qframe
from qframe.audit import audit
from qframe.audit_report import RULES
from qframe.packing import pack_codes, unpack_codes
from qframe.report.audit import audit_parts
from qframe.report.table import stacked

LAYER = "model.layers.0.mlp.up_proj"  # 96 x 64
OTHER = "model.layers.0.mlp.gate_proj"  # the same shape
SYMMETRIC = {"num_bits": 4, "group_size": 32}
ZERO_POINTS = {**SYMMETRIC, "symmetric": False}
INT8 = {"num_bits": 8, "group_size": -1}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Return a function that quantizes a tiny Llama as others would have: without a manifest."""
    place = tmp_path_factory.mktemp("audit")
    model = tiny.write_llama(place / "model", tied=False)
    done = {}

    def once(scheme, method="rtn"):
        key = repr((scheme, method))
        if key not in done:
            recipe = {"method": method, "scheme": scheme}
            recipe["calibration"] = {"num_calibration_samples": 4, "max_seq_length": 32}
            done[key] = place / str(len(done))
            qframe.quantize(model, recipe, out=done[key])
            (done[key] / "qframe.json").unlink()
        return done[key]

    once.reference = model
    return once


@pytest.fixture
def folder(made, tmp_path):
    """Return the same with a copy that the test may damage."""

    def copied(scheme, method="rtn"):
        return shutil.copytree(made(scheme, method), tmp_path / "out")

    copied.reference = made.reference
    return copied


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("scheme", [SYMMETRIC, ZERO_POINTS, INT8, "W8A8", "FP8_DYNAMIC", "MXFP4"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nothing_is_found_in_what_is_sound(folder, scheme, method):
    if method == "gptq" and scheme in ("FP8_DYNAMIC", "MXFP4"):
        method = "optimal_rtn" if isinstance(scheme, dict) else "rtn"
    report = audit(folder(scheme, method), folder.reference)
    assert report.findings == []
    assert report.exit_code == 0
    assert len(report.layers) == 14
    for figures in report.layers.values():
        assert figures.error < 0.2
        assert (figures.farther == 0) == (method == "rtn")
        assert figures.above_least is None or figures.above_least >= 1
    if method == "rtn" and scheme != "W8A8":  # others have a code more, so another scale
        assert all(f.above_nearest == 1 for f in report.layers.values())


def codes_of(tensors, layer, change):
    """Change the codes of a layer, [96, 64] unsigned."""
    codes = change(unpack_codes(tensors[f"{layer}.weight_packed"], 4, 64).clone())
    tensors[f"{layer}.weight_packed"] = pack_codes(codes, 4)


def put(part, place, value):
    def change(tensors):
        tensors[f"{LAYER}.{part}"][place] = value

    return change


def replace(part, make):
    def change(tensors):
        tensors[f"{LAYER}.{part}"] = make(tensors[f"{LAYER}.{part}"])

    return change


def codes(make):
    return lambda tensors: codes_of(tensors, LAYER, make)


def wide(tensors):
    tensors[f"{LAYER}.weight_scale"] *= 4
    codes_of(tensors, LAYER, lambda c: ((c.float() - 8) / 4).round().to(torch.uint8) + 8)


def narrow(tensors):
    tensors[f"{LAYER}.weight_scale"] /= 4
    codes_of(tensors, LAYER, lambda c: ((c.int() - 8) * 4).clamp(-8, 7).to(torch.uint8) + 8)


def dead(every):
    def change(c):
        c[::every, :32] = 8
        return c

    return codes(change)


def one_code(c):
    c[17, 5] ^= 4
    return c


def swapped(tensors):
    for part in ("weight_packed", "weight_scale"):
        one, other = f"{LAYER}.{part}", f"{OTHER}.{part}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


PLANTED = {
    "a scale is 0": (put("weight_scale", (3, 1), 0), "structure", "scales must be positive"),
    "a scale is negative": (put("weight_scale", (3, 1), -0.5), "structure", "scale is -0.5"),
    "a scale is NaN": (put("weight_scale", (3, 1), float("nan")), "structure", "holds nan"),
    "a scale is infinite": (put("weight_scale", (3, 1), float("inf")), "structure", "holds inf"),
    "scales are missing a row": (replace("weight_scale", lambda t: t[:-1]), "structure", "[95, 2]"),
    "scales are integers": (
        replace("weight_scale", lambda t: t.to(torch.int32)),
        None,
        "scales of dtype I32",
    ),
    "words are missing": (replace("weight_packed", lambda t: t[:, :-1]), "structure", "[96, 7]"),
    "words are wide": (replace("weight_packed", lambda t: t.long()), "structure", "torch.int64"),
    "the shape is another": (
        replace("weight_shape", lambda t: t * 2),
        "structure",
        "expected [192, 4]",
    ),
    "codes are missing": (
        lambda t: t.pop(f"{LAYER}.weight_packed"),
        "structure",
        "weight_packed missing",
    ),
    "the layer is missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)],
        "completeness",
        "neither quantized nor stored",
    ),
    "a plain weight as well": (
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(96, 64)}),
        "completeness",
        "both as codes and as a plain weight",
    ),
    "all scales are 1": (
        replace("weight_scale", torch.ones_like),
        "default scales",
        "all 192 scales are 1",
    ),
    "a scale is huge": (put("weight_scale", (3, 1), 3000.0), "scale range", "times the median"),
    "all weights are 0": (codes(lambda c: c * 0 + 8), "dead groups", "100 % of groups are all 0"),
    "some groups are 0": (dead(16), "dead groups", "3.12 % of groups are all 0"),
    "all codes are the largest": (codes(lambda c: c * 0 + 15), "saturated codes", "100 %"),
    "scales are a quarter": (narrow, "saturated codes", "are the least or the largest"),
    "scales are fourfold": (wide, "unused codes", "use the inner half of their codes alone"),
    "rows are reversed": (
        replace("weight_packed", lambda t: t.flip(0)),
        "reference",
        "||W - Q|| is 1.",
    ),
    "layers are swapped": (swapped, "reference", "||W - Q|| is 1."),
    "a scale is doubled": (lambda t: t[f"{LAYER}.weight_scale"][5].mul_(2), "rounding", "row 5 is"),
    "a bit has flipped": (codes(one_code), "single codes", "1 of 6144 codes are not the nearest"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_named(folder, fault):
    change, check, message = PLANTED[fault]
    out = folder(SYMMETRIC)
    edit(out, change)
    if check is None:  # no layer can be known without it
        with pytest.raises(qframe.errors.WeightsError, match=message) as caught:
            audit(out)
        assert LAYER in str(caught.value)
        return
    report = audit(out, folder.reference)
    found = [f for f in report.findings if f.layer == LAYER]
    assert [f.check for f in found if message in f.message] == [check]
    assert {f.layer for f in report.findings} <= {LAYER, OTHER}
    assert (report.exit_code == 4) == any(f.severity == "error" for f in found)
    said = str(found[0])
    assert LAYER in said


def test_zero_points_that_are_one_off_move_the_centre(folder):
    out = folder(ZERO_POINTS)

    def change(tensors):
        name = f"{LAYER}.weight_zero_point"
        zero = unpack_codes(tensors[name].T.contiguous(), 4, 96)
        tensors[name] = pack_codes((zero + 1).clamp(max=15), 4).T

    edit(out, change)
    report = audit(out)
    assert [(f.layer, f.check) for f in report.findings] == [(LAYER, "centre")]
    assert "-1.0" in report.findings[0].message or "-0.9" in report.findings[0].message
    assert report.exit_code == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_were_rounded_before_have_no_flipped_codes(tiny, tmp_path, made, dtype):
    """auto-round rounds weights to bfloat16 first, which moves a few codes by a hair."""
    model = tiny.write_llama(tmp_path / "rounded", tied=False)
    edit(model, lambda t: t.update({n: w.to(dtype).float() for n, w in t.items()}))
    qframe.quantize(model, {"method": "rtn", "scheme": SYMMETRIC}, out=tmp_path / "out")
    (tmp_path / "out" / "qframe.json").unlink()
    report = audit(tmp_path / "out", made.reference)
    assert report.findings == []
    assert any(f.farther for f in report.layers.values())


def test_another_network_is_not_the_reference(folder, tiny, tmp_path):
    other = tiny.write_llama(tmp_path / "other", tied=False, seed=1)
    report = audit(folder(SYMMETRIC), other)
    assert {f.check for f in report.findings} == {"reference"}
    assert len(report.errors()) == 14


def test_the_document_has_every_rule():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for check, rule in RULES.items():
        assert f"| {check} | {rule} |" in text


def test_every_rule_is_broken_by_a_test():
    broken = {check for _, check, _ in PLANTED.values()} | {"centre"}
    assert broken - {None} == set(RULES)


def test_the_command_audits_what_has_no_manifest(run, folder):
    out = folder(SYMMETRIC)
    sound = run("verify", out, "--reference", folder.reference)
    assert sound.code == 0, sound.err
    assert "sound, as far as can be told" in sound.out
    assert "14 of 14 layers have the nearest code everywhere" in " ".join(sound.out.split())
    edit(out, PLANTED["a scale is 0"][0])
    broken = run("verify", out)
    assert broken.code == 4
    assert LAYER in broken.out
    assert "not a sound checkpoint" in broken.out
    record = json.loads(run("verify", out, "--json").out)
    assert [f["check"] for f in record["findings"]] == ["structure"]


def test_the_screen_says_what_was_not_asked(folder):
    report = audit(folder(SYMMETRIC))
    stream = io.StringIO()
    Console(width=200, file=stream).print(stacked(*audit_parts(report)))
    text = stream.getvalue()
    assert text.count("not asked: no --reference") == 3
    assert text.count("holds") == len(RULES) - 3
